"""What every launch tells a profiler, without a GPU: of some cases, by phase, and of whole training runs, as JSON.

Run as its own process, since the interpreter that the tests use replaces triton.jit. Nothing is compiled: a driver
that says it is a Hopper gives the hook, as Triton does, what a launch would be.
"""

import functools
import itertools
import json
import runpy
from pathlib import Path
from unittest import mock

import torch
import triton

import fusedact
from fusedact import backend, nn
from fusedact.fitting import training as training_runs
from fusedact.fitting.flat import FlatEngine
from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import contenders, output_gradient
from fusedact.profiling.counting import Counts, counted
from fusedact.tuning.records import REFERENCE_CHIPS

WARM_LAUNCH = runpy.run_path(str(Path(__file__).with_name("test_warm_launch.py")))
CASES = (
    Case("linear_act", (100, 256, 784), "float32", "relu"),
    Case("linear_act", (64, 80, 48), "bfloat16", "gelu"),
    Case("linear_act", (1024, 1024, 1024), "bfloat16", "relu"),
    Case("linear_chain", (64, 128, 256), "float32", "relu"),
    Case("cross_entropy", (256, 1000), "float32"),
    Case("cross_entropy", (256, 1000), "bfloat16"),
    Case("cross_entropy", (2, 21, 4096), "float32"),
    Case("cross_entropy_grad_in_forward", (256, 1000), "float32"),
    Case("cross_entropy_probabilities", (256, 1000), "float32"),
    Case("nll_loss", (256, 1000), "float32"),
    Case("softmax", (256, 1000), "float32"),
    Case("log_softmax", (256, 1000), "bfloat16"),
    Case("bce_with_logits", (2**18,), "float32"),
    Case("bce", (2**18,), "bfloat16"),
    Case("multilabel_soft_margin", (256, 1000), "float32"),
    Case("gated", (256, 1024), "bfloat16", "silu"),
    Case("activation", (2**18,), "float32", "mish"),
    Case("prelu", (256, 1000), "float32"),
    Case("linear_cross_entropy", (256, 64, 1000), "float32"),
    Case("linear_bce", (4096, 100), "float32"),
)


Counted = dict[str, tuple[int, int, int]]  # by operation or launch: calls, bytes, FLOPs


def told_by(case: Case) -> dict[str, Counted]:
    """Of inference, and of the phases."""
    run = contenders(case, 0)["fusedact"]
    dy = output_gradient(run.forward().detach())
    y = run.forward()
    phases = {
        "no_grad": run.evaluate,
        "forward": run.forward,
        "backward": lambda: run.gradients(y, dy),
    }
    return {phase: as_read(counted(step)) for phase, step in phases.items()}


def as_read(counts: Counts) -> Counted:
    return {name: (count.calls, count.bytes, sum(count.flops.values())) for name, count in counts.items()}


def training(epochs: int) -> dict[str, Counted]:
    """Runs by each kernel that trains in one launch, after the first epoch: epochs of 4 batches of 16 rows."""
    found = {}
    for name, widths in {"tiny": (3, 4, 1), "single": (784, 10), "layers": (48, 32, 10)}.items():
        layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.Sigmoid())]
        x, y = torch.rand(64, widths[0]), torch.rand(64, widths[-1])
        model = nn.Sequential(*layers)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = functools.partial(fusedact.fit, model, x, y, loss=nn.BCELoss(), optimizer=optimizer, batch_size=16)
        found[name] = as_read(counted(lambda run=run: run(epochs=epochs, engine="persistent")))
    return found


def main() -> None:
    triton.compiler.compile = WARM_LAUNCH["compile_nothing"]
    triton.runtime.driver.set_active(WARM_LAUNCH["HOPPER"])
    with (
        mock.patch.object(backend, "_triton_problem", lambda device: None),
        mock.patch.object(backend, "chip", lambda device, library=True: REFERENCE_CHIPS["sm_90"]),
        mock.patch.object(backend, "multiprocessors", lambda device: 132),
        mock.patch.object(training_runs, "SLICE", 1e9),  # seconds: four epochs a launch, however slow this machine is
        mock.patch.object(FlatEngine, "_is_finite", lambda self, losses: True),  # of memory that no kernel wrote
        fusedact.use_backend("triton"),
    ):
        cases = {case.name: told_by(case) for case in CASES}
        print(json.dumps({"cases": cases, "training": [training(epochs) for epochs in (1, 5)]}))


if __name__ == "__main__":
    main()
