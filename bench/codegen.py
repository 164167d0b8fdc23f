"""The machine code of every kernel for every target, read without a GPU: `python -m bench.codegen`.

A case calls a launcher with tensors of the meta device while the driver claims to be the target, so the JIT
specializes and compiles what it would there. The machine code tells registers, spills, load widths, matrix
instructions and the loop that holds them; the case tells its least bytes and FLOPs, and so the least time on an
H200. Both together tell an estimate of the time on each chip.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, product
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import triton
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Column, Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.assembly import (
    COPY,
    LOAD,
    STORE,
    Assembly,
    matrix_instructions,
    moved_bits,
    read_amd,
    read_nvidia,
)
from bench.codegen_cases import CASES, EVERY_ACTIVATION, Case
from bench.codegen_launchers import PRECISIONS, Work

COPY_BYTES_PER_S = 4.3e12  # H200, as the rates below
LATENCY = 1000  # cycles from a load to its use while the memory is busy: an assumption, the same of every chip
THREADS, PROGRAMS = 2048, 32  # that a multiprocessor holds at most


# Chips


class Speed(NamedTuple):
    """What a chip does at most: the H200 (sm_90) by what was measured, the others by their data sheets."""

    multiprocessors: int
    schedulers: int  # of a multiprocessor; each issues an instruction of one warp a cycle
    hertz: float
    bytes_per_s: float
    flops: dict[str, int]  # a cycle and multiprocessor, by precision


class Chip(NamedTuple):
    """A target, what one program may take of it, and its speed."""

    target: GPUTarget
    shared_memory: int
    registers: int  # a thread
    register_file: int  # all threads
    read: Callable[[Any], Assembly]
    speed: Speed


A100 = Speed(108, 4, 1.41e9, 2.0e12, {"bf16": 2048, "fp16": 2048, "tf32": 1024, "fp32": 128, "fp64": 128})
# The clock at which the 790 TFLOP/s measured in bf16 are all that it can do; data sheets have a faster one.
H200 = Speed(132, 4, 1.46e9, COPY_BYTES_PER_S, {"bf16": 4096, "fp16": 4096, "tf32": 2048, "fp32": 256, "fp64": 256})
B200 = Speed(148, 4, 1.86e9, 7.7e12, {"bf16": 8192, "fp16": 8192, "tf32": 4096, "fp32": 256, "fp64": 128})
# Four SIMDs of 16 lanes take four cycles to a wave of 64: together an instruction a cycle.
MI300X = Speed(304, 1, 2.1e9, 5.3e12, {"bf16": 2048, "fp16": 2048, "tf32": 1024, "fp32": 256, "fp64": 256})

CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 255, 65536, read_nvidia, A100),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 255, 65536, read_nvidia, H200),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 255, 65536, read_nvidia, B200),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 512, 131072, read_amd, MI300X),
}


# Report

ORDERED = re.compile("[SB]*(BTB[SB]*L[SBL]*)*")  # of all events but G
ARRIVAL = re.compile("BRA")  # at a grid barrier, and the first look at it: no load in between
LOOK = re.compile("BA")  # again, in a loop
BARRIER = re.compile(r"BAR\b|s_barrier")  # of a program's threads
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.\S*\.b?f(?:16|32|64)|_atomic_\w*_b?f(?:16|32|64)")


class Offline:
    """A driver for a chip that is not there: enough for the JIT to specialize and compile."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: target.arch
        self.get_current_stream = lambda device: None


class Launch(NamedTuple):
    kernel: Any
    programs: int
    bytes: int  # of the tensors it was given


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, TensorDescriptor):
            yield argument.base
        elif isinstance(argument, tuple):
            yield from tensors(argument)


