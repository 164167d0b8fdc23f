"""Mutation testing: breaks the package's source in one place at a time, and tells which breaks no test notices.

`make mutants` takes a random sample of cosmic-ray's mutants of the files in mutants.toml, each in proportion to
its places, and runs on a copy of the tree with the mutant in it those of that file's own fast tests that reach it. Cut,
it goes on where it was. `--write` puts the table into docs/proofs.md; mutants.toml says why a survivor may live.

A place is drawn, then one of its mutants: else an addition, of which there are eleven, would count eleven times. Left
out is what changes no behaviour: annotations, overloads, a cache's decorator on a function with a result. A test
run that exceeds its limit has noticed. The exit status is 1 where fewer than LEAST were run, fewer than SHARE of these
killed, or one survives without a reason.
"""

import argparse
import ast
import compileall
import difflib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import Any

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # before the imports

import hypothesis  # noqa: F401  these are imported once, before the forks
import pytest
import torch  # noqa: F401
import triton  # noqa: F401
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from mutants_told import TESTS, Mutant, shortfalls, shown, write
from rich.progress import MofNCompleteColumn, Progress

sys.dont_write_bytecode = True
ROOT = Path(__file__).parents[1]
SAMPLE, SEED = 210, 2
PYTEST = "-x -q --import-mode=importlib -p no:cacheprovider -p no:xdist -p no:randomly -m 'not exhaustive'"
LIMIT_CPU_S, LIMIT_S = 60, 600  # of a mutant's tests, which take a few seconds; ten times that of a file's, traced


