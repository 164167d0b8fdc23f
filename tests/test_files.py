"""What a user keeps of models: copies, state dicts, files of other libraries; and what stock says without a GPU."""

import copy
import pickle
import re
import warnings
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedact
from fusedact.__main__ import main
from fusedact.trainers import save_checkpoint
from fusedact.trainers.checkpoint import load_run

ON_CPU_BUILD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    with fusedact.use_backend(request.param):
        yield request.param


def same_error(ours, stock, pattern):
    """Both raise errors of one type and text, in which the pattern is found."""
    raised = []
    for call in (ours, stock):
        with pytest.raises(Exception, match=pattern) as caught:
            call()
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]
    return raised[0][0]


# Copies and state dicts


@pytest.mark.contract(62)
def test_a_result_is_not_copied_but_a_module_is(backend, device):
    module = fusedact.nn.Linear(3, 2, activation="gelu").to(device)
    x = torch.randn(4, 3, device=device)
    stock = torch.nn.Linear(3, 2, device=device)
    pattern = r"Only Tensors created explicitly by the user \(graph leaves\) support the deepcopy protocol"
    assert same_error(lambda: copy.deepcopy(module(x)), lambda: copy.deepcopy(stock(x)), pattern) is RuntimeError
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), module(x))
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in module.parameters()}
    assert torch.equal(copy.deepcopy(module(x).detach()), module(x))


def modules(nn):
    """The kinds of modules that have a state, of torch.nn or of ours."""
    return {
        "linear": nn.Linear(3, 2),
        "prelu": nn.PReLU(2),
        "conv": nn.Conv2d(2, 3, 3),
        "sequential": nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
    }


KINDS = list(modules(torch.nn))


def reloaded(content, **options):
    buffer = BytesIO()
    torch.save(content, buffer)
    return torch.load(BytesIO(buffer.getvalue()), **options)


@pytest.mark.contract(63)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_loaded_and_modules_are_not(kind):
    ours, stock = modules(fusedact.nn)[kind], modules(torch.nn)[kind]
    state = reloaded(ours.state_dict(), weights_only=True)
    stock.load_state_dict(state)
    assert all(torch.equal(state[name], value) for name, value in stock.state_dict().items())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        reloaded(ours, weights_only=True)
    whole = reloaded(ours, weights_only=False)
    assert type(whole) is type(ours) and all(map(torch.equal, whole.parameters(), ours.parameters()))


@pytest.mark.contract(63)
@pytest.mark.parametrize("value", [np.float64(1), Path("here"), {1}, torch.nn.ReLU()], ids=lambda v: type(v).__name__)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, value):
    if not isinstance(value, set):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            reloaded(value, weights_only=True)
    save_checkpoint(tmp_path / "a.pt", {}, {"lr": 0.5})
    with pytest.raises(TypeError, match=rf"\.'run'\.'lr' is of type {type(value).__name__}, expected a tensor or"):
        save_checkpoint(tmp_path / "a.pt", {}, {"lr": value})
    assert load_run(tmp_path / "a.pt") == ({}, {"lr": 0.5})


def other_states(state):
    first, *_ = state
    yield (
        "size",
        state | {first: torch.zeros(7)},
        rf"Error\(s\) in loading state_dict for \w+:\s+size mismatch for {first}",
    )
    yield "missing", {name: value for name, value in state.items() if name != first}, rf"Missing key\(s\).*{first}"
    yield "unexpected", state | {"more": torch.zeros(1)}, r"Unexpected key\(s\).*more"
    yield "no dict", [1], "Expected state_dict to be dict-like, got <class 'list'>"


@pytest.mark.contract(68)
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit(kind):
    ours, stock = modules(fusedact.nn)[kind], modules(torch.nn)[kind]
    for fault, state, pattern in other_states(stock.state_dict()):
        raised = same_error(partial(ours.load_state_dict, state), partial(stock.load_state_dict, state), pattern)
        assert raised is (TypeError if fault == "no dict" else RuntimeError)


@pytest.mark.contract(68)
@pytest.mark.parametrize("kind", KINDS)
def test_another_dtype_is_cast(kind):
    ours = modules(fusedact.nn)[kind]
    state = {name: value.bfloat16() for name, value in modules(torch.nn)[kind].state_dict().items()}
    ours.load_state_dict(state)
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, state[name].float())


