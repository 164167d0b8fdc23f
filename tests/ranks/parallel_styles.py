"""torch's own ways to place a model, on ours: loss_parallel and the parallel styles."""

import copy

import pytest
import torch
from samples.sharded_calls import CLASSES, LOGITS, Case, check, labels, loss, or_kernels, there
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel import loss_parallel as torchs_loss_parallel

import fusedact
from fusedact import nn
from fusedact.distributed import loss_parallel
from fusedact.distributed.parallel import ColwiseParallel, RowwiseParallel
from fusedact.functional.layouts import TWICE


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "shape",
    [LOGITS, *(pytest.param(shape, marks=pytest.mark.exhaustive) for shape in ((2, CLASSES, 3), (CLASSES,)))],
    ids=str,
)
def test_loss_parallel_equals_torchs(shape, reduction, equal, mesh, world):
    """Where torch's can: classes in shards of one size."""
    dim = min(1, len(shape) - 1)
    even = tuple(2 * world if at == dim else size for at, size in enumerate(shape))
    x = torch.randn(even)
    target = torch.randint(even[dim], even[:dim] + even[dim + 1 :])
    weight = None
    if shape == LOGITS:
        target[0] = -100
    else:  # torch's has no gradient of ignored rows with a weight: it reads that of class -100
        weight = torch.rand(even[dim])

    def run(context, dtype=torch.float32):
        parts = there(x.to(dtype), mesh, str(dim)).requires_grad_()
        in_dtype = weight if weight is None else weight.to(dtype)
        with context():
            loss = torch.nn.CrossEntropyLoss(in_dtype, reduction=reduction)(parts, target)
            loss.sum().backward()
        assert parts.grad.placements == parts.placements
        return [loss.full_tensor().detach(), parts.grad.full_tensor()]

    truth = run(torchs_loss_parallel, torch.float64)
    equal(f"loss_parallel, {reduction}", run(loss_parallel), truth, run(torchs_loss_parallel))


@pytest.mark.parametrize(
    ("x", "target", "options"),
    [
        pytest.param("01", "0r", {}, id="rows and classes"),
        pytest.param("10", "r0", {}, id="classes and rows"),
        pytest.param("01", "00", {"label_smoothing": 0.1}, id="smoothed"),
    ],
)
def test_loss_parallel_on_a_mesh_of_two_dimensions(x, target, options, equal, mesh_2d):
    """A mean and label_smoothing, which torch's refuses; and backward outside."""

    def run(*tensors):
        with loss_parallel():
            return torch.nn.functional.cross_entropy(*tensors, **options)

    case = Case(loss("cross_entropy", **options), ((LOGITS, x), (labels, target)), "rr")
    check(equal, f"loss_parallel on a mesh of two dimensions, {options}", case, mesh_2d, run=run)


def test_loss_parallel_leaves_the_rest_alone(mesh, mesh_2d):
    """Plain tensors, other functions; and a plain target that would have to be split is a ValueError."""
    x, target = torch.randn(*LOGITS), labels()
    plain = torch.nn.functional.cross_entropy(x, target)
    with loss_parallel():
        assert torch.equal(torch.nn.functional.cross_entropy(x, target), plain)
        assert torch.equal(torch.nn.functional.relu(x), x.relu())
        parts = there(x, mesh_2d, "01")
        with pytest.raises(ValueError, match="target must be a DTensor"):
            torch.nn.functional.cross_entropy(parts, target)
    parts = there(x, mesh, "1")
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        torch.nn.functional.cross_entropy(parts, target)


class Block(torch.nn.Module):
    """Layers of ours: by columns, by rows, of a sequence, and a loss of its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(6)
        self.up = nn.Linear(6, 8, activation="prelu")
        self.down = nn.Linear(8, 6, activation="relu")
        self.more = nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.LinearCrossEntropyLoss(5, CLASSES, bias=True)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h = self.down(self.up(self.norm(x)))
        return self.head(self.more(h).flatten(0, 1), target)


PLAN = {
    "norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    "down": RowwiseParallel(input_layouts=Shard(2), output_layouts=Replicate()),
    "more.0": ColwiseParallel(output_layouts=Replicate()),
}


@or_kernels
@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["eager", "compiled"]
)
def test_parallel_styles(compiled, equal, rank, world, mesh, kernels):
    """A plan on a model of our layers, whose input is this rank's part of the sequence."""
    if compiled and not TWICE:
        pytest.skip("torch 2.11 has no sharding strategy for prelu's backward, which it compiles")
    model, x = Block(), torch.randn(2, 3 * world, 6)
    target = torch.randint(CLASSES, (2 * 3 * world,))

    def gradients(model, x):
        loss = model(x, target)
        loss.backward()
        whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        return [loss.detach(), *whole]

    with fusedact.use_backend("torch"):
        truth = gradients(copy.deepcopy(model).double(), x.double())
        one = gradients(copy.deepcopy(model), x)
    model = parallelize_module(model, mesh, PLAN)
    run = torch.compile(model, backend="aot_eager") if compiled else model
    ours = gradients(run, x.chunk(world, 1)[rank])
    equal(f"parallelize_module, {'compiled' if compiled else 'eager'}", ours, truth, one)


def test_a_style_that_fails_gives_the_activation_back():
    layer = nn.Linear(4, 6, activation="prelu")
    activation = layer.activation
    with pytest.raises(AttributeError):
        ColwiseParallel()._apply(layer, "no mesh")
    assert layer.activation is activation
