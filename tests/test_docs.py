"""The pages of docs/ and the README: names, links, programs, kernels and figures are the project's own."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

import fusedact
from fusedact.cli import app
from tools import pages

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
RECORDED = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", re.DOTALL)
RUN = re.compile(r"^<!-- run -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
RATIO = re.compile(r"\d(?:\.\d+)?x\b|times (?:as )?fast|times faster|% faster|\d-fold", re.IGNORECASE)
GIVEN = """
import fusedact, torch

x, target = torch.randn(100, 784), torch.randint(10, (100,))
weight, bias = torch.randn(256, 784), torch.randn(256)
"""


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_text = pytest.mark.parametrize("path", TEXTS, ids=name_of)


def anchors(path: Path) -> set[str]:
    """As mkdocs and GitHub name headings, those of ASCII words at least."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@each_text
def test_links_lead_somewhere(path):
    for link in LINK.findall(FENCED.sub("", path.read_text())):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_file(), f"{link}: no such file"
        assert not anchor or anchor in anchors(there), f"{link}: no such heading"
        assert path.parent == ROOT or DOCS in there.parents, f"{link}: outside of the built pages"


def test_every_page_is_in_the_menu_once():
    menu = re.findall(r"^\s+- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(menu) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def reexported(package: str) -> set[str]:
    """The names of ours that a package lists, `from ... import name as name`, by its source."""
    nodes = ast.parse((ROOT / "fusedact" / package / "__init__.py").read_text()).body
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusedact")]
    modules = {"nn", "functional"}
    return {alias.name for node in froms for alias in node.names if alias.asname == alias.name} - modules


@pytest.mark.parametrize("package", ["", "nn", "functional", "fusion", "fitting"])
def test_every_name_of_ours_is_in_its_reference(package):
    page = pages.expanded((DOCS / "api" / f"{package or 'fusedact'}.md").read_text())
    home = ".".join(filter(None, ("fusedact", package)))
    shown = set(re.findall(rf"^(?:## |      heading: ){home}\.(\w+)$", page, re.MULTILINE))
    assert shown == {name for name in reexported(package) if callable(getattr(sys.modules[home], name))}
    assert len(shown) > 3 or package == "fusion"


@pytest.mark.parametrize("which", pages.TORCH)
def test_every_name_of_ours_is_in_the_migration_table(which):
    table = pages.migration(which)
    assert {line.split("|")[2].strip(" `") for line in table.splitlines() if "` |" in line} == reexported(which)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_what_is_made_is_made(path):
    """A marker that nobody knows would stay in the page, unseen."""
    text = path.read_text()
    assert text.count("<!-- made:") == len(pages.MADE.findall(text))
    assert {what for what, _ in pages.MADE.findall(text)} <= set(pages.MAKERS)


def test_the_command_line_is_told_whole():
    """Every command has its help in the reference, and every command that a text names exists."""
    known = set(pages.command_names(app))
    assert known >= {"train", "compare", "fuse", "tune", "info", "plot curves"}
    told = pages.commands()
    assert set(re.findall(r"^## fusedact (.*)$", told, re.MULTILINE)) == known
    assert told.count("Usage: fusedact") == len(known)
    named = {each for path in TEXTS for each in re.findall(r"(?:^|`)fusedact ([a-z]\w*)", path.read_text(), re.M)}
    assert named <= known


def test_every_make_target_that_a_text_names_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {each for path in TEXTS for each in re.findall(r"(?:^|`)make ([a-z][\w-]*)", path.read_text(), re.M)}
    assert {"demo", "test", "docs", "bench"} <= named <= targets


# Programs


@pytest.mark.parametrize("path", [path for path in TEXTS if RUN.search(path.read_text())], ids=name_of)
def test_programs_run(path, tmp_path, monkeypatch, capsys):
    """As a file, since Triton reads the source of its functions; an activation's own kernels are asked for."""
    file = tmp_path / "program.py"
    given = GIVEN if path.name == "README.md" else ""
    file.write_text(given + "\n".join(RUN.findall(path.read_text())))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location("program", file))
    monkeypatch.setitem(sys.modules, "program", module)
    monkeypatch.setattr("fusedact.activations.ACTIVATIONS", dict(fusedact.activations.ACTIVATIONS))
    monkeypatch.setattr("fusedact.activations._BY_MODULE", dict(fusedact.activations._BY_MODULE))
    with fusedact.use_backend("triton" if path.stem == "activation" else "auto"):
        module.__spec__.loader.exec_module(module)


def test_programs_are_there():
    assert {path.stem for path in TEXTS if RUN.search(path.read_text())} >= {"README", "start", "activation"}


# Kernels


def sources(page: Path) -> set[str]:
    [said] = re.findall(r"^Source: (.*?)\n\n", page.read_text(), re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`(kernels/\w+\.py)`", said))


def test_every_kernel_has_a_page():
    entry = {
        name_of(path)
        for path in (ROOT / "kernels").glob("*.py")
        if re.search(r"^@triton\.jit.*\ndef _\w*kernel\(", path.read_text(), re.MULTILINE)
    }
    told = set().union(*(sources(page) for page in DOCS.glob("kernels/*.md") if page.stem != "index"))
    assert entry and entry <= told
    assert all((ROOT / name).is_file() for name in told)
    index = (DOCS / "kernels" / "index.md").read_text()
    assert {page.name for page in DOCS.glob("kernels/*.md")} - {"index.md"} == set(re.findall(r"\((\w+\.md)\)", index))


def test_every_launcher_of_the_machine_code_report_has_its_page():
    made = [made for page in PAGES for made in pages.MADE.findall(page.read_text())]
    told = " ".join(names for what, names in made if what == "machine-code").split()
    launchers = re.findall(r'"launcher": "(\w+)"', pages.CODE.read_text())
    assert sorted(told) == sorted(set(launchers))


def test_a_table_of_machine_code_has_what_the_record_has():
    table = pages.machine_code("linear_forward")
    assert "HGMMA" in table and "v_mfma" in table and "spilled" not in table


# Figures


@each_text
def test_no_ratio_is_typed_by_hand(path):
    """Ratios come from records, between markers, or are made when the pages are built."""
    text = RECORDED.sub("", FENCED.sub("", path.read_text()))
    assert RATIO.findall(text) == []


@pytest.mark.parametrize("n", [4096, 8192])
def test_what_the_readme_says_of_large_layers_is_the_arithmetic(n):
    """Bytes of two passes over (n, n) in bfloat16 at 4.3 TB/s, FLOPs at 790 TFLOP/s."""
    gain = (2 * n * n * 2 / 4.3e12) / (2 * n**3 / 790e12)
    row = next(line for line in pages.limits().splitlines() if line.startswith(f"| {n:,} x {n:,} x {n:,} | bf16 |"))
    assert f"{1 + gain:.3f}" == row.split("|")[-2].strip()
    assert f"{100 * gain:.2g} %" in (ROOT / "README.md").read_text()


def test_a_docstring_is_plain_text():
    said = "x (*, K) -> `(*, N)`.\nx, y: rows.\nothers: none of these names.\n\n    code * code"
    expected = "x (\\*, K) -> `(*, N)`.\n\n- x, y: rows.\nothers: none of these names.\n\n    code * code"
    assert pages.as_markdown(said, {"x"}) == expected
