"""What tools/mutants.toml says still holds: its files and tests are there, and so are the lines of its survivors.

And docs/proofs.md's table is of enough mutants, of which enough were noticed, with a reason for each that was not.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tools import mutants_told
from tools.mutants_told import LEAST, SHARE, Mutant

ROOT = Path(__file__).parents[1]
TOLD = tomllib.loads((ROOT / "tools/mutants.toml").read_text())
WHOLE = ["kernels/activations.py", "fusedact/activations.py", "fusedact/backend.py"]


def test_each_file_has_its_tests():
    modules = {
        str(path.relative_to(ROOT))
        for name in ("functional", "tuning")
        for path in (ROOT / "fusedact" / name).glob("*.py")
    }
    modules -= {"fusedact/tuning/__init__.py"}  # which holds no more than names
    modules -= {f"fusedact/functional/{name}.py" for name in ("layouts", "sharded")}  # whose tests start processes
    assert {*WHOLE, *modules} == TOLD["tests"].keys()
    tests = [word for words in TOLD["tests"].values() for word in shlex.split(words) if word.endswith(".py")]
    assert tests and all((ROOT / test).exists() for test in tests)


def test_survivors_still_stand():
    for survivor in TOLD.get("survivor", []):
        lines = map(str.strip, (ROOT / survivor["file"]).read_text().splitlines())
        assert survivor["before"] in lines, survivor
        assert survivor["before"] != survivor["after"] and survivor["reason"]


def test_the_page_tells_of_enough_mutants_and_why_each_survivor_may_live():
    table = re.search(r"<!-- mutants -->\n(.*?)<!-- /mutants -->", (ROOT / "docs/proofs.md").read_text(), re.DOTALL)[1]
    whole = re.search(r"^\| all \| (\d+) \| (\d+) \| \d+ \| (\d+) \|", table, re.MULTILINE)
    mutants, killed, survived = map(int, whole.groups())
    assert mutants >= LEAST and killed + survived == mutants and killed >= SHARE * mutants
    told = [line.removesuffix(" |").rpartition(" | ")[2] for line in table.splitlines() if line.startswith("| `")]
    assert len(told) == survived
    assert {*told} <= {survivor["reason"] for survivor in TOLD.get("survivor", [])}


KILLED, SURVIVED = Mutant("a.py", "x", "y", "killed"), Mutant("a.py", "x", "z", "survived")


@pytest.mark.parametrize(("mutants", "told"), [
    ([KILLED] * 190 + [SURVIVED] * 20, []),
    ([KILLED] * 150, ["150 mutants were run"]),
    ([KILLED] * 189 + [SURVIVED] * 22, ["89.6% were killed"]),
    ([KILLED] * 200 + [SURVIVED._replace(after="w")], ["no reason"]),
], ids=["enough", "few", "blind", "no reason"])  # fmt: skip
def test_what_a_sample_does_not_show_is_told(mutants, told, monkeypatch):
    monkeypatch.setattr(mutants_told, "reasons", lambda: {SURVIVED[:3]: "why"})
    found = mutants_told.shortfalls(mutants)
    assert len(found) == len(told) and all(map(str.startswith, found, told))
