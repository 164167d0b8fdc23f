"""Binary cross-entropy on logits and on probabilities, forward and backward, against float64 PyTorch."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F
from fusedact.kernels import bce, tiles

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
LOSSES = ["binary_cross_entropy_with_logits", "binary_cross_entropy"]
LOGITS, PROBABILITIES = LOSSES
BLOCK = bce.tile(4).block
each_loss = pytest.mark.parametrize("loss", LOSSES)


def drawn(shape, seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if positive else torch.randn)(shape, generator=generator, dtype=torch.float64)


def inputs(loss, shape, dtype, device, seed=0):
    """Logits or probabilities of that loss, and targets."""
    x = drawn(shape, seed, positive=True) if loss == PROBABILITIES else 4 * drawn(shape, seed)
    return x.to(device, dtype), drawn(shape, seed + 1, positive=True).to(device, dtype)


def both(loss):
    return getattr(F, loss), getattr(torch.nn.functional, loss)


@each_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (64, 1), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (3, 5, 471)], ids=str)
def test_shapes(loss, shape, dtype, reduction, device, loss_as_accurate_as_torch):
    x, target = inputs(loss, shape, dtype, device)
    if loss == PROBABILITIES and dtype in (torch.float16, torch.bfloat16):
        x = x.clamp(0.05, 0.95)  # torch's own gradient divides by (1 - x) x, in half precision 0 close to 1
    loss_as_accurate_as_torch(*both(loss), x, target, reduction=reduction)


SHAPE = (6, 3, 10)
WEIGHTS = [(10,), (3, 1), (6, 1, 1), (6, 1, 10), (1,), (), SHAPE, (1, 3, 10)]


@each_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_weight_broadcasts(loss, shape, reduction, device, loss_as_accurate_as_torch, launches):
    x, target = inputs(loss, SHAPE, torch.float32, device)
    weight = drawn(shape, 3).to(device, torch.float32)
    loss_as_accurate_as_torch(*both(loss), x, target, reduction=reduction, weight=weight)
    assert launches.count == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", WEIGHTS, ids=str)
def test_pos_weight_broadcasts(shape, dtype, device, loss_as_accurate_as_torch, launches):
    x, target = inputs(LOGITS, SHAPE, dtype, device)
    pos_weight = 3 * drawn(shape, 3, positive=True).to(device, dtype)
    weight = drawn((10,), 4, positive=True).to(device, dtype)
    loss_as_accurate_as_torch(*both(LOGITS), x, target, pos_weight=pos_weight)
    loss_as_accurate_as_torch(*both(LOGITS), x, target, pos_weight=pos_weight, weight=weight, reduction="none")
    assert launches.count == 4


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda t: t.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
    "rows of wider ones": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "slices of slices": lambda t: t.repeat(2, 2, 2)[: t.shape[0], : t.shape[1], : t.shape[2]],
    "expanded": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t[:1, :1, :1].expand_as(t),
    "from the end": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@each_loss
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_read_in_place(loss, layout, device, loss_as_accurate_as_torch, launches):
    x, target = inputs(loss, SHAPE, torch.float32, device)
    arranged, weight = LAYOUTS[layout](x), LAYOUTS[layout](drawn(SHAPE, 3).float())
    for reduction in REDUCTIONS:
        loss_as_accurate_as_torch(*both(loss), arranged, target, reduction=reduction)
        loss_as_accurate_as_torch(*both(loss), arranged, LAYOUTS[layout](target), reduction=reduction, weight=weight)
        loss_as_accurate_as_torch(*both(loss), x, LAYOUTS[layout](target), reduction=reduction)
    assert launches.count == 18


@each_loss
def test_what_takes_four_dimensions_is_copied(loss, device, loss_as_accurate_as_torch):
    x, target = inputs(loss, (3, 4, 5, 6), torch.float32, device)
    weight = drawn((3, 1, 5, 1), 3).float()
    loss_as_accurate_as_torch(*both(loss), x.repeat(1, 2, 2, 2)[:, :4, :5, :6], target, weight=weight)
    loss_as_accurate_as_torch(*both(loss), x, target, weight=drawn((4, 1, 6), 3).float(), reduction="none")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_any_strides(layout, device):
    x, target = inputs(LOGITS, SHAPE, torch.float32, device)
    dy = LAYOUTS[layout](drawn(SHAPE, 5).to(device, torch.float32))
    ours, stock = (torch.autograd.grad(f(x.requires_grad_(), target, reduction="none"), x, dy)[0] for f in both(LOGITS))
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("pos_weight", [None, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
def test_far_out_as_torch(target, pos_weight, device):
    points = [0.0, -0.0, 30.0, -30.0, 1e4, -1e4, 3e38, -3e38, math.inf, -math.inf, math.nan]
    x = torch.tensor(points, device=device, requires_grad=True)
    weight = None if pos_weight is None else torch.tensor([pos_weight], device=device)
    results = []
    for function in both(LOGITS):
        t = torch.full_like(x, target).detach().requires_grad_()
        value = function(x, t, reduction="none", pos_weight=weight)
        results.append((value, *torch.autograd.grad(value.sum(), (x, t))))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, equal_nan=True, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
def test_at_the_ends_as_torch(target, dtype, device):
    """Logarithms are clamped at -100 in the loss, the denominator at 1e-12 in its gradient, nothing in the target's."""
    points = [0.0, -0.0, 1.0, 0.5, 1e-45, 1e-40, 1e-30, 1e-12, 1e-6, 1 - 2**-24, 1 - 1e-6]
    x = torch.tensor(points, device=device, dtype=dtype, requires_grad=True)
    results = []
    for function in both(PROBABILITIES):
        t = torch.full_like(x, target).detach().requires_grad_()
        value = function(x, t, reduction="none")
        results.append((value, *torch.autograd.grad(value.sum(), (x, t))))
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock, rtol=2e-6, atol=1e-6)


