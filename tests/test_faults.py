"""What a launch may fail of, and what the user sees of it: the right answer and one warning, or the cause."""

import re
import sys
import warnings
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

import fusedact
from fusedact import autograd, backend
from fusedact import functional as F
from fusedact.fitting import training
from fusedact.fitting.loop import Loop
from fusedact.fitting.persistent import Persistent
from fusedact.kernels.faults import LaunchError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARNING = "fusedact runs stock PyTorch operations: kernel .* cannot be compiled or loaded: .*no luck"


def drawn(*shape):
    return torch.randn(shape, device=DEVICE).requires_grad_()


def labels(rows=6, classes=5):
    return torch.arange(rows, device=DEVICE) % classes


def thirds(*shape):
    return torch.full(shape, 0.3, device=DEVICE)


def linear(activation):
    return lambda x, w, b, slope=None: autograd.linear_act(x, w, b, slope, activation, ())


def chain(x, w, b, v, c):
    if autograd.can_be_chained(x, (w, b, v, c)):
        return autograd.linear_chain(x, (("gelu", ()), None), (w, b, None, v, c, None))
    return torch.nn.functional.linear(autograd.linear_act(x, w, b, None, "gelu", ()), v, c)


def head(reduction):
    def loss(x, w, b):
        return F.linear_cross_entropy(x, w, labels(), linear_bias=b, reduction=reduction)

    return loss


def every_row(x):
    loss, lse = F.cross_entropy(x, labels(), reduction="none", z_loss=0.1, return_lse=True)
    return loss + 2 * lse


OPS = {
    "linear": (linear("relu"), (6, 4), (5, 4), (5,)),
    "linear, from the pre-activation": (linear("gelu"), (2, 3, 4), (5, 4), (5,)),
    "linear, a slope": (linear("prelu"), (6, 4), (5, 4), (5,), (5,)),
    "chain": (chain, (6, 4), (5, 4), (5,), (3, 5), (3,)),
    "activation": (lambda x: autograd.activation(x, None, "gelu", ()), (6, 4)),
    "activation, from its output": (lambda x: autograd.activation(x, None, "tanh", ()), (6, 4)),
    "prelu": (lambda x, slope: autograd.activation(x, slope, "prelu", ()), (6, 4), (4,)),
    "gated": (lambda gate, up: autograd.gated(gate, up, "silu", ()), (6, 4), (6, 4)),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, activation="relu"), (2, 3, 6, 6), (4, 3, 3, 3), (4,)),
    "softmax": (lambda x: F.softmax(x, 1), (6, 5)),
    "log_softmax": (lambda x: F.log_softmax(x, 0), (6, 5)),
    "softmin": (lambda x: F.softmin(x, 1), (6, 5)),
    "cross_entropy": (lambda x: F.cross_entropy(x, labels(), label_smoothing=0.1), (6, 5)),
    "cross_entropy of rows": (every_row, (6, 5)),
    "cross_entropy, early": (lambda x: F.cross_entropy(x, labels(), grad_in_forward=True), (6, 5)),
    "nll_loss": (lambda x: F.nll_loss(x, labels()), (6, 5)),
    "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), thirds(6, 5)), (6, 5)),
    "bce with logits": (lambda x: F.binary_cross_entropy_with_logits(x, thirds(6, 5)), (6, 5)),
    "multilabel": (lambda x: F.multilabel_soft_margin_loss(x, thirds(6, 5), reduction="none"), (6, 5)),
    "head": (head("mean"), (6, 4), (5, 4), (5,)),
    "head of rows": (head("none"), (6, 4), (5, 4), (5,)),
    "binary head": (
        lambda x, w, b: F.linear_binary_cross_entropy_with_logits(x, w, thirds(6, 1), linear_bias=b),
        (6, 4), (1, 4), (1,),
    ),
}  # fmt: skip
every_op = pytest.mark.parametrize("name", OPS)


def with_gradients(function, tensors, between=lambda: None):
    y = function(*tensors)
    between()
    dy = torch.linspace(0.5, 2.0, y.numel(), device=DEVICE).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def without_gradients(function, tensors, between=lambda: None):
    with torch.no_grad():
        return [function(*tensors)]


def under_a_mode(function, tensors, between=lambda: None):
    with FlopCounterMode(display=False):
        return with_gradients(function, tensors, between)


def compiled(function, tensors, between=lambda: None):
    torch._dynamo.reset()
    return with_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), tensors, between)


