"""The table of a profile: a row an operation, of a GPU by the kernels that it launched."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch.profiler import profile

from fusedact.profiling.ceilings import COPY
from fusedact.profiling.counting import Count, Counts

STEP = "step"  # the range around each
OTHER = "the rest: autograd, the optimizer's Python, the ranges"
OPERATIONS = ("aten::", "fusedact::")
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace's events
LAUNCHES = ("cuda_runtime", "cuda_driver")
RANGES = ("cpu_op", "user_annotation")
RATES: dict[int, Callable[[str], str]] = {  # the ceiling of FLOPs, by the width of their operands and torch's precision
    16: lambda precision: "bf16, TFLOP/s",
    32: lambda precision: "fp32, TFLOP/s" if precision == "highest" else "tf32, TFLOP/s",
}


@dataclass
class Row:
    """An operation in a step: calls, on a GPU launches, µs, bytes and FLOPs by width; what is not known is None.

    us: without the operations that it calls, which whole_us includes. share: of the least time that the measured
    ceilings allow in whole_us; above 1 where a cache served.
    """

    name: str
    calls: float
    us: float
    whole_us: float
    kernels: list[str] = field(default_factory=list)
    bytes: int | None = None
    flops: dict[int, int] = field(default_factory=dict)
    share: float | None = None

    def add(self, count: Count | None) -> None:
        if count is not None and count.bytes:
            self.bytes, self.flops = count.bytes, {width: flops for width, flops in count.flops.items() if flops}

    def set_share(self, ceilings: dict[str, float], precision: str) -> None:
        if self.bytes is None or not self.whole_us:
            return
        least = self.bytes / ceilings[COPY] * 1e-3
        for width, flops in self.flops.items():
            if width in RATES:
                least = max(least, flops / ceilings[RATES[width](precision)] * 1e-6)
        self.share = least / self.whole_us


def of_host(recorded: profile, steps: int, counts: Counts) -> list[Row]:
    """Each operation's own time, without those that it calls; the longest first, and last all that is no operation.

    Times are the medians of the steps: one that the system interrupts counts no more than another.
    """
    events = recorded.events() or []
    starts = sorted(event.time_range.start for event in events if event.name == STEP)
    own: dict[str, list[float]] = defaultdict(lambda: [0.0] * steps)
    whole: dict[str, list[float]] = defaultdict(lambda: [0.0] * steps)
    calls: Counter[str] = Counter()
    for event in events:
        step = bisect_right(starts, event.time_range.start) - 1
        if step < 0:
            continue
        name = event.name if event.name.startswith(OPERATIONS) else OTHER
        calls[name] += 1
        own[name][step] += event.self_cpu_time_total
        whole[name][step] += event.cpu_time_total
    rows = [Row(name, calls[name] / steps, median(own[name]), median(whole[name])) for name in own]
    for row in rows:
        row.add(counts.get(row.name))
        if row.name == OTHER:
            row.calls, row.whole_us = 0, row.us
    return sorted(rows, key=lambda row: (row.name == OTHER, -row.us))


def of_device(events: list[dict[str, Any]], steps: int, counts: Counts) -> list[Row]:
    """What ran on the GPU, by the innermost range around its launch; the longest first."""
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    ranges = _Ranges(events)
    rows: dict[str, Row] = {}
    for event in events:
        if event.get("cat") not in ON_DEVICE:
            continue
        launch = launches.get(event["args"].get("correlation"))
        name = ranges.around(launch) if launch else event["name"]
        row = rows.setdefault(name, Row(name, 0, 0.0, 0.0))
        row.calls += 1 / steps
        row.us += event["dur"] / steps
        row.whole_us = row.us
        if event["name"] not in row.kernels:
            row.kernels.append(event["name"])
    for row in rows.values():
        row.calls = round(row.calls, 6)
        row.add(counts.get(row.name))
    return sorted(rows.values(), key=lambda row: -row.us)


class _Ranges:
    """The ranges of a trace by thread, each with the one around it."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        by_thread = defaultdict(list)
        for event in events:
            if event.get("ph") == "X" and event.get("cat") in RANGES:
                by_thread[event["pid"], event["tid"]].append(event)
        self.threads = {}
        for thread, of_thread in by_thread.items():
            of_thread.sort(key=lambda event: (event["ts"], -event["dur"]))
            open_ones: list[int] = []
            around = []
            for at, event in enumerate(of_thread):
                while open_ones and _end(of_thread[open_ones[-1]]) <= event["ts"]:
                    open_ones.pop()
                around.append(open_ones[-1] if open_ones else None)
                open_ones.append(at)
            self.threads[thread] = of_thread, [event["ts"] for event in of_thread], around

    def around(self, launch: dict[str, Any]) -> str:
        """The name of the innermost range that holds the launch, or the launch's own."""
        of_thread, starts, around = self.threads.get((launch["pid"], launch["tid"]), ([], [], []))
        at: int | None = bisect_right(starts, launch["ts"]) - 1
        if at is not None and at < 0:
            return launch["name"]
        while at is not None and _end(of_thread[at]) < launch["ts"]:
            at = around[at]
        return launch["name"] if at is None else of_thread[at]["name"]


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]
