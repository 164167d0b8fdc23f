"""`fusedact plot activations | xor | mnist | curves | losses`: pictures."""

import csv
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import Progress, track

from fusedact import plotting
from fusedact.cli.options import Device, Threads, console
from fusedact.cli.training import COLUMNS, Name, Out
from fusedact.data import write_whole
from fusedact.plotting import activations as catalogue
from fusedact.plotting import digits, surfaces
from fusedact.plotting import losses as loss_pictures
from fusedact.trainers import LAYERS, TRAINERS, Epoch, Perceptron, Trainer, Xor
from fusedact.trainers.checkpoint import load_run
from fusedact.trainers.loop import PLAIN
from fusedact.trainers.perceptron import ROWS
from fusedact.trainers.runs import Run
from fusedact.trainers.runs import train as runs_in_turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MNIST = ("mnist-mlp", "mnist-softmax", "mnist-cnn")
MAKERS = "MNIST by LeCun, Cortes and Burges, CC BY-SA 3.0"
DRAWN = {"stock": ("stock", PLAIN), "fused": ("fused", PLAIN), "fit": ("stock", "auto")}  # of curves: layers, engine
MOST_CURVES = len(plotting.curves.LINES)

plot = typer.Typer(help="Pictures, as PNGs: activations, losses, what the trainers learned and how their costs fell.")

Epochs = Annotated[int | None, typer.Option(min=1, help="The trainer's own, as the next two, if not given.")]
Seed = Annotated[int | None, typer.Option(min=0, max=2**63 - 1)]
Rate = Annotated[float | None, typer.Option(min=0)]
Images = Annotated[Path | None, typer.Option(help="A folder of MNIST's IDX files.")]
Dpi = Annotated[int, typer.Option(min=50, max=600, help="Pixels an inch; a picture is 7 to 10 inches wide.")]
RUNS = "runs/plots"


def _activation(name: str) -> str:
    if name not in catalogue.names():
        raise typer.BadParameter(f"unknown activation {name!r}, expected one of {', '.join(catalogue.names())}")
    return name


def _mnist_trainer(name: str) -> type[Trainer]:
    if name not in MNIST:
        raise typer.BadParameter(f"unknown trainer {name!r}, expected one of {', '.join(MNIST)}")
    return TRAINERS[name]


@plot.command()
def activations(
    names: Annotated[list[Any] | None, typer.Argument(parser=_activation, metavar="[NAME]...")] = None,
    *,
    out: Out = RUNS,
    dpi: Dpi = 150,
) -> None:
    """Draw each activation with its derivative: a gallery of all, or of those named, and a picture of each."""
    panels = [catalogue.panel(name) for name in dict.fromkeys(names or catalogue.names())]
    if len(panels) > 1:
        _write(out, dpi, {"activations": catalogue.gallery(panels)})
    singles = track(panels, "drawing", console=console, disable=not console.is_terminal, transient=True)
    for panel in singles:
        _write(out / "activations", dpi, {panel.name: catalogue.single(panel)})


@plot.command()
def losses(*, out: Out = RUNS, dpi: Dpi = 150) -> None:
    """Draw each loss against what it is given, and which output it pairs with."""
    _write(out, dpi, loss_pictures.figures())


@plot.command()
def xor(
    *,
    epochs: Epochs = None,
    lr: Rate = None,
    seed: Seed = None,
    device: Device,
    threads: Threads = 1,
    out: Out = RUNS,
    dpi: Dpi = 150,
) -> None:
    """Train XOR with a hidden layer, and without, and draw the output of both over the plane and their costs."""
    given = {"epochs": epochs, "lr": lr, "seed": seed, "device": device}
    runs = _trained({kind.name: _trainer(kind, **given) for kind in (Xor, Perceptron)}, threads)
    drawn = [_surface(runs["xor"], "Two layers"), _surface(runs["perceptron"], "One layer")]
    title = "XOR by a network with a hidden layer and by one without"
    _write(out, dpi, {"xor": surfaces.decision_surfaces(drawn, title)})