def launches(chip: Chip, case: Case) -> tuple[Work, list[Launch]]:
    """The case's work, and what its launcher launches on that chip, compiled."""
    recorded = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        recorded.append(Launch(kernel, math.prod(grid), sum(x.nbytes for x in tensors(args))))

    driver.set_active(Offline(chip.target))
    with mock.patch.object(JITFunction, "run", compile_only):
        work = case.launcher(chip, PRECISIONS[case.precision], *case.shape, **case.options)
    return work, recorded


def resident(chip: Chip, launch: Launch, assembly: Assembly) -> int:
    """Programs that a multiprocessor runs at a time, as registers, shared memory, threads and the grid allow."""
    metadata = launch.kernel.metadata
    threads = metadata.num_warps * chip.target.warp_size
    registers = 8 * max(1, math.ceil(assembly.registers / 8))  # as they are allotted
    return max(
        1,
        min(
            chip.register_file // (registers * threads),
            chip.shared_memory // max(1, metadata.shared),
            THREADS // threads,
            PROGRAMS,
            math.ceil(launch.programs / chip.speed.multiprocessors),
        ),
    )


def pass_of(assembly: Assembly) -> tuple[list[str], int]:
    """What a program repeats, the loop or, where it has none, its whole text; the bits that a thread moves in it."""
    code = assembly.step or assembly.mnemonics
    return code, sum(moved_bits(mnemonic) for mnemonic in code if LOAD.match(mnemonic) or STORE.match(mnemonic))


def estimate(chip: Chip, case: Case, work: Work, launch: Launch, assembly: Assembly) -> float:
    """Seconds that the launch should take: a model's, measured by nobody; 0 where the model says nothing.

    A product takes flops / (2 block_m block_n block_k) steps, shared evenly by its programs, which run in waves of
    one to a multiprocessor. A step takes what is longer: its FLOPs at the multiprocessor's rate, or its instructions
    for every warp, one a cycle from each scheduler, where a pass of the loop is as many steps as it loads tiles for.

    Any other kernel passes its loop, or its whole text where it has none, as often as what that loads and stores goes
    into its bytes. With I cycles to issue a pass, T to move its bytes at the multiprocessor's share of the memory, L
    of latency and r programs resident, a pass takes max(I, T, (L + I + T) / r) cycles, the last by Little's law: a
    program waits for what it loads, and only the others keep the memory busy meanwhile. Where no barrier holds a
    program's warps together they drift apart, and the last I and T are one warp's.

    Nothing is faster than its bytes. Nothing is said of a trainer, whose products have no one tile, nor of programs
    too few for the chip, which wait more than they work. Left out: prologue, epilogue, caches, the launch, and the
    last tile of a program that takes several.
    """
    speed, metadata = chip.speed, launch.kernel.metadata
    m, n, k = (getattr(work.config, block, 0) for block in ("block_m", "block_n", "block_k"))
    code, bits = pass_of(assembly)
    issue = len(code) * metadata.num_warps / speed.schedulers
    moved = bits // 8 * metadata.num_warps * chip.target.warp_size
    if work.flops and m * n * k:
        product, _, times = case.precision.partition("x")  # tf32x3: three products in tf32
        step = 2 * m * n * k
        multiply = step * int(times or 1) / speed.flops[product]
        steps_a_pass = max(1, round(moved / ((m + n) * k * PRECISIONS[product].dtype.itemsize)))
        waves = math.ceil(launch.programs / speed.multiprocessors)
        cycles = work.flops / step / launch.programs * waves * max(multiply, issue / steps_a_pass)
    elif not work.flops and moved and launch.programs >= speed.multiprocessors:
        transfer = moved / (speed.bytes_per_s / speed.multiprocessors / speed.hertz)
        together = any(map(BARRIER.match, code))
        alone = issue + transfer if together else len(code) + transfer / metadata.num_warps
        a_pass = max(issue, transfer, (LATENCY + alone) / resident(chip, launch, assembly))
        cycles = work.bytes / moved * a_pass / speed.multiprocessors
    else:
        return 0.0
    return max(cycles / speed.hertz, work.bytes / speed.bytes_per_s)


