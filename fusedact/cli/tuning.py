"""`fusedact tune | info`: what takes a layer's products, and why."""

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import fusedact
from fusedact import autograd, backend
from fusedact.activations import TABLE, Activation, by_name
from fusedact.autograd.linear import plan_of
from fusedact.cli.options import console, implementation, one_of, reachable
from fusedact.tuning import Chip, Problem
from fusedact.tuning.candidates import HEAD, LIBRARY, RULE, candidates
from fusedact.tuning.measure import Found, Layer, Way, tune_head
from fusedact.tuning.measure import tune as tune_layer
from fusedact.tuning.records import FUSED, OP, REFERENCE_CHIPS, STOCK, machine_of, path_of, why, write

DTYPES = {  # tf32: float32 as torch.set_float32_matmul_precision("high") has it
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
}
MEASURED = ("bfloat16", "float16", "float32", "tf32")
SHAPES = (  # MNIST's network, a transformer's pair, squares
    (100, 256, 784),
    (100, 256, 256),
    (2048, 1024, 1024),
    (8192, 4096, 1024),
    (8192, 1024, 4096),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
)
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("layers"),
    TimeElapsedColumn(),
)


def _sizes(text: str) -> tuple[int, int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text, re.ASCII)
    if found is None:
        raise typer.BadParameter(f"{text!r}, expected MxNxK as 4096x1024x1024")
    M, N, K = map(int, found.groups())
    return M, N, K


def _gpu(name: str) -> torch.device:
    """The device, if it is a GPU on which Triton runs."""
    device = torch.empty(0, device=reachable(name)).device
    if device.type != "cuda":
        raise typer.BadParameter(f"{name}: choices are measured on a GPU")
    if problem := backend.triton_problem(device):
        raise typer.BadParameter(f"{name}: {problem}")
    return device


_dtype = one_of(DTYPES, "dtype")
_activation = one_of([activation.name for activation in TABLE if not activation.learned], "activation")
_chip = one_of(REFERENCE_CHIPS, "chip")

Shapes = Annotated[
    list[Any] | None,
    typer.Option(parser=_sizes, metavar="MxNxK", help="Of x (M, K) and W (N, K); may recur."),
]
Heads = Annotated[
    list[Any] | None,
    typer.Option(
        parser=_sizes, metavar="MxNxK", help="Of heads: x (M, K), N classes; then --shape has no default. May recur."
    ),
]
Dtypes = Annotated[
    list[Any] | None,
    typer.Option(parser=_dtype, metavar="DTYPE", help=f"{', '.join(DTYPES)}; may recur."),
]
Epilogue = Annotated[Any, typer.Option(parser=_activation, metavar="NAME")]
Gpu = Annotated[Any, typer.Option(parser=_gpu, metavar="DEVICE")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what is fastest, and keep nothing.")]
Linear = Annotated[
    Any, typer.Option(parser=_sizes, metavar="MxNxK", help="Say what runs for a layer of x (M, K) and W (N, K).")
]
Dtype = Annotated[Any, typer.Option(parser=_dtype, metavar="DTYPE", help="That layer's.")]
ChipName = Annotated[
    Any,
    typer.Option(
        parser=_chip, metavar="CHIP", help=f"{', '.join(REFERENCE_CHIPS)}: what runs there until it is measured."
    ),
]


def tune(
    *,
    shape: Shapes = None,
    head: Heads = None,
    dtype: Dtypes = None,
    activation: Epilogue = "relu",
    device: Gpu = "cuda",
    dry_run: DryRun = False,
) -> None:
    """Measure what is fastest on this GPU, and keep it: from then on layers choose by it.

    For the forward and each product of the backward, also as a chain of layers takes it: our kernels and the
    library's. Then the whole layer, fused and stock. For a head, linear_cross_entropy: the rows of a chunk, and torch's
    own chunks where it has them.
    """
    torch.cuda.set_device(device)
    chip, act, path = backend.chip(device), by_name(activation), None
    names, shapes = dtype or MEASURED, shape or (() if head else SHAPES)
    layers = {f"{M}x{N}x{K} {name}": _layer((M, N, K), name, chip) for name in names for M, N, K in shapes}
    heads = {f"head {M}x{N}x{K} {name}": _head((M, N, K), name, chip) for name in names for M, N, K in head or ()}
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(layers) + len(heads))
        for title, layer in layers.items():
            found = _measured(title, layer, act, device, progress, bar)
            if not dry_run:
                path = write(chip, {problem: one.record for problem, one in found.items()})
            console.print(_table(title, layer.problems(), found))
            progress.advance(bar)
        for title, problem in heads.items():
            progress.update(bar, description=title)
            with _no_fault_of_ours(title):
                one = tune_head(problem, device, _head_ways(problem))
            if not dry_run:
                path = write(chip, {problem: one.record})
            console.print(_table(title, {HEAD: problem}, {problem: one}))
            progress.advance(bar)
    if path is not None:
        print(path)


