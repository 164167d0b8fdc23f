"""What losses hold in memory, for docs/measured.md: by formula, counted, measured on a GPU, resident on a CPU.

python -m bench.memory [--page-only]

Measures the head on this CPU, a process for each way of taking it, into bench/results/memory.json.
"""

import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bench.report import between, newest
from fusedact.functional import linear_cross_entropy
from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import Contender

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "results" / "memory.json"
PAGE = ROOT / "docs" / "measured.md"
OPEN, CLOSE = "<!-- memory -->", "<!-- /memory -->"


# By formula


class Amount(NamedTuple):
    """Bytes, in units of: u the logits or what else the loss is of; of a head x its input and w its weight, which are
    as large as their gradients, and c the logits of a chunk. What a row has a number of is left out.
    """

    u: int = 0
    x: int = 0
    w: int = 0
    c: int = 0

    def __str__(self) -> str:
        terms = [f"{count if count > 1 else ''}{unit}" for unit, count in self._asdict().items() if count]
        return " + ".join(terms) or "0"

    def bytes(self, units: "Amount") -> int:
        return sum(count * unit for count, unit in zip(self, units, strict=True))


def units(case: Case) -> Amount:
    """The bytes of each unit."""
    itemsize = case.torch_dtype.itemsize
    if case.op != "linear_cross_entropy":
        return Amount(u=prod(case.shape) * itemsize)
    rows, features, classes = (n * itemsize for n in case.shape)
    chunk = (case.chunk or 0) * classes
    return Amount(rows * classes // itemsize, rows * features // itemsize, classes * features // itemsize, chunk)


class Held(NamedTuple):
    """Between forward and backward, and at the peak of both, gradients included; beyond the inputs."""

    saved: Amount
    peak: Amount


@dataclass(frozen=True)
class Loss:
    """A case, what each way of taking it holds, and why."""

    case: Case
    held: dict[str, Held]
    why: str


ROWS = (4096, 128256)  # of logits
HEAD = (16384, 4096, 128256)
NOTHING, LOGITS, RESULT = Amount(), Amount(u=1), Amount(u=2)
GRADIENTS, COPIES = Amount(x=1, w=1), Amount(x=2, w=2)
STOCK = Held(LOGITS, Amount(u=3))

LOSSES = (
    Loss(
        Case("cross_entropy", ROWS, "bfloat16"),
        {"stock": STOCK, "fusedact": Held(NOTHING, LOGITS), "Liger": Held(NOTHING, NOTHING)},
        "stock keeps log-probabilities, and their gradient comes before that of the logits; ours keeps two numbers a "
        "row; Liger puts the gradient in the place of the user's logits",
    ),
    Loss(
        Case("cross_entropy_grad_in_forward", ROWS, "bfloat16"),
        {"stock": STOCK, "fusedact": Held(LOGITS, LOGITS)},
        "what is kept is the gradient",
    ),
    Loss(
        Case("bce_with_logits", ROWS, "bfloat16"),
        {"stock": Held(NOTHING, RESULT), "fusedact": Held(NOTHING, LOGITS)},
        "stock's is several operations with a result each",
    ),
    Loss(
        Case("softmax", ROWS, "bfloat16"),
        {"stock": Held(LOGITS, RESULT), "fusedact": Held(LOGITS, RESULT)},
        "the result is kept, as what follows keeps it",
    ),
    Loss(
        Case("linear_cross_entropy", HEAD, "float32", chunk=2048),
        {
            "stock": STOCK,
            "fusedact": Held(GRADIENTS, Amount(x=1, w=1, c=1)),
            "Liger": Held(GRADIENTS, COPIES),
            "cut-cross-entropy": Held(NOTHING, GRADIENTS),
            "torch's chunks": Held(GRADIENTS, COPIES),
        },
        "stock keeps log-probabilities of all rows; the chunks keep gradients. Liger's are of so few rows that their "
        "logits are as large as x, and dW's part of each is added from beside it; cut-cross-entropy makes logits anew",
    ),
    Loss(
        Case("linear_cross_entropy", HEAD, "bfloat16", chunk=2048),
        {
            "stock": STOCK,
            "fusedact": Held(GRADIENTS, Amount(x=1, w=3)),
            "Liger": Held(GRADIENTS, Amount(x=2, w=1)),
            "cut-cross-entropy": Held(NOTHING, GRADIENTS),
        },
        "ours adds dW up in float32, which is 2w, and rounds it at the end, when the chunks' logits are gone; Liger "
        "and cut-cross-entropy add up in 16 bits",
    ),
)
WAYS = tuple(dict.fromkeys(way for loss in LOSSES for way in loss.held))


# Counted


def counted(run: Contender, dy: Tensor) -> Held:
    """Bytes that torch's allocator on the CPU gives out, as its profiler sees them, in place of amounts."""
    run.gradients(run.forward(), dy)  # what is allocated once is there then
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        y = run.forward()
        with record_function("between"):
            pass
        gradients = run.gradients(y, dy)
    del y, gradients
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    [between] = [event["ts"] for event in events if event["name"] == "between"]
    moves = sorted((event["ts"], event["args"]) for event in events if event["name"] == "[memory]")
    totals = [moved["Total Allocated"] for _, moved in moves]
    before = totals[0] - moves[0][1]["Bytes"]
    until = sum(at < between for at, _ in moves)
    return Held(totals[until - 1] - before, max(totals) - before)


# Resident on a CPU

CPU_HEAD = (8192, 512, 64000)
HEADS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "`F.linear`, `F.cross_entropy`": lambda x, w, target: F.cross_entropy(F.linear(x, w), target),
    "`F.linear_cross_entropy`": lambda x, w, target: F.linear_cross_entropy(x, w, target),
    "`F.linear_cross_entropy`, its chunks": lambda x, w, target: F.linear_cross_entropy(
        x, w, target, options=torch.nn.LinearCrossEntropyOptions()
    ),
    "fusedact": lambda x, w, target: linear_cross_entropy(x, w, target),
}


