"""Which cases are measured where."""

import torch

from fusedact.profiling.cases import CASES, SMALL, Case
from fusedact.profiling.ops import work

LIMIT = 1.2e8  # of a CPU: bytes, and FLOPs, of forward with backward


def cases_for(device: torch.device) -> tuple[Case, ...]:
    """CASES on a GPU; on a CPU those of them, in float32, that end within a fraction of a second, and SMALL."""
    return CASES if device.type == "cuda" else (*filter(_light, CASES), *SMALL)


def _light(case: Case) -> bool:
    whole = work(case, "both")
    return case.dtype == "float32" and max(whole.bytes, whole.flops) < LIMIT
