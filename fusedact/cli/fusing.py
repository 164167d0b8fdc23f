"""`fusedact fuse`: what is fused of a model, what is left, and why."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import typer
from torch import nn

import fusedact
from fusedact.cli.options import sizes

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64", "int64")}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise typer.BadParameter(f"unknown dtype {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


Path = Annotated[str, typer.Argument(metavar="MODULE:FACTORY", help="A function, a class or a model, by import path.")]
Shapes = Annotated[
    list[Any] | None,
    typer.Option("--input", parser=sizes, metavar="SHAPE", help="As 1x3x224x224; one for each argument."),
]
Dtype = Annotated[
    Any,
    typer.Option(
        parser=_dtype, metavar="DTYPE", help=f"Of model and inputs, int64 of these alone: {', '.join(DTYPES)}."
    ),
]


def fuse(path: Path, *, input: Shapes = None, dtype: Dtype = None) -> None:
    """Build a model on the CPU, fuse it, and print what was fused, what was left and why, and what that saves.

    With --input, for each argument of the model, it runs once, on zeros, and the report says what a step saves.
    """
    model = _model(path)
    with _in_one_line(path):
        if dtype is not None and dtype.is_floating_point:
            model.to(dtype)
        fusedact.fuse(model)
    inputs = None
    if input:
        if dtype is None:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        with _in_one_line("--input"):
            inputs = tuple(torch.zeros(shape, dtype=dtype, device="cpu") for shape in input)
    with _in_one_line("--input: the model raised" if input else path):
        report = fusedact.report(model, inputs)
    print(report)


def _model(path: str) -> nn.Module:
    """What stands at 'package.module:name', called if it is no model yet. The current folder can be imported from."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise typer.BadParameter(f"{path!r}, expected module:factory as models.vit:build")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    argv, sys.argv = sys.argv, [path]  # ours are not for a factory that reads them
    try:
        with _in_one_line(path), torch.device("cpu"):
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            if not isinstance(found, nn.Module) and callable(found):
                found = found()
    finally:
        sys.argv = argv
    if not isinstance(found, nn.Module):
        raise typer.BadParameter(f"{path}: expected a torch.nn.Module, received {type(found).__name__}")
    return found


@contextmanager
def _in_one_line(where: str) -> Iterator[None]:
    """What someone else's code raises, or exits with, as a fault of the command line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise typer.BadParameter(f"{where}: {line}") from error
