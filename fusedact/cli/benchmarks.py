"""`fusedact bench`: ops timed beside torch's own and torch.compile's, by the functions of bench/'s suites."""

import json as json_format
import os
import statistics
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fusedact.activations import TABLE
from fusedact.backend import uses_triton
from fusedact.cli.options import Device, Threads, console, implementation, one_of, sizes
from fusedact.data import write_whole
from fusedact.profiling import ceilings
from fusedact.profiling.cases import CASES, SMALL, Case
from fusedact.profiling.choosing import cases_for
from fusedact.profiling.figures import contenders_of, described, figures, samples
from fusedact.profiling.machine import machine
from fusedact.profiling.measure import prepare
from fusedact.profiling.ops import EARLY, OPS
from fusedact.profiling.ops import PHASES as USUAL
from fusedact.profiling.peers import PEERS
from fusedact.profiling.timing import FULL, ON_CPU, Effort, effort_on, undisturbed
from fusedact.profiling.tracing import unit_of

DTYPES = ("float32", "bfloat16", "float16")
PHASES = tuple(dict.fromkeys((*USUAL, *EARLY)))
ALONE = [activation.name for activation in TABLE if not activation.learned]
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("cases"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
FAULTS = ("wrong", "failed")
FALLBACK = "On a CPU fused layers run torch's own operations: a ratio near 1 says that they cost nothing there."
LEGEND = """µs: medians. stock / fused: the median of each turn's ratio, and 20 to 80 %.
noise: how far from 1 those 20 and 80 % are where stock is beside itself.
GB/s, TFLOP/s: the least bytes and FLOPs over fused's time. share: the least time, by
a measured copy and product, over it; more than 100 % is a cache's or, of float32
products on a GPU, that of kernels which make each of three TF32 ones."""

Ops = Annotated[
    list[Any] | None,
    typer.Option("--op", parser=one_of(OPS, "op"), metavar="NAME", help="linear_act, softmax, ...; may recur."),
]
Named = Annotated[
    str | None, typer.Option("--case", metavar="TEXT", help="Cases with this in their name, of any size.")
]
Dtype = Annotated[Any, typer.Option(parser=one_of(DTYPES, "dtype"), metavar="DTYPE", help=", ".join(DTYPES))]
Shapes = Annotated[
    list[Any] | None,
    typer.Option(
        "--shape", parser=sizes, metavar="AxBx...", help="Of --op, in place of its cases: linear_act MxNxK; may recur."
    ),
]
Epilogue = Annotated[
    Any, typer.Option("--activation", parser=one_of(ALONE, "activation"), metavar="NAME", help="Of --op at --shape.")
]
Phase = Annotated[Any, typer.Option(parser=one_of(PHASES, "phase"), metavar="PHASE", help=", ".join(PHASES))]
Peers = Annotated[bool, typer.Option("--peers", help="Others' kernels too, of the packages that are installed.")]
Compile = Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile too, which takes seconds a case.")]
Rounds = Annotated[
    int | None, typer.Option(min=2, help=f"Turns that each has; {FULL.rounds}, on a CPU {ON_CPU.rounds}.")
]
Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", dir_okay=False, readable=False, writable=True, help="Write samples and figures too."
    ),
]
Listed = Annotated[bool, typer.Option("--list", help="Print the names of the cases, and measure none.")]


def bench(
    *,
    op: Ops = None,
    case: Named = None,
    shape: Shapes = None,
    dtype: Dtype = None,
    activation: Epilogue = None,
    phase: Phase = None,
    device: Device,
    threads: Threads = 1,
    peers: Peers = False,
    compiled: Compile = True,
    rounds: Rounds = None,
    json: Json = None,
    listed: Listed = False,
) -> None:
    """Time torch's ops, compiled and fused ones in turn: ratios, noise, rates, shares of what the device can do.

    Each is first compared with float64; the exit code is 1 where one is wrong or fails. On a CPU the cases of its size
    are measured, unless --case or --shape names others.
    """
    where = torch.empty(0, device=device).device
    implementation(torch.empty(0, device=where))  # refuses what FUSEDACT_BACKEND asks for and cannot have
    if shape or activation:
        if case is not None or not (op and shape):
            raise typer.BadParameter("--shape and --activation: expected --op and --shape, and no --case")
        cases = _shaped(where, op, shape, dtype, activation, phase)
    else:
        cases = _chosen(where, op, case, dtype, phase)
    if listed:
        print(*(case.name for case in cases), sep="\n")
        return
    folder = json and json.resolve().parent
    if folder and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise typer.BadParameter(f"--json {json}: expected a file in a folder that exists and can be written")
    found = Found(where, threads, effort_on(where, rounds), "default" if compiled else None, peers)
    try:
        found.measure(cases, (phase,) if phase else PHASES)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:  # what was measured is shown on Ctrl-C too
        print(*_lines(found), "", *_remarks(found), sep="\n")
        if json is not None:
            write_whole(json, json_format.dumps(_record(found), indent=1).encode())
            print(json)
    if faults := [f"{r['verdict']}: {case.name}" for case, r in found.results.items() if r["verdict"] in FAULTS]:
        print(*faults, sep="\n")
        raise typer.Exit(1)


