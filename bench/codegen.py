"""The machine code of every kernel for every target, read without a GPU: `python -m bench.codegen`.

A case calls a launcher with tensors of the meta device while the driver claims to be the target, so the JIT
specializes and compiles what it would there. The machine code tells registers, spills, load widths and matrix
instructions; the case tells its least bytes and FLOPs, and so the least time on an H200.
"""

import json
import re
import subprocess
import tempfile
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

from bench.codegen_cases import CASES, EVERY_ACTIVATION, PRECISIONS, Case, Work

COPY_BYTES_PER_S = 4.3e12  # H200, as the rates below


# Machine code


class Assembly(NamedTuple):
    """A kernel as the assembler left it.

    spills: a thread's bytes of stack, and on AMD the vector registers saved there too (a scalar register that
    moves into a lane of a vector register is none). events: what orders memory, a letter each.
    """

    registers: int
    spills: int
    mnemonics: list[str]
    events: str


# S store, B barrier, L load of a partial, G other load, X other atomic; at the GPU's scope T ticket (acquire and
# release), R arrival at a grid barrier (release), A look at it (acquire).
PTX_EVENTS = re.compile(
    r"""(?P<S>\bst\.global) | (?P<B>\bbar\.sync) | (?P<L>\bld\.global\.cg)
    | (?P<T>\batom\.global\.gpu\.acq_rel\.add\.u32) | (?P<R>\batom\.global\.gpu\.release\.add\.u(?:32|64))
    | (?P<A>\bld\.global\.gpu\.acquire) | (?P<G>\bld\.global|\bcp\.async\.c[ag]\.shared\.global)
    | (?P<X>\b(?:atom|red)\.)""",
    re.VERBOSE,
)
AMD_EVENTS = re.compile(
    r"""(?P<S>(?:global|buffer)_store) | (?P<B>s_barrier) | (?P<L>(?:global|buffer)_load.*\ sc0\ nt)
    | (?P<T>buffer_wbl2\ sc1\n s_waitcnt\ vmcnt\(0\)\n global_atomic_add\ .*\ sc0\n
        s_waitcnt\ vmcnt\(0\)\n buffer_inv\ sc1\n)
    | (?P<R>buffer_wbl2\ sc1\n s_waitcnt\ vmcnt\(0\)\n global_atomic_add)
    | (?P<A>global_load_dword.*\ sc1\n s_waitcnt\ vmcnt\(0\)\n buffer_inv\ sc1\n)
    | (?P<G>(?:global|buffer)_load) | (?P<X>_atomic_)""",
    re.VERBOSE,
)
ORDERED = re.compile("[SB]*(BTB[SB]*L[SBL]*)*")  # of all but G
ARRIVAL = re.compile("BRA")  # at a grid barrier, and the first look at it: no load in between
LOOK = re.compile("BA")  # again, in a loop
FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.\S*\.b?f(?:16|32|64)|_atomic_\w*_b?f(?:16|32|64)")
LOAD = re.compile(r"LDG\b|LDGSTS|(?:global|buffer)_load")
MATRIX = re.compile(r"[A-Z]*MMA\b|v_mfma")
BITS = {"256": 256, "128": 128, "dwordx4": 128, "dwordx3": 96, "64": 64, "dwordx2": 64}
BITS |= {"U16": 16, "ushort": 16, "short": 16, "U8": 8, "S8": 8, "ubyte": 8, "sbyte": 8}


def events(pattern: re.Pattern, text: str) -> str:
    return "".join(match.lastgroup or "" for match in pattern.finditer(text))


def load_bits(mnemonic: str) -> int:
    return next((BITS[part] for part in re.split(r"[._]", mnemonic) if part in BITS), 32)


def tool(name: str, *arguments: str) -> str:
    """What that tool, of those in Triton's wheel, prints."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read_nvidia(asm) -> Assembly:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = tool("nvdisasm", "-ndf", "-c", cubin.name)
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]+)", sass, re.MULTILINE)
    return Assembly(registers, stack + local, mnemonics, events(PTX_EVENTS, asm["ptx"]))


def read_amd(asm) -> Assembly:
    text = asm["amdgcn"]
    figures = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)$", text, re.MULTILINE)}
    code = re.findall(r"^\t(?!s_nop)([a-z].*)", text, re.MULTILINE)
    return Assembly(
        registers=figures["vgpr_count"],
        spills=figures["vgpr_spill_count"] + figures["private_segment_fixed_size"],
        mnemonics=[line.split()[0] for line in code],
        events=events(AMD_EVENTS, "\n".join(code)),
    )


class Chip(NamedTuple):
    """A target and what one program may take of it."""

    target: GPUTarget
    shared_memory: int
    registers: int  # a thread
    register_file: int  # all threads
    read: Callable[[Any], Assembly]


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, 255, 65536, read_nvidia),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, 255, 65536, read_nvidia),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, 255, 65536, read_nvidia),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, 512, 131072, read_amd),
}


# Report


class Offline:
    """A driver for a chip that is not there: enough for the JIT to specialize and compile."""

    def __init__(self, target: GPUTarget):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: target.arch
        self.get_current_stream = lambda device: None


class Launch(NamedTuple):
    kernel: Any
    bytes: int  # of the tensors it was given


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors(argument)


def launches(chip: Chip, case: Case) -> tuple[Work, list[Launch]]:
    """The case's work, and what its launcher launches on that chip, compiled."""
    recorded = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        recorded.append(Launch(kernel, sum(x.nbytes for x in tensors(args))))

    driver.set_active(Offline(chip.target))
    with mock.patch.object(JITFunction, "run", compile_only):
        work = case.launcher(chip, PRECISIONS[case.precision], *case.shape, **case.options)
    return work, recorded


