"""Trainers under way: several in turn, what is done written to disk, and gone on from there."""

import csv
import io
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from fusedact import plotting
from fusedact.data import write_whole
from fusedact.distributed import processes
from fusedact.trainers.checkpoint import load_run, save_checkpoint
from fusedact.trainers.loop import PLAIN, Epoch, Trainer
from fusedact.trainers.parallel import DDP

SAVE_EVERY = 10.0  # seconds, so that a killed run leaves something
MAY_DIFFER = {"epochs", "device", "download"}  # settings of a resumed run
ALIKE = {"auto", DDP, PLAIN}  # engines that go on from one another: in processes, and in one


class Run:
    """A trainer, its epochs so far, and its state after the last of them."""

    def __init__(self, trainer: Trainer, every: int | None = None) -> None:
        self.trainer = trainer
        self.epochs: list[Epoch] = []
        self.state: dict[str, Any] = deepcopy(trainer.state())
        self._slices: Iterator[list[Epoch]] = trainer.slices(every)

    @property
    def unfinished(self) -> bool:
        return self.trainer.done < self.trainer.settings.epochs

    def advance(self) -> list[Epoch]:
        """Trains some epochs; returns their records."""
        some = next(self._slices)
        self.state, self.epochs = deepcopy(self.trainer.state()), self.epochs + some
        return some

    def save(self, path: Path) -> None:
        costs = [epoch.cost for epoch in self.epochs]
        seconds = [epoch.step_seconds for epoch in self.epochs]
        settings = {name: str(value) for name, value in asdict(self.trainer.settings).items()}
        state = {name: value for name, value in self.state.items() if name != "model"}
        save_checkpoint(path, self.state["model"], state | {"costs": costs, "seconds": seconds, "settings": settings})

    def resume(self, path: Path) -> None:
        """Goes on from what `save` wrote. ValueError where it is damaged, or of a run with other settings.

        Of several processes the first reads it and hands it to the others, however many there were when it was written.
        """
        model, run = processes.from_first(lambda: load_run(path))
        if missing := {"settings", "costs", "seconds", "epochs", "optimizer", "random"} - set(run):
            raise ValueError(
                f"{path}: holds no run to go on from, but a model; {', '.join(sorted(missing))} are missing"
            )
        if run["epochs"] > self.trainer.settings.epochs:
            raise ValueError(
                f"{path}: has {run['epochs']} epochs, more than the {self.trainer.settings.epochs} asked for"
            )
        ours = {name: str(value) for name, value in asdict(self.trainer.settings).items()}
        for name, value in run["settings"].items():
            alike = name == "engine" and {value, ours[name]} <= ALIKE
            if name not in MAY_DIFFER and ours.get(name) != value and not alike:
                raise ValueError(f"{path}: is of a run with {name} {value}, not {ours.get(name)}")
        try:
            self.trainer.resume(run | {"model": model})
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"{path}: is of another model: {error}") from error
        self.state = deepcopy(self.trainer.state())
        records = zip(run["costs"], run["seconds"], strict=True)
        self.epochs = [Epoch(number, cost, seconds) for number, (cost, seconds) in enumerate(records, 1)]

    @property
    def step_microseconds(self) -> tuple[float, float, float]:
        """Median over the epochs, with the 20 and 80 % points."""
        times = [1e6 * epoch.step_seconds for epoch in self.epochs]
        points = quantiles(times, n=5, method="inclusive") if len(times) > 1 else times
        return median(times), points[0], points[-1]


Runs = dict[str, Run]  # by what each of them is: stock, fused, ...


def checkpoint_path(out: Path, name: str, label: str) -> Path:
    return out / f"{name}-{label}.pt"


def train(runs: Runs, out: Path | None, every: int | None, show: Callable[[Run, list[Epoch]], None]) -> list[Path]:
    """Trains all, in turn the one that has done least, and shows what it did.

    What is done is saved every ten seconds and at the end, and a checkpoint of each after every `every` epochs.
    Returns what was written.
    """
    if out:
        import_module("matplotlib.figure")  # before there is anything to save: Ctrl-C in it leaves it in pieces
    saved = time.monotonic()
    while unfinished := [run for run in runs.values() if run.unfinished]:
        run = min(unfinished, key=lambda run: run.trainer.done)
        show(run, run.advance())
        if out and every and run.trainer.done % every == 0:
            [label] = [label for label, each in runs.items() if each is run]
            run.save(checkpoint_path(out, run.trainer.name, label))
        if time.monotonic() > saved + SAVE_EVERY:
            save(runs, out)
            saved = time.monotonic()
    return save(runs, out)


def save(runs: Runs, out: Path | None) -> list[Path]:
    """Writes the curves, metrics and checkpoints of the whole epochs so far; returns where they are."""
    done = {label: run for label, run in runs.items() if run.epochs}
    if out is None or not done:
        return []
    name = next(iter(done.values())).trainer.name
    checkpoints = {checkpoint_path(out, name, label): run for label, run in done.items()}
    for path, run in checkpoints.items():
        run.save(path)
    costs = {label: [epoch.cost for epoch in run.epochs] for label, run in done.items()}
    picture, metrics = out / f"{name}.png", out / f"{name}.csv"
    write_whole(metrics, _metrics(done))
    write_whole(picture, plotting.png(plotting.training_curves(costs, name)))
    return [picture, metrics, *checkpoints]


def _metrics(runs: Runs) -> bytes:
    """A CSV with a line for each epoch of each run."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["run", "epoch", "cost", "step_seconds"])
    for label, run in runs.items():
        table.writerows([label, epoch.number, epoch.cost, epoch.step_seconds] for epoch in run.epochs)
    return text.getvalue().encode()
