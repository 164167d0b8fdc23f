"""A trainer or an op under torch's profiler, stock and fused: a Chrome trace of each, and what each operation took.

profile_unit("mnist-mlp", torch.device("cpu"), out=Path("runs/profile-mnist-mlp"))
"""

import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import emit_nvtx, record_function
from torch.profiler import ProfilerActivity, profile

from fusedact import backend
from fusedact.profiling import ceilings, proton
from fusedact.profiling.cases import CASES, MATRIX_OPS, SMALL, Case
from fusedact.profiling.choosing import cases_for
from fusedact.profiling.contenders import Contender, contenders, output_gradient
from fusedact.profiling.counting import counted, launches_named
from fusedact.profiling.ops import OPS
from fusedact.profiling.rows import RATES, STEP, Row, of_device, of_host
from fusedact.profiling.timing import (
    FULL,
    ON_CPU,
    Call,
    Effort,
    Sampler,
    host,
    interleaved,
    seconds_of,
    spread,
    undisturbed,
    wait,
    wall,
)
from fusedact.trainers import LAYERS, TRAINERS, Trainer

WARM_UP = 3  # steps, in which kernels are compiled and memory is allocated
ROUNDS = 5  # of timing without a profiler
SECONDS = 0.1  # that a sample of it aims at
NAMES = (*TRAINERS, *OPS)
FIXED = (*MATRIX_OPS, "linear_bce")  # whose sizes all have names; others take further dimensions
Progress = Callable[[str], None]
PHASES = {"forward": "forward", "backward": "backward", "both": "forward and backward", "no_grad": "inference"}


@dataclass(frozen=True)
class Unit:
    """What is profiled: a trainer's name, or a case and the phases of it that a step runs."""

    trainer: str | None = None
    case: Case | None = None
    phase: str = "both"

    @property
    def title(self) -> str:
        return f"a training step of {self.trainer}" if self.case is None else f"{self.case.name}, {PHASES[self.phase]}"

    @property
    def file(self) -> str:
        """How its files' names begin."""
        name = f"{self.case.name} {self.phase}" if self.case else str(self.trainer)
        return name.replace(" ", "-")

    def steps(self, device: torch.device) -> dict[str, Call]:
        """A step of stock, and one of the same fused."""
        if self.trainer is not None:
            return {name: _training_step(self.trainer, name, device) for name in LAYERS}
        assert self.case is not None
        torch.set_float32_matmul_precision(self.case.precision)
        with torch.device(device):
            runs = contenders(self.case, 0)
        return {"stock": _op_step(runs["stock"], self.phase), "fused": _op_step(runs["fusedact"], self.phase)}


def unit_of(
    name: str,
    device: torch.device,
    shape: tuple[int, ...] | None = None,
    dtype: str | None = None,
    activation: str | None = None,
    phase: str | None = None,
    *,
    inference: bool = False,
) -> Unit:
    """The trainer or op of that name, or the case; what is None is a trainer's own, or that of the op's first case.

    inference: whether each op has the phase no_grad. ValueError names what does not fit.
    """
    given = {"shape": shape, "dtype": dtype, "activation": activation, "phase": phase}
    asked = {key: value for key, value in given.items() if value is not None}
    if name in TRAINERS:
        if asked:
            raise ValueError(f"{', '.join(asked)}: of an op; {name} is a trainer, expected none")
        return Unit(trainer=name)
    found = [case for case in cases_for(device) if case.op == name]
    found = found or [case for case in (*CASES, *SMALL) if case.name == name]
    if not found:
        raise ValueError(
            f"unknown name {name!r}, expected one of {', '.join(NAMES)}, or a case as 'softmax 8x10 float32'"
        )
    op = found[0].op
    phases = dict.fromkeys((*OPS[op].phases, *["no_grad"] * inference))
    if phase is not None and phase not in phases:
        raise ValueError(f"phase {phase!r}: {op} has {', '.join(phases)}")
    if shape is not None and not _takes(op, shape):
        example = "x".join(map(str, found[0].shape))
        raise ValueError(f"shape {'x'.join(map(str, shape))}: {op} takes one as {example}")
    if activation is not None and not found[0].activation:
        raise ValueError(f"activation {activation!r}: {op} takes none")
    alike = [case for case in found if shape is not None and len(case.shape) == len(shape)]
    case = (alike or found)[0]
    changes: dict[str, Any] = {key: value for key, value in asked.items() if key != "phase"}
    return Unit(case=replace(case, **changes), phase=phase or "both")


