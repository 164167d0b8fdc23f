"""Cross-entropy by slices of the classes, all in one process: statistics of each, all combined, a gradient of each."""

import math

import pytest
import torch

from fusedact import autograd, backend, distributed
from fusedact.autograd import class_shards
from fusedact.autograd.cross_entropy import cross_entropy_formula
from fusedact.distributed import VocabParallelCrossEntropyLoss, vocab_parallel_cross_entropy

DEFAULTS = {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "softcap": 0.0}
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "class weights": {"weight": True},
    "sample weights": {"sample_weight": True},
    "a class ignored": {"ignore_index": 2, "weight": True},
    "smoothed": {"label_smoothing": 0.1},
    "smoothed, class weights": {"label_smoothing": 0.1, "weight": True, "reduction": "none"},
    "z_loss": {"z_loss": 0.1},
    "softcap": {"softcap": 3.0, "reduction": "sum"},
    "everything": {
        "weight": True, "sample_weight": True, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "ignore_index": 4,
    },
}  # fmt: skip
WIDE = [pytest.param(p, marks=[] if p in (2, 7) else pytest.mark.exhaustive) for p in (1, 2, 3, 7)]


def slices_of(x, p):
    """x (N, C, ...) or (C,) by torch.chunk's rule, and where each slice begins; the last may be empty."""
    dim = min(1, x.dim() - 1)
    classes = x.shape[dim]
    each = -(-classes // p)
    firsts = [min(rank * each, classes) for rank in range(p)]
    return [(x.narrow(dim, first, min(each, classes - first)), first) for first in firsts]


def sharded(x, target, weight, sample_weight, p, dloss=None, dlse=None, **options):
    """loss, lse and, for these gradients of theirs, that of the logits, from slices that know of no other."""
    ignore_index, reduction, smoothing, z_loss, softcap = (DEFAULTS | options).values()
    dim = min(1, x.dim() - 1)
    classes, slices = x.shape[dim], slices_of(x, p)
    gathered = torch.stack(
        [
            class_shards.statistics(part, target, weight, first, ignore_index, smoothing, softcap)
            for part, first in slices
        ]
    )
    rows = target, weight, sample_weight
    loss, lse, stats, total = class_shards.combined(
        gathered, *rows, classes, ignore_index, reduction, smoothing, z_loss, True, True, x.dtype
    )
    total = total if reduction == "mean" else None
    dloss = torch.ones_like(loss) if dloss is None else dloss
    numbers = classes, ignore_index, smoothing, z_loss, softcap
    parts = [class_shards.gradient(dloss, dlse, part, *rows, stats, total, first, *numbers) for part, first in slices]
    return loss, lse, torch.cat(parts, dim)


def unsharded(x, target, weight, sample_weight, dloss=None, dlse=None, **options):
    """The same by torch's own operations."""
    x = x.detach().requires_grad_()
    loss, lse = cross_entropy_formula(x, target, weight, sample_weight, *(DEFAULTS | options).values(), True)
    dloss = torch.ones_like(loss) if dloss is None else dloss.to(loss.dtype)
    return loss, lse, torch.autograd.grad((loss, lse), x, (dloss, torch.zeros_like(lse) if dlse is None else dlse))[0]


def drawn(shape, options, dtype, device):
    """Logits, target, class weights and sample weights, and the options without these."""
    x = torch.randn(shape, dtype=torch.float64).mul(2).to(device, dtype)
    classes = shape[min(1, len(shape) - 1)]
    rows = (*shape[: min(1, len(shape) - 1)], *shape[2:])
    target = torch.randint(classes, rows, device=device)
    target.view(-1)[len(target.view(-1)) // 2] = options.get("ignore_index", -100)
    options = dict(options)
    weight, sample_weight = (
        torch.rand(size, dtype=torch.float64).add(0.5).to(device, dtype) if options.pop(name, False) else None
        for name, size in (("weight", classes), ("sample_weight", rows))
    )
    return (x, target, weight, sample_weight), options


def check(tensors, options, p, compare):
    """Ours, torch's in the same dtype and the float64 truth, for gradients of loss and lse that differ by row."""
    x, target, *_ = tensors
    reduction, rows = options.get("reduction", "mean"), target.shape
    dloss = torch.linspace(0.5, 2, target.numel()).view(rows) if reduction == "none" else torch.tensor(0.75)
    given = {"dloss": dloss.to(x), "dlse": torch.linspace(-1, 1, target.numel()).view(rows).to(x.device)}
    ours = sharded(*tensors, p, **given, **options)
    stock = unsharded(*tensors, **given, **options)
    wide = (t if t is None or not t.is_floating_point() else t.cpu().double() for t in tensors)
    truth = unsharded(
        *(t if t is None else t.cpu() for t in wide), **{name: t.cpu().double() for name, t in given.items()}, **options
    )
    for results in zip(ours, stock, truth, strict=True):
        compare(*results)


@pytest.mark.parametrize("p", WIDE)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_the_unsharded_loss(options, p, device, either_backend, as_accurate_as_torch):
    tensors, options = drawn((6, 11), OPTIONS[options], torch.float32, device)
    check(tensors, options, p, as_accurate_as_torch)


@pytest.mark.parametrize("options", ["none", "everything"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype, options, device, either_backend, as_accurate_as_torch):
    tensors, options = drawn((5, 13), OPTIONS[options], dtype, device)
    check(tensors, options, 3, as_accurate_as_torch)


@pytest.mark.parametrize("shape", [(9,), (1, 1), (3, 5, 4), (2, 6, 2, 3), (33, 16), (2, 9001)], ids=str)
def test_shapes(shape, device, either_backend, as_accurate_as_torch):
    """Also of one row, of rows along the last dimensions and of slices that go through the registers in steps."""
    tensors, options = drawn(shape, OPTIONS["smoothed, class weights"], torch.float32, device)
    check(tensors, options, 2, as_accurate_as_torch)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_strides_are_read_in_place(layout, device, triton_backend, as_accurate_as_torch):
    (x, target, weight, sample_weight), options = drawn((10, 12), OPTIONS["everything"], torch.float32, device)
    arranged = {
        "transposed": lambda: x.t().contiguous().t(),
        "sliced": lambda: torch.stack([x, x], -1)[..., 0],
        "expanded": lambda: x[:1].expand_as(x),
    }[layout]()
    doubled = [torch.stack([t, t], 1)[:, 0] for t in (target, weight, sample_weight)]
    check((arranged, *doubled), options, 3, as_accurate_as_torch)


@pytest.mark.parametrize(
    ("row", "loss"),
    [
        ([0.0, math.inf, 0.0], math.nan),
        ([math.inf, 0.0, 0.0], math.nan),
        ([0.0, -math.inf, 0.0], math.inf),
        ([-math.inf, 0.0, -math.inf], 0.0),
        ([-math.inf, 0.0, 0.0], math.log(2)),
        ([-math.inf] * 3, math.nan),
        ([0.0, math.nan, 0.0], math.nan),
        ([math.nan, 0.0, 0.0], math.nan),
        ([-3e38, -3e38, -3e38], math.log(3)),
        ([3e38, -3e38, 0.0], math.inf),
    ],
    ids=str,
)
@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_rows_as_torch(row, loss, p, smoothing, device, either_backend):
    """The label is 1 in every row; the other row is an ordinary one and must stay so."""
    x = torch.tensor([row, [1.0, 2.0, 3.0]], device=device)
    target = torch.tensor([1, 1], device=device)
    ours = sharded(x, target, None, None, p, reduction="none", label_smoothing=smoothing)
    stock = unsharded(x, target, None, None, reduction="none", label_smoothing=smoothing)
    for found, expected in zip(ours[::2], stock[::2], strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)
    if not smoothing:
        assert ours[0][0].item() == pytest.approx(loss, nan_ok=True)


def test_a_slice_of_no_class_counts_for_nothing(device, either_backend):
    """Also beside logits so far below 0 that a maximum of 0 would leave none of them."""
    x, target = torch.tensor([[-1e3, -1001.0, -1e3]], device=device), torch.tensor([1], device=device)
    loss, _, dx = sharded(x, target, None, None, 4)
    stock = unsharded(x, target, None, None)
    torch.testing.assert_close((loss, dx), stock[::2])


def test_ignored_rows(device, either_backend):
    """Whatever their logits are, and where all of them are."""
    x = torch.tensor([[math.nan, 0.0, 1.0, math.inf], [1.0, 2.0, 3.0, 4.0]], device=device)
    for target in ([-100, 1], [-100, -100]):
        target = torch.tensor(target, device=device)
        ours, stock = (f(x, target, None, None, *rest) for f, rest in ((sharded, (2,)), (unsharded, ())))
        torch.testing.assert_close(ours[0], stock[0], equal_nan=True)
        assert not ours[2][0].any() and ours[2].isfinite().all()
        torch.testing.assert_close(ours[2][1], stock[2][1])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label", [-1, 7, 10**9])
def test_a_class_out_of_range_is_nan_in_its_row_alone(label, weighted, device, either_backend):
    x = torch.randn(3, 7, device=device)
    target = torch.tensor([0, label, 6], device=device)
    weight = torch.rand(7, device=device) if weighted else None
    loss, _, dx = sharded(x, target, weight, None, 3, reduction="none")
    assert loss.isnan().tolist() == dx.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, device, either_backend):
    nothing = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device), None, None
    ours, stock = sharded(*nothing, 2, reduction=reduction), unsharded(*nothing, reduction=reduction)
    for found, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("C", [1, 5, 4100])
def test_the_gradient_takes_the_logits_place(C, device, either_backend):
    """Each program has read what it writes; more classes than one program's are there as well."""
    (x, target, *_), _ = drawn((3, 2 * C), {}, torch.bfloat16, device)
    part = x[:, C:].clone()
    numbers = class_shards.statistics(x, target, None, 0, -100, 0.0, 0.0)[None]
    *_, stats, total = class_shards.combined(numbers, target, None, None, 2 * C, -100, "mean", 0.0, 0.0, False, True)
    rows = torch.ones((), device=device), None, part, target, None, None, stats, total
    options = C, 2 * C, -100, 0.0, 0.0, 0.0
    expected = class_shards.gradient(*rows, *options)
    assert class_shards.gradient(*rows, *options, into=part) is part
    assert torch.equal(part, expected)


@pytest.mark.parametrize("mixed", ["kernels first", "torch first"])
def test_processes_may_differ_in_what_they_run(mixed, device):
    """One whose compiler fails counts as the others do."""
    (x, target, *_), _ = drawn((4, 8), {}, torch.float32, device)
    backends = ("triton", "torch") if mixed == "kernels first" else ("torch", "triton")
    gathered = []
    for name, (part, first) in zip(backends, slices_of(x, 2), strict=True):
        with backend.use_backend(name):
            gathered.append(class_shards.statistics(part, target, None, first, -100, 0.1, 0.0))
    loss, *_ = class_shards.combined(torch.stack(gathered), target, None, None, 8, -100, "mean", 0.1, 0.0, False, False)
    expected = torch.nn.functional.cross_entropy(x, target, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("kernel", ["_statistics_kernel", "_combine_kernel", "_backward_kernel"])
def test_what_cannot_be_compiled_is_torchs_for_that_part_alone(kernel, auto, refused, device):
    tensors, options = drawn((4, 8), OPTIONS["everything"], torch.float32, device)
    refused.kernels = kernel
    with pytest.warns(RuntimeWarning, match="cannot be compiled or loaded"):
        ours = sharded(*tensors, 2, **options)
    for found, expected in zip(ours, unsharded(*tensors, **options), strict=True):
        torch.testing.assert_close(found, expected)


def test_one_launch_a_part(launches, device, triton_backend):
    (x, target, *_), _ = drawn((6, 10), {}, torch.float32, device)
    counts = []
    for run in (
        lambda: class_shards.statistics(x[:, 5:], target, None, 5, -100, 0.0, 0.0),
        lambda: class_shards.combined(
            torch.rand(4, 3, 6, device=device), target, None, None, 10, -100, "mean", 0.0, 0.0, False, True
        ),
        lambda: class_shards.gradient(
            torch.ones((), device=device), None, x[:, 5:], target, None, None, torch.rand(2, 6, device=device), None,
            5, 10, -100, 0.0, 0.0, 0.0,
        ),
    ):  # fmt: skip
        launches.reset()
        run()
        counts.append(launches.count)
    assert counts == [1, 1, 1]


# The function, of one process


@pytest.mark.parametrize("options", OPTIONS)
def test_alone_it_is_cross_entropy(options, device, either_backend):
    (x, target, weight, sample_weight), options = drawn((5, 7), OPTIONS[options], torch.float32, device)
    stock = unsharded(x, target, weight, sample_weight, **options)
    x = x.requires_grad_()
    options["softcap"] = options.pop("softcap", None)
    module = VocabParallelCrossEntropyLoss(weight, return_lse=True, **options)
    loss, lse = module(x, target, sample_weight=sample_weight)
    ours = loss, lse, torch.autograd.grad(loss, x, torch.ones_like(loss))[0]
    for found, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert torch.equal(
            vocab_parallel_cross_entropy(x, target, weight, sample_weight=sample_weight, **options), loss
        )


def test_a_mean_of_rows_without_weight(device, either_backend):
    """NaN, as torch's: smoothed, the loss of classes of weight 0 is not 0."""
    weight = torch.tensor([0.0, 1.0, 1.0], device=device)
    x, target = torch.rand(3, 3, device=device, requires_grad=True), torch.tensor([0, 0, -100], device=device)
    loss = vocab_parallel_cross_entropy(x, target, weight, label_smoothing=0.1)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and dx[:2].isnan().all() and not dx[2].any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_no_classes(options, device, either_backend):
    """All rows ignored, as they must be."""
    x, target = torch.rand(3, 0, device=device), torch.full((3,), -100, device=device)
    assert vocab_parallel_cross_entropy(x, target, classes=0, **options).isnan()
    assert not vocab_parallel_cross_entropy(x, target, reduction="none", **options).any()


def test_gradient_of_the_log_sum_exp_alone(device, either_backend):
    (x, target, *_), _ = drawn((5, 7), {}, torch.float32, device)
    x = x.requires_grad_()
    _, lse = vocab_parallel_cross_entropy(x, target, return_lse=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), x)[0], x.softmax(1))