def resident(name: str, *shape: int) -> dict[str, float]:
    """{"bytes", "seconds"} of forward with backward in a process of its own: the peak beyond its inputs."""
    code = f"from bench.memory import alone; alone({name!r}, *{shape})"
    hidden = ("TRITON_INTERPRET", "FUSEDACT_BACKEND")
    environment = {variable: value for variable, value in os.environ.items() if variable not in hidden}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def alone(name: str, rows: int, features: int, classes: int) -> None:
    """What `resident` reads, printed; the libraries' own memory is there before it begins."""
    for shape in ((8, 4, 16), (rows, features, classes)):
        x = torch.randn(shape[0], shape[1], requires_grad=True)
        w = (torch.randn(shape[2], shape[1]) / shape[1] ** 0.5).requires_grad_()
        target = torch.randint(shape[2], (shape[0],))
        before, started = _status("VmRSS"), time.perf_counter()
        gradients = torch.autograd.grad(HEADS[name](x, w, target), (x, w))
    seconds = time.perf_counter() - started
    del gradients
    print(json.dumps({"bytes": _status("VmHWM") - before, "seconds": seconds}))


def _status(line: str) -> int:
    """Of this process: not getrusage's ru_maxrss, which begins with that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{line}:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024


def measure() -> dict:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "kind": "memory",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "shape": CPU_HEAD,
        "heads": {name: resident(name, *CPU_HEAD) for name in track(HEADS, "heads on this CPU")},
    }


# The page


def formulas() -> str:
    lines = [["loss", "example", *WAYS], ["---"] * (2 + len(WAYS))]
    for loss in LOSSES:
        case = loss.case
        cells = [_cell(loss.held[way], units(case)) if way in loss.held else "" for way in WAYS]
        lines.append([f"`{case.op}`", f"{' x '.join(f'{n:,}' for n in case.shape)} {case.dtype}", *cells])
    return _table(lines)


def _cell(held: Held, units: Amount) -> str:
    return f"{held.saved}; {held.peak} ({held.peak.bytes(units) / 2**30:.2f} GiB)"


def reasons() -> str:
    return "\n".join(f"- `{loss.case.op}`, {loss.case.dtype}: {loss.why}." for loss in LOSSES)


def on_a_gpu(results: Path) -> str:
    """Of the newest record, GiB at the peak of forward with backward beyond what was there before."""
    found = newest(results)
    if found is None:
        return "On a GPU: no record yet."
    path, record = found
    ops = {loss.case.op for loss in LOSSES}
    peaks: dict[str, dict[str, int]] = {}
    for section in ("ops", "peers"):
        for name, result in record["sections"].get(section, {}).get("results", {}).items():
            if result.get("op") in ops and "phases" in result:
                peaks[name] = peaks.get(name, {}) | result["phases"]["both"].get("memory", {})
    ways = list(dict.fromkeys(way for each in peaks.values() for way in each))
    lines = [["peak, GiB", *ways], ["---"] * (1 + len(ways))]
    lines += [[name, *(f"{each[w] / 2**30:.2f}" if w in each else "" for w in ways)] for name, each in peaks.items()]
    return f"{record['machine']['device']}, record `bench/results/{path.name}`:\n\n{_table(lines)}"


def on_a_cpu(record: dict) -> str:
    rows, features, classes = record["shape"]
    logits = rows * classes * 4 / 2**30
    lines = [["head", "peak, GiB", "s"], ["---"] * 3]
    lines += [[name, f"{r['bytes'] / 2**30:.2f}", f"{r['seconds']:.0f}"] for name, r in record["heads"].items()]
    where = f"{record['machine']}, {record['date']}, commit {record['commit']}: record `bench/results/memory.json`"
    said = f"{rows:,} rows of {features} features, {classes:,} classes, float32 (logits of {logits:.2f} GiB)"
    return (
        f"On a CPU, a process's resident memory at the peak of forward with backward, beyond its inputs: {said}.\n"
        f"{where}, by `python -m bench.memory`.\nThe machine is shared: seconds are good for one digit.\n\n"
        f"{_table(lines)}"
    )


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LEGEND = """Bytes held between forward and backward; then at the peak of both, gradients included; beyond the inputs.
u is the logits, x a head's input, w its weight, each as large as its gradient, c the logits of a chunk of 2,048 rows.
Counted on a CPU (`tests/test_memory.py`): stock, torch's chunks in float32, and of ours all but the head. By formula,
from their source: ours of the head, Liger-Kernel 0.8.5 and cut-cross-entropy 25.1.1."""


def rendered(page: str) -> str:
    parts = (LEGEND, formulas(), reasons(), on_a_gpu(RECORD.parent), on_a_cpu(json.loads(RECORD.read_text())))
    return between(page, OPEN, CLOSE, "\n\n".join(parts))


if __name__ == "__main__":
    if "--page-only" not in sys.argv:
        RECORD.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text()))
