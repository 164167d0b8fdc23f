"""Gradients made with the loss: cross_entropy(grad_in_forward=True), and what every such op owes to autograd."""

import pytest
import torch
import torch.utils.checkpoint

from fusedact import functional as F
from fusedact import nn

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS = [
    {},
    {"weight": True},
    {"label_smoothing": 0.1},
    {"weight": True, "label_smoothing": 0.1},
    {"z_loss": 1e-3, "softcap": 5.0, "sample_weight": True},
    {"probabilities": True},
    {"probabilities": True, "weight": True, "label_smoothing": 0.2},
]


def early(x, target, **options):
    return F.cross_entropy(x, target, grad_in_forward=True, **options)


def inputs(shape, dtype, device, seed=0, probabilities=False, weight=False, sample_weight=False, **options):
    """Logits, target, and options with the tensors that are asked for."""
    generator = torch.Generator().manual_seed(seed)
    rows = (shape[0], *shape[2:])
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(shape[1], rows, generator=generator)
    if probabilities:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    else:
        target.flatten()[::5] = -100
    if weight:
        options["weight"] = torch.rand(shape[1], generator=generator).to(device, dtype)
    if sample_weight:
        options["sample_weight"] = torch.rand(rows, generator=generator).to(device, dtype)
    return x.to(device, dtype).requires_grad_(), target.to(device), options


def with_gradient(function, x, target, dloss=1.0, **options):
    loss = function(x, target, **options)
    return loss.detach(), torch.autograd.grad(loss, x, torch.full_like(loss, dloss))[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_accurate_as_torch(options, dtype, reduction, device, as_accurate_as_torch):
    x, target, options = inputs((23, 17), dtype, device, **options)
    doubled = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    double = target.double() if target.is_floating_point() else target
    truth = with_gradient(F.cross_entropy, x.detach().double().requires_grad_(), double, reduction=reduction, **doubled)
    classic = with_gradient(F.cross_entropy, x, target, reduction=reduction, **options)
    for results in zip(with_gradient(early, x, target, reduction=reduction, **options), classic, truth, strict=True):
        as_accurate_as_torch(*results)


@pytest.mark.parametrize("shape", [(4, 5, 7), (1, 1), (2, 3000), (300, 10)], ids=str)
@pytest.mark.parametrize("dloss", [1.0, -0.37])
def test_shapes_and_dloss(shape, dloss, device):
    x, target, _ = inputs(shape, torch.float32, device)
    ours, classic = (with_gradient(f, x, target, dloss, reduction="sum") for f in (early, F.cross_entropy))
    torch.testing.assert_close(ours, classic)


def test_one_launch_forward_and_one_backward(device, launches):
    x, target, _ = inputs((300, 10), torch.float32, device)
    before = x.detach().clone()
    launches.reset()
    loss = early(x, target)
    assert launches.count == 1
    loss.backward()
    assert launches.count == 2 and torch.equal(x, before)


def test_the_gradient_is_the_callers_own(device):
    """What is done to it does not reach a second backward."""
    x, target, _ = inputs((9, 5), torch.float32, device)
    loss = early(x, target)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    expected = first.clone()
    first.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, x, retain_graph=True)[0], expected)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, x)[0], 3 * expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, x)


def test_nothing_but_the_arguments_is_saved(device):
    x, target, _ = inputs((9, 5), torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        early(x, target)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), target.data_ptr()}


def test_logits_changed_since_are_an_error(device):
    x, target, _ = inputs((9, 5), torch.float32, device)
    loss = early(x, target)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivative(reduction, device):
    x, target, _ = inputs((4, 3), torch.float64, device)
    assert torch.autograd.gradcheck(lambda x: early(x, target, reduction=reduction), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: early(x, target, reduction=reduction), x, fast_mode=True)


@pytest.mark.parametrize(
    "made",
    [
        lambda x, target: early(x.half(), target),
        lambda x, target: early(x, target, reduction="none").sum() / (target >= 0).sum(),
        lambda x, target: early(x, target, return_lse=True)[0],
        lambda x, target: torch.compile(early, backend="aot_eager", fullgraph=True)(x, target),
        lambda x, target: torch.func.functional_call(nn.CrossEntropyLoss(grad_in_forward=True), {}, (x, target)),
    ],
    ids=["float16, which would underflow", "none", "return_lse", "compiled", "a module"],
)
def test_what_else_it_is_asked_for_together_with(made, device):
    x, target, _ = inputs((6, 4), torch.float32, device)
    ours, stock = made(x, target), torch.nn.functional.cross_entropy(x, target)
    torch.testing.assert_close(ours.float(), stock, rtol=2e-3, atol=0)
    gradients = [torch.autograd.grad(loss, x)[0] for loss in (ours, stock)]
    torch.testing.assert_close(*gradients, rtol=5e-3, atol=1e-4)


def test_no_gradient_is_made_where_none_is_wanted(device, launches):
    x, target, _ = inputs((30, 10), torch.float32, device)
    with torch.no_grad():
        loss = early(x, target)
    assert not loss.requires_grad and torch.equal(loss, early(x.detach(), target))
    assert torch.equal(loss, F.cross_entropy(x.detach(), target))


def test_a_mean_of_rows_without_weight(device):
    """NaN, as its gradients: smoothed, the loss of classes of weight 0 is not 0."""
    x, target = torch.rand(3, 4, device=device, requires_grad=True), torch.tensor([0, 0, -100], device=device)
    weight = torch.tensor([0.0, 1.0, 1.0, 1.0], device=device)
    loss = F.cross_entropy(x, target, weight, label_smoothing=0.1, grad_in_forward=True)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and dx[:2].isnan().all() and not dx[2].any()


def test_all_ignored(device):
    x, target, _ = inputs((6, 4), torch.float32, device)
    loss, dx = with_gradient(early, x, torch.full_like(target, -100))
    assert loss.isnan() and not dx.any()


def test_bitwise_the_same_from_run_to_run(device):
    x, target, _ = inputs((700, 33), torch.float32, device)
    for first, second in zip(with_gradient(early, x, target), with_gradient(early, x, target), strict=True):
        assert torch.equal(first, second)


def test_checkpointed(device):
    x, target, _ = inputs((6, 4), torch.float32, device)
    loss = torch.utils.checkpoint.checkpoint(early, x, target, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], with_gradient(F.cross_entropy, x, target)[1])
