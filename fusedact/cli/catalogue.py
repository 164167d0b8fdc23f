"""`fusedact catalogue`: the losses' snippets and which output goes with which loss."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fusedact import plotting
from fusedact.catalogue import SNIPPETS, TASKS, Comparison, Outcome, Values, values
from fusedact.catalogue import compare as compare_pairings
from fusedact.cli.options import Device, console, folder, implementation
from fusedact.data import write_whole
from fusedact.plotting import losses

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("networks trained"),
    TimeElapsedColumn(),
)
NEAR = 0.01  # shares of right rows no farther apart than this count as equal

NARROW = 60  # columns of a terminal under which a table's cells stand without space around them

Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the pairings' data and first weights.")]
Out = Annotated[
    Any,
    typer.Option(parser=folder, metavar="DIR", help="For both tables as CSV and the pairings' course as a picture."),
]


def catalogue(*, seed: Seed = 0, device: Device, out: Out = None) -> None:
    """Print the loss tutorials' values beside ours, then train by each right and each usual wrong pairing."""
    torch.set_num_threads(1)  # two stall on networks as small as these
    made = torch.zeros((), device=device)
    print(f"catalogue: {made.device}; {implementation(made)}; seed {seed}")
    printed = [values(snippet, device) for snippet in SNIPPETS]
    console.print(_snippet_table(printed))
    with Progress(*COLUMNS, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("pairings", total=sum(len(task.pairings) for task in TASKS))
        compared = compare_pairings(seed, device, progress=lambda done: progress.update(bar, completed=done))
    for comparison in compared:
        _print_comparison(comparison)
    if out:
        print(*_save(out, printed, compared), sep="\n")


def _table(texts: int, *heads: str) -> Table:
    """An empty table whose first columns are texts, folded where there is no room, and whose others are numbers."""
    table = Table(*heads, padding=(0, int(console.width >= NARROW)))
    for column in table.columns[:texts]:
        column.overflow = "fold"
    for column in table.columns[texts:]:
        column.justify, column.no_wrap = "right", True
    return table


def _snippet_table(printed: list[Values]) -> Table:
    table = _table(2, "text, by", "inputs, what it prints", "from\nstock", "from\nfloat64")
    table.title = "What the tutorials' snippets print"
    table.caption = (
        "By tutorial; 004* states it without code. Distances are absolute. 001 and 003 print their inputs rounded "
        "to four digits, so the last of theirs can differ by one."
    )
    for found in printed:
        snippet = found.snippet
        ours_stock, ours_truth, stock_truth = map("{:.1e}".format, found.differences())
        inputs = "; ".join(f"{name} {numbers}" for name, numbers in snippet.inputs.items())
        table.add_row(snippet.tutorial, f"[bold]{snippet.name}[/bold]: {escape(inputs)}")
        table.add_row("torch.nn", escape(found.stock_printed), "", stock_truth)
        table.add_row("fusedact.nn", escape(found.ours_printed), ours_stock, ours_truth)
        if snippet.stated:
            told = f"{snippet.stated} ({'holds' if found.is_as_stated else 'DOES NOT HOLD'})"
            table.add_row("its text", escape(told))
        table.add_section()
    return table


def _comparison_table(compared: Comparison) -> Table:
    task = compared.task
    table = _table(1, "output + loss", "cost", "-log p", "right", "p apart")
    table.title = f"{task.name}: outputs {task.outputs}, targets {task.targets}, decided by {task.decision}"
    table.caption = (
        "-log p: of what was true of held-out rows, by the probabilities that the model then claims; right: the share "
        "of those rows; p apart: the farthest from the first pairing's. "
        f"The chances that drew the labels reach {compared.best_log_loss:.3f} and {compared.best_accuracy:.1%}."
    )
    for kind, right in (("right", True), ("wrong", False)):
        table.add_section()
        table.add_row(f"[bold]{kind}[/bold]")
        for outcome in compared.outcomes:
            if outcome.pairing.right == right:
                table.add_row(escape(outcome.pairing.name), *_numbers(outcome))
    return table


def _numbers(outcome: Outcome) -> tuple[str, ...]:
    if outcome.error:
        return ("raises",)
    _, cost, log_loss, accuracy = outcome.looks[-1]
    return f"{cost:.4g}", f"{log_loss:.3f}", f"{accuracy:.1%}", f"{outcome.farthest:.1e}"


def _print_comparison(compared: Comparison) -> None:
    console.print()
    console.print(_comparison_table(compared))
    for outcome in compared.outcomes:
        pairing = outcome.pairing
        console.print(f"[bold]{escape(pairing.name)}[/bold]: {escape(' '.join([pairing.why, outcome.error]))}")
    console.print(escape(_verdict(compared.outcomes)), style="bold")


def _verdict(outcomes: list[Outcome]) -> str:
    """How far apart right pairings are, and by how much the wrong ones that train are worse."""
    right = [outcome for outcome in outcomes if outcome.pairing.right]
    wrong = [outcome for outcome in outcomes if not outcome.pairing.right and not outcome.error]
    best = right[0].looks[-1]
    apart = max(outcome.farthest for outcome in right)
    worse = sorted(outcome.looks[-1].log_loss / best.log_loss for outcome in wrong)
    lines = [
        f"Right ones agree to {apart:.1e} in every probability; wrong ones' -log p is {worse[0]:.3g} to "
        f"{worse[-1]:.3g} times theirs."
    ]
    if even := [outcome.pairing.name for outcome in wrong if outcome.looks[-1].accuracy > best.accuracy - NEAR]:
        lines.append(f"As many rows right, to {NEAR:.0%}, all the same: {'; '.join(even)}.")
    return " ".join(lines)


def _save(out: Path, printed: list[Values], compared: list[Comparison]) -> list[Path]:
    """Writes both tables and the picture; returns where they are."""
    snippets, pairings, picture = (
        out / f"catalogue-{name}" for name in ("snippets.csv", "pairings.csv", "pairings.png")
    )
    write_whole(snippets, _csv(found.record() for found in printed))
    write_whole(pairings, _csv(record for comparison in compared for record in comparison.records()))
    write_whole(picture, plotting.png(losses.pairings(compared)))
    return [snippets, pairings, picture]


def _csv(records: Iterable[dict[str, Any]]) -> bytes:
    first, *rest = records
    text = io.StringIO()
    lines = csv.DictWriter(text, first)
    lines.writeheader()
    lines.writerows([first, *rest])
    return text.getvalue().encode()
