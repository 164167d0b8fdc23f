"""The ops on DTensors, against one process on whole tensors: values, gradients and where they are placed."""

import re

import pytest
import torch
from samples.sharded_calls import (
    CASES,
    CLASSES,
    ON_TWO_DIMENSIONS,
    ROWS,
    W,
    X,
    check,
    drawn,
    first,
    labels,
    learned,
    or_kernels,
    there,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

import fusedact
import fusedact.nn.functional as F
from fusedact.functional.layouts import TWICE


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name, equal, mesh):
    """Uneven shards: five rows on two ranks; and on four, where the last has none of three."""
    check(equal, f"DTensors, {name}", CASES[name], mesh)


def twice(run, given, leaves):
    """The result, and gradients of the gradients' squares: of squares, and of a sum's, whose gradient is whole."""
    y, found = run(*given), []
    for loss in ((y * y).sum(), y.sum().square()):
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        squares = sum((grad * grad).sum() for grad in grads)
        found += [*grads, *torch.autograd.grad(squares, leaves, retain_graph=True)]
    return [y, *found]


IN_CLASSES = {name: case for name, case in CASES.items() if re.search("of classes(?! and)", name)}
IN_ROWS = [name for name in CASES if name not in IN_CLASSES]


@or_kernels
@pytest.mark.parametrize(
    "name", first(IN_ROWS, "cross-entropy", "cross-entropy, sum", "nll", "bce", "linear of a batch", "gelu", "softmax")
)
def test_second_derivatives_equal_one_process(name, mesh, kernels):
    case, tensors = CASES[name], [t.double() if t.is_floating_point() else t for t in drawn(CASES[name])]
    given = [there(t, mesh, letters) for t, (_, letters) in zip(tensors, case.tensors, strict=True)]
    if not TWICE:
        with pytest.raises(RuntimeError, match=r"in torch 2\.13 and newer alone"):
            twice(case.run, given, learned(case, given))
        return
    ours = [t.full_tensor() for t in twice(case.run, given, learned(case, given))]
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(ours, twice(case.run, tensors, learned(case, tensors)))


@pytest.mark.parametrize("name", first(IN_CLASSES, "cross-entropy of classes", "head of classes"))
def test_second_derivatives_of_classes_in_shards_are_refused(name, mesh):
    case, tensors = IN_CLASSES[name], drawn(IN_CLASSES[name])
    given = [there(t, mesh, letters) for t, (_, letters) in zip(tensors, case.tensors, strict=True)]
    with pytest.raises(RuntimeError, match="first derivative alone" if TWICE else r"in torch 2\.13"):
        twice(case.run, given, learned(case, given))


BY_FORMULA = "cross-entropy, of learned weights", "linear of a sequence, a slope of each"  # in one process too


@pytest.mark.parametrize(
    "name", first(CASES, "linear of a batch", "linear by columns", "softmax", "cross-entropy", "head of classes", "bce")
)
def test_kernels_equal_one_process(name, equal, rank, mesh, triton_backend, launches):
    """Local tensors run fused; the last rank may have none."""
    launches.reset()
    check(equal, f"DTensors by kernels, {name}", CASES[name], mesh)
    assert rank or (launches.count > 0) is (name not in BY_FORMULA)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)], ids=str)
@pytest.mark.parametrize(
    "name", ["nll", "cross-entropy", "cross-entropy of classes", "head of rows", "bce with logits"]
)
def test_low_precision_equals_one_process(name, dtype, equal, mesh):
    check(equal, f"DTensors in {dtype}, {name}", CASES[name], mesh, dtype)


@or_kernels
@pytest.mark.parametrize("name", ON_TWO_DIMENSIONS)
def test_a_mesh_of_two_dimensions(name, equal, mesh_2d, kernels):
    check(equal, f"DTensors on a mesh of two dimensions, {name}", ON_TWO_DIMENSIONS[name], mesh_2d)


def test_a_mean_of_means_is_not_the_mean(equal, mesh, world):
    """Ranks have other numbers of rows that count, and one has none: torch 2.13's own is a mean of means, and NaN."""
    x = torch.randn(4 * world, CLASSES)
    target = torch.randint(CLASSES, (4 * world,)).masked_fill(torch.arange(4 * world) < 5, -100)
    given = [there(t, mesh, "0") for t in (x, target)]
    ours = F.cross_entropy(*given).full_tensor()
    one = torch.nn.functional.cross_entropy(x, target)
    equal("DTensors, a mean over ranks", [ours], [torch.nn.functional.cross_entropy(x.double(), target)], [one])
    assert ours.isfinite()


def test_a_sum_over_ranks_is_rounded_once(mesh, world):
    """Were each rank's share rounded first, some of these means would be others."""
    for _ in range(20):
        x, target = torch.randn(5 * world, CLASSES).bfloat16(), torch.randint(CLASSES, (5 * world,))
        loss = F.nll_loss(there(x, mesh, "0"), there(target, mesh, "0")).full_tensor()
        assert torch.equal(loss, torch.nn.functional.nll_loss(x.double(), target).bfloat16())


