"""What a device can do at most: bytes of a copy, FLOPs of a matrix product, measured."""

import statistics
from collections.abc import Callable, Iterable
from functools import partial

import torch

from fusedact.profiling.timing import Call, Effort, free_memory, host, queued

COPY = "copy, GB/s"


def copy_gbps(device: torch.device, effort: Effort) -> float:
    """GB/s of a large copy on the device, read and written bytes both counted. On a GPU in half of what is free."""
    elements = effort.elements if device.type == "cpu" else min(effort.elements, free_memory() // 16)
    x = torch.randn(elements, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _best(lambda: y.copy_(x), device, effort) * 1e-3


def _matmul_tflops(dtype: torch.dtype, precision: str, device: torch.device, effort: Effort) -> float:
    torch.set_float32_matmul_precision(precision)
    a, b = (torch.randn(effort.edge, effort.edge, device=device, dtype=dtype) for _ in range(2))
    return 2 * effort.edge**3 / _best(lambda: a @ b, device, effort) * 1e-6


def _best(call: Call, device: torch.device, effort: Effort) -> float:
    """The median of the rounds, µs."""
    call()
    sample = partial(host, call, 3) if device.type == "cpu" else partial(queued, [call] * 3, 3)
    return statistics.median(sample() for _ in range(effort.rounds))


CEILINGS: dict[str, Callable[[torch.device, Effort], float]] = {
    COPY: copy_gbps,
    "bf16, TFLOP/s": partial(_matmul_tflops, torch.bfloat16, "highest"),
    "tf32, TFLOP/s": partial(_matmul_tflops, torch.float32, "high"),
    "fp32, TFLOP/s": partial(_matmul_tflops, torch.float32, "highest"),
}


def measured(names: Iterable[str], device: torch.device, effort: Effort) -> dict[str, float]:
    return {name: CEILINGS[name](device, effort) for name in names}
