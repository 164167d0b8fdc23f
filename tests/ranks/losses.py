"""Cross-entropy of classes that are spread over the processes, against the unsharded loss."""

import pytest
import torch
import torch.distributed as dist

from fusedact import functional
from fusedact.autograd import class_shards
from fusedact.distributed import VocabParallelCrossEntropyLoss, vocab_parallel_cross_entropy

OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weighted": {"weight": True, "sample_weight": True},
    "smoothed": {"label_smoothing": 0.1, "weight": True},
    "capped": {"softcap": 3.0, "z_loss": 1e-2, "reduction": "none", "sample_weight": True},
    "everything": {"weight": True, "sample_weight": True, "label_smoothing": 0.2, "softcap": 3.0, "z_loss": 1e-2},
}
BACKENDS = ["auto", pytest.param("triton", marks=pytest.mark.exhaustive)]


def drawn(shape, options, dtype):
    """Logits (N, C, ...), target, and the options with their tensors."""
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    target = torch.randint(shape[1], (shape[0], *shape[2:]))
    target.view(-1)[1] = -100
    options = dict(options)
    for name, like in (("weight", shape[1:2]), ("sample_weight", target.shape)):
        if options.pop(name, False):
            options[name] = torch.rand(like, dtype=torch.float64).add(0.5).to(dtype)
    return x, target, options


def my_classes(x, rank, world):
    """This process's slice of (N, C, ...), which may be empty."""
    each = -(-x.shape[1] // world)
    return x[:, rank * each : (rank + 1) * each]


def whole(part, classes, world):
    """The slices of all processes, side by side."""
    each = -(-classes // world)
    padded = part.new_zeros(part.shape[0], each, *part.shape[2:])
    padded[:, : part.shape[1]] = part
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat(parts, 1)[:, :classes]


def with_gradient(loss, x, *args, **options):
    """The loss and its gradient, whose own gradient is 0.5 everywhere."""
    x = x.detach().clone().requires_grad_()
    value = loss(x, *args, **options)
    return value.detach(), torch.autograd.grad(value, x, torch.full_like(value, 0.5))[0]


def unsharded(x, target, options, dtype):
    options = {name: v.to(dtype) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    return with_gradient(functional.cross_entropy, x.to(dtype), target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("shape", [(6, 11), pytest.param((2, 5, 3), marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_one_process(rank, world, equal, options, shape, dtype):
    x, target, given = drawn(shape, OPTIONS[options], dtype)
    loss, dx = with_gradient(
        vocab_parallel_cross_entropy, my_classes(x, rank, world), target, classes=shape[1], **given
    )
    ours = [loss, whole(dx, shape[1], world)]
    name = f"cross-entropy by classes, {options}, {str(dtype).removeprefix('torch.')}"
    equal(name, ours, unsharded(x, target, given, torch.float64), unsharded(x, target, given, dtype))


@pytest.mark.parametrize("options", ["mean", pytest.param("everything", marks=pytest.mark.exhaustive)])
def test_kernels_equal_one_process(rank, world, equal, triton_backend, options):
    test_equals_one_process(rank, world, equal, options, (4, 7), torch.float32)


def test_fewer_classes_than_processes(rank, world, equal):
    """Where the last process has none: of 3 classes on 4 processes, of 1 on 2."""
    test_equals_one_process(rank, world, equal, "weighted", (5, world - 1), torch.float32)


def test_every_process_has_the_same_bits(rank, world):
    """The loss of all, twice; and the gradient, of which each has its own part, twice."""
    x, target, given = drawn((9, 13), OPTIONS["everything"], torch.float32)
    runs = [
        with_gradient(vocab_parallel_cross_entropy, my_classes(x, rank, world), target, classes=13, **given)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    losses = [torch.empty_like(runs[0][0]) for _ in range(world)]
    dist.all_gather(losses, runs[0][0])
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_one_gather_a_call(rank, world, monkeypatch):
    """12 bytes a row from every process, and nothing in backward."""
    sent = []
    gather = class_shards._all_gather
    monkeypatch.setattr(class_shards, "_all_gather", lambda into, x, **how: sent.append(x) or gather(into, x, **how))
    x, target, _ = drawn((7, 9), {}, torch.bfloat16)
    with_gradient(vocab_parallel_cross_entropy, my_classes(x, rank, world), target, classes=9)
    assert [(t.dtype, t.numel()) for t in sent] == [(torch.float32, 3 * 7)]


def test_compiled(rank, world, equal):
    """One graph without a break, which keeps the exchange inside one op."""
    x, target, given = drawn((6, 8), OPTIONS["smoothed"], torch.float32)
    module = VocabParallelCrossEntropyLoss(given["weight"], classes=8, label_smoothing=0.1, return_lse=True)

    def rule(x, scale):
        loss, lse = module(x * scale, target)
        return loss + lse.sum()

    part = my_classes(x, rank, world)
    eager = with_gradient(rule, part, 2.0)
    compiled = with_gradient(torch.compile(rule, backend="aot_eager", fullgraph=True), part, 2.0)
    for found, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(found, expected)


def test_some_of_the_processes(rank, world):
    """A loss of each half of four processes, of other logits in each; of two or three, each by itself."""
    halves = [(0, 1), (2, 3)] if world == 4 else [(r,) for r in range(world)]
    groups = [dist.new_group(list(members)) for members in halves]
    mine = next(i for i, members in enumerate(halves) if rank in members)
    x, target, _ = drawn((5, 6), {}, torch.float64)
    x = x + mine * torch.arange(6.0)
    part = my_classes(x, halves[mine].index(rank), len(halves[mine]))
    loss = vocab_parallel_cross_entropy(part, target, group=groups[mine], classes=6)
    torch.testing.assert_close(loss, functional.cross_entropy(x, target))
    with pytest.raises((ValueError, TypeError), match="group"):
        vocab_parallel_cross_entropy(part, target, group=groups[mine - 1], classes=6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"classes": 100}, ValueError, "classes", id="slice of another size"),
        pytest.param({"classes": None}, ValueError, "classes must be given where", id="classes of no number"),
        pytest.param({"target": torch.rand(4, 6)}, TypeError, "probabilities", id="probabilities"),
        pytest.param({"target": torch.full((4,), 6)}, IndexError, "Target 6 is out of bounds", id="target too large"),
        pytest.param({"weight": torch.ones(3)}, RuntimeError, "all 6 classes", id="weight of a slice"),
    ],
)
def test_refused_before_anything_is_sent(rank, world, monkeypatch, change, error, message):
    monkeypatch.setattr(class_shards, "exchange", None)
    given = {"target": torch.zeros(4, dtype=torch.int64), "classes": 6} | change
    with pytest.raises(error, match=message):
        vocab_parallel_cross_entropy(my_classes(torch.zeros(4, 6), rank, world), **given)


def test_a_second_derivative_is_refused(rank, world):
    x = my_classes(torch.zeros(4, 6), rank, world).requires_grad_()
    target = torch.zeros(4, dtype=torch.int64)
    loss = vocab_parallel_cross_entropy(x, target, classes=6)
    with pytest.raises(RuntimeError, match="first derivative alone"):
        torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivative alone"):
        torch.func.grad(lambda x: vocab_parallel_cross_entropy(x, target, classes=6))(x)
