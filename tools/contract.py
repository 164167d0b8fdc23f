"""Prints docs/contract.md as a table, each row with the tests that hold it; fails where one has none that passed.

`make contract` runs the tests that carry `@pytest.mark.contract(row, ...)`. Arguments go to pytest. With --collect-only
nothing runs, and a row needs a test that was collected.
"""

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| (\d+) \| (.*) \| (.*) \|$", re.MULTILINE)
ROWS = range(1, 90)
FAULT_WIDTH = 44


def rows(text: str) -> dict[int, str]:
    """What each row of the page is about, by its number; each number once and in order, lest a row be lost."""
    found = [(int(number), fault.strip()) for number, fault, _ in ROW.findall(text)]
    if [number for number, _ in found] != [*ROWS]:
        wrong = sorted({*ROWS} ^ {number for number, _ in found})
        raise ValueError(f"docs/contract.md needs rows {ROWS[0]} to {ROWS[-1]}, once each and in order; see {wrong}")
    return dict(found)


class Outcomes:
    """A pytest plugin: how often the tests of each row passed, failed or were skipped, by the test's name."""

    def __init__(self, faults: dict[int, str]) -> None:
        self.faults = faults
        self.found: defaultdict[int, defaultdict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.config.option.collectonly:
            for item in session.items:
                self.count(item, "collected")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            self.count(report, report.outcome)

    def count(self, test: pytest.Item | pytest.TestReport, outcome: str) -> None:
        for name, row in test.user_properties:
            if name == "contract":
                self.found[row][test.nodeid.split("[")[0].removeprefix("tests/")][outcome] += 1

    def table(self) -> Table:
        table = Table("#", "fault", "tests", "passed", show_lines=True, title="docs/contract.md, and what holds it")
        for row, fault in self.faults.items():
            tests = self.found[row]
            told = [" ".join(f"{count} {outcome}" for outcome, count in counts.items()) for counts in tests.values()]
            shown = fault if len(fault) <= FAULT_WIDTH else fault[: FAULT_WIDTH - 1] + "…"
            table.add_row(str(row), shown, "\n".join(tests) or "none", "\n".join(told))
        return table

    def without(self, outcome: str) -> list[int]:
        """The rows of which no test did."""
        return [row for row in self.faults if not any(counts[outcome] for counts in self.found[row].values())]

    def unknown(self) -> list[int]:
        """Rows that a test names and the page has not."""
        return sorted(self.found.keys() - self.faults.keys())


def main(arguments: list[str]) -> int:
    outcomes = Outcomes(rows((ROOT / "docs/contract.md").read_text()))
    wanted = "collected" if "--collect-only" in arguments else "passed"
    status = pytest.main(["-m", "contract", *arguments], plugins=[outcomes])
    lost, unknown = outcomes.without(wanted), outcomes.unknown()
    if wanted == "passed":
        Console(width=150).print(outcomes.table())
    for wrong, numbers in (("rows that no test holds", lost), ("tests hold rows that are not there", unknown)):
        if numbers:
            print(f"{wrong}: {', '.join(map(str, numbers))}", file=sys.stderr)
    return int(status) or bool(lost or unknown)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # as `python -m pytest` has it: tests import tools and bench
    sys.exit(main(sys.argv[1:]))
