"""Sigmoid + binary cross-entropy on logits, forward and backward, against float64 PyTorch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedact import functional as F

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
stock_bce = torch.nn.functional.binary_cross_entropy_with_logits


def inputs(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.rand(shape, generator=generator, dtype=torch.float64)
    return logits.to(device, dtype), target.to(device, dtype)


def check(logits, target, compare, reduction):
    """Ours, torch's in the same dtype and the float64 truth: the loss and the gradient of the logits."""
    three = []
    for function, x, t in (
        (F.binary_cross_entropy_with_logits, logits, target),
        (stock_bce, logits, target),
        (stock_bce, logits.cpu().double(), target.cpu().double()),
    ):
        x = x.detach().requires_grad_()
        loss = function(x, t, reduction=reduction)
        dloss = torch.linspace(0.5, 2.0, loss.numel(), dtype=x.dtype, device=x.device).view(loss.shape)
        three.append((loss, torch.autograd.grad(loss, x, dloss)[0]))
    for ours, stock, truth in zip(*three, strict=True):
        compare(ours, stock, truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (64, 1), (2047,), (2048,), (2049,), (3, 5, 700)], ids=str)
def test_shapes(shape, dtype, reduction, device, as_accurate_as_torch):
    check(*inputs(shape, dtype, device), as_accurate_as_torch, reduction)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout, device, as_accurate_as_torch):
    logits, target = inputs((30, 12), torch.float32, device)
    arranged = {
        "transposed": lambda: logits.t().contiguous().t(),
        "sliced": lambda: torch.stack([logits, logits], -1)[..., 0],
        "expanded": lambda: logits[:1].expand_as(logits),
    }[layout]()
    check(arranged, target, as_accurate_as_torch, "mean")
    check(arranged, target, as_accurate_as_torch, "none")


@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
def test_far_out_as_torch(target, device):
    points = [0.0, -0.0, 30.0, -30.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan]
    logits = torch.tensor(points, device=device, requires_grad=True)
    results = []
    for function in (F.binary_cross_entropy_with_logits, stock_bce):
        loss = function(logits, torch.full_like(logits, target), reduction="none")
        results.append((loss, torch.autograd.grad(loss.sum(), logits)[0]))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(reduction, device):
    x = torch.randn(0, 5, device=device)
    torch.testing.assert_close(
        F.binary_cross_entropy_with_logits(x, x, reduction=reduction),
        stock_bce(x, x, reduction=reduction),
        equal_nan=True,
    )


@pytest.mark.parametrize("options", ["weight", "pos_weight", "target gradient", "target float64"])
def test_options_not_fused_yet_are_torchs(options, device):
    logits, target = inputs((9, 3), torch.float32, device)
    kwargs = {name: torch.rand(3, device=device) for name in ("weight", "pos_weight") if name == options}
    if options == "target gradient":
        target.requires_grad_()
    if options == "target float64":
        target = target.double()
    ours = F.binary_cross_entropy_with_logits(logits, target, **kwargs)
    torch.testing.assert_close(ours, stock_bce(logits, target, **kwargs), rtol=0, atol=0)


def test_one_launch_forward_and_one_backward(device, launches):
    logits, target = inputs((5000,), torch.float32, device)
    logits.requires_grad_()
    launches.reset()
    loss = F.binary_cross_entropy_with_logits(logits, target)
    assert launches.count == 1
    loss.backward()
    assert launches.count == 2


@given(
    shape=st.lists(st.integers(0, 12), max_size=3),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, dtype, reduction, seed, device, as_accurate_as_torch):
    check(*inputs(shape, dtype, device, seed), as_accurate_as_torch, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative(reduction, device):
    logits, target = inputs((4, 3), torch.float64, device)

    def f(x):
        return F.binary_cross_entropy_with_logits(x, target, reduction=reduction)

    assert torch.autograd.gradcheck(f, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(f, logits)
