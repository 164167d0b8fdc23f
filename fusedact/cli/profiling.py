"""`fusedact profile`: a trainer or an op under torch's profiler, stock and fused."""

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusedact.activations import TABLE
from fusedact.cli.options import Device, Threads, console, implementation, one_of, sizes
from fusedact.profiling.rows import OTHER
from fusedact.profiling.tracing import NAMES, PHASES, profile_unit, stages, unit_of

DTYPES = ("float32", "bfloat16", "float16", "float64")
ACTIVATIONS = [activation.name for activation in TABLE if not activation.learned]
SHOWN = 20  # rows of a table; the files have all
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

Name = Annotated[str, typer.Argument(metavar="NAME", help=f"{' | '.join(NAMES)}, or a case by its name.")]
Steps = Annotated[int, typer.Option(min=1, help="How many are recorded, after some that are not.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Of the traces.", show_default="runs/profile-NAME")]
Shape = Annotated[
    Any, typer.Option(parser=sizes, metavar="AxBx...", help="Of an op, as in the cases table: linear_act MxNxK.")
]
Dtype = Annotated[
    Any, typer.Option(parser=one_of(DTYPES, "dtype"), metavar="DTYPE", help=f"Of an op: {', '.join(DTYPES)}.")
]
Activation = Annotated[
    Any,
    typer.Option(
        parser=one_of(ACTIVATIONS, "activation"), metavar="NAME", help="Of an op that has one: relu, gelu, ..."
    ),
]
Phase = Annotated[
    Any, typer.Option(parser=one_of(PHASES, "phase"), metavar="PHASE", help=f"Of an op: {', '.join(PHASES)}.")
]
WithProton = Annotated[bool, typer.Option(help="On a GPU: Triton's own profiler too.")]
Nvtx = Annotated[bool, typer.Option("--nvtx", help="On a GPU: steps with NVTX ranges as well, for nsys or ncu.")]


