"""Prints docs/contract.md as a table, each row with the tests that hold it; fails where one has none that passed.

`make contract` runs the tests that carry `@pytest.mark.contract(row, ...)`. Arguments go to pytest.
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
FAULT_WIDTH = 44


def rows() -> dict[int, str]:
    """What each row of the page is about, by its number."""
    return {int(number): fault.strip() for number, fault, _ in ROW.findall((ROOT / "docs/contract.md").read_text())}


class Outcomes:
    """A pytest plugin: how often the tests of each row passed, failed or were skipped, by the test's name."""

    def __init__(self) -> None:
        self.found: defaultdict[int, defaultdict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        test = report.nodeid.split("[")[0].removeprefix("tests/")
        for name, row in report.user_properties:
            if name == "contract":
                self.found[row][test][report.outcome] += 1

    def table(self) -> Table:
        table = Table("#", "fault", "tests", "passed", show_lines=True, title="docs/contract.md, and what holds it")
        for row, fault in rows().items():
            tests = self.found[row]
            told = [" ".join(f"{count} {outcome}" for outcome, count in counts.items()) for counts in tests.values()]
            shown = fault if len(fault) <= FAULT_WIDTH else fault[: FAULT_WIDTH - 1] + "…"
            table.add_row(str(row), shown, "\n".join(tests) or "none", "\n".join(told))
        return table

    def unproved(self) -> list[int]:
        return [row for row in rows() if not any(counts["passed"] for counts in self.found[row].values())]


def main(arguments: list[str]) -> int:
    outcomes = Outcomes()
    status = pytest.main(["-m", "contract", *arguments], plugins=[outcomes])
    Console(width=150).print(outcomes.table())
    if unproved := outcomes.unproved():
        print(f"no test of these rows passed: {', '.join(map(str, unproved))}", file=sys.stderr)
    return int(status) or bool(unproved)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
