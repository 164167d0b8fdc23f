"""tools/contract.py: no row of docs/contract.md is lost, and one without a test fails."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tools import contract

PAGE = (Path(__file__).parents[1] / "docs/contract.md").read_text()
FIRST, LAST = "\n| 1 |", "\n| 89 |"


def test_the_page_has_each_row_once():
    assert [*contract.rows(PAGE)] == [*contract.ROWS]


@pytest.mark.parametrize("text", [
    PAGE.replace(FIRST, "\n|1 |"), PAGE.replace(FIRST, LAST), PAGE[: PAGE.index(LAST)], f"{PAGE}\n| 90 | more | x |",
], ids=["another form", "a number twice", "one less", "one more"])  # fmt: skip
def test_a_row_lost_or_added_is_told(text):
    with pytest.raises(ValueError, match="needs rows 1 to 89"):
        contract.rows(text)


def test_a_row_is_held_by_what_was_collected_or_passed_alone():
    outcomes = contract.Outcomes({1: "a", 2: "b", 3: "c"})
    for row, outcome in ((1, "passed"), (2, "skipped"), (3, "collected"), (90, "passed")):
        test = SimpleNamespace(nodeid="tests/test_x.py::test_y[z]", user_properties=[("contract", row)])
        outcomes.count(test, outcome)
    assert outcomes.without("passed") == [2, 3]
    assert outcomes.without("collected") == [1, 2]
    assert outcomes.unknown() == [90]
