"""What commands share: the console, a device that can be reached, and what fused layers run there."""

import torch
import typer
from rich.console import Console
from torch import Tensor

from fusedact.backend import uses_triton

console = Console()


def reachable(name: str) -> str:
    """The name, if a number can go to that device and back."""
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{name}: {reason}") from error
    return name


def implementation(x: Tensor) -> str:
    try:
        kind = "Triton kernels" if uses_triton(x) else "the PyTorch fallback"
    except (RuntimeError, ValueError) as error:  # of FUSEDACT_BACKEND
        raise typer.BadParameter(str(error)) from error
    return f"fused layers run {kind}"