@pytest.mark.parametrize("at", ["0", "1"])
def test_autocast_takes_the_rules(at, rank, world, mesh, triton_backend, launches):
    """With what torch's losses have not, too."""
    launches.reset()
    x, target, options = torch.randn(ROWS, CLASSES).bfloat16(), labels(), {"z_loss": 0.01, "softcap": 3.0}
    with torch.autocast("cpu", torch.bfloat16):
        ours = F.cross_entropy(there(x, mesh, at), there(target, mesh, "0"), **options)
        assert rank == world - 1 or launches.count
        torch.testing.assert_close(ours.full_tensor(), F.cross_entropy(x, target, **options))
    assert ours.dtype == torch.float32


@or_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_rows_ignored(reduction, mesh, kernels):
    """NaN of a mean, and a gradient of 0."""
    x = there(torch.randn(ROWS, CLASSES), mesh, "0").requires_grad_()
    target = there(torch.full((ROWS,), -100), mesh, "0")
    loss = F.cross_entropy(x, target, reduction=reduction)
    value = loss.full_tensor()
    assert value.isnan() if reduction == "mean" else value == 0
    assert not torch.autograd.grad(loss, x)[0].full_tensor().any()


def partial(t: Tensor, mesh) -> DTensor:
    """Of which each rank has its part of the sum."""
    return DTensor.from_local(t / mesh.size(), mesh, [Partial()])


@or_kernels
@pytest.mark.parametrize("rows", ["0", "r"])
def test_sums_over_ranks_are_added_up_first(rows, mesh, kernels):
    x, w = torch.randn(*X), torch.randn(*W)
    weight = there(w, mesh, rows)
    y = F.linear(partial(x, mesh), weight, activation="gelu").full_tensor()
    torch.testing.assert_close(y, F.linear(x, w, activation="gelu"))
    target = labels() % 6
    loss = F.cross_entropy(partial(x, mesh), there(target, mesh, rows)).full_tensor()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, target))
    torch.testing.assert_close(F.activate(partial(x, mesh), "softsign").full_tensor(), F.softsign(x))


def test_a_sum_under_way_is_waited_for(mesh, kernels, launches):
    """As torch's parallel styles leave it (async_op=True)."""
    x = torch.randn(*X, requires_grad=True)
    parts = there(x.detach(), mesh, "0").requires_grad_()
    launches.reset()
    y = F.activate(parts.redistribute(mesh, [Replicate()], async_op=True), "gelu")
    assert (launches.count > 0) is (fusedact.get_backend() == "triton")
    y.sum().backward()
    expected = torch.nn.functional.gelu(x)
    (dx,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(y.full_tensor(), expected)
    torch.testing.assert_close(parts.grad.full_tensor(), dx)


@or_kernels
def test_rules_trace(mesh, kernels):
    """One graph without a break: a model by columns and rows, then a loss of classes in shards."""
    x, v, w = torch.randn(ROWS, 6), torch.randn(8, 6), torch.randn(CLASSES, 8)
    given = [there(v, mesh, "0"), there(w, mesh, "1"), there(torch.randn(4 * CLASSES, CLASSES), mesh, "0")]
    y, target = there(x, mesh, "r"), there(labels(), mesh, "r")

    def run(x, v, w, head):
        hidden = F.linear(F.linear(x, v, activation="gelu"), w, activation="relu")
        return F.cross_entropy(torch.nn.functional.linear(hidden, head), target)

    found = []
    for rule in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        tensors = [t.detach().requires_grad_() for t in given]
        loss = rule(y, *tensors)
        loss.backward()
        found.append([loss.full_tensor(), *(t.grad.full_tensor() for t in tensors)])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["linear of a batch", "head of rows", "softmax along shards", "bce", "prelu", "nll"])
def test_each_rule_traces(name, equal, mesh):
    if name == "bce" and not TWICE:
        pytest.skip("torch 2.11 compiles it as torch's own operations, whose result is placed in another way")
    compiled = torch.compile(CASES[name].run, backend="aot_eager", fullgraph=True)
    check(equal, f"DTensors compiled, {name}", CASES[name], mesh, run=compiled)


def test_what_no_rule_covers_is_torchs(mesh, launches, triton_backend):
    """Its own errors, before anything is launched."""
    x, w = torch.randn(*X), torch.randn(*W)
    parts = there(x, mesh, "0")
    launches.reset()
    for run in (
        lambda: F.linear(parts, w, activation="gelu"),
        lambda: F.gated(parts, x),
        lambda: F.cross_entropy(parts, labels() % 6),
        lambda: F.linear_cross_entropy(parts, w, labels()),
        lambda: F.binary_cross_entropy_with_logits(parts, x),
        lambda: F.linear(x, there(w, mesh, "0"), activation="gelu"),
    ):
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            run()
    with pytest.raises((RuntimeError, NotImplementedError), match="sharding strategy"):
        torch.ops.fusedact.activation(parts, None, "gelu", [], False)
    assert not launches.count


def test_a_label_out_of_range(mesh):
    """torch's IndexError, of replicated labels on every rank."""
    x = there(torch.randn(ROWS, CLASSES), mesh, "1")
    target = there(torch.full((ROWS,), CLASSES), mesh, "r")
    with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
        F.cross_entropy(x, target)


def test_shards_in_strides_are_torchs(mesh, launches, triton_backend):
    """A placement that no rule knows."""
    x = torch.randn(3, 4)
    strided = DTensor.from_local(x, mesh, [_StridedShard(0, split_factor=1)], run_check=False)
    launches.reset()
    y = F.activate(strided, "gelu")
    torch.testing.assert_close(y.to_local(), torch.nn.functional.gelu(x))
    assert not launches.count
