"""What tools/mutants.toml says still holds: its files and tests are there, and so are the lines of its survivors."""

import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOLD = tomllib.loads((ROOT / "tools/mutants.toml").read_text())
WHOLE = ["kernels/activations.py", "fusedact/activations.py", "fusedact/backend.py"]


def test_each_file_has_its_tests():
    modules = {
        str(path.relative_to(ROOT))
        for name in ("functional", "tuning")
        for path in (ROOT / "fusedact" / name).glob("*.py")
    }
    assert {*WHOLE, *modules} - {"fusedact/tuning/__init__.py"} == TOLD[
        "tests"
    ].keys()  # which holds no more than names
    tests = [word for words in TOLD["tests"].values() for word in shlex.split(words) if word.endswith(".py")]
    assert tests and all((ROOT / test).exists() for test in tests)


def test_survivors_still_stand():
    for survivor in TOLD.get("survivor", []):
        lines = map(str.strip, (ROOT / survivor["file"]).read_text().splitlines())
        assert survivor["before"] in lines, survivor
        assert survivor["before"] != survivor["after"] and survivor["reason"]
