"""The host side of every launch, for a GPU that is not there: tests/dry_launch.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("dry_launch.py")
LINEAR = "forward backward forward forward"  # y; dz, db and slope; dx; dW
ONE_EACH = "forward backward"


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """{case: its launches}"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.split(": ") for line in done.stdout.splitlines())


def test_every_case_is_accepted_and_launches_what_is_stated(lines):
    linear = [name for name, launched in lines.items() if launched == LINEAR]
    assert len(linear) == 11
    for name, launched in lines.items():
        if name == "network and loss":  # y twice, loss; its gradient, dz, dz; dW twice
            assert launched == "forward forward forward backward backward backward forward forward"
        elif name.startswith("a slice"):
            assert launched == "statistics combine backward"
        elif name == "every activation":
            assert len(launched.split()) % 4 == 0
        elif name == "every activation alone":
            assert launched == " ".join([ONE_EACH] * (len(launched.split()) // 2))
        else:
            assert launched == (LINEAR if name in linear else ONE_EACH), name
