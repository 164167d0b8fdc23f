"""Whole training runs by `fusedact.fit`: first right, then how long each takes, and how long stock's loop would."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from fusedact.fitting import Training
from fusedact.trainers import LAYERS, TRAINERS

LOOKED_AT = 50  # steps whose costs are compared: later ones of S6 differ by what rounding alone does
ROUNDS = 3


@dataclass(frozen=True)
class Fit:
    """A tutorial's whole run, and the seconds that it may take, compilation apart.

    rows: of the training data, repeated where there are fewer. stock: its loop, on layers of torch.nn.
    """

    system: str
    trainer: str
    rows: int
    steps: int
    seconds: float
    engine: str = "persistent"
    precision: str | None = None

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.system, self.trainer, self.engine, self.precision) if part)


FITS = (
    Fit("S1", "binary", 800, 120_000, 0.1),
    Fit("S3", "xor", 1_000, 150_000, 0.1),
    Fit("S5", "mnist-softmax", 60_000, 9_000, 0.05),
    Fit("S6", "mnist-mlp", 60_000, 9_000, 0.3),
    Fit("S6", "mnist-mlp", 60_000, 9_000, 0.1, precision="bf16"),
    Fit("S6", "mnist-mlp", 60_000, 9_000, 0.5, engine="graph"),
)


def measure_fit(fit: Fit, device: torch.device, dry: bool, timed: bool = True) -> dict:
    """Costs of the first steps, then, timed, seconds of the run and µs a step of stock's loop, in turns.

    Dry, on a CPU: an epoch of `steps`, of which nothing is judged.
    """
    torch.set_float32_matmul_precision("highest")
    kind = TRAINERS[fit.trainer]
    trainer = kind(LAYERS["stock"], replace(kind.defaults, device=str(device), engine="plain"))
    size = trainer.settings.batch_size
    rows = 10 * size if dry or not timed else fit.rows // size * size
    x, y = (t.repeat(-(-rows // len(t)), *[1] * (t.dim() - 1))[:rows] for t in (trainer.x, trainer.y))

    def training(engine: str, precision: str | None = None) -> Training:
        made = partial(type(trainer.optimizer), lr=trainer.settings.lr)
        return Training(
            copy.deepcopy(trainer.model), x, y, loss=trainer.criterion, optimizer=made, batch_size=size,
            generator=torch.Generator().manual_seed(0), engine=engine, precision=precision,
        )  # fmt: skip

    def stock() -> None:
        for visited in torch.randperm(rows, device=device).split(size):
            trainer.step(x[visited], y[visited])

    run = training("steps") if dry else training(fit.engine, fit.precision)
    costs = {
        name: each.slice(1)[0, :LOOKED_AT].double().cpu() for name, each in (("fit", run), ("loop", training("loop")))
    }
    result = asdict(fit) | {"costs": {name: c.tolist() for name, c in costs.items()}}
    if not torch.allclose(costs["fit"], costs["loop"], rtol=2e-2 if fit.precision == "bf16" else 1e-3, atol=1e-6):
        return result | {"verdict": "wrong"}
    if not timed:
        return result | {"verdict": "accurate"}
    epochs = 1 if dry else max(1, fit.steps * size // rows)
    run.train(epochs)  # compiled, and cut into launches as it will be
    rounds = [(_seconds(partial(run.train, epochs)), _seconds(stock)) for _ in range(1 if dry else ROUNDS)]
    took, stock_epoch = (statistics.median(column) for column in zip(*rounds, strict=True))
    steps = rows // size
    times = {"took": took, "step_us": 1e6 * took / (epochs * steps), "stock_step_us": 1e6 * stock_epoch / steps}
    return result | {"verdict": "accurate"} | times


def _seconds(call: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