def info(*, linear: Linear = None, dtype: Dtype = "bfloat16", chip: ChipName = None) -> None:
    """Print versions, devices and what fused layers run on each; or what runs for one layer, and why."""
    if linear is not None:
        _explain(linear, dtype, _chip_here() if chip is None else REFERENCE_CHIPS[chip])
        return
    if chip is not None:
        raise typer.BadParameter("--chip needs --linear, the layer")
    for package in ("fusedact", "torch", "triton", "numpy"):
        try:
            version = torch.__version__ if package == "torch" else importlib.metadata.version(package)  # and its build
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:10} {version}")
    print(f"{'python':10} {platform.python_version()}")
    print(f"{'backend':10} {fusedact.get_backend()}")
    for device in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        hardware = platform.machine() if device == "cpu" else torch.cuda.get_device_name(device)
        print(f"{device:10} {hardware}, {implementation(torch.empty(0, device=device))}")


def _layer(sizes: tuple[int, int, int], name: str, chip: Chip) -> Layer:
    return Layer(*sizes, DTYPES[name], _precision(name), chip)


def _head(sizes: tuple[int, int, int], name: str, chip: Chip) -> Problem:
    return Problem(HEAD, *sizes, DTYPES[name], _precision(name), False, chip)


def _precision(name: str) -> str:
    try:
        return "tf32" if name == "tf32" else backend.dot_precision(DTYPES[name])
    except ValueError as error:  # of FUSEDACT_FLOAT32
        raise typer.BadParameter(str(error)) from error


def _head_ways(head: Problem) -> dict[str, Way]:
    def by_torch(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, w, target, options=torch.nn.LinearCrossEntropyOptions())

    def by_chunks(rows: int, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return autograd.linear_cross_entropy(x, w, None, target, None, None, -100, "mean", 0.0, 0.0, 0.0, rows)

    return {name: by_torch if rows is None else partial(by_chunks, rows) for name, rows in candidates(head).items()}


@contextmanager
def _no_fault_of_ours(title: str) -> Iterator[None]:
    """A GPU's memory that is too small is the user's to know; so is what he interrupts himself."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise typer.BadParameter(f"{title}: {reason}") from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _measured(
    title: str, layer: Layer, activation: Activation, device: torch.device, progress: Progress, bar: TaskID
) -> dict[Problem, Found]:
    """What is measured of a layer; where that cannot go on, what was measured of those before it is kept."""
    parameters = activation.default_values
    plan = plan_of(activation.name, parameters, torch.empty(0, dtype=layer.dtype, device=device))
    ways: dict[str, Way] = {
        STOCK: lambda x, w, b: activation.reference(F.linear(x, w, b), *parameters),
        FUSED: lambda x, w, b: autograd.linear_act(x, w, b, None, activation.name, parameters),
    }
    with _no_fault_of_ours(title):
        return tune_layer(
            layer, activation, plan, device, ways, lambda what: progress.update(bar, description=f"{title}, {what}")
        )


def _table(title: str, problems: dict[str, Problem], found: dict[Problem, Found]) -> Table:
    """Each problem's candidates, the fastest first, then those that were left out."""
    table = Table("", "candidate", "µs", "reference / this", "", title=title)
    table.columns[2].justify = table.columns[3].justify = "right"
    for label, problem in problems.items():
        record, left_out = found[problem]
        times = record.microseconds
        reference = times[{OP: STOCK, HEAD: RULE}.get(problem.task, LIBRARY)]
        for name in sorted(times, key=times.__getitem__):
            mark = "chosen" if name == record.choice else ""
            table.add_row(label, name, f"{times[name]:,.1f}", f"{reference / times[name]:.2f}", mark)
            label = ""
        for name, fault in left_out.items():
            table.add_row("", name, "", "", escape(f"left out: {fault}"))
        table.add_section()
    return table


def _chip_here() -> Chip:
    x = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    what = implementation(x)
    if not backend.uses_triton(x):
        raise typer.BadParameter(f"{what}; --chip asks about a GPU that is not here")
    return backend.chip(x.device)


def _explain(sizes: tuple[int, int, int], dtype: str, chip: Chip) -> None:
    """What runs for a layer: by this GPU's records, where it has some, else by the rule."""
    try:
        problems = _layer(sizes, dtype, chip).problems()
    except ImportError as error:
        raise typer.BadParameter(f"Triton does not import ({error})") from error
    table = Table("", "runs", "why", title=f"{'x'.join(map(str, sizes))} {dtype} on {chip.kind}")
    for label, problem in problems.items():
        table.add_row(f"{label}\nin a chain" if label == "backward" else label, *map(escape, why(problem)))
    console.print(table)
    if (machine := machine_of(chip)) is not None:
        print(path_of(machine))
