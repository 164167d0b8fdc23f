"""Writes the stubs of fusedact.nn and fusedact.nn.functional: every name of torch's, and ours, for type checkers.

`python tools/make_nn_stubs.py` writes them; with `--check` it compares, and exits with 1 where they differ from what
it would write for the installed torch. Nothing is listed here: the names are read from the modules themselves.
"""

import ast
import difflib
import re
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional

import fusedact.functional
import fusedact.nn

PACKAGE = Path(__file__).resolve().parents[1] / "fusedact" / "nn"
STUBS = {
    PACKAGE / "__init__.pyi": (fusedact.nn, torch.nn),
    PACKAGE / "functional.pyi": (fusedact.functional, torch.nn.functional),
}
LINE = 120  # as ruff has it
HEADER = "# Written by tools/make_nn_stubs.py from torch {version}: not by hand.\n"


def own(ours: ModuleType, stock: ModuleType) -> dict[str, str]:
    """Our public names, each with the module that defines it."""
    homes = {}
    for name, value in vars(ours).items():
        if name.startswith("_"):
            continue
        if isinstance(value, ModuleType):
            if hasattr(stock, name) and value is not getattr(stock, name):
                homes[name] = ours.__name__
        elif (getattr(value, "__module__", None) or "").startswith(ours.__name__):
            homes[name] = value.__module__
    return homes


def typed(stock: ModuleType) -> set[str] | None:
    """The names in torch's own stub beside that module; None where there is no stub, so that its source counts."""
    stub = Path(stock.__file__ or "").with_suffix(".pyi")
    if not stub.is_file():
        return None
    names = set()
    for node in ast.parse(stub.read_text()).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(value=ast.List(elts=listed)) | ast.AugAssign(value=ast.List(elts=listed)):  # __all__
                names |= {item.value for item in listed if isinstance(item, ast.Constant)}
    return names


def stub(ours: ModuleType, stock: ModuleType) -> str:
    """The stub's text: torch's names from torch, ours from their homes, Any for what torch itself leaves untyped."""
    homes = own(ours, stock)
    known = typed(stock)
    imports, untyped = [("typing", "Any")], []
    for name in sorted({*homes, *dir(stock)}):
        value = getattr(stock, name, None)
        if name in homes:
            imports.append((homes[name], name))
        elif name.startswith("_"):
            continue
        elif known is None or name in known:
            imports.append((stock.__name__, name))
        elif isinstance(value, type) and getattr(torch, name, None) is value:
            imports.append(("torch", name))
        else:
            untyped.append(name)
    if not untyped:
        imports.remove(("typing", "Any"))
    sections: list[list[str]] = [[], [], []]
    for module, name in sorted(imports, key=_isort):
        section = ("typing", "torch", "fusedact").index(module.partition(".")[0])
        sections[section].append(_import(module, name if section == 0 else f"{name} as {name}"))
    blocks = ["\n".join(section) for section in sections if section]
    blocks += ["\n".join(f"{name}: Any" for name in untyped)] if untyped else []
    return HEADER.format(version=torch.__version__.partition("+")[0]) + "\n" + "\n\n".join(blocks) + "\n"


def _import(module: str, name: str) -> str:
    line = f"from {module} import {name}"
    return line if len(line) <= LINE else f"from {module} import (\n    {name},\n)"


def _isort(item: tuple[str, str]) -> tuple:
    """ruff's order of imports: modules, then constants, classes and the rest, each as one counts."""
    module, name = item
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    digits = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]
    return module, kind, digits


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print("usage: make_nn_stubs.py [--check]", file=sys.stderr)
        return 2
    differing = False
    for path, (ours, stock) in STUBS.items():
        text = stub(ours, stock)
        before = path.read_text() if path.is_file() else ""
        if text == before:
            continue
        differing = True
        if arguments:
            sys.stdout.writelines(
                difflib.unified_diff(before.splitlines(True), text.splitlines(True), path.name, "to be written", n=0)
            )
        else:
            path.write_text(text)
            print("wrote", path.name)
    if differing and arguments:
        print("stubs differ: run python tools/make_nn_stubs.py", file=sys.stderr)
    return int(differing and bool(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
