"""Calls timed against each other: on a GPU cold, as launched and on the wall; on a CPU the thread's time."""

import ctypes
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one sample: µs a call
Times = dict[str, dict[str, Any]]  # of each contender its median, 20 and 80 % points, and samples by round, in µs

INDUCTOR = "inductor"
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's
SHORT = 1e-3  # seconds: from here on a call's launches hide behind its own work


@dataclass(frozen=True)
class Effort:
    """Rounds; seconds that a sample aims at; input sets at most; edge and elements of a ceiling's tensors.

    compiler: torch.compile's backend. epochs: of a trainer's run.
    """

    rounds: int
    seconds: float
    sets: int
    edge: int
    elements: int
    compiler: str = INDUCTOR
    epochs: int = 5


FULL = Effort(rounds=5, seconds=0.01, sets=128, edge=8192, elements=2**30)
ON_CPU = Effort(rounds=15, seconds=0.01, sets=1, edge=1024, elements=2**24)
DRY = Effort(rounds=2, seconds=0.0005, sets=2, edge=64, elements=2**12, compiler="aot_eager", epochs=1)


def effort_on(device: torch.device, rounds: int | None = None) -> Effort:
    effort = FULL if device.type == "cuda" else ON_CPU
    return effort if rounds is None else replace(effort, rounds=rounds)


@contextmanager
def undisturbed(device: torch.device, threads: int) -> Iterator[None]:
    """No collections, on a GPU a stream that is not the default, on a CPU so many of torch's threads.

    Torch is then as it was; glibc goes on keeping freed memory, since it does not say what its limits were. A
    collection inside a graph's capture would free what must not be freed there, and capturing needs the stream.
    """
    before, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        if device.type == "cpu":
            torch.set_num_threads(threads)
            _keep_freed_memory()
        with torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext():
            yield
            wait()
    finally:
        torch.set_num_threads(before)
        torch.set_float32_matmul_precision(precision)
        if collecting:
            gc.enable()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: the allocator keeps each stream's memory for itself."""
    return torch.cuda.Stream(device)


def _keep_freed_memory() -> None:
    """Else glibc returns large blocks to the system, and what fetching them again takes falls on any contender."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, 2**25)  # the most that it takes


def timed(calls: dict[str, list[Call]], device: torch.device, effort: Effort, waiting: Collection[str] = ()) -> dict:
    """Every kind of time of every contender, each of whose calls takes another set of inputs.

    On a CPU the thread's time, of several threads the wall's. On a GPU the device's from a cold L2, a launch's between
    events, the wall's, and the memory that a call takes. waiting: those that no graph can capture.
    """
    first = {name: each[0] for name, each in calls.items()}
    seconds = {name: _first_seconds(call) for name, call in first.items()}

    def samplers(sample: Callable[..., float], most: int) -> dict[str, Sampler]:
        counts = {name: max(1, min(most, int(effort.seconds / s))) for name, s in seconds.items()}
        return {name: partial(sample, call, counts[name]) for name, call in first.items()}

    if device.type == "cpu":
        return {"times": {"cpu": interleaved(samplers(host, 1000), effort.rounds)}}
    cold = {name: _cold(each, seconds[name], effort, name not in waiting) for name, each in calls.items()}
    return {
        "cold_by": {name: method for name, (method, _) in cold.items()},
        "times": {
            "cold": interleaved({name: sampler for name, (_, sampler) in cold.items()}, effort.rounds),
            "launched": interleaved(samplers(_launched, 50), effort.rounds),
            "wall": interleaved(samplers(wall, 1000), effort.rounds),
        },
        "memory": {name: _memory(call) for name, call in first.items()},
    }


def interleaved(samplers: dict[str, Sampler], rounds: int) -> Times:
    """Each round gives everyone a turn, and stock, for the noise, another; who begins changes from round to round."""
    samplers = samplers | {"again": samplers["stock"]}
    names: list[str] = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for at in range(len(names)):
            name = names[(turn + at) % len(names)]
            samples[name].append(samplers[name]())
    return {name: spread(each) | {"samples": each} for name, each in samples.items()}


def spread(numbers: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(numbers, n=5, method="inclusive")
    return {"median": statistics.median(numbers), "p20": low, "p80": high}


def ratios(times: Times, name: str) -> dict[str, float]:
    """Stock's time over this one's, of each round: their median, 20 and 80 % points."""
    pairs = zip(times["stock"]["samples"], times[name]["samples"], strict=True)
    return spread([stock / own for stock, own in pairs])


def host(call: Call, count: int) -> float:
    return _loop(call, count, time.thread_time if torch.get_num_threads() == 1 else time.perf_counter)


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


def _cold(calls: list[Call], seconds: float, effort: Effort, capturing: bool) -> tuple[str, Sampler]:
    """Device time over all sets in turn: short calls from a graph where they can be captured, else from a queue."""
    turns = max(1, math.ceil(min(20, effort.seconds / seconds) / len(calls)))
    many = calls * turns
    method = "queue"
    if seconds < SHORT and capturing:
        try:
            return "graph", partial(queued, [captured(many).replay], len(many))
        except RuntimeError as error:
            method = f"queue, since the graph failed: {error}"
    return method, partial(queued, many, len(many))


def captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()  # whatever it compiles or allocates once must not happen inside the capture
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    wait()
    graph.capture_begin(pool)
    try:
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    except RuntimeError:
        # torch 2.11's capture_end then leaves the allocator believing in a capture, and empty_cache may refuse
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise
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
    """The least of three, after one: a sample made of few calls because one was interrupted would be noise."""
    call()
    return min(seconds_of(call) for _ in range(3))


def free_memory() -> int:
    """Bytes of the GPU that torch can have, those that it keeps and does not use among them."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def seconds_of(call: Call) -> float:
    return wall(call, 1) * 1e-6


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
