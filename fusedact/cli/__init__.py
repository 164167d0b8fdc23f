"""`fusedact train | compare | bench | profile | plot | catalogue | tune | fuse | info`."""

import sys
from collections.abc import Sequence

import typer

from fusedact.cli import ranks
from fusedact.cli.benchmarks import bench
from fusedact.cli.catalogue import catalogue
from fusedact.cli.fusing import fuse
from fusedact.cli.plotting import plot
from fusedact.cli.profiling import profile
from fusedact.cli.training import compare, train
from fusedact.cli.tuning import info, tune
from fusedact.distributed import processes

app = typer.Typer(
    help="The tutorials' programs on fused layers, on torch's own, or on both; ops timed, traced and drawn; what runs, "
    "and what is fastest; what is fused of a model.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, compare, bench, profile, catalogue, tune, fuse, info):
    app.command()(command)
app.add_typer(plot, name="plot")


def run(args: Sequence[str] | None) -> int:
    """Runs a command. What cannot be done is said in one line on standard error; the exit code is then 2."""
    words = sys.argv[1:] if args is None else [*args]
    if processes.launched():
        return ranks.run(lambda: _command(words), words)
    result = _command(words)
    if isinstance(result, int):
        return result
    print("fusedact:", result, file=sys.stderr)
    return 2


def _command(words: list[str]) -> int | str:
    """The exit code, or in one line what cannot be done."""
    try:
        return app(words, standalone_mode=False) or 0
    except typer.TyperException as error:
        fault = error.format_message()
    except OSError as error:
        fault = str(error)
    return " ".join(fault.split())
