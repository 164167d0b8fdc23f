"""The bytes of fusedact.distributed.scaling are those that a head hands to collectives, and no other."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from fusedact.distributed import vocab_parallel_linear_cross_entropy
from fusedact.distributed.scaling import Collective, head_step
from fusedact.functional import linear_cross_entropy

TOKENS, HIDDEN, CHUNK_ROWS = 40, 6, 16  # three chunks, the last one shorter
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


@pytest.fixture
def handed(monkeypatch) -> list[Collective]:
    """What this process hands in, call by call."""
    calls: list[Collective] = []
    for kind, name, at in (
        ("all_reduce", "all_reduce", 0),
        ("all_gather", "all_gather_into_tensor", 1),
        ("all_gather", "all_gather_single", 1),
    ):
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, partial(_told, calls, kind, at, getattr(dist, name)))
    return calls


def _told(calls, kind, at, call, *args, group=None, **options):
    given = args[at]
    calls.append(Collective(kind, given.numel() * given.element_size(), dist.get_world_size(group)))
    return call(*args, group=group, **options)


def _shards(rank: int, world: int, size: int) -> Iterator[dist.ProcessGroup]:
    """The group of neighbours that this process shares the classes with, that of those with the same classes."""
    groups = [dist.new_group(list(range(at, at + size))) for at in range(0, world, size)]
    across = [dist.new_group(list(range(at, world, size))) for at in range(size)]
    yield groups[rank // size]
    yield across[rank % size]


@pytest.mark.parametrize("smoothing", [0.0, 0.1], ids=["", "smoothed"])
@pytest.mark.parametrize("itemsize", DTYPES)
def test_a_sharded_head_sends_what_the_model_says(rank, world, handed, itemsize, smoothing):
    dtype, classes = DTYPES[itemsize], 5 * world
    x = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    w = torch.randn(5, HIDDEN, dtype=dtype, requires_grad=True)
    target = torch.randint(classes, (TOKENS,))
    options = {"label_smoothing": smoothing, "chunk_rows": CHUNK_ROWS, "classes": classes}
    vocab_parallel_linear_cross_entropy(x, w, target, **options).backward()
    given = {"itemsize": itemsize, "chunk_rows": CHUNK_ROWS, "numbers": 5 if smoothing else 3}
    cost = head_step(TOKENS, HIDDEN, classes, world, way="sharded", **given)
    assert handed == list(cost.collectives) and cost.chunks == 3


def test_a_loss_alone_sends_no_gradient(world, handed):
    x, w = torch.randn(TOKENS, HIDDEN), torch.randn(5, HIDDEN)
    with torch.no_grad():
        target, classes = torch.randint(5 * world, (TOKENS,)), 5 * world
        vocab_parallel_linear_cross_entropy(x, w, target, classes=classes, chunk_rows=CHUNK_ROWS)
    cost = head_step(TOKENS, HIDDEN, classes, world, way="sharded", itemsize=4, chunk_rows=CHUNK_ROWS)
    assert handed == [each for each in cost.collectives if each.kind == "all_gather"]


class Head(nn.Module):
    """As DistributedDataParallel takes it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, HIDDEN))

    def forward(self, x, target):
        return linear_cross_entropy(x, self.weight, target)


@pytest.mark.exhaustive
def test_a_replicated_head_sends_what_the_model_says(world):
    """By DistributedDataParallel's buckets."""
    sent = []

    def told(state, bucket):
        sent.append(Collective("all_reduce", bucket.buffer().numel() * bucket.buffer().element_size(), world))
        return allreduce_hook(state, bucket)

    model = nn.parallel.DistributedDataParallel(Head(7))
    model.register_comm_hook(None, told)
    model(torch.randn(TOKENS // world, HIDDEN), torch.randint(7, (TOKENS // world,))).backward()
    cost = head_step(TOKENS, HIDDEN, 7, world, way="replicated", itemsize=4, chunk_rows=CHUNK_ROWS)
    assert sent == list(cost.collectives)


def test_nodes_of_two_send_what_the_model_says(rank, world, handed):
    """Two neighbours share the classes, the pairs the tokens."""
    if world % 2:
        pytest.skip("pairs")
    pair, across = _shards(rank, world, 2)
    x = torch.randn(TOKENS * 2 // world, HIDDEN, requires_grad=True)
    w = torch.randn(5, HIDDEN, requires_grad=True)
    target = torch.randint(10, (len(x),))
    vocab_parallel_linear_cross_entropy(x, w, target, group=pair, classes=10, chunk_rows=CHUNK_ROWS).backward()
    if world > 2:
        dist.all_reduce(w.grad, group=across)
    cost = head_step(TOKENS, HIDDEN, 10, world, way="both", itemsize=4, chunk_rows=CHUNK_ROWS, per_node=2)
    assert handed == list(cost.collectives)
