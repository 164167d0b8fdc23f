"""Every tile that some chip's candidates have."""

from typing import Any

import torch

from fusedact.tuning.candidates import RATES, Chip, Problem, candidates


def every_tile(task: str, dtypes: list[torch.dtype]) -> dict[str, tuple[torch.dtype, Any]]:
    """(dtype, tile) of all chips' candidates, each once. The interpreter tells neither warps nor stages apart."""
    found: dict[Any, tuple[str, torch.dtype, Any]] = {}
    for kind in RATES:
        chip = Chip(kind, shared_memory=227 * 1024, warp_size=32, multiprocessors=3)
        for dtype in dtypes:
            for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                for name, tile in candidates(Problem(task, 1024, 1024, 1024, dtype, precision, True, chip)).items():
                    interpreted = tile and tile._replace(num_warps=4, num_stages=1, specialized=False)
                    key = tile if torch.cuda.is_available() else interpreted
                    found.setdefault((dtype, key), (f"{dtype} {name}", dtype, tile))
    return {name: (dtype, tile) for name, dtype, tile in found.values()}