@pytest.mark.contract(68)
@pytest.mark.parametrize("layer", ["Linear", "Conv2d"])
def test_a_learned_slope_is_part_of_the_state(layer):
    sizes = (3, 2) if layer == "Linear" else (3, 2, 1)
    ours, stock = getattr(fusedact.nn, layer)(*sizes, activation="prelu"), getattr(torch.nn, layer)(*sizes)
    state = stock.state_dict() | {"activation.weight": torch.tensor([0.5])}
    ours.load_state_dict(state)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in state.items())
    begins = rf"Error\(s\) in loading state_dict for {layer}:\s+"
    for given, pattern in (
        (stock.state_dict(), r'Missing key\(s\) in state_dict: "activation\.weight"'),
        (state | {"activation.weight": torch.ones(2)}, r"size mismatch for activation\.weight: copying a param"),
    ):
        with pytest.raises(RuntimeError, match=begins + pattern):
            ours.load_state_dict(given)
    with pytest.raises(RuntimeError, match=begins + r'Unexpected key\(s\) in state_dict: "activation\.weight"'):
        stock.load_state_dict(ours.state_dict())
    with pytest.raises(RuntimeError, match=begins + r'Unexpected key\(s\) in state_dict: "activation\.weight"'):
        getattr(fusedact.nn, layer)(*sizes).load_state_dict(ours.state_dict())


@pytest.mark.contract(65)
def test_safetensors(tmp_path):
    """We read none; they take our state dicts as they take torch's, and their faults are theirs."""
    st = pytest.importorskip("safetensors.torch")
    from safetensors import SafetensorError

    path, state = tmp_path / "a.safetensors", fusedact.nn.Linear(3, 2).state_dict()
    st.save_file(state, path)
    loaded = st.load_file(path)
    fusedact.nn.Linear(3, 2).load_state_dict(loaded)
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    whole = path.read_bytes()
    for content, pattern in ((whole[:-1], "incomplete metadata, file not fully covered"), (whole[:4], "too small")):
        path.write_bytes(content)
        with pytest.raises(SafetensorError, match=pattern):
            st.load_file(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    loaded = st.load_file(path)
    assert not all(torch.equal(loaded[name], value) for name, value in state.items())


# Devices and precision that are not there


@ON_CPU_BUILD
@pytest.mark.contract(78)
def test_without_a_gpu(capsys):
    ours, stock, x = fusedact.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.ones(1, 2)
    raised = same_error(ours.cuda, stock.cuda, "Torch not compiled with CUDA enabled|NVIDIA driver")
    assert raised in (AssertionError, RuntimeError)
    pinned = "Cannot access accelerator device when none is available|NVIDIA driver"
    same_error(lambda: ours(x).detach().pin_memory(), lambda: stock(x).detach().pin_memory(), pinned)
    same_error(lambda: ours.to("gpu"), lambda: stock.to("gpu"), "Expected one of cpu, cuda, ")
    for device, fault in (("cuda", "CUDA|NVIDIA"), ("gpu", "Expected one of cpu, cuda, ")):
        assert main(["train", "xor", "--epochs", "1", "--device", device]) == 2
        assert re.fullmatch(rf"fusedact: .*({fault}).*\n", capsys.readouterr().err)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, sorted((w.category, str(w.message)) for w in caught if "AMP" not in str(w.message))


@pytest.mark.contract(79)
def test_autocast_to_float32_on_a_cpu():
    module, stock, x = fusedact.nn.Linear(3, 2, activation="relu"), torch.nn.Linear(3, 2), torch.randn(4, 3)
    stock.load_state_dict(module.state_dict())

    def under(model):
        with torch.autocast("cpu", torch.float32):
            return model(x)

    (y, ours), (expected, theirs) = warned(lambda: under(module)), warned(lambda: under(stock).relu())
    assert y.dtype == torch.float32 and torch.equal(y, expected) and ours == theirs
    text = "In CPU autocast, but the target dtype is not supported. Disabling autocast."
    assert any(category is UserWarning and text in said for category, said in ours)


@ON_CPU_BUILD
@pytest.mark.contract(79)
def test_a_scaler_without_a_gpu_steps_as_none():
    steps = []
    for scaled in (True, False):
        torch.manual_seed(0)
        module = fusedact.nn.Linear(3, 2, activation="relu")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler, said = warned(partial(torch.amp.GradScaler, "cuda", enabled=scaled))
        assert scaler.is_enabled() is False
        assert any(c is UserWarning and "CUDA is not available.  Disabling." in text for c, text in said) is scaled
        scaler.scale(module(torch.ones(4, 3)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append([p.detach().clone() for p in module.parameters()])
    assert all(map(torch.equal, *steps))
