"""`fusedact train | compare | info`."""

import csv
import importlib.metadata
import inspect
import io
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

import fusedact
from fusedact import plotting
from fusedact.backend import uses_triton
from fusedact.data import write_whole
from fusedact.trainers import LAYERS, TRAINERS, Epoch, Trainer, save_checkpoint

SAVE_EVERY = 10.0  # seconds, so that a killed run leaves something
MOST_ROWS = 20  # of epochs in a table; of longer runs it shows the first and every tenth part
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("epochs"),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[cost]}"),
)

console = Console()
app = typer.Typer(
    help="The tutorials' programs on fused layers, on torch's own, or on both.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def run(args: Sequence[str] | None) -> int:
    """Runs a command. What cannot be done is said in one line on standard error; the exit code is then 2."""
    try:
        return app(args, standalone_mode=False) or 0
    except typer.TyperException as error:
        fault = error.format_message()
    except OSError as error:
        fault = str(error)
    print("fusedact:", " ".join(fault.split()), file=sys.stderr)
    return 2


def _trainer(name: str) -> type[Trainer]:
    if name not in TRAINERS:
        raise typer.BadParameter(f"unknown trainer {name!r}, expected one of {', '.join(TRAINERS)}")
    return TRAINERS[name]


def _device(name: str) -> str:
    """The name, if a number can go to that device and back."""
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{name}: {reason}") from error
    return name


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"{error}, expected numbers with commas between them") from error


def _folder(path: str) -> Path:
    """The folder, made where absent, if a file can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    return Path(path)


Name = Annotated[Any, typer.Argument(parser=_trainer, metavar="NAME", help=" | ".join(TRAINERS))]
Layers = Annotated[Literal["stock", "fused"], typer.Option(help="torch.nn's or fusedact.nn's.")]
OPTIONS = {  # of both commands: the fields of Settings that a user may give
    "epochs": Annotated[int | None, typer.Option(min=1, help="The tutorial's, as the next three, if not given.")],
    "batch_size": Annotated[int | None, typer.Option(min=1)],
    "lr": Annotated[float | None, typer.Option(min=0)],
    "seed": Annotated[int | None, typer.Option(min=0, max=2**63 - 1)],
    "start": Annotated[
        Any,
        typer.Option(parser=_numbers, metavar="W,W,...", help="Parameters to start from, in the model's order."),
    ],
    "data": Annotated[Path | None, typer.Option(help="MNIST: a folder of IDX files. Others: a CSV, made if absent.")],
    "download": Annotated[
        bool | None, typer.Option("--download", help="Fetch MNIST, once, into the user's cache folder.")
    ],
    "raw_pixels": Annotated[
        bool | None, typer.Option("--raw-pixels", help="Test MNIST on 0..255, as the tutorial does.")
    ],
}
Device = Annotated[
    str,
    typer.Option(
        parser=_device,
        metavar="DEVICE",
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu",
        show_default="cuda if there is one",
    ),
]
Threads = Annotated[int, typer.Option(min=1, help="Torch's on a CPU; two stall on networks as small as these.")]
Out = Annotated[Any, typer.Option(parser=_folder, metavar="DIR", help="For the curve, metrics and parameters.")]


@dataclass
class Run:
    """A trainer under way: its epochs so far, and its parameters after the last whole one."""

    trainer: Trainer
    epochs: list[Epoch] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    def add(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)
        self.state = {name: value.clone() for name, value in self.trainer.model.state_dict().items()}

    @property
    def step_microseconds(self) -> tuple[float, float, float]:
        """Median over the epochs, with the 20 and 80 % points."""
        times = [1e6 * epoch.step_seconds for epoch in self.epochs]
        points = quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
        return median(times), points[0], points[-1]


Runs = dict[str, Run]  # by the name of their layers


def _takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Spells the command's `**options` out for typer, which reads signatures."""
    signature = inspect.signature(command)
    *own, _ = signature.parameters.values()
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in OPTIONS.items()
    ]
    command.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return command


@app.command()
@_takes_options
def train(
    trainer: Name,
    *,
    layers: Layers = "fused",
    device: Device,
    threads: Threads = 1,
    out: Out = None,
    **options: Any,
) -> None:
    """Run a tutorial's program and print what it prints."""
    runs = _prepare(trainer, [layers], threads, device=device, **options)
    paths = _train(runs, out)
    print(runs[layers].trainer.evaluate().text, *paths, sep="\n")


@app.command()
@_takes_options
def compare(trainer: Name, *, device: Device, threads: Threads = 1, out: Out = None, **options: Any) -> None:
    """Run a tutorial's program on stock and on fused layers, an epoch of each in turn, and tabulate them."""
    out = out or _folder(f"runs/{trainer.name}")
    runs = _prepare(trainer, list(LAYERS), threads, device=device, **options)
    paths = _train(runs, out)
    console.print(_table(runs))
    print(*paths, sep="\n")


