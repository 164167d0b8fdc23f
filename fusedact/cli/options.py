"""What commands share: the console, a device that can be reached, and what fused layers run there."""

import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from fusedact.backend import uses_triton
from fusedact.distributed import processes

console = Console()


def reachable(name: str) -> str:
    """The name, if a number can go to that device and back. Of CUDA's devices each process of torchrun has its own."""
    if name == "cuda" and processes.launched():
        name = f"cuda:{processes.local_rank()}"
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise typer.BadParameter(f"{name}: {reason}") from error
    return name


def one_of(names: Collection[str], what: str) -> Callable[[str], str]:
    """A parser of options that takes these names."""

    def known(name: str) -> str:
        if name not in names:
            raise typer.BadParameter(f"unknown {what} {name!r}, expected one of {', '.join(names)}")
        return name

    return known


def sizes(text: str) -> tuple[int, ...]:
    """A shape, whose sizes have x between them."""
    if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text, re.ASCII) is None:
        raise typer.BadParameter(f"{text!r}, expected sizes as 4096x1000")
    return tuple(map(int, text.split("x")))


def folder(path: str) -> Path:
    """The folder, made where absent, if a file can be written there. Of several processes the first alone writes."""

    def made() -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()

    try:
        processes.from_first(made)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
    return Path(path)


def implementation(x: Tensor) -> str:
    try:
        kind = "Triton kernels" if uses_triton(x) else "the PyTorch fallback"
    except (RuntimeError, ValueError) as error:  # of FUSEDACT_BACKEND
        raise typer.BadParameter(str(error)) from error
    return f"fused layers run {kind}"


Device = Annotated[
    str,
    typer.Option(
        parser=reachable,
        metavar="DEVICE",
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu",
        show_default="cuda if there is one",
    ),
]
Threads = Annotated[int, typer.Option(min=1, max=1024, help="Torch's on a CPU; two stall on small networks.")]
