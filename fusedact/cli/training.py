"""`fusedact train | compare`: the tutorials' programs."""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fusedact.cli.options import Device, Threads, console, folder, implementation
from fusedact.distributed import processes
from fusedact.trainers import LAYERS, TRAINERS, Binary, Epoch, Settings, Trainer, Xor
from fusedact.trainers.loop import PLAIN, TUTORIAL
from fusedact.trainers.parallel import DDP
from fusedact.trainers.runs import Run, Runs, checkpoint_path, save
from fusedact.trainers.runs import train as runs_in_turn
from fusedact.trainers.sweep import EPOCHS as SWEPT_EPOCHS
from fusedact.trainers.sweep import save_sweep, sweep_xor

COMPARED = {"tutorial": ("stock", TUTORIAL), "stock": ("stock", PLAIN), "fused": ("fused", PLAIN)}
SWEPT = 1000  # seeds
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


def _trainer(name: str) -> type[Trainer]:
    if name not in TRAINERS:
        raise typer.BadParameter(f"unknown trainer {name!r}, expected one of {', '.join(TRAINERS)}")
    return TRAINERS[name]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise typer.BadParameter(f"{error}, expected numbers with commas between them") from error


Name = Annotated[Any, typer.Argument(parser=_trainer, metavar="NAME", help=" | ".join(TRAINERS))]
Engine = Annotated[
    Literal["auto", "persistent", "graph", "steps", "loop", "plain", "tutorial", "ddp"],
    typer.Option(
        help="What trains: auto for the fastest that can; tutorial, or plain without its data loader; under torchrun "
        "ddp, each batch split over its processes."
    ),
]
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
    "standardize": Annotated[
        bool | None, typer.Option("--standardize", help="binary: inputs of mean 0 and deviation 1.")
    ],
    "logits": Annotated[
        bool | None, typer.Option("--logits", help="binary: BCE on logits in place of Sigmoid and BCELoss.")
    ],
    "rows": Annotated[int | None, typer.Option(min=1, help="MNIST: train on the first so many images alone.")],
    "raw_pixels": Annotated[
        bool | None, typer.Option("--raw-pixels", help="Test MNIST on 0..255, as the tutorial does.")
    ],
}
CheckpointEvery = Annotated[
    int | None, typer.Option(min=1, metavar="EPOCHS", help="How often to save; every ten seconds if not given.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Sweep = Annotated[
    bool, typer.Option("--sweep", help=f"xor: how often it learns, of {SWEPT:,} initializations at each of some rates.")
]
Out = Annotated[Any, typer.Option(parser=folder, metavar="DIR", help="For the curve, metrics and parameters.")]


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


@_takes_options
def train(
    trainer: Name,
    *,
    layers: Layers = "fused",
    engine: Engine = "auto",
    device: Device,
    threads: Threads = 1,
    out: Out = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    **options: Any,
) -> None:
    """Run a tutorial's program and print what it prints.

    Under torchrun its processes share each batch, the first prints and writes, and started again after one of them
    died they go on from the last checkpoint in --out.
    """
    if processes.started() and engine not in ("auto", DDP):
        raise typer.BadParameter(f"--engine {engine} trains in one process; under torchrun there is {DDP}, or auto")
    if out is None and (resume or checkpoint_every):
        raise typer.BadParameter("--checkpoint-every and --resume need --out, where checkpoints are")
    runs = _prepare(trainer, {layers: (layers, engine)}, threads, checkpoint_every, device=device, **options)
    paths = _train(runs, out, checkpoint_every, resume)
    if processes.rank() == 0:
        print(runs[layers].trainer.evaluate().text, *paths, sep="\n")


@_takes_options
def compare(
    trainer: Name,
    *,
    engine: Engine = "auto",
    device: Device,
    threads: Threads = 1,
    out: Out = None,
    checkpoint_every: CheckpointEvery = None,
    resume: Resume = False,
    sweep: Sweep = False,
    **options: Any,
) -> None:
    """Run a tutorial's program four ways in turn, from one seed, and tabulate them.

    tutorial: its own loop and data loader; stock: torch.nn's layers on rows that are on the device; fused: ours;
    fit: torch.nn's through fusedact.fit.
    """
    if processes.started() and not sweep:
        raise typer.BadParameter("compare runs in one process, but for its --sweep: start it without torchrun")
    out = out or folder(f"runs/{trainer.name}")
    if sweep:
        _sweep(trainer, out, device, threads, **options)
        return
    runs = _prepare(trainer, COMPARED | {"fit": ("stock", engine)}, threads, checkpoint_every, device=device, **options)
    paths = _train(runs, out, checkpoint_every, resume)
    console.print(_table(runs))
    if trainer is Binary:
        console.print(_loss_table(runs["fit"].trainer.settings))
    print(*paths, sep="\n")


def _prepare(
    trainer: type[Trainer], ways: dict[str, tuple[str, str]], threads: int, every: int | None, **options: Any
) -> Runs:
    """A run of each of the ways, which are layers and engine; its trainer's defaults where an option is None."""
    settings = replace(trainer.defaults, **{name: value for name, value in options.items() if value is not None})
    torch.set_num_threads(threads)

    def made() -> Runs:
        return {
            label: Run(trainer(LAYERS[layers], replace(settings, engine=engine)), every)
            for label, (layers, engine) in ways.items()
        }

    try:
        runs = processes.in_turn(made)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    first, *_, last = [run.trainer for run in runs.values()] * 2
    where = f"cpu, torch threads: {torch.get_num_threads()}" if first.x.device.type == "cpu" else str(first.x.device)
    what = f"{next(iter(runs))} layers" if len(runs) == 1 else ", ".join(runs)
    print(
        f"{trainer.name}: {what}; {where}; {implementation(first.x)}; engine {last.engine} ({last.reason}); "
        f"{first.source}"
    )
    return runs


def _train(runs: Runs, out: Path | None, every: int | None, resume: bool) -> list[Path]:
    """Trains all in turn behind a bar; what is done is saved on Ctrl-C and on a fault too."""
    trainers = [run.trainer for run in runs.values()]
    if out:
        _begin(runs, out, resume)
    out = None if processes.rank() else out
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
        total = sum(trainer.settings.epochs for trainer in trainers)
        bar = progress.add_task(trainers[0].name, total=total, cost="")

        def show(run: Run, some: list[Epoch]) -> None:
            done = sum(trainer.done for trainer in trainers)
            progress.update(bar, completed=done, cost=f"cost {some[-1].cost:.4g}")
            if len(runs) == 1 and (lines := run.trainer.report(some[-1])):
                print(lines)

        try:
            return runs_in_turn(runs, out, every, show)
        except BaseException as fault:
            with processes.unstoppable():
                paths = save(runs, out)
            if isinstance(fault, KeyboardInterrupt):
                print(*paths, sep="\n")
                raise typer.Exit(130) from None
            if isinstance(fault, FloatingPointError):
                raise typer.BadParameter(str(fault)) from fault
            raise


def _begin(runs: Runs, out: Path, resume: bool) -> None:
    """Runs that have a checkpoint go on from it, where they were told to or torchrun has started processes again.

    In processes a run that begins anew leaves a checkpoint of no epochs, so that a restart never goes on from what an
    earlier run left there.
    """
    again = resume or processes.restarted()
    paths = {label: checkpoint_path(out, run.trainer.name, label) for label, run in runs.items()}

    def found() -> list[str]:
        there = [label for label, path in paths.items() if again and path.exists()]
        if processes.started() and not (there or resume):
            for label, path in paths.items():
                runs[label].save(path)
        return there

    there = processes.from_first(found)
    if resume and not there:
        raise typer.BadParameter(f"{' and '.join(map(str, paths.values()))}: no checkpoint to go on from")
    for label in there:
        try:
            runs[label].resume(paths[label])
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error


def _sweep(trainer: type[Trainer], out: Path, device: str, threads: int, epochs: int | None, **options: Any) -> None:
    if trainer is not Xor:
        raise typer.BadParameter(f"--sweep is xor's, not {trainer.name}'s")
    if unused := [name for name, value in options.items() if value is not None]:
        raise typer.BadParameter(f"--sweep takes --epochs, --device, --threads and --out, not --{unused[0]}")
    torch.set_num_threads(threads)
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("sweep", total=epochs or SWEPT_EPOCHS, cost="")
        swept = sweep_xor(
            SWEPT,
            epochs=epochs or SWEPT_EPOCHS,
            device=device,
            progress=lambda done: progress.update(bar, completed=done),
        )
    last = len(swept.epochs) - 1
    shown = [look for look, epoch in enumerate(swept.epochs) if epoch in (10, 100, 1000) or look == last]
    table = Table("lr", *(f"by epoch {swept.epochs[look]:,}" for look in shown))
    table.title = f"share of {SWEPT:,} initializations that have learned XOR ({swept.engine})"
    for lr, shares in zip(swept.lrs, swept.shares.tolist(), strict=True):
        table.add_row(f"{lr:g}", *(f"{shares[look]:.1%}" for look in shown))
    console.print(table)
    if processes.rank() == 0:
        print(*save_sweep(swept, out), sep="\n")


def _table(runs: Runs) -> Table:
    """Cost by epoch, accuracy and time of each way, and how they compare with the tutorial and with stock layers."""
    last = len(runs["stock"].epochs)
    shown = range(1, last + 1) if last <= MOST_ROWS else sorted({1, *(last * i // 10 for i in range(1, 11))})
    table = Table("", *(f"{name}, {run.trainer.engine}" if name == "fit" else name for name, run in runs.items()))
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, form: str, values: Iterable[float]) -> None:
        table.add_row(label, *(form.format(value) for value in values))

    for n in shown:
        row(f"cost, epoch {n}", "{:.6f}", [run.epochs[n - 1].cost for run in runs.values()])
    stock = [epoch.cost for epoch in runs["stock"].epochs]
    row("farthest from stock", "{:.1e}", [_farthest([e.cost for e in run.epochs], stock) for run in runs.values()])
    row("accuracy", "{:.4f}", [run.trainer.evaluate().accuracy for run in runs.values()])
    times = {name: run.step_microseconds for name, run in runs.items()}
    row("time a step, µs", "{:,.1f}", [middle for middle, _, _ in times.values()])
    row("20 to 80 %, from", "{:,.1f}", [low for _, low, _ in times.values()])
    row("to", "{:,.1f}", [high for _, _, high in times.values()])
    for base in ("tutorial", "stock"):
        row(f"{base} / this", "{:.2f}", [times[base][0] / middle for middle, _, _ in times.values()])
    return table


def _farthest(costs: list[float], others: list[float]) -> float:
    """The greatest relative difference."""
    return max(abs(a - b) / (abs(b) or 1.0) for a, b in zip(costs, others, strict=True))


def _loss_table(settings: Settings) -> Table:
    """What fusing the loss, and then scaling the inputs, does to S1 from the same initialization."""
    ways = {
        "Sigmoid, BCELoss": (False, False),
        "BCE on logits": (True, False),
        "on standardized inputs": (True, True),
    }
    table = Table("one layer, the same start", "cost at the end", "right, validation")
    table.title = "What fusing the loss does"
    table.caption = (
        "No plane divides the rule's rows from the rest; on standardized inputs training nears the best one."
    )
    for label, (logits, standardize) in ways.items():
        trainer = Binary(LAYERS["fused"], replace(settings, logits=logits, standardize=standardize))
        *_, last = trainer.epochs()
        table.add_row(label, f"{last.cost:.4f}", f"{trainer.evaluate().accuracy:.3f}")
    return table