# What is left where the answer is right


@triton.jit
def _apply_kernel(x_ptr, y_ptr, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, FUNCTION(tl.load(x_ptr + offsets)))


@pytest.mark.parametrize(
    ("function", "stock", "end", "most"),
    [
        (tiles.log1p, torch.log1p, 1.0, 2e-7),
        (tiles.log1m, lambda x: torch.log1p(-x), 0.5, 2e-7),
        (tiles.log, torch.log, 0.5, 4e-7),
    ],
    ids=["log1p", "log1m", "log"],
)
def test_logarithms(function, stock, end, most, device):
    """To a few roundings of their own size, denormal numbers included; NaN stays NaN."""
    near = torch.logspace(-45, 0, 30_000, dtype=torch.float64)
    x = torch.cat([near, torch.linspace(0, 1, 35_000, dtype=torch.float64), torch.tensor([0.0, 1.0, math.nan])])
    x = torch.cat([x, x.new_ones(2**16 - len(x))]).mul(end).to(device, torch.float32)
    y = torch.empty_like(x)
    _apply_kernel[(4,)](x, y, function, BLOCK=2**14)
    truth = stock(x.double())
    finite = truth.isfinite()
    assert ((y - truth).abs()[finite] <= most * truth.abs()[finite] + 1e-45).all()
    assert torch.equal(y.isnan(), truth.isnan()) and (y[truth.isinf()] < -104).all()


@pytest.mark.parametrize("pos_weight", [None, 3.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_right_answer_keeps_its_digits(dtype, target, pos_weight, device):
    """exp(-|x|) errs by |x| roundings; nothing cancels on top of that."""
    magnitude = torch.linspace(0, 80, 2001, dtype=dtype, device=device)
    x = magnitude if target else -magnitude
    weight = None if pos_weight is None else torch.tensor([pos_weight], dtype=dtype, device=device)
    value = F.binary_cross_entropy_with_logits(x, torch.full_like(x, target), reduction="none", pos_weight=weight)
    truth = torch.log1p(torch.exp(-magnitude.double())) * (pos_weight if target and pos_weight else 1.0)
    assert ((value.double() - truth).abs() <= (4 + magnitude) * torch.finfo(dtype).eps * truth).all()


@each_loss
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [4 * BLOCK - 1, 4 * BLOCK, 4 * BLOCK + 1, 5 * BLOCK + 3, 8 * BLOCK])
def test_programs_of_several_blocks(n, reduction, loss, device, loss_as_accurate_as_torch, monkeypatch):
    """Whole blocks first, and what is left of one by the program whose turn it is; the same in every run."""
    monkeypatch.setattr(bce, "PROGRAMS", 4)
    x, target = inputs(loss, (n,), torch.float32, device)
    loss_as_accurate_as_torch(*both(loss), x, target, reduction=reduction)
    assert torch.equal(*(both(loss)[0](x, target, reduction=reduction) for _ in range(2)))


BAD = [-0.1, 1.1, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("which", ["input", "target"])
@pytest.mark.parametrize("value", BAD)
def test_no_probability_is_an_error_where_values_are_looked_at(value, which, device, launches, monkeypatch):
    """On a CPU always, on a GPU under FUSEDACT_CHECKS=1."""
    monkeypatch.setattr(fusedact.backend, "_checks", lambda: True)
    x, target = inputs(PROBABILITIES, (4, 5), torch.float32, device)
    (x if which == "input" else target)[1, 2] = value
    with pytest.raises(RuntimeError, match=f"all elements of {which} should be between 0 and 1"):
        F.binary_cross_entropy(x, target)
    assert launches.count == 0


@pytest.mark.parametrize("which", ["input", "target"])
@pytest.mark.parametrize("value", BAD)
def test_no_probability_is_nan_in_the_kernel(value, which, device, monkeypatch):
    monkeypatch.setattr(fusedact.backend, "looks_at_values", lambda t: False)
    x, target = inputs(PROBABILITIES, (4, 5), torch.float32, device)
    (x if which == "input" else target)[1, 2] = value
    x.requires_grad_(), target.requires_grad_()
    loss = F.binary_cross_entropy(x, target, reduction="none")
    wrong = torch.zeros(4, 5, dtype=torch.bool, device=device)
    wrong[1, 2] = True
    for result in (loss, *torch.autograd.grad(loss.sum(), (x, target))):
        assert torch.equal(result.isnan(), wrong)


@each_loss
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)], ids=str)
def test_empty(loss, shape, reduction, device):
    x = torch.rand(shape, device=device, requires_grad=True)
    ours, stock = (f(x, x.detach(), reduction=reduction) for f in both(loss))
    torch.testing.assert_close(ours, stock, equal_nan=True)
    ours.sum().backward()
    assert x.grad.shape == shape


