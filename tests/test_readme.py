"""What the README and the pages say of commands, names and figures is what the project and its records have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cpu, memory, precision, saved
from fusedact.activations import ACTIVATIONS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def between(marker):
    return re.search(f"<!-- {marker} -->\n(.*?)\n<!-- /{marker} -->", README, re.DOTALL).group(1)


def test_the_two_commands_stand_at_the_top_and_are_makes():
    first_block = README.split("```")[1].split()
    assert [first_block[i] for i, word in enumerate(first_block, 1) if word == "make"] == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in ("demo", "test", "docs", "bench"))


def test_activations_are_the_tables():
    assert re.findall(r"`(\w+)`", between("activations")) == list(ACTIVATIONS)


def test_figures_are_the_records():
    report = ROOT / "bench" / "report.py"
    done = subprocess.run([sys.executable, str(report), "--check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", README.split("```python\n")[1:])
def test_python_blocks_name_what_exists(block):
    code = block.split("```")[0]
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("script", [cpu, memory, precision, saved], ids=lambda script: script.__name__)
def test_what_a_script_writes_into_a_page_is_what_it_would_write(script):
    page = script.PAGE.read_text()
    assert script.rendered(page) == page