def _takes(op: str, shape: tuple[int, ...]) -> bool:
    dimensions = {len(case.shape) for case in (*CASES, *SMALL) if case.op == op}
    return len(shape) in dimensions if op in FIXED else len(shape) >= min(dimensions)


def profile_unit(
    name: str,
    device: torch.device,
    *,
    steps: int = 10,
    out: Path | None = None,
    threads: int = 1,
    with_proton: bool = False,
    nvtx: bool = False,
    effort: Effort | None = None,
    known: dict[str, float] | None = None,
    progress: Progress = lambda what: None,
    **choice: Any,
) -> dict[str, Any]:
    """Rows and totals per contender, "stock" and "fused", of a step as `unit_of(name, device, **choice)` says.

    out: the folder of the traces, `<trainer or case, phase>-stock.json` and `-fused.json`, and of Proton's profile;
    None: no files. effort: how ceilings are measured. known: ceilings that need not be; the others are added to it.
    with_proton: on a GPU Triton's profiler too, or why it did not. nvtx: more steps of each with ranges for NVIDIA's
    tools. progress is told what begins. What it gives is JSON's.
    """
    unit = unit_of(name, device, inference=True, **choice)
    on_gpu = device.type == "cuda"
    precision = unit.case.precision if unit.case else "highest"
    with undisturbed(device, threads), tempfile.TemporaryDirectory() as folder:
        found = _profiled(unit, device, steps, out or Path(folder), nvtx, progress)
        progress("ceilings")
        measured = _ceilings(
            [rows for rows, *_ in found.values()], device, precision, effort, {} if known is None else known
        )
    result: dict[str, Any] = {
        "name": name, "title": unit.title, "device": str(device), "steps": steps, "threads": threads,
        "kernels": on_gpu, "triton": backend.uses_triton(torch.empty(0, device=device)), "ceilings": measured,
        "contenders": {
            contender: _summary(rows, measured, precision)
            | {"time_us": times, "trace": str(trace) if out else None}
            for contender, (rows, times, trace) in found.items()
        },
    }  # fmt: skip
    if with_proton and on_gpu:
        progress("Proton")
        gc.collect()
        torch.cuda.empty_cache()  # a second process holds the same again
        result["proton"] = proton.profiled(name, device, choice, steps, out and out / f"{unit.file}-proton.hatchet")
    return result


def _profiled(
    unit: Unit, device: torch.device, steps: int, folder: Path, nvtx: bool, progress: Progress
) -> dict[str, tuple[list[Row], dict[str, float], Path]]:
    """Of each contender rows, time without a profiler, and trace. What ran is let go of on return."""
    on_gpu = device.type == "cuda"
    progress("warm-up")
    runs = unit.steps(device)
    for step in runs.values():
        for _ in range(WARM_UP):
            step()
    wait()
    progress("time without a profiler")
    times = _times(runs, steps, on_gpu)
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for contender, step in runs.items():
        progress(f"{contender}: bytes and FLOPs")
        counts = counted(step)
        progress(f"{contender}: trace")
        recorded = _recorded(step, steps, on_gpu)
        trace = folder / f"{unit.file}-{contender}.json"
        recorded.export_chrome_trace(str(trace))  # which torch does once
        events = json.loads(trace.read_text())["traceEvents"] if on_gpu else []
        rows = of_device(events, steps, counts) if on_gpu else of_host(recorded, steps, counts)
        found[contender] = rows, times[contender], trace
    if nvtx:
        progress("NVTX")
        _with_nvtx(runs, steps)
    return found