@dataclass(frozen=True)
class Report:
    """A case on a chip.

    resident: programs on a multiprocessor at a time. step_instructions, step_matrix: of one pass of the loop that does
    the work, and how many of these are matrix instructions; pass_bits: what a thread loads and stores in it, or in the
    whole text where there is no loop. loads: how many of each width in bits; copies: of tiles, by the copy engine.
    ordered: whether partial sums are, None where there are none. barriers: how many loads follow each arrival at a
    grid barrier, as the text has them; looks: loops that wait for one; stray: what else arrives or looks.
    bytes_given: of the tensors that the kernel was given, workspace included. floor_us: on an H200; estimate_us:
    on this chip, by the model of `estimate`.
    """

    case: str
    chip: str
    launcher: str
    precision: str
    shape: tuple[int, ...]
    error: str | None = None
    config: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    programs: int = 0
    resident: int = 0
    registers: int = 0
    registers_limit: int = 0
    spills: int = 0
    shared_memory: int = 0
    shared_memory_limit: int = 0
    instructions: int = 0
    step_instructions: int = 0
    step_matrix: int = 0
    pass_bits: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    copies: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    ordered: bool | None = None
    barriers: tuple[int, ...] = ()
    looks: int = 0
    stray: int = 0
    float_atomics: int = 0
    bytes: int = 0
    bytes_given: int = 0
    flops: int = 0
    floor_us: float = 0.0
    estimate_us: float = 0.0


