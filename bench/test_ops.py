"""pytest bench --benchmark-only: every op and phase, stock and fused, on the wall; on a CPU the small cases.

Interleaved rounds and device time are bench/gpu.py's; this is for a look at one op and for --benchmark-compare.
"""

from dataclasses import asdict

import pytest
import torch

from fusedact.profiling.cases import CASES
from fusedact.profiling.contenders import contenders, output_gradient
from fusedact.profiling.ops import OPS, work

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = 1.5e8  # FLOPs and bytes, forward with backward
CHOSEN = [
    case
    for case in CASES
    if DEVICE == "cuda" or (case.dtype == "float32" and max(asdict(work(case, "both")).values()) < SMALL)
]


@pytest.fixture(autouse=True)
def surroundings():
    """One thread on a CPU, and torch's settings as they were."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=True)
@pytest.mark.parametrize("contender", ["stock", "fusedact"])
@pytest.mark.parametrize(
    ("case", "phase"),
    [
        pytest.param(case, phase, id=f"{case.name.replace(' ', '-')}-{phase}")
        for case in CHOSEN
        for phase in OPS[case.op].phases
    ],
)
def test_op(case, phase, contender, benchmark):
    torch.set_float32_matmul_precision(case.precision)
    with torch.device(DEVICE):
        run = contenders(case, seed=0)[contender]
    call = run.call(phase, output_gradient(run.forward().detach()))

    def finished():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{case.op} {phase}"
    benchmark.extra_info |= {
        "shape": case.shape,
        "dtype": case.dtype,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} thread",
        **asdict(work(case, phase)),
    }
    benchmark(finished)