WAYS = [
    pytest.param(with_gradients, id="with gradients"),
    pytest.param(without_gradients, id="without", marks=pytest.mark.exhaustive),
    pytest.param(under_a_mode, id="under a mode", marks=pytest.mark.exhaustive),
    pytest.param(compiled, id="compiled", marks=pytest.mark.exhaustive),
]


@pytest.mark.contract(80)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", ["forward", "backward"])
@every_op
def test_what_cannot_be_compiled_is_torchs_with_one_warning(name, fails, way, auto, refused):
    function, *shapes = OPS[name]
    tensors = [drawn(*shape) for shape in shapes]
    with fusedact.use_backend("torch"):
        expected = with_gradients(function, tensors)
    refused.count = 0

    def refuse():
        refused.kernels = "all"

    if fails == "forward":
        refuse()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            found = way(function, tensors, refuse)
            for ours, stock in zip(found, expected[:1] if way is without_gradients else expected, strict=True):
                torch.testing.assert_close(ours, stock)
    told = [text for text in (str(warning.message) for warning in told) if "fusedact" in text]
    assert all(re.search(WARNING, text) for text in told)
    assert len(told) == (0 if fails == "backward" and way is without_gradients else 1), told


@pytest.mark.contract(80)
@pytest.mark.parametrize("kernels", ["_forward_kernel", "_backward_kernel"])
def test_asked_for_by_name_it_is_an_error_with_its_cause(kernels, auto, refused):
    """Also where `auto` has given it up already: it is tried again."""
    x = drawn(6, 4)
    refused.kernels = kernels
    with pytest.warns(RuntimeWarning, match=WARNING):
        autograd.activation(x, None, "gelu", ()).sum().backward()
    with fusedact.use_backend("triton"):
        tried = refused.count
        with pytest.raises(RuntimeError, match=r"kernel elementwise.* cannot be compiled or loaded: .*no luck") as told:
            autograd.activation(x, None, "gelu", ()).sum().backward()
    assert isinstance(told.value, LaunchError) and str(told.value.__cause__).startswith("no luck")
    assert refused.count == tried + 1


@pytest.mark.contract(80)
def test_what_was_given_up_is_not_tried_again_and_nothing_else_is(auto, refused):
    """Others are other activations and dtypes; another number is none."""
    refused.kernels = "_forward_kernel"
    x = drawn(6, 4)
    with pytest.warns(RuntimeWarning, match=WARNING):
        for slope in (0.1, 0.2):
            autograd.activation(x, None, "leaky_relu", (slope,))
    assert refused.count == 1
    autograd.activation(x, None, "relu", ())
    autograd.activation(x.half(), None, "leaky_relu", (0.1,))
    assert refused.count == 3


@pytest.mark.contract(80)
def test_no_op_is_tried_where_none_can_be_compiled(auto, refused, monkeypatch):
    refused.kernels, refused.error = "all", OSError("no space left")
    with pytest.warns(RuntimeWarning, match="no space left") as told:
        for _ in range(2):
            F.softmax(drawn(6, 5), 1)
            F.linear(drawn(6, 4), drawn(5, 4), activation="relu")
    assert len(told) == 1 and not backend.uses_triton(torch.empty(0))


@pytest.mark.contract(80)
def test_a_second_derivative_of_what_was_given_up(auto, refused):
    x, w, b = drawn(6, 4), drawn(5, 4), drawn(5)
    refused.kernels = "all"
    with pytest.warns(RuntimeWarning, match=WARNING):
        assert torch.autograd.gradcheck(linear("gelu"), [t.detach().double().requires_grad_() for t in (x, w, b)])
        assert torch.autograd.gradgradcheck(linear("gelu"), [t.detach().double().requires_grad_() for t in (x, w, b)])


# Triton that is there and does not start


class Raising(ModuleType):
    """As an installation of which a part is missing, or that this system's libraries are too old for."""

    def __init__(self, error):
        super().__init__("triton")
        self.error = error

    def __getattr__(self, name):
        raise self.error


