"""Measuring trainers whole: first right, then what a step and a short run take, by each way to train."""

import math
from dataclasses import replace

import torch

from fusedact.profiling.cases import Step
from fusedact.profiling.timing import INDUCTOR, Effort, Sampler, host, interleaved, seconds_of, wall
from fusedact.trainers import LAYERS, TRAINERS, Trainer
from fusedact.trainers.loop import PLAIN, TUTORIAL

WAYS = {  # layers and engine
    "stock": ("stock", PLAIN),
    "compile": ("stock", PLAIN),
    "fusedact": ("fused", PLAIN),
    "fit": ("stock", "auto"),
    "tutorial": ("stock", TUTORIAL),
}
PHASES = {
    "step": [name for name in WAYS if name != "tutorial"],  # which makes its batches one by one, and not for a step
    "run": list(WAYS),
}
ROWS = 1000  # of MNIST's images


def measure_trainer(step: Step, device: torch.device, effort: Effort, compiling: str = "default") -> dict:
    """Costs of the first epochs, which must agree; then times of a step, as the mean of an epoch's, and of a run.

    All start from one seed and visit the same batches. `without` says why a way is left out. On a GPU times are the
    wall's.
    """
    torch.set_float32_matmul_precision("highest")
    trainers = {name: _trainer(step, engine, layers, device) for name, (layers, engine) in WAYS.items()}
    torch._dynamo.reset()
    trainers["compile"].model.compile(backend=effort.compiler, mode=compiling if effort.compiler == INDUCTOR else None)
    costs, without = {}, {}
    for name, trainer in trainers.items():
        try:
            costs[name] = _trained(trainer, effort.epochs)
        except Exception as error:  # no compiler
            without[name] = f"{type(error).__name__}: {str(error)[:200]}"
    result = {"op": None, "system": step.system, "costs": costs, "without": without}
    for each in costs.values():
        if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(each, costs["stock"], strict=True)):
            return result | {"verdict": "wrong"}
    steps = len(trainers["stock"].x) // trainers["stock"].settings.batch_size
    phases = {}
    for phase, names in PHASES.items():
        epochs, parts = (1, steps) if phase == "step" else (effort.epochs, 1)
        samplers = {name: _sampler(trainers[name], epochs, parts, effort) for name in names if name in costs}
        phases[phase] = {"times": {"cpu" if device.type == "cpu" else "wall": interleaved(samplers, effort.rounds)}}
    return result | {"verdict": "accurate", "steps": steps, "epochs": effort.epochs, "phases": phases}


def _trainer(step: Step, engine: str, layers: str, device: torch.device) -> Trainer:
    kind = TRAINERS[step.trainer]
    endless = replace(kind.defaults, device=str(device), engine=engine, epochs=10**9, rows=ROWS)
    return kind(LAYERS[layers], endless)


def _trained(trainer: Trainer, epochs: int) -> list[float]:
    """Trains so many epochs more; their costs."""
    costs: list[float] = []
    slices = trainer.slices(every=epochs)
    while len(costs) < epochs:
        costs += [epoch.cost for epoch in next(slices)]
    return costs


def _sampler(trainer: Trainer, epochs: int, parts: int, effort: Effort) -> Sampler:
    """µs of so many epochs, by the parts."""

    def call() -> list[float]:
        return _trained(trainer, epochs)

    count = max(1, int(effort.seconds / min(seconds_of(call) for _ in range(3))))
    clock = host if trainer.x.device.type == "cpu" else wall
    return lambda: clock(call, count) / parts
