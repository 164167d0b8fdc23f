"""Every option of every command with a value it cannot take, and every command interrupted."""

import json
import re
import sys

import pytest
import torch
from typer.main import get_command

from fusedact import __main__, cli
from fusedact.__main__ import main

NAMES = {  # what a command needs beside its options
    "train": ["xor"],
    "compare": ["xor"],
    "profile": ["xor"],
    "fuse": ["torch.nn:ReLU"],
    "plot curves": ["xor"],
}
BAD = {"--out": "file/under", "--json": "file/under", "--data": "file/under", "--seed": "-1", "--lr": "-1"}


def leaves(command, path=()):
    """The commands that do something, by the words that call them."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


COMMANDS = {" ".join(path): command for path, command in leaves(get_command(cli.app))}
CALLS = [
    pytest.param([*name.split(), *NAMES.get(name, []), option, BAD.get(option, "?")], id=f"{name} {option}")
    for name, command in COMMANDS.items()
    for option in (parameter.opts[0] for parameter in command.params if not getattr(parameter, "is_flag", False))
    if option.startswith("--")
]
ARGUMENTS = [
    pytest.param([*name.split(), "?"], id=name)
    for name, command in COMMANDS.items()
    if any(not parameter.opts[0].startswith("--") for parameter in command.params)
]
MORE = [
    ["train", "xor", "--seed", str(2**63)],
    ["train", "xor", "--epochs", "1e3"],
    ["train", "xor", "--lr", "nan"],
    ["train", "xor", "--threads", "1025"],
    ["train", "xor", "--start", ""],
    ["train", "xor", "--data", "a\0b"],
    ["train", "xor", "--out", "a\0b"],
    ["train", "xor", "--rows", "0"],
    ["train", "mnist-mlp", "--rows", "99"],
    ["plot", "mnist", "--checkpoint", "file"],
    ["plot", "curves", "xor", "--from", "file"],
    ["plot", "curves", "xor", "--dpi", "10000"],
    ["profile", "xor", "--steps", "0"],
    ["bench", "--rounds", "1"],
    ["bench", "--activation", "relu"],
    ["plot"],
    ["plot", "fly"],
    ["fuse", "file:x", "--input", "-1"],
]


@pytest.fixture(autouse=True)
def clean_folder(tmp_path, monkeypatch):
    """A folder that holds an empty file, and no more after any fault; torch's threads are put back."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("args", [*CALLS, *ARGUMENTS, *(pytest.param(args, id=" ".join(args)) for args in MORE)])
@pytest.mark.contract(88)
def test_a_bad_value_is_one_line(capsys, args):
    assert main(args) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and re.fullmatch(r"fusedact: [^\n]+\n", errors)
    assert "Traceback" not in errors


INTERRUPTED = {  # and what of it is interrupted
    "train xor --out out": "fusedact.trainers.loop.Trainer._slice",
    "compare xor": "fusedact.trainers.loop.Trainer._slice",
    "compare xor --sweep": "fusedact.cli.training.sweep_xor",
    "bench --list": "fusedact.cli.benchmarks.cases_for",
    "bench --op softmax --shape 8x8 --json found.json": "fusedact.cli.benchmarks.prepare",
    "profile xor": "fusedact.cli.profiling.profile_unit",
    "catalogue": "rich.progress.Progress.__enter__",
    "fuse torch.nn:ReLU": "fusedact.cli.fusing.fusedact.fuse",
    "info": "fusedact.cli.tuning.implementation",
    "plot activations relu": "fusedact.cli.plotting.plotting.png",
    "plot losses": "fusedact.cli.plotting.plotting.png",
    "plot xor": "fusedact.cli.plotting.runs_in_turn",
    "plot mnist": "fusedact.cli.plotting.runs_in_turn",
    "plot curves xor": "fusedact.cli.plotting.runs_in_turn",
}


@pytest.mark.parametrize("command", INTERRUPTED)
@pytest.mark.contract(89)
def test_ctrl_c(clean_folder, capsys, monkeypatch, command):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(INTERRUPTED[command], interrupted)
    monkeypatch.setattr("fusedact.cli.benchmarks.ceilings.measured", lambda *args: {})
    assert main(command.split()) == 130
    assert capsys.readouterr().err == ""
    if "--json" in command:
        assert json.loads((clean_folder / "found.json").read_text())["benchmarks"] == []


@pytest.mark.contract(89)
def test_ctrl_c_while_the_commands_are_imported(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fusedact.cli")
    monkeypatch.setattr(sys, "meta_path", [type("Finder", (), {"find_spec": lambda *args: interrupted(args)})])
    monkeypatch.setattr(__main__, "find_spec", lambda name: True)
    assert main(["info"]) == 130


def test_every_command_is_interrupted():
    """But tune, which begins where there is a GPU."""
    assert {name for name in COMMANDS if any(call.startswith(name) for call in INTERRUPTED)} == {*COMMANDS} - {"tune"}
