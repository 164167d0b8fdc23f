"""Which calls the functions hand to a kernel where it depends on the backend, on compiling, or on a GPU's autocast."""

import importlib
from types import SimpleNamespace

import pytest
import torch

import fusedact
from fusedact import autograd, backend, functional
from fusedact.activations import ACTIVATIONS
from fusedact.functional import activations, binary_losses, checks, losses, softmaxes

gated = importlib.import_module("fusedact.functional.gated")  # the name is the function's
LOW = torch.bfloat16


class OnGpu:
    """A tensor that says that it is on a GPU."""

    is_cuda = True

    def __init__(self, t):
        self.t = t

    def __getattr__(self, name):
        return getattr(self.t, name)

    def to(self, dtype):
        return OnGpu(self.t.to(dtype))


@pytest.fixture
def everywhere(monkeypatch):
    """Triton runs on every device, as far as the functions can tell; the kernels are interpreted."""
    monkeypatch.setattr(backend, "uses_triton", lambda x: backend.get_backend() != "torch")


@pytest.fixture
def autocast_on_gpu(monkeypatch):
    """As inside torch.autocast("cuda") on a GPU that takes every call: the op's arguments come back."""
    monkeypatch.setattr(backend, "autocast_dtype", lambda x: LOW)
    for module in (checks, gated, binary_losses):
        monkeypatch.setattr(module, "on_triton", lambda *tensors: True)
    for op in ("activation", "gated", "bce_with_logits", "binary_cross_entropy", "multilabel_soft_margin"):
        monkeypatch.setattr(autograd, op, lambda *args: args)


@pytest.mark.parametrize(
    ("name", "compiling", "expected"),
    [("auto", False, 1), ("auto", True, 0), ("triton", False, 1), ("triton", True, 1), ("torch", False, 0)],
)
@pytest.mark.parametrize("op", ["gated", "softsign"])
def test_what_compiling_fuses_is_left_to_it(op, name, compiling, expected, device, everywhere, launches, monkeypatch):
    x = torch.randn(3, 4, device=device)
    calls = {"gated": lambda: functional.gated(x, x), "softsign": lambda: functional.activate(x, "softsign")}
    with fusedact.use_backend(name), monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        calls[op]()
    assert launches.count == expected


@pytest.mark.parametrize("name", ["softplus", "silu", "tanh"])
def test_activations_under_a_gpus_autocast(name, autocast_on_gpu):
    x = OnGpu(torch.randn(3, 4, dtype=LOW))
    wide = not ACTIVATIONS[name].low_precision
    with fusedact.use_backend("triton"):
        given, *_ = activations._fused(ACTIVATIONS[name], x, ACTIVATIONS[name].default_values, None)
        fits = gated._fits(x, x, ACTIVATIONS[name], ACTIVATIONS[name].default_values)
    assert given.dtype == (torch.float32 if wide else LOW) and fits is (not wide)


def test_prelu_under_a_gpus_autocast(autocast_on_gpu):
    x, slope = OnGpu(torch.randn(3, 4)), OnGpu(torch.ones(4))
    with fusedact.use_backend("triton"):
        given, weight, *_ = activations._fused(ACTIVATIONS["prelu"], x, (), slope)
    assert (given.dtype, weight.dtype) == (LOW, LOW)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_softmax_under_a_gpus_autocast(low, autocast_on_gpu, monkeypatch):
    x = torch.randn(3, dtype=low)
    assert softmaxes._result_dtype(OnGpu(x)) == (torch.float64 if low == torch.float64 else torch.float32)
    assert softmaxes._result_dtype(x) == low
    monkeypatch.setattr(backend, "autocast_dtype", lambda x: None)
    assert softmaxes._result_dtype(OnGpu(x)) == low


@pytest.mark.parametrize("where", [OnGpu, lambda t: t], ids=["gpu", "cpu"])
def test_losses_under_autocast(where, autocast_on_gpu):
    x = where(torch.rand(3, 4, dtype=LOW))
    widened = binary_losses.binary_cross_entropy_with_logits(x, x)[:2]
    margin = binary_losses.multilabel_soft_margin_loss(x, x)[:2]
    assert [t.dtype for t in widened] == [torch.float32] * 2
    assert [t.dtype for t in margin] == [torch.float32 if x.is_cuda else LOW] * 2


def test_probabilities_under_a_gpus_autocast_are_torchs_to_ban(autocast_on_gpu, monkeypatch):
    banned = SimpleNamespace(binary_cross_entropy=lambda *args, **options: "torch's")
    monkeypatch.setattr(binary_losses, "F", banned)
    x = torch.rand(3, 4)
    assert binary_losses.binary_cross_entropy(OnGpu(x), OnGpu(x)) == "torch's"
    assert binary_losses.binary_cross_entropy(x, x) != "torch's"


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (torch.ones(2), LOW),
        (torch.ones(2, dtype=torch.float16), LOW),
        (torch.ones(2, dtype=torch.float64), torch.float64),
        (torch.ones(2, dtype=torch.int64), torch.int64),
    ],
    ids=str,
)
def test_autocast_casts_all_floating_tensors_but_float64(t, expected):
    assert checks.cast(t, LOW).dtype == expected


@pytest.mark.parametrize(("shape", "expected"), [((3,), 0), ((2, 3), 1), ((2, 3, 5, 4), 1)], ids=str)
def test_where_the_classes_are(shape, expected):
    assert checks.class_dim(torch.ones(shape)) == expected


@pytest.mark.parametrize(
    ("ignored", "expected"),
    [(2**63 - 1, True), (-(2**63), True), (0, True), (2**63, False), (-(2**63) - 1, False), (1.0, False)],
    ids=str,
)
def test_any_int64_may_be_the_ignored_class(ignored, expected):
    assert losses._class_loss_fits(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), None, ignored) is expected


@pytest.mark.parametrize(("classes", "expected"), [(2**31 - 2**16, True), (2**31 - 2**16 + 1, False)])
def test_a_step_beyond_the_last_class_is_counted_in_32_bits_too(classes, expected):
    assert softmaxes._fits(torch.ones(1).expand(classes), 0, torch.float32) is expected


@pytest.mark.parametrize(
    ("dtype", "of_input", "of_target", "compiling", "expected"),
    [
        (torch.float32, True, False, False, True),
        (torch.bfloat16, True, False, False, True),
        (torch.float16, True, False, False, False),
        (torch.float32, False, False, False, False),
        (torch.float32, True, True, False, False),
        (torch.float32, True, False, True, False),
    ],
    ids=["float32", "bfloat16", "float16", "unwanted", "the target's too", "compiling"],
)
def test_when_a_loss_makes_its_gradient_at_once(dtype, of_input, of_target, compiling, expected, monkeypatch):
    x, target = (torch.ones(2, 3, dtype=dtype).requires_grad_(wanted) for wanted in (of_input, of_target))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: compiling)
        assert losses._knows_its_gradient(x, target) is expected


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ((), True),
        ((None, torch.ones(1)), True),
        ((torch.ones(1, device="meta"),), False),
        ((torch.ones(1).to_sparse(),), False),
        ((torch.nn.Parameter(torch.ones(1)),), True),
        ((torch.ones(1), None, [1.0]), False),
    ],
    ids=["alone", "none", "meta", "sparse", "parameter", "list"],
)
def test_all_tensors_are_plain_and_of_one_device(others, expected, triton_backend):
    assert checks.on_triton(torch.ones(2), *others) is expected
    assert not checks.on_triton([1.0], *others)