@app.command()
def info() -> None:
    """Print versions, devices, and what fused layers run on each."""
    for package in ("fusedact", "torch", "triton", "numpy"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:10} {version}")
    print(f"{'python':10} {platform.python_version()}")
    print(f"{'backend':10} {fusedact.get_backend()}")
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        hardware = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
        print(f"{device:10} {hardware}, {_implementation(torch.empty(0, device=device))}")


def _prepare(trainer: type[Trainer], layers: list[str], threads: int, **options: Any) -> Runs:
    """A run on each of the layers, with its trainer's defaults where an option is None."""
    settings = replace(trainer.defaults, **{name: value for name, value in options.items() if value is not None})
    torch.set_num_threads(threads)
    try:
        runs = {name: Run(trainer(LAYERS[name], settings)) for name in layers}
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    x, source = runs[layers[0]].trainer.x, runs[layers[0]].trainer.source
    where = f"cpu, torch threads: {torch.get_num_threads()}" if x.device.type == "cpu" else str(x.device)
    print(f"{trainer.name} on {' and '.join(layers)} layers; {where}; {_implementation(x)}; {source}")
    return runs


def _implementation(x: Tensor) -> str:
    try:
        kind = "Triton kernels" if uses_triton(x) else "the PyTorch fallback"
    except (RuntimeError, ValueError) as error:  # of FUSEDACT_BACKEND
        raise typer.BadParameter(str(error)) from error
    return f"fused layers run {kind}"


def _train(runs: Runs, out: Path | None) -> list[Path]:
    """Trains an epoch of each in turn; what is done is saved now and then, at the end, and on Ctrl-C."""
    trainers = [run.trainer for run in runs.values()]
    saved = time.monotonic()
    try:
        with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task(trainers[0].name, total=trainers[0].settings.epochs, cost="")
            for epochs in zip(*(trainer.epochs() for trainer in trainers), strict=True):
                for run, epoch in zip(runs.values(), epochs, strict=True):
                    run.add(epoch)
                progress.update(bar, advance=1, cost=f"cost {epochs[-1].cost:.4g}")
                if len(runs) == 1 and (lines := trainers[0].report(epochs[0])):
                    print(lines)
                if time.monotonic() > saved + SAVE_EVERY:
                    _save(runs, out)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        print(*_save(runs, out), sep="\n")
        raise typer.Exit(130) from None
    return _save(runs, out)


def _save(runs: Runs, out: Path | None) -> list[Path]:
    """Writes the curves, metrics and parameters of the whole epochs so far; returns where they are."""
    done = {layers: run for layers, run in runs.items() if run.epochs}
    if out is None or not done:
        return []
    name = next(iter(done.values())).trainer.name
    costs = {layers: [epoch.cost for epoch in run.epochs] for layers, run in done.items()}
    picture, metrics = out / f"{name}.png", out / f"{name}.csv"
    write_whole(picture, plotting.png(plotting.training_curves(costs, name)))
    write_whole(metrics, _metrics(done))
    checkpoints = {out / f"{name}-{layers}.pt": run.state for layers, run in done.items()}
    for path, state in checkpoints.items():
        save_checkpoint(path, state)
    return [picture, metrics, *checkpoints]


def _metrics(runs: Runs) -> bytes:
    """A CSV with a line for each epoch of each run."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["layers", "epoch", "cost", "step_seconds"])
    for layers, run in runs.items():
        table.writerows([layers, epoch.number, epoch.cost, epoch.step_seconds] for epoch in run.epochs)
    return text.getvalue().encode()


def _table(runs: Runs) -> Table:
    """Cost by epoch, accuracy and time of stock and fused layers, and the ratio of each."""
    last = len(runs["stock"].epochs)
    shown = range(1, last + 1) if last <= MOST_ROWS else sorted({1, *(last * i // 10 for i in range(1, 11))})
    rows = [(f"cost, epoch {n}", "{:.6f}", [run.epochs[n - 1].cost for run in runs.values()]) for n in shown]
    rows.append(("accuracy", "{:.4f}", [run.trainer.evaluate().accuracy for run in runs.values()]))
    table = Table("", *runs, "stock / fused")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, form, (stock, fused) in rows:
        table.add_row(label, form.format(stock), form.format(fused), f"{stock / fused:.4f}" if fused else "")
    times = {layers: run.step_microseconds for layers, run in runs.items()}
    stock, fused = (middle for middle, _, _ in times.values())
    table.add_row("time a step", f"{stock:,.1f} µs", f"{fused:,.1f} µs", f"{stock / fused:.4f}")
    spread = ", ".join(f"{layers} {low:,.1f} to {high:,.1f}" for layers, (_, low, high) in times.items())
    table.caption = f"time: median epoch; 20 to 80 %: {spread} µs"
    return table