@each_loss
@pytest.mark.parametrize("wanted", ["input", "target", "both", "neither"])
def test_one_launch_forward_and_one_backward(loss, wanted, device, launches):
    x, target = inputs(loss, (50, 100), torch.float32, device)
    weight = torch.rand(100, device=device)
    x.requires_grad_(wanted in ("input", "both"))
    target.requires_grad_(wanted in ("target", "both"))
    value = both(loss)[0](x, target, weight)
    assert launches.count == 1
    if wanted != "neither":
        value.backward()
        assert launches.count == 2
    assert (x.grad is not None) == x.requires_grad and (target.grad is not None) == target.requires_grad


@each_loss
def test_saves_what_it_was_given_and_nothing_without_gradients(loss, device):
    x, target = inputs(loss, (30, 10), torch.float32, device)
    weight, kept = torch.rand(10, device=device), []
    x.requires_grad_()
    given = {t.data_ptr() for t in (x, target, weight)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        both(loss)[0](x, target, weight)
        assert {t.data_ptr() for t in kept} == given and len(kept) == 3
        kept.clear()
        with torch.no_grad():
            both(loss)[0](x, target, weight)
    assert not kept


@each_loss
def test_bitwise_the_same_from_run_to_run(loss, device):
    x, target = inputs(loss, (3000, 3), torch.float32, device)
    assert torch.equal(both(loss)[0](x, target), both(loss)[0](x, target))


@st.composite
def broadcast(draw, shape):
    """A shape that broadcasts to that one."""
    kept = draw(st.integers(0, len(shape)))
    return tuple(draw(st.sampled_from([1, size])) for size in shape[len(shape) - kept :])


@given(data=st.data(), loss=st.sampled_from(LOSSES), reduction=st.sampled_from(REDUCTIONS), seed=st.integers(0, 9))
def test_any_shape_and_strides(data, loss, reduction, seed, device, loss_as_accurate_as_torch):
    shape = data.draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    order = data.draw(st.permutations(range(len(shape))))
    x, target = inputs(loss, shape, data.draw(st.sampled_from([torch.float32, torch.float64])), device, seed)
    x = x.permute(order).contiguous().permute(sorted(range(len(shape)), key=order.__getitem__))
    options = {"weight": drawn(data.draw(broadcast(shape)), seed)}
    if loss == LOGITS:
        options["pos_weight"] = drawn(data.draw(broadcast(shape)), seed, positive=True)
    loss_as_accurate_as_torch(*both(loss), x, target, reduction=reduction, **options)


@each_loss
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(loss, reduction, backend, device):
    x, target = (t.clamp(0.1, 0.9).requires_grad_() for t in inputs(loss, (4, 3), torch.float64, device))
    options = {"weight": drawn((3,), 2).to(device), "reduction": reduction}
    if loss == LOGITS:
        options["pos_weight"] = drawn((4, 1), 3, positive=True).to(device)
    with fusedact.use_backend(backend):
        assert torch.autograd.gradcheck(lambda *xs: both(loss)[0](*xs, **options), (x, target))
        assert torch.autograd.gradgradcheck(lambda *xs: both(loss)[0](*xs, **options), (x, target))


@pytest.mark.contract(61)
def test_offsets_beyond_two_to_the_31(far_rows, device):
    _, target = inputs(LOGITS, (4, 16), torch.float16, device)
    for reduction in REDUCTIONS:
        results = []
        for logits in (far_rows, far_rows.clone()):
            logits = logits.detach().requires_grad_()
            value = F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)
            results.append((value, torch.autograd.grad(value.sum(), logits)[0]))
        assert all(torch.equal(far, near) for far, near in zip(*results, strict=True))
