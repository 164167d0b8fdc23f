"""Bad input to losses: torch's answer, or its exception in its words before any launch, by every way into each."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from samples.losses import BINARY, CLASSES, TORCH_HAS_THE_HEAD, arguments_of, pair, problem

import fusedact
from fusedact import functional as F

each_backend = pytest.mark.parametrize("name", ["torch", "triton"])
row = pytest.mark.contract


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def on(device, arguments):
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.fixture
def checks(monkeypatch):
    """Values are looked at on a GPU too."""
    monkeypatch.setenv("FUSEDACT_CHECKS", "1")
    fusedact.backend._checks.cache_clear()
    yield
    fusedact.backend._checks.cache_clear()


@pytest.fixture
def refuses(device, launches, checks):
    """Ours as stock, in the contract's words; ours alone where stock would kill the GPU's context."""

    def test(arguments, kind, message, functions, name):
        arguments = on(device, arguments)
        deadly = device == "cuda" and (kind is IndexError or "all elements" in message)
        if deadly and (name == "torch" or not arguments["input"].numel()):
            pytest.skip("the answer is stock's, of which the context dies")
        with fusedact.use_backend(name):
            assert deadly or problem(*functions, launches, arguments) is None
            with pytest.raises(kind, match=message):
                functions[0](**arguments)
        assert launches.count == 0

    return test


# Rows 28 to 36


def of_class(number, change, kind, message):
    return pytest.param(change, kind, message, marks=row(number))


def labels_of(dtype, told):
    until = f"expected scalar type Long but found {told}", f"\"nll_loss.*\" not implemented for '{told}'"  # torch 2.11
    message = f"^({'|'.join([f'expected target dtype to be Long or Byte, but got {told}', *until])})$"
    return of_class(29, {"target": torch.ones(4).to(dtype)}, RuntimeError, message)


WRONG_CLASSES = {
    "label C": of_class(28, {"target": torch.tensor([0, 3, 1, 2])}, IndexError, r"^Target 3 is out of bounds\.$"),
    "label -1": of_class(28, {"target": torch.tensor([0, -1, 1, 2])}, IndexError, r"^Target -1 is out of bounds\.$"),
    "label 2**62": of_class(28, {"target": torch.full((4,), 2**62)}, IndexError, f"^Target {2**62} is out of"),
    "float labels": labels_of(torch.float32, "Float"),
    "int32 labels": labels_of(torch.int32, "Int"),
    "int16 labels": labels_of(torch.int16, "Short"),
    "bool labels": labels_of(torch.bool, "Bool"),
    "one-hot": of_class(
        30,
        {"target": zeros(4, 3)},
        RuntimeError,
        "^(Expected floating point type for target with class probabilities, got Long|0D or 1D target tensor expected)",
    ),
    "batch": of_class(
        31, {"target": zeros(3)}, ValueError, r"^Expected input batch_size \(4\) to match target batch_size \(3\)\.$"
    ),
    "weight length": of_class(
        33, {"weight": torch.ones(4)}, RuntimeError, "^weight tensor should be defined either for all 3 classes or no"
    ),
    "weight dtype": of_class(
        33,
        {"weight": torch.ones(3, dtype=torch.float64)},
        RuntimeError,
        "^expected scalar type Float but found Double$",
    ),
    "reduction": of_class(35, {"reduction": "foo"}, ValueError, "^foo is not a valid value for reduction$"),
    "no reduction": of_class(35, {"reduction": None}, ValueError, "^None is not a valid value for reduction$"),
    "integers": of_class(
        36,
        {"input": zeros(4, 3)},
        NotImplementedError,
        """^"(log_softmax_lastdim_kernel_impl|nll_loss_out_frame)" not implemented for 'Long'$""",
    ),
}
CLASS_WAYS = [("cross_entropy", way) for way in ("function", "module", "head", "joined")]
CLASS_WAYS += [("nll_loss", way) for way in ("function", "module")]
each_class_way = pytest.mark.parametrize(("loss", "way"), CLASS_WAYS, ids=[" ".join(each) for each in CLASS_WAYS])


@each_backend
@each_class_way
@pytest.mark.parametrize(("change", "kind", "message"), WRONG_CLASSES.values(), ids=WRONG_CLASSES)
def test_a_loss_of_classes_refuses(change, kind, message, loss, way, name, refuses):
    if way == "joined" and "input" in change:
        pytest.skip("a layer has no integer parameters")
    refuses({"input": torch.rand(4, 3), "target": zeros(4)} | change, kind, message, pair(loss, way), name)


@each_backend
@pytest.mark.parametrize("way", ["function", "module"])
@pytest.mark.parametrize(
    ("loss", "change", "kind", "message"),
    [
        pytest.param(
            "cross_entropy",
            {"input": torch.rand(2, 3, 5), "target": zeros(2, 4)},
            RuntimeError,
            r"^Expected target size \[2, 5\], got \[2, 4\]$",
            marks=row(31),
        ),
        pytest.param(
            "nll_loss",
            {"input": torch.rand(2, 3, 5), "target": zeros(2, 4)},
            RuntimeError,
            r"^Expected target size \[2, 5\], got \[2, 4\]$",
            marks=row(31),
        ),
        pytest.param(
            "cross_entropy",
            {"input": torch.rand(1, 3, 2, 2), "target": torch.full((1, 2, 2), 3), "reduction": "none"},
            IndexError,
            r"^Target 3 is out of bounds\.$",
            marks=row(28),
        ),
        pytest.param(
            "cross_entropy",
            {"target": torch.rand(4, 3), "ignore_index": 1},
            RuntimeError,
            "^ignore_index is not supported for floating point target$",
            marks=row(32),
        ),
        pytest.param(
            "cross_entropy",
            {"input": torch.tensor(1.0), "target": torch.tensor(0)},
            RuntimeError,
            "^Expected floating point type for target with class probabilities, got Long$",
            marks=row(36),
        ),
        pytest.param(
            "cross_entropy",
            {"input": torch.rand(2, 0), "target": zeros(2)},
            IndexError,
            r"^Target 0 is out of bounds\.$",
            marks=row(37),
        ),
        pytest.param(
            "nll_loss",
            {"input": torch.rand(2, 0), "target": zeros(2)},
            IndexError,
            r"^Target 0 is out of bounds\.$",
            marks=row(37),
        ),
    ],
    ids=["spatial", "nll spatial", "label of an image", "ignored", "0-d", "no classes", "nll no classes"],
)
def test_a_loss_refuses(loss, change, kind, message, way, name, refuses):
    refuses({"input": torch.rand(4, 3), "target": zeros(4)} | change, kind, message, pair(loss, way), name)


@row(32)
@each_backend
def test_a_head_refuses_an_ignored_class_of_probabilities(name, refuses):
    arguments = {"input": torch.rand(4, 3), "target": torch.rand(4, 3), "ignore_index": 1}
    message = "^ignore_index cannot be specified when target contains probabilities$"
    ours, stock = pair("cross_entropy", "head")
    refuses(arguments, RuntimeError, message, (ours, stock if TORCH_HAS_THE_HEAD else ours), name)


SMOOTHING = "label_smoothing must be between 0.0 and 1.0. Got: 1.5$"


@row(34)
@each_backend
@pytest.mark.parametrize("way", ["function", "module", "head", "joined"])
def test_label_smoothing_out_of_range(way, name, device, refuses):
    arguments = on(device, {"input": torch.rand(4, 3), "target": zeros(4)})
    ours, stock = pair("cross_entropy", way)
    refuses(arguments | {"label_smoothing": 1.5}, RuntimeError, SMOOTHING, (ours, stock), name)
    with fusedact.use_backend(name):
        negative = ours(**arguments, label_smoothing=-0.1)
    torch.testing.assert_close(negative, stock(**arguments))


@row(29)
@each_backend
@each_class_way
def test_uint8_labels_are_taken(loss, way, name, device):
    x, target = torch.rand(4, 3, device=device), torch.tensor([0, 1, 2, 1], device=device)
    ours, stock = pair(loss, way)
    with fusedact.use_backend(name):
        value = ours(x, target.to(torch.uint8))
    torch.testing.assert_close(value, stock(x, target))


# Rows 44 to 48


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


PROBABILITY, LOGIT = "binary_cross_entropy", "binary_cross_entropy_with_logits"
INPUT, TARGET = (f"^all elements of {what} should be between 0 and 1$" for what in ("input", "target"))
WRONG_BINARY = {
    "p above 1": pytest.param(PROBABILITY, (torch.tensor([0.5, 1.5]), ones(2)), RuntimeError, INPUT, marks=row(44)),
    "p below 0": pytest.param(PROBABILITY, (torch.tensor([0.5, -0.5]), ones(2)), RuntimeError, INPUT, marks=row(44)),
    "p NaN": pytest.param(PROBABILITY, (torch.tensor([0.5, math.nan]), ones(2)), RuntimeError, INPUT, marks=row(44)),
    "target 2": pytest.param(PROBABILITY, (ones(2), 2 * ones(2)), RuntimeError, TARGET, marks=row(44)),
    "p shapes": pytest.param(
        PROBABILITY,
        (ones(4, 1), ones(4)),
        ValueError,
        r"^Using a target size \(torch\.Size\(\[4\]\)\) that is different to the input size \(torch\.Size\(\[4, 1\]",
        marks=row(45),
    ),
    "p int": pytest.param(
        PROBABILITY, (ones(4), zeros(4)), RuntimeError, "^Found dtype Long but expected Float$", marks=row(45)
    ),
    "shapes": pytest.param(
        LOGIT,
        (ones(4, 1), ones(4)),
        ValueError,
        r"^Target size \(torch\.Size\(\[4\]\)\) must be the same as input size \(torch\.Size\(\[4, 1\]\)\)$",
        marks=row(46),
    ),
    "int": pytest.param(
        LOGIT,
        (ones(4, 1), zeros(4, 1)),
        RuntimeError,
        "^result type Float can't be cast to the desired output type Long$",
        marks=row(47),
    ),
    "bool": pytest.param(
        LOGIT,
        (ones(4, 1), ones(4, 1).bool()),
        RuntimeError,
        "^Subtraction, the `-` operator, with two bool tensors",
        marks=row(47),
    ),
    "reduction": pytest.param(
        LOGIT, {"reduction": "foo"}, ValueError, "^foo is not a valid value for reduction$", marks=row(35)
    ),
    "p reduction": pytest.param(
        PROBABILITY, {"reduction": "foo"}, ValueError, "^foo is not a valid value for reduction$", marks=row(35)
    ),
    "pos_weight": pytest.param(
        LOGIT,
        {"input": ones(4, 3), "target": ones(4, 3), "pos_weight": ones(2)},
        RuntimeError,
        r"^The size of tensor a \(2\) must match the size of tensor b \(3\)",
        marks=row(48),
    ),
}


@each_backend
@pytest.mark.parametrize("way", ["function", "module", "head"])
@pytest.mark.parametrize(("loss", "given", "kind", "message"), WRONG_BINARY.values(), ids=WRONG_BINARY)
def test_a_loss_of_yes_or_no_refuses(loss, given, kind, message, way, name, refuses):
    if way == "head" and (loss == PROBABILITY or "pos_weight" in given):
        pytest.skip("no head of probabilities, and one of one output")
    if isinstance(given, tuple):
        given = dict(zip(("input", "target"), given, strict=True))
    arguments = {"input": ones(4, 1), "target": ones(4, 1)} | given
    refuses(arguments, kind, message, pair(loss, way), name)


@row(47)
@each_backend
@pytest.mark.parametrize("way", ["function", "module"])
def test_a_float64_target_makes_the_loss_float64(way, name, device):
    x, target = torch.randn(4, 3, device=device), torch.rand(4, 3, dtype=torch.float64, device=device)
    ours, stock = pair(LOGIT, way)
    with fusedact.use_backend(name):
        value = ours(x, target)
    assert value.dtype == torch.float64 and torch.equal(value, stock(x, target))


@row(45)
@each_backend
@pytest.mark.parametrize("way", ["function", "module"])
def test_autocast_and_probabilities(way, name, device, launches):
    """Banned on a GPU; on a CPU in float32."""
    x, target = torch.rand(4, 3, device=device).bfloat16(), torch.rand(4, 3, device=device).bfloat16()
    ours, stock = pair(PROBABILITY, way)
    with fusedact.use_backend(name), torch.autocast(device, dtype=torch.bfloat16):
        if device == "cuda":
            with pytest.raises(RuntimeError, match="unsafe to autocast"):
                ours(x, target)
            assert launches.count == 0
        else:
            value = ours(x, target)
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, stock(x, target))


def test_autocast_leaves_float64_and_refuses_integers(device, triton_backend):
    logits, target = torch.randn(4, device=device, dtype=torch.float64), torch.ones(4, device=device).double()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.binary_cross_entropy_with_logits(logits, target).dtype == torch.float64
        with pytest.raises(RuntimeError):
            F.binary_cross_entropy_with_logits(logits.float(), target.long())


# Options


class_arguments = {"input": torch.linspace(-1, 1, 12).view(4, 3), "target": torch.tensor([0, 1, 2, 1])}


@each_backend
@pytest.mark.parametrize("way", ["function", "head"])
@pytest.mark.parametrize(
    "option",
    [
        *({"ignore_index": value} for value in (-100.0, None, 2**63, 2**63 - 1, -(2**63), True, np.int64(1), "1")),
        {"ignore_index": torch.tensor(1)},
        *({"label_smoothing": value} for value in (None, "0.1", math.nan, True, 1, torch.tensor(0.1))),
        {"weight": [1.0, 1.0, 1.0]},
        {"reduction": 3},
    ],
    ids=str,
)
def test_options_of_any_kind_are_as_torchs(option, way, name, device, launches):
    if way == "head" and option == {"ignore_index": None} and not TORCH_HAS_THE_HEAD:
        pytest.skip("this torch has no such loss")
    with fusedact.use_backend(name):
        assert problem(*pair("cross_entropy", way), launches, on(device, class_arguments | option)) is None


@each_backend
@pytest.mark.parametrize("way", ["function", "module"])
@pytest.mark.parametrize("option", [{"size_average": True}, {"reduce": False}], ids=str)
@pytest.mark.parametrize("loss", [*CLASSES, *BINARY])
def test_old_options_warn_as_torchs(loss, option, way, name, device, launches):
    arguments = on(device, arguments_of(loss)) | option
    arguments = {k: v for k, v in arguments.items() if "weight" not in k}
    ours, stock = pair(loss, way)
    with fusedact.use_backend(name):
        assert problem(ours, stock, launches, arguments) is None
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            ours(**arguments)


RANGE = {
    "z_loss": (-1.0, math.nan, math.inf),
    "softcap": (-1.0, 0, math.nan, math.inf),
    "sample_weight": (
        ones(3),
        ones(),
        ones(4).to(torch.complex64),
        ones(4).to_sparse(),
        torch.nested.nested_tensor([ones(2), ones(2)]),
    ),
}


@each_backend
@pytest.mark.parametrize("way", ["function", "head"])
@pytest.mark.parametrize("option", RANGE)
def test_what_torch_has_not_is_refused_by_its_name_and_value(option, way, name, device, launches):
    ours, _ = pair("cross_entropy", way)
    arguments = on(device, class_arguments)
    with fusedact.use_backend(name):
        for value in RANGE[option]:
            told = r"got .*" if isinstance(value, torch.Tensor) else f"got {value}$"
            with pytest.raises(ValueError, match=f"^{option} must .*{told}"):
                ours(**arguments, **on(device, {option: value}))
        with pytest.raises(TypeError):
            ours(**arguments, **{option: [1.0]})
    assert launches.count == 0


@pytest.mark.parametrize(
    ("on_gpu", "asked", "capturing", "looks"),
    [(False, "0", False, True), (True, "0", False, False), (True, "1", False, True), (True, "1", True, False)],
    ids=["cpu", "gpu", "gpu, asked", "gpu, asked in a graph"],
)
@row(28)
def test_where_values_are_looked_at(on_gpu, asked, capturing, looks, monkeypatch):
    monkeypatch.setenv("FUSEDACT_CHECKS", asked)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(fusedact.backend, "PLAIN", {SimpleNamespace})
    fusedact.backend._checks.cache_clear()
    try:
        assert fusedact.backend.looks_at_values(SimpleNamespace(is_cuda=on_gpu)) is looks
    finally:
        fusedact.backend._checks.cache_clear()
