"""Several processes, started by torchrun on loopback, against one: tests/ranks, each test in every process at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks"
FILES = sorted(str(path) for path in RANKS.glob("*.py") if path.name != "conftest.py")
SHORT, REST = "not exhaustive", "exhaustive"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "chosen"),
    [
        pytest.param(2, SHORT, id="2 processes, short"),
        pytest.param(2, REST, id="2 processes, the rest", marks=pytest.mark.exhaustive),
        pytest.param(4, SHORT, id="4 processes, short", marks=pytest.mark.exhaustive),
        pytest.param(4, REST, id="4 processes, the rest", marks=pytest.mark.distributed),
    ],
)
def test_processes_equal_one(world, chosen, tmp_path, record_property):
    """A test of tests/ranks that fails in one process ends all of them."""
    found = tmp_path / "equalities.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "EQUALITIES": str(found)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    options = ["-m", chosen, "--maxfail=1", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5"]
    done = subprocess.run(
        [*command, "-m", "pytest", *options, *FILES],
        env={name: value for name, value in environment.items() if not name.startswith("PYTEST_")},
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for row in json.loads(found.read_text()):
        record_property("equality", json.dumps(row))
