"""`fusedact fuse`: a model by its import path, its report, faults in one line."""

import sys
from textwrap import dedent

import pytest
import torch

from fusedact.__main__ import main

MODELS = """
import argparse
import sys

import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.fc, self.act = nn.Linear(4, width), nn.GELU()

    def forward(self, x, *others):
        return sum(others, self.act(self.fc(x)))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(5, 4), nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def forward(self, tokens):
        return self.body(self.embed(tokens))

def blocks():
    return nn.Sequential(*(Pair() for _ in range(3)))

ready = Pair(16)
number = 3

def broken():
    raise ValueError("no such size\\nand more")

def exits():
    sys.exit(3)

def parses():
    argparse.ArgumentParser().parse_args()
    return Pair()

class Uncastable(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)

    def to(self, *args):
        raise RuntimeError("stays as it is")

class Uninitialised(nn.Module):
    def __init__(self):
        pass

    def forward(self, x):
        return x

def traced():
    return torch.jit.trace(nn.Linear(4, 4), torch.zeros(1, 4))
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A module in the current folder, whence it is imported, of another name in every test; gives that name."""
    name = f"models_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(dedent(MODELS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield name
    sys.modules.pop(name, None)


def words(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("factory", "row"),
    [
        ("Pair", "(the model) Linear(4, 8) + gelu 1 + 1 32 + 32"),
        ("ready", "(the model) Linear(4, 16) + gelu 1 + 1 64 + 64"),
        ("parses", "(the model) Linear(4, 8) + gelu 1 + 1 32 + 32"),
        ("blocks", "{0..2} 3 x Linear(4, 8) + gelu 1 + 1 32 + 32"),
    ],
)
def test_a_function_a_class_or_a_model(models, capsys, factory, row):
    assert main(["fuse", f"{models}:{factory}"]) == 0
    captured = capsys.readouterr()
    assert row in words(captured.out) and captured.err == ""


def test_inputs_are_run_once(models, capsys):
    assert main(["fuse", f"{models}:Pair", "--input", "2x5x4", "--input", "8"]) == 0
    assert "10 1 + 1 640 B" in words(capsys.readouterr().out)
    assert main(["fuse", f"{models}:Pair", "--input", "2x5x4", "--dtype", "bfloat16"]) == 0
    assert "10 1 + 1 320 B" in words(capsys.readouterr().out)
    assert main(["fuse", f"{models}:Words", "--input", "2x50", "--dtype", "int64"]) == 0
    assert "100 1 + 1 7.20 kB" in words(capsys.readouterr().out)


def test_a_traced_model_has_no_site(models, capsys):
    assert main(["fuse", f"{models}:traced", "--input", "1x4"]) == 0
    assert capsys.readouterr().out.startswith("No site: ")


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        (["fuse"], "Missing argument 'MODULE:FACTORY'"),
        (["fuse", "models"], "'models', expected module:factory as models.vit:build"),
        (["fuse", ":build"], "':build', expected module:factory"),
        (["fuse", "models:"], "'models:', expected module:factory"),
        (
            ["fuse", "nowhere_at_all:build"],
            "nowhere_at_all:build: ModuleNotFoundError: No module named 'nowhere_at_all'",
        ),
        (["fuse", "MODELS:absent"], "has no attribute 'absent'"),
        (["fuse", "MODELS:broken"], "MODELS:broken: ValueError: no such size"),
        (["fuse", "MODELS:number"], "MODELS:number: expected a torch.nn.Module, received int"),
        (["fuse", "MODELS:torch.ones"], "TypeError"),
        (["fuse", "MODELS:Pair", "--input", "2x5x"], "'2x5x', expected sizes as 4096x1000"),
        (["fuse", "MODELS:Pair", "--input", "0x4"], "'0x4', expected sizes"),
        (["fuse", "MODELS:Pair", "--input", "2x5"], "--input: the model raised: RuntimeError: "),
        (["fuse", "MODELS:Pair", "--input", "99999999999x99999999"], "--input: RuntimeError: Storage size calculation"),
        (["fuse", "MODELS:Pair", "--input", "9" * 23], "--input: TypeError: zeros(): argument 'size' failed"),
        (["fuse", "MODELS:exits"], "MODELS:exits: SystemExit: 3"),
        (["fuse", "MODELS:Uncastable", "--dtype", "bfloat16"], "MODELS:Uncastable: RuntimeError: stays as it is"),
        (["fuse", "MODELS:Uninitialised"], "MODELS:Uninitialised: AttributeError: 'Uninitialised' object has no"),
        (["fuse", "MODELS:Pair", "--dtype", "int8"], "unknown dtype 'int8', expected one of bfloat16, float16"),
    ],
)
@pytest.mark.contract(88)
def test_fault_is_one_line(models, capsys, args, fault):
    assert main([arg.replace("MODELS", models) for arg in args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fusedact: ") and captured.err.count("\n") == 1
    assert fault.replace("MODELS", models) in captured.err


def test_a_fault_while_importing_is_one_line(models, tmp_path, capsys):
    (tmp_path / f"{models}.py").write_text("import torch\n1 / 0\n")
    assert main(["fuse", f"{models}:build"]) == 2
    assert capsys.readouterr().err == f"fusedact: Invalid value: {models}:build: ZeroDivisionError: division by zero\n"


def test_the_model_is_built_on_the_cpu(models, capsys):
    torch.set_default_device("meta")
    try:
        assert main(["fuse", f"{models}:Pair", "--input", "2x4"]) == 0
    finally:
        torch.set_default_device(None)
    assert "Sites fused: 1 of 1" in capsys.readouterr().out
