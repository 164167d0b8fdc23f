"""The binary losses as PyTorch sees them: modules, deprecated arguments, autocast, compilers, transforms, errors."""

import copy

import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn

pytestmark = pytest.mark.usefixtures("triton_backend")

REDUCTIONS = ["mean", "sum", "none"]
LOGITS, PROBABILITIES, LABELS = (
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy",
    "multilabel_soft_margin_loss",
)
MODULES = {LOGITS: "BCEWithLogitsLoss", PROBABILITIES: "BCELoss", LABELS: "MultiLabelSoftMarginLoss"}
each_loss = pytest.mark.parametrize("loss", MODULES)


def both(loss):
    return getattr(F, loss), getattr(torch.nn.functional, loss)


def inputs(shape, device, dtype=torch.float32):
    """Between 0 and 1, so that every loss takes them."""
    return tuple((0.1 + 0.8 * torch.rand(shape)).to(device, dtype) for _ in range(2))


@each_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_modules(loss, reduction, device, launches):
    x, target = inputs((4, 5), device)
    options = {"weight": torch.rand(5), "reduction": reduction}
    if loss == LOGITS:
        options["pos_weight"] = torch.rand(5)
    ours, stock = (getattr(module, MODULES[loss])(**options).to(device) for module in (nn, torch.nn))
    assert repr(ours) == repr(stock) and list(ours.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(copy.deepcopy(ours)(x, target), stock(x, target))
    assert launches.count == 1


@each_loss
@pytest.mark.parametrize("options", [(False, None), (None, False), (True, True), (False, True)], ids=str)
def test_deprecated_arguments(loss, options, device, launches):
    x, target = inputs((4, 5), device)
    ours, stock = both(loss)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated") as warned:
        value = ours(x, target, None, *options)
        assert launches.count == sum(w.category is UserWarning for w in warned) == 1
        torch.testing.assert_close(value, stock(x, target, None, *options))


@each_loss
def test_deprecated_arguments_warn_once_where_torch_answers(loss, device, launches):
    x, target = inputs((4, 5), device)
    weight = torch.ones(4, 5, device=device, dtype=torch.float64)
    with pytest.warns(UserWarning, match="deprecated") as warned:
        both(loss)[0](x, target, weight, False)
    assert len(warned) == 1 and launches.count == 0


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_autocast_gives_stocks_dtype(loss, dtype, device, launches):
    if device == "cuda" and loss == PROBABILITIES:
        pytest.skip("banned there")
    x, target = inputs((4, 5), device, dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, stock = (f(x, target) for f in both(loss))
    assert ours.dtype == stock.dtype and launches.count == 1
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)


def test_autocast_on_a_gpu_bans_probabilities(device, launches):
    if device == "cpu":
        pytest.skip("on a CPU it runs in float32")
    with torch.autocast(device), pytest.raises(RuntimeError, match="unsafe to autocast"):
        F.binary_cross_entropy(*inputs((4, 5), device))
    assert launches.count == 0


@pytest.mark.parametrize("loss", [LOGITS, PROBABILITIES])
def test_autocast_brings_mixed_dtypes_together(loss, device, launches):
    if device == "cuda" and loss == PROBABILITIES:
        pytest.skip("banned there")
    x, target = inputs((4, 5), device, torch.bfloat16)
    weight = torch.rand(5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        ours, stock = (f(x, target.float(), weight) for f in both(loss))
    assert ours.dtype == stock.dtype == torch.float32 and launches.count == 1
    torch.testing.assert_close(ours, stock)


@each_loss
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_take_torchs_formula(loss, transform, device):
    x, target = inputs((4, 5), device)
    ours, stock = (
        {
            "vmap": lambda f=f: torch.vmap(f)(x, target),
            "grad": lambda f=f: torch.func.grad(f, argnums=(0, 1))(x, target)[1],
            "jvp": lambda f=f: torch.func.jvp(lambda x: f(x, target), (x,), (x,))[1],
        }[transform]()
        for f in both(loss)
    )
    torch.testing.assert_close(ours, stock)


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole_and_only_once_more(loss, reduction, device):
    """No graph break, and no new graph after the second batch size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weight = torch.rand(5, device=device)

    def value(x, target):
        return both(loss)[0](x * 0.9, target, weight, reduction=reduction).sum()

    compiled = torch.compile(value, fullgraph=True)
    for rows in (11, 17, 23, 31):
        x, target = inputs((rows, 5), device)
        x.requires_grad_()
        results = [(f(x, target), *torch.autograd.grad(f(x, target), x)) for f in (compiled, value)]
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@each_loss
def test_fake_tensors_take_the_op(loss, device):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.device(device):
        x = torch.rand(7, 5, requires_grad=True)
        value = both(loss)[0](x, torch.rand(7, 5), torch.rand(5), reduction="none")
        value.sum().backward()
    assert value.shape == ((7,) if loss == LABELS else (7, 5)) and x.grad.shape == (7, 5)


def ones(*shape, dtype=torch.float32, **options):
    return torch.ones(shape, dtype=dtype, **options)


@pytest.mark.parametrize(
    ("loss", "make", "options", "kind", "message"),
    [
        (LOGITS, lambda: (ones(4, 1), ones(4)), {}, ValueError, r"Target size \(torch.Size\(\[4\]\)\) must be the"),
        (PROBABILITIES, lambda: (ones(4, 1), ones(4)), {}, ValueError, "Using a target size .* that is different"),
        (LABELS, lambda: (ones(4, 3), ones(4, 2)), {}, RuntimeError, r"size of tensor a \(2\) must match"),
        (LABELS, lambda: (ones(), ones()), {}, IndexError, "[Dd]imension"),
        (LOGITS, lambda: (ones(4), ones(4).long()), {}, RuntimeError, "can't be cast|desired output type"),
        (LOGITS, lambda: (ones(4), ones(4).bool()), {}, RuntimeError, "Subtraction"),
        (LABELS, lambda: (ones(4), ones(4).bool()), {}, RuntimeError, "Subtraction"),
        (PROBABILITIES, lambda: (ones(4), ones(4).long()), {}, RuntimeError, "Found dtype Long but expected Float"),
        (PROBABILITIES, lambda: (ones(4), ones(4).double()), {}, RuntimeError, "Found dtype Double but expected"),
        (LOGITS, lambda: (ones(4, 3), ones(4, 3), ones(2)), {}, RuntimeError, r"size of tensor a \(3\) must match"),
        (LABELS, lambda: (ones(4, 3), ones(4, 3), ones(2)), {}, RuntimeError, r"size of tensor a \(3\) must match"),
        (PROBABILITIES, lambda: (ones(3), ones(3), ones(2)), {}, RuntimeError, "broadcast|must match the size"),
        (LOGITS, lambda: (ones(3), ones(3)), {"pos_weight": ones(2)}, RuntimeError, "size of tensor a"),
        (LOGITS, lambda: (ones(3), ones(3), ones(2, 3)), {}, RuntimeError, "doesn't match the broadcast shape"),
        (LOGITS, lambda: (ones(3), ones(3)), {"reduction": "foo"}, ValueError, "foo is not a valid value"),
        (PROBABILITIES, lambda: (ones(3), ones(3)), {"reduction": "foo"}, ValueError, "foo is not a valid value"),
        (LABELS, lambda: (ones(3), ones(3)), {"reduction": "foo"}, ValueError, "foo is not valid"),
        (LOGITS, lambda: (ones(3), ones(3), ones(3, requires_grad=True)), {}, RuntimeError, "differentiable"),
        (PROBABILITIES, lambda: (ones(3), ones(3), ones(3, requires_grad=True)), {}, RuntimeError, "differentiable"),
        (LOGITS, lambda: ([1.0], ones(1)), {}, (TypeError, AttributeError), "list"),
    ],
)
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_bad_input_is_torchs_error(loss, make, options, kind, message, name, device, launches):
    with torch.device(device):
        tensors = make()
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with fusedact.use_backend(name), pytest.raises(kind, match=message):
        both(loss)[0](*tensors, **options)
    assert launches.count == 0


@pytest.mark.parametrize(
    ("dtypes", "weight"),
    [
        ((torch.float32, torch.float64), None),
        ((torch.float64, torch.float32), None),
        ((torch.bfloat16, torch.bfloat16), torch.float32),
        ((torch.float32, torch.float32), torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_are_torchs(dtypes, weight, device, launches):
    x, target = (ones(3, 4, dtype=dtype, device=device) for dtype in dtypes)
    weight = None if weight is None else torch.rand(4, dtype=weight, device=device)
    ours, stock = (f(x, target, weight, pos_weight=weight) for f in both(LOGITS))
    assert ours.dtype == stock.dtype and torch.equal(ours, stock) and launches.count == 0


@pytest.mark.parametrize("loss", [LOGITS, PROBABILITIES])
def test_the_elementwise_mean_of_old(loss, device, launches):
    x, target = inputs((4, 5), device)
    with pytest.warns(UserWarning, match="elementwise_mean' is deprecated"):
        values = [f(x, target, reduction="elementwise_mean") for f in both(loss)]
    assert torch.equal(*values) and launches.count == 0
