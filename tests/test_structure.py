"""The house's rules, held by reading the source: who imports whom, what kernels may do, and what importing does."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fusedact"
FOLDERS = ("kernels", "fusedact", "tests", "bench", "tools")
LONGEST = 600

# A room may import its own floor and those before it. `fusedact` alone stands for the public names in __init__.py.
FLOORS = (
    ("kernels",),
    ("activations",),
    ("tuning",),
    ("backend",),
    ("autograd",),
    ("functional",),
    ("nn",),
    ("fusion", "fitting", "distributed"),
    ("fusedact",),
    ("trainers", "data", "plotting", "profiling", "catalogue"),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.relative_to(PACKAGE).parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_kernel = pytest.mark.parametrize("path", KERNELS, ids=relative)
each_module = pytest.mark.parametrize("path", MODULES, ids=relative)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, within: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of each import; `from fusedact import nn` is fusedact.nn, `from .a import b` .a.b."""
    for node in ast.walk(within or tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            between = "" if base.endswith(".") else "."
            yield from ((node.lineno, base + between + alias.name) for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain; an empty string for anything else."""
    if isinstance(node, ast.Attribute):
        inside = dotted(node.value)
        return f"{inside}.{node.attr}" if inside else ""
    return node.id if isinstance(node, ast.Name) else ""


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in (*child.decorator_list, *child.args.defaults, *child.args.kw_defaults):
                if part is not None:
                    yield part
                    yield from at_import(part)
        elif not isinstance(child, ast.Lambda):
            yield child
            yield from at_import(child)


def room(name: str) -> str | None:
    """The room of an imported name of ours: fusedact.nn.linear is in nn, fusedact.Tensor in none but fusedact."""
    parts = name.split(".")
    if parts[0] != "fusedact":
        return None
    inner = parts[1] if len(parts) > 1 else ""
    is_module = (PACKAGE / inner).is_dir() or (PACKAGE / f"{inner}.py").is_file()
    return inner if inner and is_module else "fusedact"


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "fusedact" if first == "__init__" else first


# Who imports whom


@each_kernel
def test_no_device_function_has_a_default_that_is_text(path):
    """Triton 3.6 takes only numbers and functions for constants there; its interpreter takes any."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(name) for name in node.decorator_list):
            defaults = [d for d in (*node.args.defaults, *node.args.kw_defaults) if isinstance(d, ast.Constant)]
            assert not any(isinstance(d.value, str) for d in defaults), f"{relative(path)}:{node.lineno}"


@each_kernel
def test_kernels_import_only_torch_triton_and_themselves(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names} - {"os", "sys", "subprocess", "importlib"}
    wrong = [f"line {line}: {name}" for line, name in imports(path) if name.split(".")[0] not in {"", *allowed}]
    above = [f"line {line}: {name}" for line, name in imports(path) if name.startswith("..")]
    assert wrong + above == []


@each_kernel
def test_kernels_know_no_autograd_and_no_modules(path):
    known = {dotted(node) for node in ast.walk(tree(path))} | {name for _, name in imports(path)}
    assert [name for name in known if name.startswith(("torch.nn", "torch.autograd", "torch.library"))] == []


@each_module
def test_imports_point_down(path):
    here = room_of(path)
    assert here in FLOOR, f"{here} has no floor yet: house.md's table and FLOORS name it first"
    wrong = []
    for line, name in imports(path):
        there = room(name)
        if there is not None and FLOOR[there] > FLOOR[here]:
            wrong.append(f"line {line}: {here} imports {name}")
    assert wrong == []


@each_module
def test_imports_are_absolute(path):
    """So that the test above can read their direction."""
    assert [f"line {line}: {name}" for line, name in imports(path) if name.startswith(".")] == []


def test_nothing_imports_tests_and_what_ships_imports_no_bench():
    """Tests do not import each other either: each file is read alone."""
    tests = {"tests"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    found = []
    for folder in FOLDERS:
        banned = tests if folder in ("tests", "bench") else {*tests, "bench"}
        for path in (ROOT / folder).rglob("*.py"):
            found += [f"{relative(path)}:{at} {name}" for at, name in imports(path) if name.split(".")[0] in banned]
    assert found == []


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "nn"], ids=relative)
def test_nn_never_launches(path):
    assert [name for _, name in imports(path) if room(name) in ("kernels", "autograd")] == []


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "functional"], ids=relative)
def test_functional_never_allocates(path):
    makers = {"empty", "zeros", "ones", "full", "empty_like", "zeros_like", "new_empty", "new_zeros", "empty_strided"}
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert [call.attr for call in calls if isinstance(call, ast.Attribute) and call.attr in makers] == []


# What kernels may do