def profile(
    name: Name,
    *,
    steps: Steps = 10,
    out: Out = None,
    device: Device,
    threads: Threads = 1,
    shape: Shape = None,
    dtype: Dtype = None,
    activation: Activation = None,
    phase: Phase = None,
    proton: WithProton = True,
    nvtx: Nvtx = False,
) -> None:
    """Profile a trainer's step or an op, stock and fused: a table of what ran, and a Chrome trace of each.

    A trace opens in ui.perfetto.dev or chrome://tracing. In it forward, loss, backward and optimizer are named, and
    within them each of our ops and, on a GPU, each Triton kernel with its sizes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes on standard error that it runs
    where = torch.empty(0, device=device).device
    if nvtx and where.type != "cuda":
        raise typer.BadParameter(f"--nvtx: ranges are NVIDIA's, expected a CUDA device, received {device}")
    choice = {"shape": shape, "dtype": dtype, "activation": activation, "phase": phase}
    out = out or Path("runs") / f"profile-{name.replace(' ', '-')}"
    what = implementation(torch.empty(0, device=where))
    try:
        unit_of(name, where, inference=True, **choice)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("", total=stages(where, proton, nvtx))

        def begun(stage: str) -> None:
            progress.update(bar, description=stage)
            progress.advance(bar)

        try:
            found = profile_unit(
                name,
                where,
                steps=steps,
                out=out,
                threads=threads,
                with_proton=proton,
                nvtx=nvtx,
                progress=begun,
                **choice,
            )
        except (RuntimeError, ValueError) as error:  # memory that does not suffice, an op that is not for this dtype
            raise typer.BadParameter(f"{name}: {str(error).partition(chr(10))[0]}") from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    _show(found, what)


def _show(found: dict[str, Any], what: str) -> None:
    for contender, profiled in found["contenders"].items():
        console.print(_table(f"{found['title']}, {contender}", profiled, found["kernels"]))
    console.print(_totals(found))
    ceilings = ", ".join(f"{name} {value:.4g}" for name, value in found["ceilings"].items())
    above = "a cache served" + ", or three TF32 products made a float32 one" * found["kernels"]
    console.print(f"Share: of the time that the measured ceilings allow ({ceilings}); above 100 %: {above}.")
    if not found["triton"]:
        console.print(f"On {found['device']} {what}, torch's own operations: fused kernels show on a GPU.")
    elif not found["kernels"]:
        console.print(f"On {found['device']} {what}, interpreted: their times say nothing of a GPU's.")
    if "proton" in found:
        _show_proton(found["proton"])
    for profiled in found["contenders"].values():
        print(profiled["trace"])


def _table(title: str, profiled: dict[str, Any], on_gpu: bool) -> Table:
    table = Table("operation", title=title)
    if on_gpu:
        table.add_column("kernels", overflow="ellipsis", no_wrap=True, max_width=40)
    for heading in ("launches" if on_gpu else "calls", "µs", "bytes", "FLOPs", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [row for row in profiled["rows"] if row["name"] != OTHER]
    rest = [row for row in profiled["rows"] if row["name"] == OTHER]
    for row in rows[:SHOWN]:
        kernels = [escape(", ".join(row["kernels"]))] if on_gpu else []
        flops = sum(row["flops"].values())
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        table.add_row(
            escape(row["name"]), *kernels, f"{row['calls']:g}", f"{row['us']:,.1f}", _short(row["bytes"]),
            _short(flops), share,
        )  # fmt: skip
    hidden = rows[SHOWN:]
    if hidden:
        calls, us = (sum(row[key] for row in hidden) for key in ("calls", "us"))
        blank = [""] if on_gpu else []
        table.add_row(f"{len(hidden)} more", *blank, f"{calls:g}", f"{us:,.1f}", "", "", "")
    for row in rest:
        table.add_row(row["name"], "", f"{row['us']:,.1f}", "", "", "")
    return table


def _short(number: int | None) -> str:
    """1.23 M for 1,230,000; nothing for 0 or what is not known."""
    if not number:
        return ""
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {letter}"
    return str(number)


def _totals(found: dict[str, Any]) -> Table:
    on_gpu = found["kernels"]
    table = Table("a step", title=f"{found['steps']} steps recorded on {found['device']}")
    for heading in ("stock", "fused", "stock / fused"):
        table.add_column(heading, justify="right")
    stock, fused = found["contenders"]["stock"], found["contenders"]["fused"]
    names = ("launches", "µs on the device") if on_gpu else ("ATen calls", "µs under the profiler")
    for name, key in zip(names, ("calls", "us"), strict=True):
        noisy = key == "us" and not on_gpu  # each ran by itself
        ratio = "" if noisy else _ratio(stock[key], fused[key])
        table.add_row(name, f"{stock[key]:,.6g}", f"{fused[key]:,.6g}", ratio)
    times = [profiled["time_us"]["median"] for profiled in (stock, fused)]
    table.add_row("µs without a profiler", *(f"{time:,.1f}" for time in times), _ratio(*times))
    return table


def _ratio(stock: float, fused: float) -> str:
    return f"{stock / fused:.2f}" if fused else ""


def _show_proton(found: dict[str, Any]) -> None:
    if "error" in found:
        console.print(f"Proton: {escape(found['error'])}")
        return
    table = Table("kernel", title="Proton, fused, a step")
    for heading in ("launches", "µs", "GB/s", "TFLOP/s"):
        table.add_column(heading, justify="right")
    for row in found["rows"][:SHOWN]:
        ns = row.get("time (ns)", 0)
        flops = sum(value for key, value in row.items() if key.startswith("flops"))
        rates = [f"{value / ns:,.1f}" if ns and value else "" for value in (row.get("bytes", 0), flops / 1e3)]
        table.add_row(escape(row["name"]), f"{row.get('count', 0):g}", f"{ns / 1e3:,.1f}", *rates)
    console.print(table)
    if found["file"]:
        print(found["file"])
