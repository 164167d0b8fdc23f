"""log-softmax + NLL on logits, forward and backward, against float64 PyTorch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedact import functional as F
from fusedact.kernels import cross_entropy

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
SHAPES = [(1, 1), (5, 10), (100, 10), (257, 3), (129, 16), (33, 17), (3, 1000), (2, 2049), (4, 5000)]


def inputs(N, C, dtype, device, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(N, C, generator=generator, dtype=torch.float64)
    target = torch.randint(0, C, (N,), generator=generator)
    return logits.to(device, dtype), target.to(device)


def check(logits, target, compare, **options):
    """Ours, torch's in the same dtype and the float64 truth: the loss and the gradient of the logits."""
    three = []
    for function, x in (
        (F.cross_entropy, logits),
        (torch.nn.functional.cross_entropy, logits),
        (torch.nn.functional.cross_entropy, logits.cpu().double()),
    ):
        x = x.detach().requires_grad_()
        loss = function(x, target.to(x.device), **options)
        dloss = torch.linspace(0.5, 2.0, loss.numel(), dtype=x.dtype, device=x.device).view(loss.shape)
        three.append((loss, torch.autograd.grad(loss, x, dloss)[0]))
    for ours, stock, truth in zip(*three, strict=True):
        compare(ours, stock, truth)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype, reduction, device, as_accurate_as_torch):
    check(*inputs(*shape, dtype, device), as_accurate_as_torch, reduction=reduction)


@pytest.mark.parametrize(("C", "dtype"), [(40_000, torch.float32), (16_500, torch.float64)], ids=str)
def test_wider_than_the_registers(C, dtype, device, as_accurate_as_torch):
    """More classes than WIDEST: statistics are kept per lane."""
    assert cross_entropy.tile(C, 1, dtype.itemsize, 1, 32).chunks > 1
    check(*inputs(3, C, dtype, device), as_accurate_as_torch)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignored", ["some", "all"])
def test_ignore_index(ignored, reduction, device, as_accurate_as_torch):
    logits, target = inputs(40, 7, torch.float32, device)
    target[:: 3 if ignored == "some" else 1] = 5
    check(logits, target, as_accurate_as_torch, ignore_index=5, reduction=reduction)


def test_all_ignored_is_nan_with_zero_gradient(device):
    logits, target = inputs(6, 4, torch.float32, device)
    logits.requires_grad_()
    loss = F.cross_entropy(logits, torch.full_like(target, -100))
    loss.backward()
    assert loss.isnan() and not logits.grad.any()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_are_read_in_place(layout, device, as_accurate_as_torch):
    logits, target = inputs(30, 12, torch.float32, device)
    arranged = {
        "transposed": lambda: logits.t().contiguous().t(),
        "sliced": lambda: torch.stack([logits, logits], -1)[..., 0],
        "expanded": lambda: logits[:1].expand_as(logits),
    }[layout]()
    check(arranged, torch.stack([target, target], 1)[:, 0], as_accurate_as_torch)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_stable_far_out(scale, device, as_accurate_as_torch):
    logits, target = inputs(20, 10, torch.float32, device, scale=1.0)
    check(logits + scale, target, as_accurate_as_torch)
    check(logits * scale, target, as_accurate_as_torch)


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ([0.0, math.inf, 0.0], math.nan),
        ([0.0, -math.inf, 0.0], math.inf),
        ([-math.inf, 0.0, -math.inf], 0.0),
        ([-math.inf] * 3, math.nan),
        ([0.0, math.nan, 0.0], math.nan),
        ([-3e38, -3e38, -3e38], math.log(3)),
        ([3e38, -3e38, 0.0], math.inf),
    ],
    ids=str,
)
def test_extreme_rows_as_torch(row, loss, device):
    """The label is 1 in every row; the other row is an ordinary one and must stay so."""
    logits = torch.tensor([row, [1.0, 2.0, 3.0]], device=device)
    target = torch.tensor([1, 1], device=device)
    ours = F.cross_entropy(logits, target, reduction="none")
    stock = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    torch.testing.assert_close(ours, stock, equal_nan=True)
    assert ours[0].item() == pytest.approx(loss, nan_ok=True)


def test_a_nan_in_an_ignored_row_is_ignored(device):
    logits = torch.tensor([[math.nan, 0.0], [1.0, 2.0]], device=device, requires_grad=True)
    loss = F.cross_entropy(logits, torch.tensor([-100, 1], device=device))
    loss.backward()
    assert loss.isfinite() and not logits.grad[0].any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_batch(reduction, device):
    logits, target = torch.randn(0, 5, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    ours = F.cross_entropy(logits, target, reduction=reduction)
    stock = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, stock, equal_nan=True)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_out_of_range_label(label, device):
    """IndexError on a CPU; on a GPU, and in the kernel itself, NaN for that row and nothing read out of bounds."""
    logits, target = inputs(4, 3, torch.float32, device)
    target[2] = label
    if device == "cpu":
        with pytest.raises(IndexError, match=f"Target {label} is out of bounds."):
            F.cross_entropy(logits, target)
    config = cross_entropy.tile(3, 1, 4, 1, 32)
    losses, _, stats, _ = cross_entropy.forward(
        logits, target, None, None, -100, "none", 0.0, 0.0, 0.0, False, config, save=True
    )
    ones = torch.ones(4, device=device)
    dx, _ = cross_entropy.backward(
        ones, None, logits, target, None, None, stats, None, -100, 0.0, 0.0, 0.0, want_dx=True, want_dtarget=False
    )
    assert losses.isnan().tolist() == [False, False, True, False]
    assert dx.isnan().all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}], ids=str)
@pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
def test_deprecated_arguments_warn_and_mean_what_they_meant(options, function, device, launches):
    logits, target = inputs(9, 3, torch.float32, device)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        ours = function(logits, target, **options)
    assert launches.count == 1
    reduction = "none" if "reduce" in options else "sum"
    assert torch.equal(ours, function(logits, target, reduction=reduction))


def test_one_launch_forward_and_one_backward(device, launches):
    logits, target = inputs(300, 10, torch.float32, device)
    logits.requires_grad_()
    launches.reset()
    loss = F.cross_entropy(logits, target)
    assert launches.count == 1
    loss.backward()
    assert launches.count == 2


def test_saves_the_logits_and_two_numbers_a_row(device):
    logits, target = inputs(300, 10, torch.float32, device)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.cross_entropy(logits, target)
        own = [t for t in kept if t.data_ptr() not in (logits.data_ptr(), target.data_ptr())]
        assert sum(t.numel() for t in own) == 2 * 300 + 1
        kept.clear()
        with torch.no_grad():
            F.cross_entropy(logits, target)
    assert not kept


@given(
    N=st.integers(0, 70),
    C=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 9),
)
def test_any_shape(N, C, dtype, reduction, seed, device, as_accurate_as_torch):
    logits, target = inputs(N, C, dtype, device, seed)
    if N:
        target[seed % N] = -100
    check(logits, target, as_accurate_as_torch, reduction=reduction)


def test_bitwise_the_same_from_run_to_run(device):
    logits, target = inputs(3000, 10, torch.float32, device)
    assert torch.equal(F.cross_entropy(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivative(reduction, device):
    logits, target = inputs(4, 3, torch.float64, device)
    target[1] = -100

    def f(x):
        return F.cross_entropy(x, target, reduction=reduction)

    assert torch.autograd.gradcheck(f, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(f, logits)