@dataclass(frozen=True)
class Report:
    """A case on a chip.

    loads: how many of each width in bits. ordered: whether partial sums are, None where there are none. barriers: how
    many loads follow each arrival at a grid barrier, as the text has them; looks: loops that wait for one; stray: what
    else arrives or looks.
    bytes_given: of the tensors that the kernel was given, workspace included. floor_us: on an H200.
    """

    case: str
    chip: str
    launcher: str
    precision: str
    shape: tuple[int, ...]
    error: str | None = None
    config: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    registers: int = 0
    registers_limit: int = 0
    spills: int = 0
    shared_memory: int = 0
    shared_memory_limit: int = 0
    instructions: int = 0
    loads: dict[int, int] = field(default_factory=dict)
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


def examine(case: Case, name: str) -> Report:
    chip = CHIPS[name]
    report = Report(str(case), name, case.launcher.__name__, case.precision, case.shape)
    try:
        work, (launch, *others) = launches(chip, case)
    except Exception as error:  # one kernel's failure leaves the others' reports
        return replace(report, error=f"{type(error).__name__}: {error}")
    asm, metadata = launch.kernel.asm, launch.kernel.metadata
    assembly = chip.read(asm)
    matrix = (MATRIX.match(mnemonic) for mnemonic in assembly.mnemonics)
    sums = assembly.events.replace("G", "")
    _, *stretches = ARRIVAL.split(assembly.events)
    least_s = max(work.bytes / COPY_BYTES_PER_S, work.flops / PRECISIONS[case.precision].flops_per_s)
    return replace(
        report,
        config=work.config._asdict(),
        launches=1 + len(others),
        registers=assembly.registers,
        registers_limit=min(chip.registers, chip.register_file // (metadata.num_warps * chip.target.warp_size)),
        spills=assembly.spills,
        shared_memory=metadata.shared,
        shared_memory_limit=chip.shared_memory,
        instructions=len(assembly.mnemonics),
        loads=dict(Counter(load_bits(m) for m in assembly.mnemonics if LOAD.match(m))),
        matrix=dict(Counter(match.group() for match in matrix if match)),
        ordered=bool(ORDERED.fullmatch(sums)) if re.search("[TX]", sums) else None,
        barriers=tuple(len(re.findall("[LG]", stretch)) for stretch in stretches),
        looks=sum(len(LOOK.findall(stretch)) for stretch in stretches),
        stray=len(re.findall("[RA]", LOOK.sub("", ARRIVAL.sub("", assembly.events)))),
        float_atomics=len(FLOAT_ATOMIC.findall(asm.get("ptx") or asm["amdgcn"])),
        bytes=work.bytes,
        bytes_given=launch.bytes,
        flops=work.flops,
        floor_us=round(least_s * 1e6, 3),
    )


def examine_all(jobs: list[tuple[Case, str]]) -> Iterator[Report]:
    """Reports in the order of the jobs, from two processes."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield from pool.map(examine, *zip(*jobs, strict=True))


# Output

COLUMNS = {
    "chip": 6, "config": 18, "registers": 9, "spills": 6, "shared KB": 11, "instructions": 12,
    "loads x bits": 26, "matrix": 11, "partials": 11, "barriers": 8,
}  # fmt: skip


def tally(counts: dict) -> str:
    return " ".join(f"{count}x{name}" for name, count in sorted(counts.items(), reverse=True))


def row(report: Report) -> tuple[str, ...]:
    if report.error:
        return report.chip, "[red]failed"
    return (
        report.chip,
        "x".join(map(str, report.config.values())),
        str(report.registers),
        f"[red]{report.spills}" if report.spills else "0",
        f"{report.shared_memory / 1024:.1f}/{report.shared_memory_limit // 1024}",
        str(report.instructions),
        tally(report.loads),
        tally(report.matrix),
        {None: "", True: "ordered", False: "[red]not ordered"}[report.ordered],
        "[red]broken" if report.stray or report.looks != len(report.barriers) else str(report.looks or ""),
    )


def show(case: str, reports: list[Report], console: Console) -> None:
    errors = [f"[red]{escape(report.error)}" for report in reports if report.error]
    work = max(reports, key=lambda report: report.bytes)
    least = f"{work.bytes / 1e6:.2f} MB, {work.flops / 1e9:.2f} GFLOP, {work.floor_us:.1f} µs on an H200"
    table = Table(*(Column(name, width=width) for name, width in COLUMNS.items()), box=None)
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
    jobs = list(product(cases, targets or CHIPS))
    reports = list(track(examine_all(jobs), "compiling", len(jobs), console=Console(stderr=True)))
    console = Console()
    console.width = max(console.width, 140)
    for case, group in groupby(reports, lambda report: report.case):
        show(case, list(group), console)
    if output:
        write(reports, output)
    if any(report.error for report in reports):
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