def examine(case: Case, name: str) -> Report:
    chip = CHIPS[name]
    report = Report(str(case), name, case.launcher.__name__, case.precision, case.shape)
    try:
        work, (launch, *others) = launches(chip, case)
    except Exception as error:  # one kernel's failure leaves the others' reports
        return replace(report, error=f"{type(error).__name__}: {error}")
    asm, metadata = launch.kernel.asm, launch.kernel.metadata
    assembly = chip.read(asm)
    sums = assembly.events.replace("G", "")
    _, *stretches = ARRIVAL.split(assembly.events)
    least_s = max(work.bytes / COPY_BYTES_PER_S, work.flops / PRECISIONS[case.precision].flops_per_s)
    return replace(
        report,
        config=work.config._asdict(),
        launches=1 + len(others),
        programs=launch.programs,
        resident=resident(chip, launch, assembly),
        registers=assembly.registers,
        registers_limit=min(chip.registers, chip.register_file // (metadata.num_warps * chip.target.warp_size)),
        spills=assembly.spills,
        shared_memory=metadata.shared,
        shared_memory_limit=chip.shared_memory,
        instructions=len(assembly.mnemonics),
        step_instructions=len(assembly.step),
        step_matrix=len(matrix_instructions(assembly.step)),
        pass_bits=pass_of(assembly)[1],
        loads=dict(Counter(moved_bits(m) for m in assembly.mnemonics if LOAD.match(m))),
        copies=sum(bool(COPY.match(mnemonic)) for mnemonic in assembly.mnemonics),
        matrix=dict(Counter(matrix_instructions(assembly.mnemonics))),
        ordered=bool(ORDERED.fullmatch(sums)) if re.search("[TX]", sums) else None,
        barriers=tuple(len(re.findall("[LG]", stretch)) for stretch in stretches),
        looks=sum(len(LOOK.findall(stretch)) for stretch in stretches),
        stray=len(re.findall("[RA]", LOOK.sub("", ARRIVAL.sub("", assembly.events)))),
        float_atomics=len(FLOAT_ATOMIC.findall(asm.get("ptx") or asm["amdgcn"])),
        bytes=work.bytes,
        bytes_given=launch.bytes,
        flops=work.flops,
        floor_us=round(least_s * 1e6, 3),
        estimate_us=round(estimate(chip, case, work, launch, assembly) * 1e6, 3),
    )


def examine_all(jobs: list[tuple[Case, str]]) -> Iterator[Report]:
    """Reports in the order of the jobs, from two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from pool.map(examine, *zip(*jobs, strict=True))


# Output

COLUMNS = {
    "chip": 6, "config": 18, "registers": 9, "resident": 8, "spills": 6, "shared KB": 9, "instructions": 12,
    "step/matrix": 11, "an element": 10, "loads x bits": 20, "matrix": 11, "partials": 11, "barriers": 8,
    "estimate/floor": 14,
}  # fmt: skip


def tally(counts: dict) -> str:
    return " ".join(f"{count}x{name}" for name, count in sorted(counts.items(), reverse=True))


def per_element(report: Report) -> str:
    """Instructions for each element that a pass loads or stores; a product's are its tiles'."""
    if report.flops or not report.pass_bits:
        return ""
    elements = report.pass_bits / (8 * PRECISIONS[report.precision].dtype.itemsize)
    return f"{(report.step_instructions or report.instructions) / elements:.1f}"


def row(report: Report) -> tuple[str, ...]:
    if report.error:
        return report.chip, "[red]failed"
    return (
        report.chip,
        "x".join(map(str, report.config.values())),
        str(report.registers),
        str(report.resident),
        f"[red]{report.spills}" if report.spills else "0",
        f"{report.shared_memory / 1024:.1f}/{report.shared_memory_limit // 1024}",
        str(report.instructions),
        f"{report.step_instructions}/{report.step_matrix}" if report.step_instructions else "",
        per_element(report),
        tally(report.loads),
        tally(report.matrix),
        {None: "", True: "ordered", False: "[red]not ordered"}[report.ordered],
        "[red]broken" if report.stray or report.looks != len(report.barriers) else str(report.looks or ""),
        f"{report.estimate_us:.5g}/{report.floor_us:.5g}" if report.estimate_us else "",
    )


def show(case: str, reports: list[Report], console: Console) -> None:
    errors = [f"[red]{escape(report.error)}" for report in reports if report.error]
    work = max(reports, key=lambda report: report.bytes)
    least = f"{work.bytes / 1e6:.2f} MB, {work.flops / 1e9:.2f} GFLOP, {work.floor_us:.1f} µs on an H200"
    table = Table(*(Column(name, width=width, overflow="fold") for name, width in COLUMNS.items()), box=None)
    for report in reports:
        table.add_row(*row(report))
    console.print(f"\n[bold]{case}[/]: launches {work.launches}; at least {least}", table, *errors, sep="\n")


def write(reports: list[Report], file: Path) -> None:
    lines = ",\n".join(json.dumps(asdict(report)) for report in reports)
    file.write_text(f'{{"triton": "{triton.__version__}", "reports": [\n{lines}\n]}}\n')


Targets = Annotated[list[str] | None, typer.Option("--target", help=f"{', '.join(CHIPS)}; repeatable")]
Kernels = Annotated[list[str] | None, typer.Option("--kernel", help="a case's name or how it starts; repeatable")]
Every = Annotated[bool, typer.Option("--all", help="every activation as well")]
Output = Annotated[Path | None, typer.Option("--json", help="write the report there too")]


def main(targets: Targets = None, kernels: Kernels = None, every: Every = False, output: Output = None) -> None:
    """Compile every kernel for every target and report its machine code."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET replaces the compiler: unset it to read machine code")
    cases = CASES + EVERY_ACTIVATION * every
    named = {str(case) for case in cases} & set(kernels or [])
    starts = tuple(set(kernels or [""]) - named)
    cases = tuple(case for case in cases if str(case) in named or str(case).startswith(starts))
    jobs = [(case, chip) for case, chip in product(cases, targets or CHIPS) if chip in case.chips]
    reports = list(track(examine_all(jobs), "compiling", len(jobs), console=Console(stderr=True)))
    console = Console()
    console.width = max(console.width, 190)
    for case, group in groupby(reports, lambda report: report.case):
        show(case, list(group), console)
    if output:
        write(reports, output)
    if any(report.error for report in reports):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
