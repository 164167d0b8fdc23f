"""What torch's profiler and Triton's Proton see of a training step and of some ops, stock and fused."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fusedact.profiling.timing import DRY
from fusedact.profiling.tracing import profile_unit

WITH_PROTON = ("mnist-mlp", "linear_act")  # a process of its own, of some seconds
CEILINGS: dict[str, float] = {}  # measured once in a process
PROFILED = ("mnist-mlp", "linear_act", "cross_entropy", "linear_cross_entropy", "bce_with_logits", "gated")


def measure_profile(name: str, device: torch.device, dry: bool) -> dict:
    """As `fusedact profile NAME`, of the op's first case; its traces, megabytes each, are not kept."""
    with TemporaryDirectory() as out:
        found = profile_unit(
            name,
            device,
            steps=1 if dry else 10,
            out=Path(out),
            with_proton=name in WITH_PROTON,
            effort=DRY if dry else None,
            known=CEILINGS,
        )
    for contender in found["contenders"].values():
        del contender["trace"]
    return found