def _summary(rows: list[Row], ceilings: dict[str, float], precision: str) -> dict[str, Any]:
    """The rows with their shares, and what they come to."""
    for row in rows:
        row.set_share(ceilings, precision)
    totals = {"calls": sum(row.calls for row in rows), "us": sum(row.us for row in rows)}
    return totals | {"rows": [asdict(row) for row in rows]}


def stages(device: torch.device, with_proton: bool, nvtx: bool) -> int:
    """How often profile_unit tells of its progress."""
    return 3 + 2 * len(LAYERS) + nvtx + (with_proton and device.type == "cuda")


def _training_step(name: str, layers: str, device: torch.device) -> Call:
    kind = TRAINERS[name]
    trainer = kind(LAYERS[layers], replace(kind.defaults, device=str(device), engine="loop"))
    trainer.model.train()
    rows = trainer.visited(len(trainer.x)).to(device)
    batches = [(trainer.x[some], trainer.y[some]) for some in rows.split(trainer.settings.batch_size)]
    endless = cycle(batches)
    return lambda: _ranged_step(trainer, *next(endless))


def _ranged_step(trainer: Trainer, x: torch.Tensor, y: torch.Tensor) -> None:
    """As the trainer's own step, its parts named."""
    with record_function("forward"):
        output = trainer.model(x)
    with record_function("loss"):
        cost = trainer.criterion(output, y)
    with record_function("optimizer"):
        trainer.optimizer.zero_grad()
    with record_function("backward"):
        cost.backward()
    with record_function("optimizer"):
        trainer.optimizer.step()


def _op_step(run: Contender, phase: str) -> Call:
    y = run.forward()
    dy = output_gradient(y.detach())
    grads = run.call("backward", dy) if phase == "backward" else None

    def step() -> None:
        if grads is None:
            with record_function("forward"):
                y = run.evaluate() if phase == "no_grad" else run.forward()
        if phase in ("backward", "both"):
            with record_function("backward"):
                grads() if grads is not None else run.gradients(y, dy)

    return step


def _times(runs: dict[str, Call], steps: int, on_gpu: bool) -> dict[str, dict[str, float]]:
    """µs a step, of interleaved rounds: the wall's on a GPU, as the trainers' on a CPU."""
    clock = wall if on_gpu else host
    count = max(1, min(steps, int(SECONDS / max(map(seconds_of, runs.values())))))
    samplers: dict[str, Sampler] = {name: partial(clock, step, count) for name, step in runs.items()}
    return {name: spread(each["samples"]) for name, each in interleaved(samplers, ROUNDS).items()}


def _recorded(step: Call, steps: int, on_gpu: bool) -> profile:
    """The second of two recordings: the first begins with what a profiler does once."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    for count in (1, steps):
        with launches_named(), profile(activities=activities, record_shapes=True) as recorded:
            for _ in range(count):
                with record_function(STEP):
                    step()
            wait()
    return recorded


def _with_nvtx(runs: dict[str, Call], steps: int) -> None:
    """record_function's ranges become NVTX's, for a profiler of NVIDIA's around this process."""
    for name, step in runs.items():
        with emit_nvtx(), launches_named():
            for _ in range(steps):
                with record_function(name):
                    step()


def _ceilings(
    rows: Iterable[list[Row]],
    device: torch.device,
    precision: str,
    effort: Effort | None,
    known: dict[str, float],
) -> dict[str, float]:
    widths = {width for some in rows for row in some for width in row.flops if width in RATES}
    names = [ceilings.COPY, *(RATES[width](precision) for width in sorted(widths))]
    effort = effort or (FULL if device.type == "cuda" else replace(ON_CPU, rounds=3))
    known.update(ceilings.measured([name for name in names if name not in known], device, effort))
    return {name: known[name] for name in names}