@pytest.mark.contract(80)
@pytest.mark.parametrize("error", [OSError("version GLIBC_2.38 not found"), AttributeError("knobs")], ids=repr)
def test_a_broken_triton_is_named(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", Raising(error))
    problem = backend._triton_problem.__wrapped__(torch.device("cuda"))
    assert problem == f"Triton does not import ({type(error).__name__}: {error})"


@pytest.mark.contract(72)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver starts")
def test_without_a_driver_no_op_is_tried_and_the_cause_is_told(monkeypatch):
    assert re.search(r"0 active drivers \(\[\]\). There should only be one.", backend._driver_problem())


@pytest.mark.contract(72)
def test_a_cpu_tensor_without_the_interpreter_is_torchs_or_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(backend, "_triton_problem", backend._triton_problem.__wrapped__)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    x = torch.randn(3)
    with fusedact.use_backend("auto"):
        torch.testing.assert_close(F.relu(x), x.relu())
    with fusedact.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run on cpu: Triton runs on GPUs"):
        F.relu(x)


# Memory


@pytest.fixture
def shortage(refused):
    """shortage(call): torch's error, of a launch for which the GPU has no memory left."""
    refused.error = RuntimeError("Triton Error [CUDA]: out of memory")

    def during(call):
        refused.kernels = "all"
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            call()
        refused.kernels = "none"
        assert not backend._warned

    return during


@pytest.mark.contract(83)
def test_a_kernels_own_shortage_of_memory_is_torchs_error(auto, shortage):
    """It writes no gradient, and the same call is answered when there is memory again."""
    tensors = x, w, b = drawn(6, 4), drawn(5, 4), drawn(5)
    shortage(lambda: linear("relu")(x, w, b))
    shortage(linear("relu")(x, w, b).sum().backward)
    assert [t.grad for t in tensors] == [None] * 3
    linear("relu")(x, w, b).sum().backward()
    assert all(t.grad is not None for t in tensors)


@pytest.mark.contract(83)
@pytest.mark.parametrize("engine", ["loop", "persistent"])
def test_a_kernels_own_shortage_of_memory_in_training_updates_nothing(engine, auto, shortage):
    """Neither the parameters nor the momenta."""
    model, optimizer, fit = small_job(engine, epochs=1)
    fit()
    before = [t.clone() for t in numbers_of(model, optimizer)]
    shortage(fit)
    assert len(before) == 8 and all(map(torch.equal, numbers_of(model, optimizer), before))


# Training


def numbers_of(model, optimizer):
    """The parameters and what the optimizer keeps of each."""
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [t.detach() for t in (*model.parameters(), *kept)]


def small_job(engine=None, epochs=3):
    torch.manual_seed(0)
    layers = torch.nn.Linear(3, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 1), torch.nn.Sigmoid()
    model = torch.nn.Sequential(*layers).to(DEVICE)
    x, y = torch.rand(16, 3, device=DEVICE), torch.rand(16, 1, device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
    options = {"loss": torch.nn.BCELoss(), "optimizer": optimizer, "batch_size": 4, "shuffle": False}
    return model, optimizer, lambda: fusedact.fit(model, x, y, epochs=epochs, engine=engine, **options)


@pytest.mark.contract(80)
def test_fit_trains_by_the_next_engine(auto, refused, monkeypatch):
    expected, _, fit = small_job(engine="loop")
    with fusedact.use_backend("torch"):
        fit()
    monkeypatch.setitem(training.FASTEST_FIRST, DEVICE, (Persistent, Loop))
    model, _, fit = small_job()
    refused.kernels = "_train_kernel"
    with pytest.warns(RuntimeWarning, match="training_tiny._train_kernel cannot be compiled or loaded") as told:
        fitted = fit()
    assert sum("_train_kernel" in str(warning.message) for warning in told) == 1
    assert fitted.engine == "loop" and "persistent: kernel training_tiny" in fitted.reason
    for ours, stock in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.contract(80)
def test_fit_by_an_engine_that_was_named_is_an_error_with_all_as_before(auto, refused):
    model, _, fit = small_job(engine="persistent")
    before = [p.clone() for p in model.parameters()]
    refused.kernels = "_train_kernel"
    with pytest.raises(RuntimeError, match=r"training_tiny._train_kernel cannot be compiled or loaded: .*no luck"):
        fit()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


@pytest.mark.contract(80)
def test_fit_many_trains_by_torchs_operations(auto, refused):
    def fit_many():
        model = torch.nn.Linear(3, 1, device=DEVICE)
        x, y = torch.rand(16, 3, device=DEVICE), torch.rand(16, 1, device=DEVICE)
        return fusedact.fit_many(
            model, x, y, loss=torch.nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), 0.1), epochs=3,
            batch_size=4, seeds=range(3), generator=torch.Generator().manual_seed(3),
        )  # fmt: skip

    torch.manual_seed(0)
    with fusedact.use_backend("torch"):
        expected = fit_many()
    torch.manual_seed(0)
    refused.kernels = "_train_kernel"
    with pytest.warns(RuntimeWarning, match="training_tiny._train_kernel cannot be compiled or loaded"):
        found = fit_many()
    assert found.engine == "batched" and "no luck" in found.reason
    torch.testing.assert_close(found.costs, expected.costs)
