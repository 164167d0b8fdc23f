"""The table of a profile: a row an operation, of a GPU by the kernels that it launched.

Time and bytes are of the same calls, those that are counted as torch dispatches them: a clone has the time of the
copy in it, which is no call of its own.
"""

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

    share: of the least time that the measured ceilings allow in us; above 1 where a cache served, or tensor cores a
    float32 product.
    """

    name: str
    calls: float
    us: float
    kernels: list[str] = field(default_factory=list)
    bytes: int | None = None
    flops: dict[int, int] = field(default_factory=dict)
    share: float | None = None

    def add(self, count: Count) -> None:
        if count.bytes:
            self.bytes, self.flops = count.bytes, {width: flops for width, flops in count.flops.items() if flops}

    def set_share(self, ceilings: dict[str, float], precision: str) -> None:
        if self.bytes is None or not self.us:
            return
        least = self.bytes / ceilings[COPY] * 1e-3
        for width, flops in self.flops.items():
            if width in RATES:
                least = max(least, flops / ceilings[RATES[width](precision)] * 1e-6)
        self.share = least / self.us


def of_host(recorded: profile, steps: int, counts: Counts) -> list[Row]:
    """Each operation, with what it calls where it is counted; the longest first, and last all that is no operation.

    Times are the medians of the steps: one that the system interrupts counts no more than another.
    """
    events = recorded.events() or []
    starts = sorted(event.time_range.start for event in events if event.name == STEP)
    times: dict[str, list[float]] = defaultdict(lambda: [0.0] * steps)
    calls: Counter[str] = Counter()
    for event in events:
        step = bisect_right(starts, event.time_range.start) - 1
        if step < 0:
            continue
        part_of = _counted_around(event, counts)
        name = part_of.name if part_of.name in counts or part_of.name.startswith(OPERATIONS) else OTHER
        calls[name] += name != OTHER and part_of is event
        times[name][step] += event.self_cpu_time_total
    rows = [Row(name, calls[name] / steps, median(of_steps)) for name, of_steps in times.items()]
    for row in rows:
        count = counts.get(row.name)
        if count is not None and count.calls == row.calls:  # else torch dispatched others while it was counted
            row.add(count)
    return sorted(rows, key=lambda row: (row.name == OTHER, -row.us))


def _counted_around(event: Any, counts: Counts) -> Any:
    """The outermost event around this one that is counted, which may be itself; else itself."""
    found, around = event, event
    while around is not None:
        found = around if around.name in counts else found
        around = around.cpu_parent
    return found


def of_device(events: list[dict[str, Any]], steps: int, counts: Counts) -> list[Row]:
    """What ran on the GPU, by the range around its launch as _Ranges.around has it; the longest first."""
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
        name = ranges.around(launch, counts) if launch else event["name"]
        row = rows.setdefault(name, Row(name, 0, 0.0))
        row.calls += 1 / steps
        row.us += event["dur"] / steps
        if event["name"] not in row.kernels:
            row.kernels.append(event["name"])
    for row in rows.values():
        row.calls = round(row.calls, 6)
        if row.name in counts:
            row.add(counts[row.name])
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

    def around(self, launch: dict[str, Any], counts: Counts) -> str:
        """The name of the outermost range around the launch that is counted, else of the innermost, or the launch's."""
        of_thread, starts, around = self.threads.get((launch["pid"], launch["tid"]), ([], [], []))
        before = bisect_right(starts, launch["ts"])
        at = before - 1 if before else None
        names = []
        while at is not None:
            if _end(of_thread[at]) >= launch["ts"]:
                names.append(of_thread[at]["name"])
            at = around[at]
        counted = [name for name in names if name in counts]
        return counted[-1] if counted else [*names, launch["name"]][0]


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]