def test_autocast_takes_logits_in_float32(device, either_backend):
    (x, target, weight, _), _ = drawn((5, 7), {"weight": True}, torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        ours = vocab_parallel_cross_entropy(x, target, weight)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(x.float(), target, weight.float()))


def given(**changed):
    return {"logits": torch.zeros(4, 6), "target": torch.zeros(4, dtype=torch.int64)} | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param({"logits": [1.0]}, TypeError, "logits must be Tensor, not list", id="a list"),
        pytest.param({"target": torch.rand(4, 6)}, TypeError, "class indices .* got probabilities", id="probabilities"),
        pytest.param({"target": torch.zeros(4).int()}, RuntimeError, "Long or Byte, but got torch.int32", id="int32"),
        pytest.param(
            {"target": torch.zeros(3).long()}, ValueError, r"batch_size \(4\) to match .* \(3\)", id="batch"
        ),
        pytest.param(
            {"logits": torch.zeros(4, 6, 5), "target": torch.zeros(4, 2).long()},
            RuntimeError, r"Expected target size \[4, 5\], got \[4, 2\]", id="spatial",
        ),
        pytest.param({"target": torch.full((4,), 6)}, IndexError, "Target 6 is out of bounds", id="class too large"),
        pytest.param({"logits": torch.zeros(4, 6).long()}, NotImplementedError, "torch.int64", id="integers"),
        pytest.param({"logits": torch.zeros(())}, RuntimeError, "dimension of classes", id="one number"),
        pytest.param({"weight": torch.ones(5)}, RuntimeError, "either for all 6 classes", id="weight's length"),
        pytest.param({"weight": torch.ones(6).double()}, RuntimeError, "torch.float32 but found", id="weight's dtype"),
        pytest.param(
            {"weight": torch.ones(6).requires_grad_()}, RuntimeError, "get no gradient", id="weight's gradient"
        ),
        pytest.param({"label_smoothing": 1.5}, RuntimeError, "between 0.0 and 1.0. Got: 1.5", id="smoothing"),
        pytest.param({"reduction": "foo"}, ValueError, "foo is not a valid value for reduction", id="reduction"),
        pytest.param({"z_loss": -1.0}, ValueError, "z_loss must not be negative", id="z_loss"),
        pytest.param({"softcap": 0.0}, ValueError, "softcap must be positive", id="softcap"),
        pytest.param({"sample_weight": torch.ones(3)}, ValueError, "one number for each row", id="sample weights"),
        pytest.param({"classes": 7}, ValueError, "7 classes", id="a slice of another size"),
        pytest.param({"target": torch.zeros(4, device="meta").long()}, RuntimeError, "same device", id="device"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_launched(changed, error, message, monkeypatch):
    monkeypatch.setattr(autograd, "vocab_parallel_cross_entropy", None)
    with pytest.raises(error, match=message):
        vocab_parallel_cross_entropy(**given(**changed))


def test_accepted_as_torch_accepts_it():
    """Labels of bytes, and a negative smoothing, which is none."""
    x, target = torch.randn(4, 6), torch.tensor([0, 5, 2, 3])
    ours = vocab_parallel_cross_entropy(x, target.byte(), label_smoothing=-0.5)
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(x, target))


def test_second_derivatives_and_transforms_are_refused(device, either_backend):
    x, target = torch.zeros(4, 6, device=device).requires_grad_(), torch.zeros(4, dtype=torch.int64, device=device)
    rule = distributed.vocab_parallel_cross_entropy
    with pytest.raises(RuntimeError, match="first derivative alone"):
        torch.autograd.grad(rule(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative alone"):
        torch.func.jvp(lambda x: rule(x, target), (x,), (x,))
