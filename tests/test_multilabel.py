"""Multi-label soft margin loss, forward and backward, against float64 PyTorch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
ours, stock = F.multilabel_soft_margin_loss, torch.nn.functional.multilabel_soft_margin_loss


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    return logits.to(device, dtype), target.to(device, dtype)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1,), (5,), (3000,), (1, 1), (64, 10), (129, 16), (33, 17), (2, 511), (2, 512), (2, 513), (2, 2049), (3, 4, 7)],
    ids=str,
)
def test_shapes(shape, dtype, reduction, device, loss_as_accurate_as_torch):
    loss_as_accurate_as_torch(ours, stock, *inputs(shape, dtype, device), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(10,), (3, 1), (6, 1, 1), (1,), (), (6, 3, 10)], ids=str)
def test_weight_broadcasts(shape, reduction, device, loss_as_accurate_as_torch, launches):
    weight = torch.randn(shape, dtype=torch.float64)
    loss_as_accurate_as_torch(
        ours, stock, *inputs((6, 3, 10), torch.float32, device), reduction=reduction, weight=weight
    )
    assert launches.count == 2


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows of wider ones": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded rows": lambda t: t[:1].expand_as(t),
    "expanded columns": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_read_in_place(layout, reduction, device, loss_as_accurate_as_torch, launches):
    x, target = inputs((30, 12), torch.float32, device)
    weight = LAYOUTS[layout](torch.rand(30, 12))
    loss_as_accurate_as_torch(ours, stock, LAYOUTS[layout](x), target, reduction=reduction, weight=weight)
    loss_as_accurate_as_torch(ours, stock, x, LAYOUTS[layout](target), reduction=reduction)
    assert launches.count == 4


@pytest.mark.parametrize("layout", ["every other", "expanded", "one number"])
def test_a_gradient_of_any_strides(layout, device):
    x, target = inputs((6, 5), torch.float32, device)
    dy = {
        "every other": torch.randn(12, device=device)[::2],
        "expanded": torch.randn(1, device=device).expand(6),
        "one number": torch.ones((), device=device).expand(6),
    }[layout]
    x.requires_grad_()
    one, other = (torch.autograd.grad(f(x, target, reduction="none"), x, dy)[0] for f in (ours, stock))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
def test_far_out_as_torch(target, device):
    points = [0.0, -0.0, 30.0, -30.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan]
    x = torch.tensor(points, device=device)[:, None].requires_grad_()
    results = []
    for function in (ours, stock):
        t = torch.full_like(x, target).detach().requires_grad_()
        value = function(x, t, reduction="none")
        results.append((value, *torch.autograd.grad(value.sum(), (x, t))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=2e-6, atol=1e-20)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_right_answer_keeps_its_digits(target, device):
    magnitude = torch.linspace(0, 80, 2001, device=device)
    x = (magnitude if target else -magnitude)[:, None]
    value = ours(x, torch.full_like(x, target), reduction="none")
    truth = torch.log1p(torch.exp(-magnitude.double()))
    assert ((value.double() - truth).abs() <= (4 + magnitude) * 2**-23 * truth).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (0,)], ids=str)
def test_empty(shape, reduction, device):
    x = torch.zeros(shape, device=device, requires_grad=True)
    value = ours(x, x.detach(), reduction=reduction)
    torch.testing.assert_close(value, stock(x, x.detach(), reduction=reduction), equal_nan=True)
    value.sum().backward()
    assert x.grad.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_launch_forward_and_one_backward(reduction, device, launches):
    x, target = inputs((50, 100), torch.float32, device)
    value = ours(x.requires_grad_(), target, torch.rand(100, device=device), reduction=reduction)
    assert launches.count == 1
    value.sum().backward()
    assert launches.count == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_targets(dtype, device, launches):
    """Which torch promotes to the input's dtype."""
    x, target = inputs((50, 10), dtype, device)
    labels = (target > 0.5).long()
    x.requires_grad_()
    for reduction in REDUCTIONS:
        value = ours(x, labels, reduction=reduction)
        same = ours(x, labels.to(dtype), reduction=reduction)
        assert value.dtype == stock(x, labels, reduction=reduction).dtype and torch.equal(value, same)
        assert torch.equal(*(torch.autograd.grad(v.sum(), x)[0] for v in (value, same)))
    assert launches.count == 12


def test_saves_what_it_was_given_and_nothing_without_gradients(device):
    x, target = inputs((30, 10), torch.float32, device)
    kept = []
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(x, target)
        assert {t.data_ptr() for t in kept} == {x.data_ptr(), target.data_ptr()} and len(kept) == 2
        kept.clear()
        with torch.no_grad():
            ours(x, target, reduction="none")
    assert not kept


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bitwise_the_same_from_run_to_run(reduction, device):
    x, target = inputs((300, 30), torch.float32, device)
    assert torch.equal(ours(x, target, reduction=reduction), ours(x, target, reduction=reduction))


@given(data=st.data(), reduction=st.sampled_from(REDUCTIONS), seed=st.integers(0, 9))
def test_any_shape_and_strides(data, reduction, seed, device, loss_as_accurate_as_torch):
    shape = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
    order = data.draw(st.permutations(range(len(shape))))
    kept = data.draw(st.integers(0, len(shape)))
    of_weight = [data.draw(st.sampled_from([1, size])) for size in shape[len(shape) - kept :]]
    x, target = inputs(shape, data.draw(st.sampled_from([torch.float32, torch.float64])), device, seed)
    x = x.permute(order).contiguous().permute(sorted(range(len(shape)), key=order.__getitem__))
    loss_as_accurate_as_torch(
        ours, stock, x, target, reduction=reduction, weight=torch.rand(of_weight, dtype=torch.float64)
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(reduction, backend, device):
    x, target = (t.requires_grad_() for t in inputs((4, 3), torch.float64, device))
    weight = torch.rand(3, dtype=torch.float64, device=device)
    with fusedact.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *xs: ours(*xs, weight, reduction=reduction), (x, target))
        assert torch.autograd.gradgradcheck(lambda *xs: ours(*xs, weight, reduction=reduction), (x, target))


def test_a_weight_that_wants_its_gradient_gets_torchs(device, launches):
    x, target = inputs((4, 5), torch.float32, device)
    weight = torch.rand(5, device=device, requires_grad=True)
    one, other = (torch.autograd.grad(f(x, target, weight), weight)[0] for f in (ours, stock))
    assert torch.equal(one, other) and launches.count == 0


@pytest.mark.parametrize(
    ("shapes", "dtypes"),
    [
        (((4, 3), (3,)), (torch.float32, torch.float32)),
        (((4, 3), (4, 1)), (torch.float32, torch.float32)),
        (((4, 3), (4, 3), (2, 4, 3)), (torch.float32, torch.float32, torch.float32)),
        (((4, 3), (4, 3)), (torch.float32, torch.float64)),
        (((4, 3), (4, 3)), (torch.float32, torch.uint8)),
        (((4, 3), (4, 3), (3,)), (torch.bfloat16, torch.bfloat16, torch.float32)),
    ],
    ids=str,
)
def test_what_torch_broadcasts_or_promotes_is_torchs(shapes, dtypes, device, launches):
    tensors = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
    one, other = (f(*tensors, reduction="none") for f in (ours, stock))
    assert one.dtype == other.dtype and torch.equal(one, other) and launches.count == 0
