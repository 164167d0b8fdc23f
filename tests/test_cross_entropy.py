"""log-softmax + NLL on logits, forward and backward, against float64 PyTorch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedact import functional as F
from fusedact.autograd.cross_entropy import cross_entropy_formula
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
    """A row goes through the registers in steps."""
    assert cross_entropy.tile(C, 1, dtype.itemsize, 1, 32).columns < C
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

    assert torch.autograd.gradcheck(f, logits.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, logits, fast_mode=True)


# The rows of every width, and loss and gradient in one launch

CLASSES = [1, 2, 10, 1000, 32768, 32769, 65537]
OPTIONS = [
    {},
    {"weight": True},
    {"smoothing": 0.1},
    {"weight": True, "smoothing": 0.3},
    {"probabilities": True},
    {"probabilities": True, "weight": True, "smoothing": 0.2},
    {"z_loss": 0.05, "softcap": 4.0, "sample_weight": True},
    {"probabilities": True, "z_loss": 0.05, "softcap": 4.0, "sample_weight": True},
]


def arguments(shape, options, dtype, device, seed=0):
    """Logits, target, weight and sample weight, and the numbers: what launchers take, one row ignored."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.rand(sizes, generator=generator, dtype=torch.float64).to(device, dtype)

    dim = min(1, len(shape) - 1)
    rows, C = shape[:dim] + shape[dim + 1 :], shape[dim]
    logits = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
    target = torch.randint(0, C, rows, generator=generator).to(device)
    if options.get("probabilities"):
        target = draw(*shape)
    elif target.numel() > 2:
        target.view(-1)[1] = -100
    weight = draw(C) if options.get("weight") else None
    sample_weight = draw(*rows) if options.get("sample_weight") else None
    numbers = tuple(options.get(name, 0.0) for name in ("smoothing", "z_loss", "softcap"))
    return (logits, target, weight, sample_weight), numbers


def gradient_tile(logits, options):
    two = options.get("probabilities", False) or {"weight", "smoothing"} <= set(options)
    C = logits.shape[min(1, logits.dim() - 1)]
    return cross_entropy.gradient_tile(
        C, logits.numel() // C, logits.element_size(), 2 ** (two + ("softcap" in options)), 32, 4,
        cross_entropy.rows_after(logits),
    )  # fmt: skip


def both(tensors, numbers, reduction, dtype):
    """The formula's loss and gradient of the logits in that dtype."""
    tensors = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    x = tensors[0].requires_grad_()
    loss = cross_entropy_formula(x, *tensors[1:], -100, reduction, *numbers, False)
    return loss, torch.autograd.grad(loss.sum(), x)[0]


def on_cpu(tensors):
    return [t if t is None else t.detach().cpu().clone() for t in tensors]


def compare_both(ours, tensors, numbers, reduction, dtype, compare):
    """Loss and gradient with the formula's in that dtype and in float64."""
    others = (both(on_cpu(tensors), numbers, reduction, dtype) for dtype in (dtype, torch.float64))
    for values in zip(ours, *others, strict=True):
        compare(*values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("C", CLASSES)
def test_every_width(C, dtype, device, as_accurate_as_torch):
    check(*inputs(3, C, dtype, device), as_accurate_as_torch)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("shape", "reduction"),
    [
        ((1, 1), "mean"),
        ((5,), "mean"),
        ((40, 10), "mean"),
        ((3, 21, 5), "sum"),
        ((4, 70, 9), "mean"),
        ((4, 1000), "sum"),
    ],
    ids=str,
)
def test_forward_with_gradient(shape, reduction, options, device, as_accurate_as_torch):
    tensors, numbers = arguments(shape, options, torch.float32, device)
    config = gradient_tile(tensors[0], options)
    ours = cross_entropy.forward_with_gradient(*tensors, -100, reduction, *numbers, config)
    compare_both(ours, tensors, numbers, reduction, torch.float32, as_accurate_as_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[7]], ids=str)
def test_forward_with_gradient_in_every_dtype(options, dtype, device, as_accurate_as_torch):
    tensors, numbers = arguments((13, 37), options, dtype, device)
    ours = cross_entropy.forward_with_gradient(*tensors, -100, "mean", *numbers, gradient_tile(tensors[0], options))
    compare_both(ours, tensors, numbers, "mean", dtype, as_accurate_as_torch)


