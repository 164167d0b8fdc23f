"""What tools/mutants.py tells: its tables, on the screen and in docs/proofs.md, and what its sample does not show."""

import tomllib
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/proofs.md"
BEGIN, END = "<!-- mutants -->\n", "<!-- /mutants -->"
LEAST, SHARE = 200, 0.9
TOLD = tomllib.loads((ROOT / "tools/mutants.toml").read_text())
TESTS = TOLD["tests"]


class Mutant(NamedTuple):
    """One change: the lines as they were and are, and what the tests said."""

    file: str
    before: str
    after: str
    outcome: str = ""  # killed, timeout or survived


def reasons() -> dict[tuple[str, str, str], str]:
    return {(entry["file"], entry["before"], entry["after"]): entry["reason"] for entry in TOLD.get("survivor", [])}


def counts(mutants: list[Mutant]) -> list[tuple[str, ...]]:
    """A line for each file and one for all: how many, killed, of these by the limit, surviving, and the share."""
    lines = []
    for name in (*TESTS, "all"):
        own = [m.outcome for m in mutants if name in (m.file, "all")]
        survived, late = own.count("survived"), own.count("timeout")
        share = f"{(len(own) - survived) / len(own):.0%}" if own else ""
        lines.append((name, *map(str, (len(own), len(own) - survived, late, survived)), share))
    return lines


def page(mutants: list[Mutant], seed: int) -> str:
    """The two tables of docs/proofs.md."""
    known = reasons()
    rows = [" | ".join(("", *line, "")).strip() for line in counts(mutants)]
    survivors = [
        f"| `{m.file}` | {code(m.before)} | {code(m.after)} | {known.get(m[:3], 'not looked at yet')} |"
        for m in sorted(mutants)
        if m.outcome == "survived"
    ]
    return "\n".join(
        [
            f"`make mutants`, seed {seed}:\n\n| file | mutants | killed | by the limit | survived | share |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "\n| survivor in | line | as | why it may live |\n| --- | --- | --- | --- |",
            *survivors,
            "",
        ]
    )


def shortfalls(mutants: list[Mutant]) -> list[str]:
    """What the sample does not show."""
    known = reasons()
    survivors = [m for m in mutants if m.outcome == "survived"]
    share = 1 - len(survivors) / max(len(mutants), 1)
    told = [f"{len(mutants)} mutants were run, of {LEAST} at least"] if len(mutants) < LEAST else []
    told += [f"{share:.1%} were killed, of {SHARE:.0%} at least"] if share < SHARE else []
    return [*told, *(f"no reason why this may live: {m[:3]}" for m in survivors if m[:3] not in known)]


def code(line: str) -> str:
    return "`{}`".format(line.replace("|", "\\|")) if line else "(gone)"


def shown(mutants: list[Mutant]) -> None:
    table = Table("file", "mutants", "killed", "by the limit", "survived", "share")
    for line in counts(mutants):
        table.add_row(*line)
    console = Console(width=150)
    console.print(table)
    known = reasons()
    for m in sorted(mutants):
        if m.outcome == "survived":
            console.print(f"{m.file}\n  - {m.before}\n  + {m.after}\n    {known.get(m[:3], 'NO REASON')}", markup=False)


def write(mutants: list[Mutant], seed: int) -> None:
    """Puts the tables into their page."""
    text = PAGE.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}{page(mutants, seed)}{END}{tail}")
