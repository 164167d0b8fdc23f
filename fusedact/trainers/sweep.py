"""How often XOR is learned: S3 from many seeds, each at many learning rates."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedact import plotting
from fusedact.data import write_whole
from fusedact.distributed import processes, sweeps
from fusedact.fitting import fit_many
from fusedact.trainers.perceptron import ROWS
from fusedact.trainers.xor import Xor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LRS = (0.01, 0.1, 0.3, 1.0, 3.0)  # from the tutorial's on
EPOCHS = 10_000
LOOKS = 100  # at what has been learned, ever further apart


@dataclass(frozen=True, eq=False)
class Sweep:
    """What became of each seed at each learning rate.

    solved: (lrs, seeds, looks), whether all four rows were right at that look. costs: (lrs, seeds), of the last epoch.
    epochs: of each look. parameters: by name, (lrs, seeds, *shape). engine: what trained.
    """

    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: tuple[int, ...]
    solved: Tensor
    costs: Tensor
    parameters: dict[str, Tensor]
    engine: str

    @property
    def shares(self) -> Tensor:
        """Of the seeds that had solved it by each look, (lrs, looks)."""
        return self.solved.double().mean(1)

    def records(self) -> list[dict[str, float]]:
        """A line for each learning rate and seed; solved_by is the look since when all rows are right, or 0."""
        looks = torch.tensor(self.epochs)
        wrong_until = (looks * ~self.solved).amax(2)  # the last look at which a row was wrong
        records = []
        for i, lr in enumerate(self.lrs):
            for j, seed in enumerate(self.seeds):
                since = next((epoch for epoch in self.epochs if epoch > wrong_until[i, j]), 0)
                records.append({"lr": lr, "seed": seed, "solved_by": since, "cost": self.costs[i, j].item()})
        return records

    def figure(self) -> Figure:
        title = f"xor: {len(self.seeds):,} seeds at each learning rate"
        return plotting.sweep(self.lrs, self.epochs, self.shares.tolist(), self.costs.tolist(), title)


def sweep_xor(
    seeds: int = 50,
    lrs: Sequence[float] = LRS,
    epochs: int = EPOCHS,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Sweep:
    """Trains S3 from the parameters that its trainer draws from seeds 0, 1, ..., at each learning rate, on its rows.

    All networks see the same batches. Where torch.distributed has a group its processes share the networks, and each
    has the whole sweep. progress: called now and then with the number of epochs that are done.
    """
    trainer = Xor(torch.nn, replace(Xor.defaults, device=device))
    train = sweeps.fit_many if processes.started() else fit_many
    generator = torch.Generator().manual_seed(0)
    rates = torch.tensor(lrs, dtype=torch.float64).repeat_interleave(seeds)
    starts: dict[str, Any] = {"seeds": [*range(seeds)] * len(lrs)}
    looks = sorted({round(epochs ** (look / LOOKS)) for look in range(1, LOOKS + 1)})
    solved = []
    for before, after in zip([0, *looks], looks, strict=False):
        fitted = train(
            trainer.model, trainer.x, trainer.y, loss=trainer.criterion, optimizer=trainer.optimizer,
            epochs=after - before, batch_size=trainer.settings.batch_size, drop_last=True,
            generator=generator, lrs=rates, **starts,
        )  # fmt: skip
        starts = {"inits": fitted.parameters}
        solved.append(_solved(trainer.model, fitted.parameters))
        if progress:
            progress(after)
    shape = len(lrs), seeds
    return Sweep(
        tuple(lrs),
        tuple(range(seeds)),
        tuple(looks),
        torch.stack(solved, 1).view(*shape, -1).cpu(),
        fitted.costs[:, -1].view(shape).cpu(),
        {name: value.view(*shape, *value.shape[1:]).cpu() for name, value in fitted.parameters.items()},
        fitted.engine,
    )


@torch.no_grad()
def _solved(model: torch.nn.Module, parameters: dict[str, Tensor]) -> Tensor:
    """Whether each network has all four rows right, (networks,)."""
    rows = torch.tensor(ROWS, device=next(iter(parameters.values())).device)
    outputs = torch.vmap(lambda one: torch.func.functional_call(model, one, (rows,)))(parameters)
    return ((outputs >= 0.5) == (rows.sum(1, keepdim=True) == 1)).all(2).all(1)


def save_sweep(sweep: Sweep, out: Path) -> list[Path]:
    """Writes the picture and a CSV with a line for each learning rate and seed; returns where they are."""
    picture, table = out / "xor-sweep.png", out / "xor-sweep.csv"
    write_whole(picture, plotting.png(sweep.figure()))
    text = io.StringIO()
    records = sweep.records()
    lines = csv.DictWriter(text, records[0])
    lines.writeheader()
    lines.writerows(records)
    write_whole(table, text.getvalue().encode())
    return [picture, table]