@each_kernel
def test_no_libdevice_and_no_inline_assembly(path):
    names = {part for _, name in imports(path) for part in name.split(".")}
    names |= {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
    assert [name for name in names if "libdevice" in name or "inline_asm" in name] == []


@each_kernel
def test_no_floating_point_atomics(path):
    """An atomic adds or swaps integer literals: tickets and barriers. Sums are taken in order instead."""
    wrong = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "atomic" in node.func.attr:
            operands = [
                arg.operand if isinstance(arg, ast.UnaryOp) else arg
                for arg in (*node.args[1:], *(k.value for k in node.keywords if k.arg in ("val", "cmp")))
            ]
            if not operands or not all(isinstance(a, ast.Constant) and type(a.value) is int for a in operands):
                wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert wrong == []


@each_kernel
def test_dot_precision_is_always_passed(path):
    """Triton's own default is TF32."""
    dots = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call) and dotted(node.func) == "tl.dot"]
    assert [f"line {d.lineno}" for d in dots if "input_precision" not in {k.arg for k in d.keywords}] == []


@pytest.mark.parametrize(
    "path", [*KERNELS, *(path for path in MODULES if FLOOR.get(room_of(path), 0) in (3, 4, 5, 6))], ids=relative
)
def test_activation_names_stand_in_the_table_alone(path):
    from fusedact.activations import ACTIVATIONS

    strings = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Constant) and node.value in ACTIVATIONS]
    assert [f"line {node.lineno}: {node.value!r}" for node in strings] == []


# What importing does


@each_module
def test_import_time_code_only_defines(path):
    """No environment variable, no device query, no patching, no Triton, nothing of the kernels."""
    wrong = []
    for node in at_import(tree(path)):
        where = f"line {getattr(node, 'lineno', '?')}"
        match node:
            case ast.Attribute() | ast.Name() if dotted(node) in ("os.environ", "os.getenv"):
                wrong.append(f"{where}: reads the environment")
            case ast.Call(func=func) if dotted(func).startswith(("torch.cuda.", "torch.accelerator.")):
                wrong.append(f"{where}: queries a device")
            case ast.Assign(targets=[ast.Attribute() as target, *_]):
                wrong.append(f"{where}: patches {ast.unparse(target)}")
            case ast.Call(func=ast.Name(id="setattr")):
                wrong.append(f"{where}: patches by setattr")
            case ast.Import() | ast.ImportFrom():
                lazy = ("triton", "fusedact.kernels")
                wrong += [f"{where}: {name}" for _, name in imports(path, node) if name.startswith(lazy)]
    assert wrong == []


@pytest.fixture(scope="module")
def importing() -> dict:
    """What `import fusedact` did in a fresh process that had imported torch."""
    script = """
import json, os, sys, time
import torch

reads, queries, before = [], [], set(sys.modules)

class Trap(type(os.environ)):
    def __getitem__(self, key):
        reads.append(key)
        return super().__getitem__(key)
    def __contains__(self, key):
        reads.append(key)
        return super().__contains__(key)

os.environ.__class__ = Trap
for name in "is_available device_count current_device get_device_capability get_device_properties init".split():
    setattr(torch.cuda, name, lambda *a, name=name, **k: queries.append(name))
start = time.process_time()
import fusedact
seconds = time.process_time() - start
os.environ.__class__ = Trap.__base__
print(json.dumps({
    "reads": reads, "queries": queries, "initialized": torch.cuda.is_initialized(), "seconds": seconds,
    "modules": sorted(sys.modules), "added": sorted(set(sys.modules) - before),
}))
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_reads_no_environment_variable(importing):
    assert importing["reads"] == []


def test_import_queries_no_device(importing):
    assert importing["queries"] == [] and not importing["initialized"]


@pytest.mark.parametrize("name", ["triton", "rich", "typer", "matplotlib", "fusedact.kernels", "torch._dynamo"])
def test_import_leaves_alone(importing, name):
    assert name not in importing["modules"]


def test_import_costs_little_over_torch(importing):
    """Nothing but our own modules and a little of the standard library: 0.02 s on a machine of 2 cores."""
    added = {name.split(".")[0] for name in importing["added"]} - {"fusedact", *sys.stdlib_module_names}
    assert added <= {"torch"}, sorted(added)
    assert len([name for name in importing["added"] if name.startswith("torch.")]) <= 5
    assert importing["seconds"] < 0.3


# What stands where


def test_no_file_is_too_long():
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py*") if p.suffix in (".py", ".pyi")]
    lengths = {relative(path): len(path.read_text().splitlines()) for path in files if not path.is_symlink()}
    too_long = {name: lines for name, lines in lengths.items() if lines > LONGEST}
    look_at = {name: lines for name, lines in lengths.items() if LONGEST >= lines > 400}
    assert not too_long, f"over {LONGEST} lines: {too_long}; over 400, to be looked at: {look_at}"


def test_kernels_is_a_committed_link():
    link = PACKAGE / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-s", "fusedact/kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("120000 "), done.stdout + done.stderr


def test_every_package_is_listed():
    """setuptools is given the packages by name, so that `kernels` alone is never one of them."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}
    assert set(listed) == found | {"fusedact.kernels"}
