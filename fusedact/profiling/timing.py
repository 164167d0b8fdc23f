"""Calls timed against each other: on a GPU cold, as launched and on the wall; on a CPU the thread's time."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one sample: µs a call

SHORT = 1e-3  # seconds: from here on a call's launches hide behind its own work


@dataclass(frozen=True)
class Effort:
    """Rounds; seconds that a sample aims at; input sets at most; edge and elements of a ceiling's tensors."""

    rounds: int
    seconds: float
    sets: int
    edge: int
    elements: int


FULL = Effort(rounds=5, seconds=0.01, sets=128, edge=8192, elements=2**30)
DRY = Effort(rounds=2, seconds=0.0005, sets=2, edge=64, elements=2**12)


def timed(calls: dict[str, list[Call]], device: torch.device, effort: Effort) -> dict:
    """Every kind of time of every contender, each of whose calls takes another set of inputs.

    On a CPU the thread's time. On a GPU the device's from a cold L2, a launch's between events, the wall's, and
    the memory that a call takes.
    """
    first = {name: each[0] for name, each in calls.items()}
    seconds = {name: _first_seconds(call) for name, call in first.items()}

    def samplers(sample: Callable[..., float], most: int) -> dict[str, Sampler]:
        counts = {name: max(1, min(most, int(effort.seconds / s))) for name, s in seconds.items()}
        return {name: partial(sample, call, counts[name]) for name, call in first.items()}

    if device.type == "cpu":
        return {"times": {"cpu": _interleaved(samplers(thread, 1000), effort.rounds)}}
    method, cold = _cold(calls, max(seconds.values()), effort)
    return {
        "cold_by": method,
        "times": {
            "cold": _interleaved(cold, effort.rounds),
            "launched": _interleaved(samplers(_launched, 50), effort.rounds),
            "wall": _interleaved(samplers(wall, 1000), effort.rounds),
        },
        "memory": {name: _memory(call) for name, call in first.items()},
    }


def _interleaved(samplers: dict[str, Sampler], rounds: int) -> dict[str, dict[str, float]]:
    """Median, 20 and 80 % points in µs. Each round gives everyone a turn, and stock, for the noise, another."""
    samplers = samplers | {"again": samplers["stock"]}
    samples = [{name: sample() for name, sample in samplers.items()} for _ in range(rounds)]
    return {name: _spread([each[name] for each in samples]) for name in samplers}


def _spread(samples: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": low, "p80": high}


def thread(call: Call, count: int) -> float:
    return _loop(call, count, time.thread_time)


def wall(call: Call, count: int) -> float:
    return _loop(call, count, time.perf_counter)


def _loop(call: Call, count: int, clock: Callable[[], float]) -> float:
    wait()
    started = clock()
    for _ in range(count):
        call()
    wait()
    return (clock() - started) / count * 1e6


def _launched(call: Call, count: int) -> float:
    """As triton.testing.do_bench, its median: events around a call, the L2 flushed before, which hides the host."""
    pairs = [_events() for _ in range(count)]
    for start, end in pairs:
        _scratch().zero_()
        start.record()
        call()
        end.record()
    wait()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def _cold(calls: dict[str, list[Call]], longest: float, effort: Effort) -> tuple[str, dict[str, Sampler]]:
    """Device time over all sets in turn: short calls from a graph where they can be captured, else from a queue."""
    sets = len(calls["stock"])
    turns = max(1, math.ceil(min(20, effort.seconds / longest) / sets))
    many = {name: each * turns for name, each in calls.items()}
    method = "queue"
    if longest < SHORT:
        try:
            graphs = {name: captured(each) for name, each in many.items()}
            return "graph", {name: partial(queued, [graph.replay], sets * turns) for name, graph in graphs.items()}
        except RuntimeError as error:
            method = f"queue, since the graph failed: {error}"
    return method, {name: partial(queued, each, sets * turns) for name, each in many.items()}


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()  # whatever it compiles or allocates once must not happen inside the capture
    graph = torch.cuda.CUDAGraph()
    wait()
    graph.capture_begin()
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()
    return graph


def queued(runs: list[Call], calls: int) -> float:
    """Device µs for each of the `calls` in `runs`, queued behind memory traffic that gives the host a lead."""
    start, end = _events()
    for _ in range(5):
        _scratch().zero_()
    start.record()
    for run in runs:
        run()
    end.record()
    wait()
    return start.elapsed_time(end) / calls * 1e3


def _memory(call: Call) -> int:
    """Bytes that a call holds at its peak, beyond what was there before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@cache
def _scratch() -> Tensor:
    """Larger than any L2 in view."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def _first_seconds(call: Call) -> float:
    call()
    return seconds_of(call)


def seconds_of(call: Call) -> float:
    return wall(call, 1) * 1e-6


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