def annotations(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield node.returns
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield node.annotation


def caches(tree: ast.Module) -> Iterator[ast.expr]:
    """Decorators that keep results. Without one that has no result, a warning is given twice: that shows."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.unparse(node.returns or node) != "None":
            yield from (d for d in node.decorator_list if "cache" in ast.unparse(d))


def overloads(tree: ast.Module) -> Iterator[ast.stmt]:
    """Signatures for a type checker, which Python replaces at once."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "overload" for d in node.decorator_list):
            yield from (node, *node.decorator_list)  # a function's own place begins at its `def`


def spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where a change of the source changes no behaviour."""
    tree = ast.parse(source)
    left_out = [*annotations(tree), *caches(tree), *overloads(tree)]
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in left_out]


def drawn(seed: int, total: int) -> list[Any]:
    """The sample, as cosmic-ray's work items; each file's share in proportion to its places."""
    places: dict[str, dict[Any, list[Any]]] = {file: defaultdict(list) for file in TESTS}
    for file, by_place in places.items():
        inert = spans((ROOT / file).read_text())
        for item in _all_work_items([Path(file)], {}):
            start, end = item.mutations[0].start_pos, item.mutations[0].end_pos
            if not any(first <= start <= last or first <= end <= last for first, last in inert):
                by_place[start, end].append(item)
    every = sum(map(len, places.values()))
    sample = []
    for file, by_place in places.items():
        draw, source = random.Random(f"{seed} {file}"), (ROOT / file).read_text()
        count = max(2, round(total * len(by_place) / every))
        shuffled = draw.sample(sorted(by_place), len(by_place))
        items = (draw.choice(by_place[place]) for place in shuffled)
        sample += itertools.islice((item for item in items if is_python(mutated(item.mutations[0], source))), count)
    return sample


def is_python(code: str) -> bool:
    """cosmic-ray takes a signature's bare `*` for a product."""
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def mutated(mutation: Any, source: str) -> str:
    operator = get_operator(mutation.operator_name)(**mutation.operator_args)
    code = mutate_code(source, operator, mutation.occurrence)
    assert code is not None, mutation
    return code


def changed(file: str, source: str, code: str) -> Mutant:
    """Its first line that differs, since a mutant seldom differs in more."""
    lines = [*difflib.unified_diff(source.splitlines(), code.splitlines(), n=0)][2:]
    before, after = ([line[1:].strip() for line in lines if line[0] == sign and line[1:].strip()] for sign in "-+")
    return Mutant(file, (before or [""])[0], (after or [""])[0])


# Running


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of what git tracks or would, compiled, so that only a mutant is compiled again."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).splitlines()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        root = Path(folder).resolve()
        for name in filter(lambda name: os.path.lexists(ROOT / name), names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name, follow_symlinks=False)
        for package in ("fusedact", "kernels"):
            compileall.compile_dir(root / package, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
        yield root


class Reached:
    """A pytest plugin: which tests reach each line of a file, "" being its import; and what each test takes."""

    def __init__(self, file: Path) -> None:
        self.lines: defaultdict[int, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()
        self.test = ""
        self.is_it = functools.cache(lambda name: os.path.realpath(name) == str(file))
        sys.settrace(self.entered)
        threading.settrace(self.entered)

    def entered(self, frame: Any, event: str, argument: object) -> Any:
        return self.line if self.is_it(frame.f_code.co_filename) else None

    def line(self, frame: Any, event: str, argument: object) -> Any:
        self.lines[frame.f_lineno].add(self.test)
        return self.line

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.test, started = item.nodeid, time.process_time()
        result = yield
        self.seconds[self.test], self.test = time.process_time() - started, ""
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_unconfigure(self) -> None:
        sys.settrace(None)
        lines = {line: sorted(tests - self.failed) for line, tests in self.lines.items()}
        seconds = {test: taken for test, taken in self.seconds.items() if test not in self.failed}
        Path("reached.json").write_text(json.dumps({"lines": lines, "seconds": seconds, "failed": sorted(self.failed)}))


class Chosen:
    """A pytest plugin: these tests alone, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: n for n, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def _child(root: Path, arguments: str, plugin: Callable[[], object], times: int) -> None:
    """In a process of its own, which has torch and Triton already, and not yet the package."""
    os.setsid()
    os.chdir(root)
    out = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)
    resource.setrlimit(resource.RLIMIT_CPU, (times * LIMIT_CPU_S, times * LIMIT_CPU_S))
    status = pytest.main(shlex.split(f"{PYTEST} {arguments}"), plugins=[plugin()])
    package = sys.modules.get("fusedact")
    sys.stdout.flush()
    os._exit(99 if package and not Path(str(package.__file__)).is_relative_to(root) else status)


def tested(root: Path, arguments: str, plugin: Callable[[], object], times: int = 1) -> int | None:
    """pytest's status, None past a limit."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(root, arguments, plugin, times))
    process.start()
    process.join(times * LIMIT_S)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return None
    return None if process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL) else process.exitcode


@functools.cache
def digest(root: Path) -> str:
    """Of the package and of all tests: what a test reaches may depend on each. Asked before there is a mutant."""
    paths = (path for room in ("fusedact", "kernels", "tests") for path in sorted((root / room).rglob("*.py")))
    texts = (str(path.relative_to(root)).encode() + path.read_bytes() for path in paths)
    return hashlib.sha256(b"".join(texts)).hexdigest()


@functools.cache
def passes(root: Path, file: str, kept: Path) -> None:
    """Ends here unless the tests that are to notice pass on the source as it is, chosen and run as for a mutant."""
    tests = sorted(reached(root, file, kept)["seconds"])
    if tested(root, TESTS[file], lambda: Chosen(tests), times=10) != 0:
        sys.exit(f"the tests of {file} fail without a mutant:\n{(root / 'log').read_text()[-3000:]}")


def reached(root: Path, file: str, kept: Path) -> dict[str, Any]:
    """What Reached tells of the file's tests, but for those that fail on the source as it is; kept while they stay."""
    path = kept / f"{hashlib.sha256(f'{file} {TESTS[file]} {digest(root)}'.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        status = tested(root, f"{TESTS[file]} --maxfail=1000", lambda: Reached(root / file), times=10)
        if status not in (0, 1):
            sys.exit(f"the tests of {file} do not run:\n{(root / 'log').read_text()[-3000:]}")
        path.write_text((root / "reached.json").read_text())
        for test in json.loads(path.read_text())["failed"]:
            print(f"left out, since it fails on the source itself: {test}", file=sys.stderr)
    return json.loads(path.read_text())


def statement(source: str, line: int) -> range:
    """The lines of the innermost statement there, of a compound one up to its body."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)) and not isinstance(node, ast.match_case):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            body = getattr(node, "body", None)
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
            spans += [range(first, last + 1)] if first <= line <= last else []
    return min(spans, key=len, default=range(line, line + 1))


def tests_of(known: dict[str, Any], source: str, line: int) -> list[str]:
    """Those that reach the statement, the cheapest first; all where the import does."""
    found: set[str] = set()
    for n in statement(source, line):
        found.update(known["lines"].get(str(n), ()))
    seconds = known["seconds"]
    return sorted(seconds if "" in found else found, key=lambda test: (seconds[test], test))


def judged(item: Any, root: Path, kept: Path) -> Mutant:
    """The mutant, put into the copy for a run of its tests."""
    mutation = item.mutations[0]
    file = str(mutation.module_path)
    passes(root, file, kept)
    source = (root / file).read_text()
    code = mutated(mutation, source)
    mutant = changed(file, source, code)
    tests = tests_of(reached(root, file, kept), source, mutation.start_pos[0])
    if not tests:
        return mutant._replace(outcome="survived")
    (root / file).write_text(code)
    try:
        status = tested(root, TESTS[file], lambda: Chosen(tests))
    finally:
        (root / file).write_text(source)
    if status in (5, 99):
        sys.exit(f"no tests ran for {file}:\n{(root / 'log').read_text()[-3000:]}")
    return mutant._replace(outcome="timeout" if status is None else "survived" if status == 0 else "killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--total", type=int, default=SAMPLE)
    parser.add_argument("--only", default="", help="a part of the names of the files to be run now")
    parser.add_argument("--again", action="store_true", help="runs those that survived once more")
    parser.add_argument("--write", action="store_true", help="puts what is known into docs/proofs.md, runs nothing")
    options = parser.parse_args()
    kept = ROOT / "runs/mutants"
    kept.mkdir(parents=True, exist_ok=True)
    sources = b"".join((ROOT / file).read_bytes() for file in TESTS)
    sample = hashlib.sha256(sources + f"{options.seed} {options.total}".encode()).hexdigest()
    session = kept / f"session-{sample[:16]}.json"  # another source is another sample
    results = json.loads(session.read_text()) if session.exists() else {}
    items = drawn(options.seed, options.total)
    if not options.write:
        with copied() as root, Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            bar = progress.add_task("mutants", total=len(items))
            for item in items:
                progress.advance(bar)
                key = name_of(item)
                late = key not in results or (options.again and results[key][-1] == "survived")
                if late and options.only in key:
                    results[key] = judged(item, root, kept)
                    session.write_text(json.dumps(results))
                    if results[key].outcome == "survived":
                        progress.print(*results[key][:3], sep="\n  ", markup=False)
    mutants = [Mutant(*results[name_of(item)]) for item in items if name_of(item) in results]
    shown(mutants)
    if options.write:
        write(mutants, options.seed)
    short = shortfalls(mutants)
    for line in short:
        print(line, file=sys.stderr)
    return int(bool(short))


def name_of(item: Any) -> str:
    mutation = item.mutations[0]
    return f"{mutation.module_path} {mutation.operator_name} {mutation.occurrence}"


if __name__ == "__main__":
    sys.exit(main())
