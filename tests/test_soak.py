"""Nothing grows: every cache of the package has a bound, classes are let go, and tools/soak.py sees what leaks."""

import ast
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedact
from fusedact import activations
from fusedact.fusion import recognized
from tools import soak
from tools.soak_runs import RUNS

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("fusedact", "kernels")
SOURCES = sorted((path, path.relative_to(ROOT).as_posix()) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
CHANGES = {"add", "append", "appendleft", "extend", "insert", "setdefault", "update"}
WITHOUT_BOUND = {"cache", "functools.cache", "lru_cache(None)", "lru_cache(maxsize=None)", "functools.lru_cache(None)"}
FINITE = {  # why what has no bound in the code stays small all the same
    "fusedact/activations.py ACTIVATIONS": "by what a user registers under new names",
    "fusedact/activations.py _BY_MODULE": "likewise",
    "fusedact/autograd/activation.py _pair": "likewise",
    "fusedact/autograd/activation.py _checked_pair": "likewise, and by device",
    "fusedact/autograd/bce.py _formula": "three losses",
    "fusedact/autograd/given_up.py GIVEN_UP": "by op and dtype",
    "fusedact/autograd/linear.py _kernels": "one",
    "fusedact/backend.py _triton_problem": "by device",
    "fusedact/backend.py _fork_between_launches": "one",
    "fusedact/backend.py _checks": "one",
    "fusedact/backend.py chip": "by device",
    "fusedact/backend.py multiprocessors": "by device",
    "fusedact/backend.py is_ampere": "by device",
    "fusedact/backend.py _warned": "by cause",
    "fusedact/fusion/recognized.py _FOUND": "starts anew at _MOST_FOUND, as a test below holds",
    "fusedact/fusion/recognized.py _points": "one",
    "fusedact/fusion/recognized.py _reference": "by activation",
    "fusedact/profiling/timing.py _scratch": "one",
    "fusedact/profiling/timing.py _stream": "by device",
    "fusedact/tuning/records.py _has_stock": "by chip",
    "fusedact/tuning/records.py _tables": "by machine, in the buckets of sizes that were tuned",
    "fusedact/tuning/records.py _warn_once": "by what a file system answers",
    "fusedact/tuning/records.py machine_of": "by chip",
    "kernels/faults.py _FOLDER": "one",
    "kernels/faults.py _WARNED": "by cause",
    "kernels/launch.py _SIGNATURES": "by kernel",
    "kernels/workspace.py _HELD": "by device and stream, of which torch has 32 of each priority and shares them out",
    "kernels/workspace.py _SPARE": "by device",
}


def without_bound(source: str) -> Iterator[str]:
    """Functions that keep all results, and containers of the module that a function adds to."""
    tree = ast.parse(source)
    given = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [target for node in given for target in getattr(node, "targets", [getattr(node, "target", None)])]
    containers = {target.id for target in targets if isinstance(target, ast.Name)}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            if WITHOUT_BOUND & {ast.unparse(decorator) for decorator in function.decorator_list}:
                yield function.name
            yield from (name for node in ast.walk(function) if (name := _added_to(node)) in containers)


def _added_to(node: ast.AST) -> str | None:
    """The name of what `name[...] = ` or `name.add(...)` adds to."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        held = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        held = node.func.value
    else:
        return None
    return held.id if isinstance(held, ast.Name) else None


def test_every_cache_has_a_bound_or_a_reason():
    found = {f"{name} {held}" for path, name in SOURCES for held in without_bound(path.read_text())}
    assert found == set(FINITE)


@pytest.mark.parametrize("source", [
    "@cache\ndef f(x): ...",
    "@lru_cache(maxsize=None)\ndef f(x): ...",
    "f = {}\ndef g(x):\n    f[x] = 1",
    "f: set = set()\ndef g(x):\n    f.add(x)",
], ids=["cache", "lru_cache", "dict", "set"])  # fmt: skip
def test_a_cache_without_a_bound_is_seen(source):
    assert [*without_bound(source)] == ["f"]


def test_numbers_that_change_do_not_add_up():
    bound = activations._exact.cache_info().maxsize
    for number in range(bound + 10):
        activations._exact(torch.float32, float(number))
    assert activations._exact.cache_info().currsize == bound


def test_modules_with_other_numbers_do_not_add_up(monkeypatch):
    monkeypatch.setattr(recognized, "_MOST_FOUND", 4)

    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return torch.relu(self.scale * x)

    for scale in range(2, 12):
        assert recognized.activation_of(Scaled(float(scale))) is None
        assert 1 <= len(recognized._FOUND) <= 4


def test_a_class_that_was_fused_is_let_go():
    def fused_once():
        class Network(nn.Sequential):
            pass

        model = fusedact.fuse(Network(nn.Linear(3, 4), nn.ReLU()))
        again = fusedact.fuse(Network(nn.Linear(3, 4), nn.ReLU()))
        assert type(model) is type(again) is not Network
        fusedact.unfuse(model)
        return weakref.ref(Network)

    gone = fused_once()
    gc.collect()
    assert gone() is None


def samples(cycles: int = 4, **grown) -> list[dict]:
    """Thirty, a minute and so many cycles apart, flat but for what grows by so much in each cycle."""
    flat = {"megabytes": 400.0, "objects": 300_000, "files": 5, "threads": 1, "left behind": 1, "bounded": 9}
    found = []
    for at in range(30):
        now = {what: value + at * cycles * grown.get(what, 0) for what, value in (flat | {"a.cache": 7}).items()}
        found.append({"seconds": 60 * at, "cycles": cycles * at, "caches": {"a.cache": now.pop("a.cache")}} | now)
    return found


@pytest.mark.parametrize("grown", [
    {}, {"megabytes": 0.01}, {"bounded": 2, "objects": 6}, {"cycles": 1000, "megabytes": 1e-4}, {"megabytes": -1},
], ids=["flat", "steps of an allocator", "a cache with a bound", "a MB in 14,000 cycles", "shrinks"])  # fmt: skip
def test_what_hardly_grows_has_no_fault(grown):
    assert soak.judged(samples(**grown))["faults"] == []


@pytest.mark.parametrize("grown", [
    {"megabytes": 0.05}, {"megabytes": 1e-3, "cycles": 1000}, {"objects": 1}, {"objects": 7, "bounded": 2},
    {"files": 1}, {"threads": 1}, {"left behind": 1}, {"a.cache": 1},
], ids=lambda grown: ", ".join(f"{what} {by}" for what, by in grown.items()))  # fmt: skip
def test_what_grows_is_a_fault(grown):
    (fault,) = soak.judged(samples(**grown))["faults"]
    assert fault.startswith(next(iter(grown)))


@pytest.mark.parametrize("found", [samples(cycles=3), samples()[:6]], ids=["cycles", "samples"])
def test_a_run_too_short_to_judge_is_a_fault(found):
    (fault,) = soak.judged(found)["faults"]
    assert fault.endswith("are too few to judge")


def test_the_record_is_of_every_run_by_this_rule():
    record = json.loads((ROOT / "bench/results/soak-cpu.json").read_text())
    assert record["rule"] == soak.RULE
    assert record["runs"].keys() == RUNS.keys()
    assert not [fault for run in record["runs"].values() for fault in run["faults"]]


def test_runs_that_died_are_told_beside_the_others(tmp_path, capsys):
    whole = "".join(json.dumps(each) + "\n" for each in samples())
    for name, text in {"well": whole, "cut": whole[:-9], "empty": ""}.items():
        (tmp_path / name).write_text(text)
    assert not soak.report({name: tmp_path / name for name in ("well", "cut", "empty", "none")}, tmp_path)
    found = json.loads((tmp_path / "soak.json").read_text())["runs"]
    assert [name for name, run in found.items() if run["faults"]] == ["empty", "none"]
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


def test_what_grows_in_the_warm_up_alone_is_none():
    found = samples()
    for at, each in enumerate(found[:14]):
        each["megabytes"] -= 20 * (14 - at)
        each["files"] -= 1
    assert soak.judged(found)["faults"] == []


def test_a_spike_is_none():
    found = samples()
    found[-1]["megabytes"] = 900.0
    assert soak.judged(found)["faults"] == []


def test_the_package_is_searched_for_caches():
    held = {name: bound for name, _, bound in soak.caches()}
    assert held["fusedact.activations._exact"] == 4096
    assert held["fusedact.fusion.recognized._FOUND"] is None


@pytest.mark.exhaustive
def test_a_short_run_leaves_a_record_and_a_picture(tmp_path):
    command = [sys.executable, "tools/soak.py", "--only", "fit_many", "--minutes", "0.1", "--every", "0.1"]
    done = subprocess.run([*command, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1) and not done.stderr, done.stderr  # too short to judge memory by
    record = json.loads((tmp_path / "soak.json").read_text())
    assert record["runs"]["fit_many"]["cycles"] >= 1
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