@pytest.mark.parametrize("C", CLASSES[4:])
@pytest.mark.parametrize(
    "options",
    [pytest.param(o, marks=[pytest.mark.exhaustive] if i else []) for i, o in enumerate(OPTIONS)],
    ids=str,
)
def test_forward_with_gradient_of_wide_rows(options, C, device, as_accurate_as_torch):
    tensors, numbers = arguments((2, C), options, torch.float32, device)
    ours = cross_entropy.forward_with_gradient(*tensors, -100, "sum", *numbers, gradient_tile(tensors[0], options))
    compare_both(ours, tensors, numbers, "sum", torch.float32, as_accurate_as_torch)


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("N", "C"), [(11, 37), pytest.param(2, 33_000, marks=pytest.mark.exhaustive)])
def test_overwrite_with_gradient(N, C, options, divided, device, as_accurate_as_torch):
    """Rows of a buffer that is longer than they are, each overwritten."""
    tensors, numbers = arguments((N, C), options, torch.float32, device)
    before = on_cpu(tensors)
    buffer = torch.full((N + 2, C + 3), 5.0, device=device)
    x = buffer[:N, :C].copy_(tensors[0])
    losses, total = torch.empty(N, device=device), torch.tensor([7.0], device=device)
    config = gradient_tile(tensors[0], options)
    cross_entropy.overwrite_with_gradient(x, *tensors[1:], losses, total if divided else None, -100, *numbers, config)
    truth, torchs = both(before, numbers, "none", torch.float64), both(before, numbers, "none", torch.float32)
    as_accurate_as_torch(losses, torchs[0], truth[0])
    as_accurate_as_torch(x, torchs[1] / (7 if divided else 1), truth[1] / (7 if divided else 1))
    assert (buffer[N:] == 5).all() and (buffer[:, C:] == 5).all()


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_forward_with_gradient_reads_strides_in_place(layout, device, as_accurate_as_torch):
    (logits, target, *others), numbers = arguments((30, 12), {"sample_weight": True}, torch.float32, device)
    logits = {
        "transposed": lambda: logits.t().contiguous().t(),
        "sliced": lambda: torch.stack([logits, logits], -1)[..., 0],
        "expanded": lambda: logits[:1].expand_as(logits),
        "offset": lambda: torch.cat([logits[:, :1], logits], 1)[:, 1:],
    }[layout]()
    tensors = logits, torch.stack([target, target], 1)[:, 0], *others
    ours = cross_entropy.forward_with_gradient(*tensors, -100, "mean", *numbers, gradient_tile(logits, {}))
    compare_both(ours, tensors, numbers, "mean", torch.float32, as_accurate_as_torch)


EXTREME = {
    "all but one -inf": lambda C: [-math.inf] * (C - 1) + [1.0],
    "all equal": lambda C: [2.5] * C,
    "+inf": lambda C: [math.inf] + [0.0] * (C - 1),
    "all -inf": lambda C: [-math.inf] * C,
    "NaN": lambda C: [0.0] * (C - 1) + [math.nan],
    "far out": lambda C: [3e38] + [-3e38] * (C - 1),
}


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("C", [10, pytest.param(33_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("row", EXTREME)
def test_extreme_rows_in_one_launch(row, C, ignored, device):
    """Between ordinary rows, which must stay so; where ignored, it counts for nothing, NaN or not."""
    logits = torch.tensor([[0.5] * C, EXTREME[row](C), [1.0] * C], device=device)
    target = torch.tensor([1, -100 if ignored else C - 1, 0], device=device)
    ours = cross_entropy.forward_with_gradient(
        logits, target, None, None, -100, "sum", 0.0, 0.0, 0.0, gradient_tile(logits, {})
    )
    stock = both((logits.clone(), target, None, None), (0.0, 0.0, 0.0), "sum", torch.float32)
    if ignored:
        stock[1][1] = 0
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b.detach(), equal_nan=True)


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_out_of_range_label_in_one_launch(label, device):
    (logits, target, *_), numbers = arguments((4, 3), {}, torch.float32, device)
    target[2] = label
    losses = torch.empty(4, device=device)
    cross_entropy.overwrite_with_gradient(
        logits, target, None, None, losses, None, -100, *numbers, gradient_tile(logits, {})
    )
    assert losses.isnan().tolist() == logits.isnan().all(1).tolist() == [False, False, True, False]


def test_all_ignored_in_one_launch(device):
    (logits, target, *others), numbers = arguments((6, 4), {}, torch.float32, device)
    target[:] = -100
    loss, dx = cross_entropy.forward_with_gradient(
        logits, target, *others, -100, "mean", *numbers, gradient_tile(logits, {})
    )
    assert loss.isnan() and not dx.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows_in_one_launch(reduction, device):
    (logits, target, *others), numbers = arguments((0, 4), {}, torch.float32, device)
    loss, dx = cross_entropy.forward_with_gradient(
        logits, target, *others, -100, reduction, *numbers, gradient_tile(logits, {})
    )
    assert dx.shape == (0, 4) and (loss.isnan() if reduction == "mean" else loss == 0)


@pytest.mark.parametrize("shape", [(3000, 10), (20, 1001), (3, 33_000)], ids=str)
def test_one_launch_bitwise_the_same_from_run_to_run(shape, device, launches):
    """And the logits are only read."""
    tensors, numbers = arguments(shape, {"sample_weight": True}, torch.bfloat16, device)
    config, before = gradient_tile(tensors[0], {}), tensors[0].clone()
    launches.reset()
    runs = [cross_entropy.forward_with_gradient(*tensors, -100, "mean", *numbers, config) for _ in range(2)]
    assert launches.count == 2
    assert all(torch.equal(*values) for values in zip(*runs, strict=True))
    assert torch.equal(tensors[0], before)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("C", [1, 10, 100, 1000, 4096, 4097, 32000, 32768, 32769, 128256])
@pytest.mark.parametrize("warp_size", [32, 64])
def test_tiles_are_whole(C, itemsize, warp_size):
    """Lanes divide the columns, threads are at most 1,024, and up to 8,192 classes a gradient's row is read once."""
    for streams, after in ((1, 1), (2, 1), (4, 1), (1, 5), (1, 65536)):
        gradient = cross_entropy.gradient_tile(C, 4096, itemsize, streams, warp_size, 132, after)
        for tile in (cross_entropy.tile(C, after, itemsize, streams, warp_size), gradient):
            assert tile.columns % tile.lanes == 0 and tile.num_warps * warp_size <= 1024
            assert math.log2(tile.rows * tile.columns).is_integer() and math.log2(tile.lanes).is_integer()
        assert gradient.programs <= 4096
        if after == 1 and itemsize < 8:
            assert (gradient.columns >= C) == (8192 // streams >= C)
