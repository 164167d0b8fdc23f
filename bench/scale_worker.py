"""What one process of several does for bench/scale.py, which starts it: calls of the network, of heads, and of both.

python -m bench.scale_worker OUT --rounds N [--smoke]     writes [kind, case, seconds] of each call
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist

IN_A_ROUND = 0.02  # seconds within which a call is repeated: the shorter it is, the more its samples differ
MOST_REPEATS = 20
WAYS = ("replicated", "sharded")


class Shape(NamedTuple):
    """Of all processes together."""

    tokens: int
    hidden: int
    classes: int
    chunk_rows: int


# Bytes that each process hands in, and heads that each has for itself: what rates are fitted to.
SENT = [("all_reduce", size) for size in (2**12, 2**17, 2**20, 2**22, 2**23)]
SENT += [("all_gather", size) for size in (2**10, 2**13, 2**15, 2**18)]
ALONE = (  # passes, products, many chunks, and between; last the reading of inputs, and of weights
    Shape(512, 8, 2048, 256),
    Shape(2048, 16, 512, 1024),
    Shape(256, 1024, 768, 128),
    Shape(512, 384, 1280, 256),
    Shape(512, 32, 256, 32),
    Shape(1536, 128, 640, 768),
    Shape(512, 192, 3072, 128),
    Shape(1536, 896, 4, 512),
    Shape(2, 1280, 2560, 2),
)
# What is predicted.
SHARED = (
    Shape(512, 256, 8192, 128),
    Shape(1024, 256, 4096, 256),
    Shape(2048, 512, 1024, 512),
    Shape(4096, 128, 1024, 512),
    Shape(4096, 64, 512, 1024),
)
# The same, each way where at least half of the step is the network's: few classes, or few tokens.
MOSTLY_SENT = {
    "sharded": (Shape(2048, 1024, 4, 1024), Shape(4096, 768, 4, 1024)),
    "replicated": (Shape(4, 1024, 4096, 4), Shape(4, 1536, 2048, 4)),
}
SMOKE = Shape(64, 16, 64, 32)


def shared(way: str) -> tuple[Shape, ...]:
    return SHARED + MOSTLY_SENT[way]


def worker(out: Path, rounds: int, smoke: bool) -> None:
    """In turn, round by round: each call's seconds are those of the slowest process, its figure their median."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    calls = _calls(dist.get_world_size(), smoke)
    for call in calls.values():
        call()
    repeats = [_repeats(call) for call in calls.values()]
    samples: list[list[torch.Tensor]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times, found in zip(calls.values(), repeats, samples, strict=True):
            found.append(_seconds(call, times))
    if dist.get_rank() == 0:
        cases = zip(calls, samples, strict=True)
        out.write_text(json.dumps([[kind, list(case), torch.cat(found).tolist()] for (kind, case), found in cases]))
    dist.destroy_process_group()


def _repeats(call: Callable[[], object]) -> int:
    """In a round, alike on all processes."""
    return max(1, min(MOST_REPEATS, int(IN_A_ROUND / float(_seconds(call, 3).min()))))


def _seconds(call: Callable[[], object], times: int) -> torch.Tensor:
    """Of each time, as the slowest process has it."""
    samples = torch.empty(times, dtype=torch.float64)
    for at in range(times):
        dist.barrier()
        started = time.perf_counter()
        call()
        samples[at] = time.perf_counter() - started
    dist.all_reduce(samples, dist.ReduceOp.MAX)
    return samples


def _calls(world: int, smoke: bool) -> dict[tuple[str, tuple], Callable[[], object]]:
    alone = [dist.new_group([rank]) for rank in range(world)][dist.get_rank()]
    sent, of_one = (SENT[:1] + SENT[-1:], [SMOKE]) if smoke else (SENT, ALONE)
    calls: dict[tuple[str, tuple], Callable[[], object]] = {}
    for kind, size in sent:
        calls["sent", (kind, size)] = _collective(kind, size, world)
    for shape in of_one:
        calls["alone replicated", shape] = _replicated(shape, 1)
        calls["alone sharded", shape] = _sharded(shape, alone)
    for shape in [SMOKE] if smoke else shared("replicated"):
        calls["replicated", shape] = _replicated(shape, world)
    for shape in [SMOKE] if smoke else shared("sharded"):
        calls["sharded", shape] = _sharded(shape, dist.group.WORLD)
    return calls


def _collective(kind: str, size: int, world: int) -> Callable[[], object]:
    x = torch.zeros(size // 4)
    if kind == "all_reduce":
        return lambda: dist.all_reduce(x)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    y = torch.zeros(world * size // 4)
    return lambda: gather(y, x)


def _head(shape: Shape, tokens: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(tokens, shape.hidden, requires_grad=True)
    w = (torch.randn(classes, shape.hidden) / shape.hidden**0.5).requires_grad_()
    return x, w, torch.randint(shape.classes, (tokens,))


def _replicated(shape: Shape, world: int) -> Callable[[], object]:
    """As DistributedDataParallel has it: the whole head, a part of the tokens, the sum of dW."""
    from fusedact.functional import linear_cross_entropy

    x, w, target = _head(shape, shape.tokens // world, shape.classes)
    options = SimpleNamespace(batch_chunk_size=shape.chunk_rows)  # of torch.nn.LinearCrossEntropyOptions

    def step() -> None:
        loss = linear_cross_entropy(x, w, target, options=options)
        _, dw = torch.autograd.grad(loss, (x, w))
        if world > 1:
            dist.all_reduce(dw)

    return step


def _sharded(shape: Shape, group: dist.ProcessGroup) -> Callable[[], object]:
    from fusedact.distributed import vocab_parallel_linear_cross_entropy

    x, w, target = _head(shape, shape.tokens, shape.classes // dist.get_world_size(group))

    def step() -> None:
        loss = vocab_parallel_linear_cross_entropy(
            x, w, target, group=group, classes=shape.classes, chunk_rows=shape.chunk_rows
        )
        torch.autograd.grad(loss, (x, w))

    return step


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.scale_worker")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--smoke", action="store_true")
    worker(**vars(parser.parse_args()))
