"""`fusedact train | compare | bench | profile | plot | catalogue | tune | fuse | info`."""

import sys
from collections.abc import Sequence

import typer

from fusedact.cli.benchmarks import bench
from fusedact.cli.catalogue import catalogue
from fusedact.cli.fusing import fuse
from fusedact.cli.plotting import plot
from fusedact.cli.profiling import profile
from fusedact.cli.training import compare, train
from fusedact.cli.tuning import info, tune

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
    try:
        return app(args, standalone_mode=False) or 0
    except typer.TyperException as error:
        fault = error.format_message()
    except OSError as error:
        fault = str(error)
    print("fusedact:", " ".join(fault.split()), file=sys.stderr)
    return 2