@plot.command()
def mnist(
    *,
    trainer: Annotated[Any, typer.Option(parser=_mnist_trainer, metavar="NAME", help=" | ".join(MNIST))] = MNIST[0],
    checkpoint: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Of `fusedact train`, in place of training now."),
    ] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    seed: Seed = None,
    data: Images = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch MNIST, once, into the user's cache folder.")
    ] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Train on the first so many images alone.")] = None,
    device: Device,
    threads: Threads = 1,
    out: Out = RUNS,
    dpi: Dpi = 150,
) -> None:
    """Draw digits with a model's predictions, the most confidently wrong among them, and its confusion matrix."""
    given = {"epochs": epochs, "lr": lr, "seed": seed, "rows": rows}
    where = {"data": data, "download": download, "device": device}
    if checkpoint is None:
        made = _trainer(trainer, **given, **where)
        _trained({made.name: made}, threads)
        done: int | None = made.done
    else:
        if unused := [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter(f"--checkpoint holds a trained model, which takes no --{unused[0]}")
        torch.set_num_threads(threads)
        made, done = _loaded(trainer, checkpoint, where)
    _write(out, dpi, _digit_figures(made, done))


@plot.command()
def curves(
    trainer: Name,
    *,
    source: Annotated[
        Path | None,
        typer.Option("--from", exists=True, dir_okay=False, metavar="CSV", help="Of train or compare; trains nothing."),
    ] = None,
    epochs: Epochs = None,
    lr: Rate = None,
    seed: Seed = None,
    data: Annotated[Path | None, typer.Option(help="As of train.")] = None,
    device: Device,
    threads: Threads = 1,
    out: Out = RUNS,
    dpi: Dpi = 150,
) -> None:
    """Draw a trainer's cost by epoch: on stock layers, on fused ones, and stock ones by fit."""
    given = {"epochs": epochs, "lr": lr, "seed": seed, "data": data}
    if source is None:
        made = {
            label: _trainer(trainer, LAYERS[layers], engine=engine, device=device, **given)
            for label, (layers, engine) in DRAWN.items()
        }
        costs = {label: [epoch.cost for epoch in run.epochs] for label, run in _trained(made, threads).items()}
    else:
        if unused := [name for name, value in given.items() if value is not None]:
            raise typer.BadParameter(f"--from holds a finished run, which takes no --{unused[0]}")
        costs = _read_costs(source)
    _write(out, dpi, {f"{trainer.name}-curves": plotting.training_curves(costs, trainer.name)})


def _write(out: Path, dpi: int, figures: Mapping[str, "Figure"]) -> None:
    for stem, figure in figures.items():
        path = out / f"{stem}.png"
        write_whole(path, plotting.png(figure, dpi))
        print(path)


def _trainer(kind: type[Trainer], nn: Any = torch.nn, **given: Any) -> Trainer:
    """The trainer with what is given, and its own defaults where that is None."""
    settings = replace(kind.defaults, **{name: value for name, value in given.items() if value is not None})
    try:
        return kind(nn, settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _trained(trainers: Mapping[str, Trainer], threads: int) -> dict[str, Run]:
    """Trains all in turn behind a bar."""
    torch.set_num_threads(threads)
    runs = {label: Run(trainer) for label, trainer in trainers.items()}
    total = sum(trainer.settings.epochs for trainer in trainers.values())
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task(next(iter(trainers.values())).name, total=total, cost="")

        def show(run: Run, some: list[Epoch]) -> None:
            done = sum(trainer.done for trainer in trainers.values())
            progress.update(bar, completed=done, cost=f"cost {some[-1].cost:.4g}")

        try:
            runs_in_turn(runs, None, None, show)
        except FloatingPointError as fault:
            raise typer.BadParameter(str(fault)) from fault
    return runs


def _loaded(kind: type[Trainer], path: Path, where: dict[str, Any]) -> tuple[Trainer, int | None]:
    """A checkpoint's model in a trainer that tests as its own did; the epochs behind it, where they are on record."""
    try:
        state, run = load_run(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    settings = {"data": "None", "raw_pixels": "False"} | run.get("settings", {})  # all are text
    if where["data"] is None and settings["data"] != "None":
        where = where | {"data": Path(settings["data"])}
    trainer = _trainer(kind, **where, raw_pixels=settings["raw_pixels"] == "True")
    try:
        trainer.model.load_state_dict(state)
    except RuntimeError as error:
        raise typer.BadParameter(
            f"{path}: holds no model of {trainer.name}; --trainer is one of {', '.join(MNIST)}"
        ) from error
    return trainer, run.get("epochs")


@torch.no_grad()
def _digit_figures(trainer: Any, epochs: int | None) -> dict[str, "Figure"]:
    """What an MNIST trainer's model says of the test images."""
    trainer.model.eval()
    batches = trainer.x_test.split(100)
    shown = track(batches, "testing", console=console, disable=not console.is_terminal, transient=True)
    logits = torch.cat([trainer.model(images).cpu() for images in shown])
    images, labels = trainer.x_test.view(-1, 28, 28).cpu(), trainer.y_test.cpu()
    counts = digits.confusion(labels, logits.argmax(1))
    share = int(counts.diag().sum()) / len(labels)
    after = "" if epochs is None else f", {epochs:,} epoch{'s' * (epochs != 1)}"
    title = f"{trainer.name}{after}: {share:.2%} of {len(labels):,} test images right"
    source = f"{MAKERS}; {trainer.source}"
    return {
        f"{trainer.name}-digits": digits.digits(images, labels, logits, title, source),
        f"{trainer.name}-confusion": digits.confusion_matrix(counts, title, source),
    }


@torch.no_grad()
def _surface(run: Run, title: str) -> surfaces.Surface:
    """What a trained network of two inputs says of the plane, and where its hidden units, if any, change sides."""
    model, settings = run.trainer.model.cpu().eval(), run.trainer.settings
    rows = torch.tensor(ROWS)
    first, *more = [layer for layer in model.children() if isinstance(layer, torch.nn.Linear)]
    hidden = torch.cat([first.weight, first.bias[:, None]], 1) if more else torch.empty(0, 3)
    return surfaces.Surface(
        title, f"lr {settings.lr:g}, {settings.epochs:,} epochs\nseed {settings.seed}",
        surfaces.over_square(model), rows, rows.sum(1) == 1, model(rows).squeeze(1), hidden,
        [epoch.cost for epoch in run.epochs],
    )  # fmt: skip


def _read_costs(path: Path) -> dict[str, list[float]]:
    """The costs by run of a CSV of train or compare."""
    costs: dict[str, list[float]] = {}
    try:
        with path.open(newline="") as file:
            lines = csv.DictReader(file)
            for row in lines:
                run, epoch = costs.setdefault(row["run"], []), row["epoch"]
                if epoch != str(len(run) + 1):
                    raise typer.BadParameter(
                        f"{path}, line {lines.line_num}: expected epoch {len(run) + 1} of run {row['run']!r}, "
                        f"found {epoch!r}"
                    )
                run.append(float(row["cost"]))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        fault = f"no column {error}" if isinstance(error, KeyError) else error
        raise typer.BadParameter(f"{path}: expected a CSV of train or compare: {fault}") from error
    if not 1 <= len(costs) <= MOST_CURVES:
        raise typer.BadParameter(f"{path}: expected 1 to {MOST_CURVES} runs, found {len(costs)}")
    if not any(map(math.isfinite, chain(*costs.values()))):
        raise typer.BadParameter(f"{path}: expected a cost that is finite, found none")
    return costs