@dataclass
class Found:
    """How it is measured, and what was found so far. unlimited: why the ceilings were not measured."""

    device: torch.device
    threads: int
    effort: Effort
    compiling: str | None
    peers: bool
    ceilings: dict[str, float] = field(default_factory=dict)
    unlimited: str | None = None
    results: dict[Case, dict] = field(default_factory=dict)

    def measure(self, cases: list[Case], phases: Collection[str]) -> None:
        """These phases of every case, behind a bar."""
        with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("what the device can do", total=len(cases))
            rates = dict.fromkeys(rate for case in cases if (rate := case.matrix_rate))
            try:
                with undisturbed(self.device, self.threads):
                    self.ceilings = ceilings.measured((ceilings.COPY, *rates), self.device, self.effort)
            except RuntimeError as error:  # memory that others hold
                self.unlimited = str(error).partition("\n")[0]
            for case in cases:
                progress.update(bar, description=case.name)
                with undisturbed(self.device, self.threads):
                    self.results[case] = self._result(case, phases)
                progress.advance(bar)

    def _result(self, case: Case, phases: Collection[str]) -> dict:
        """As measure_case has it; of a case that does not fit the device, or fails, only why."""
        peers = PEERS.get(case.op, {}) if self.peers else {}
        try:
            prepared = prepare(case, self.device, self.effort, self.compiling, peers)
            if prepared.result["verdict"] == "wrong":
                return prepared.result
            timed = {phase: prepared.timed(phase) for phase in OPS[case.op].phases if phase in phases}
        except MemoryError as error:
            return {"verdict": "too large", "without": {"all": str(error).partition(". ")[0]}}
        except RuntimeError as error:
            return {"verdict": "failed", "without": {"all": str(error).partition("\n")[0]}}
        return prepared.result | {"phases": timed}

    def timed(self) -> Iterator[tuple[Case, str, list[str]]]:
        """Each case and phase, and who was timed."""
        for case, result in self.results.items():
            for phase in result.get("phases", ()):
                yield case, phase, contenders_of(result, phase)


def _shaped(
    device: torch.device,
    ops: list[str],
    shapes: list[tuple[int, ...]],
    dtype: str | None,
    activation: str | None,
    phase: str | None,
) -> list[Case]:
    """Each op at each shape."""
    try:
        units = [unit_of(op, device, shape, dtype, activation, phase) for op in ops for shape in shapes]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return [unit.case for unit in units if unit.case is not None]


def _chosen(
    device: torch.device, ops: list[str] | None, text: str | None, dtype: str | None, phase: str | None
) -> list[Case]:
    """Those of the device's size, or of all where a name is asked for; BadParameter where none is left."""
    cases = cases_for(device) if text is None else dict.fromkeys((*CASES, *SMALL))
    chosen = [
        case
        for case in cases
        if (not ops or case.op in ops)
        and (text is None or text in case.name)
        and dtype in (None, case.dtype)
        and (phase is None or phase in OPS[case.op].phases)
    ]
    if not chosen:
        given = {"--op": ops and ", ".join(ops), "--case": text, "--dtype": dtype, "--phase": phase}
        asked = " ".join(f"{name} {value}" for name, value in given.items() if value)
        raise typer.BadParameter(f"{asked}: no case is of these; `fusedact bench --list` shows those of {device.type}")
    return chosen


def _lines(found: Found) -> Iterator[str]:
    """Each case, and of each phase a line: everyone's µs, and of the fused op the rest. It fits 80 columns."""
    names = list(dict.fromkeys(name for *_, timed in found.timed() for name in timed))
    widths = [max(7, len(name)) for name in names]
    heads = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    yield f"µs       {heads}    stock / fused noise  GB/s TFLOP/s share"
    last = None
    for case, phase, timed in found.timed():
        if case is not last:
            yield case.name
        result, last = found.results[case], case
        times = {name: statistics.median(samples(result, phase, name)) * 1e6 for name in timed}
        cells = [f"{times[name]:,.{times[name] < 100:d}f}" if name in times else "" for name in names]
        ours = figures(result, phase, "fusedact", found.ceilings)
        shown = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        ratio = f"{ours['ratio']:.2f} ({ours['ratio_low']:.2f}-{ours['ratio_high']:.2f})"
        share = f"{ours['share']:>5.0%}" if ours["share"] is not None else ""
        rates = f"{ours['gbps']:>5.3g} {ours['tflops']:>7.2g} {share}".rstrip()
        yield f"{phase:>8} {shown} {ratio:>16} {ours['noise']:>5.1%} {rates}"


def _remarks(found: Found) -> Iterator[str]:
    """What the table's columns are, the machine, and what is not in the table."""
    yield LEGEND
    facts = machine(found.device, found.threads)
    threads = f", threads: {found.threads}" if found.device.type == "cpu" else ""
    limits = ", ".join(f"{name} {value:.3g}" for name, value in found.ceilings.items()) or "no ceiling"
    versions = ", ".join(f"{package} {facts[package]}" for package in ("torch", "triton", "python"))
    yield f"{facts['device']} ({facts['machine']}, cores: {facts['cores']}{threads}); {versions}; measured: {limits}"
    if found.unlimited:
        yield f"no shares, since what the device can do was not measured: {found.unlimited}"
    if not uses_triton(torch.empty(0, device=found.device)):
        yield FALLBACK
    for case, result in found.results.items():
        for name, reason in result["without"].items():
            yield f"{case.name}: without {name}: {' '.join(reason.split())}"


def _record(found: Found) -> dict:
    """As pytest-benchmark's JSON of the suites has it."""
    facts = machine(found.device, found.threads)
    benchmarks = []
    for case, phase, timed in found.timed():
        for name in timed:
            data = samples(found.results[case], phase, name)
            info = described(case, phase, name) | {"device": facts["device"], "threads": found.threads}
            info |= figures(found.results[case], phase, name, found.ceilings)
            stats = {"median": statistics.median(data), "rounds": len(data), "data": data}
            benchmarks.append({"group": f"{case.op} {phase}", "extra_info": info, "stats": stats})
    return {"machine_info": facts | {"ceilings": found.ceilings}, "benchmarks": benchmarks}
