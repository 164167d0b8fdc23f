"""Whole training runs by `fusedact.fit`: first right, then how long each takes, and how long stock's loop would."""

import copy
import statistics
import time
from dataclasses import asdict, dataclass, replace

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


def measure_fit(fit: Fit, device: torch.device, dry: bool) -> dict:
    """Costs of the first steps, then seconds of the run and µs a step of stock's loop, in turns.

    Dry, on a CPU: an epoch of `steps`, of which nothing is judged.
    """
    torch.set_float32_matmul_precision("highest")
    runs = {
        "fit": _training(fit, device, dry, "steps" if dry else fit.engine),
        "stock": _training(fit, device, dry, "loop"),
    }
    costs = {name: run.slice(1)[0, :LOOKED_AT].double().cpu() for name, run in runs.items()}
    result = asdict(fit) | {"costs": {name: c.tolist() for name, c in costs.items()}}
    tolerance = 2e-2 if fit.precision == "bf16" else 1e-3
    if not torch.allclose(costs["fit"], costs["stock"], rtol=tolerance, atol=1e-6):
        return result | {"verdict": "wrong"}
    steps_an_epoch = _rows(fit, dry) // TRAINERS[fit.trainer].defaults.batch_size
    epochs = 1 if dry else max(1, fit.steps // steps_an_epoch)
    _seconds(runs["fit"], epochs)  # compiled, and cut into launches as it will be
    rounds = [(_seconds(runs["fit"], epochs), _seconds(runs["stock"], 1)) for _ in range(1 if dry else ROUNDS)]
    seconds, stock = (statistics.median(column) for column in zip(*rounds, strict=True))
    return result | {
        "verdict": "accurate",
        "took": seconds,
        "step_us": 1e6 * seconds / (epochs * steps_an_epoch),
        "stock_step_us": 1e6 * stock / steps_an_epoch,
    }


def _rows(fit: Fit, dry: bool) -> int:
    batch = TRAINERS[fit.trainer].defaults.batch_size
    return 10 * batch if dry else fit.rows // batch * batch


def _training(fit: Fit, device: torch.device, dry: bool, engine: str) -> Training:
    kind = TRAINERS[fit.trainer]
    trainer = kind(LAYERS["stock"], replace(kind.defaults, device=str(device), engine="loop"))
    rows = _rows(fit, dry)
    repeated = [t.repeat(-(-rows // len(t)), *[1] * (t.dim() - 1))[:rows] for t in (trainer.x, trainer.y)]
    return Training(
        copy.deepcopy(trainer.model), *repeated, loss=trainer.criterion,
        optimizer=lambda parameters: type(trainer.optimizer)(parameters, lr=kind.defaults.lr),
        batch_size=kind.defaults.batch_size, generator=torch.Generator().manual_seed(0), engine=engine,
        precision=None if dry else fit.precision,
    )  # fmt: skip


def _seconds(run: Training, epochs: int) -> float:
    _wait()
    started = time.perf_counter()
    run.train(epochs)
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
