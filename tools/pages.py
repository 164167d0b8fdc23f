"""What mkdocs puts into the pages of docs/ as it builds them, so that no name and no figure of these is typed.

A line `<!-- made: WHAT ARGUMENTS -->` of a page becomes what the function of that name in MAKERS returns.
"""

import ast
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from typer.testing import CliRunner

import fusedact.functional
import fusedact.nn
from fusedact.cli import app
from fusedact.distributed.scaling import WAYS as SHARINGS
from fusedact.distributed.scaling import head_step
from fusedact.tuning.candidates import RATES

ROOT = Path(__file__).parents[1]
CODE = ROOT / "bench" / "results" / "codegen.json"
QUOTED = re.compile(r"(`[^`]*`|^ {4}.*$)", re.MULTILINE)
ITEM = re.compile(r"^(?=(\w+)(?:, \w+)*: )", re.MULTILINE)
MADE = re.compile(r"^<!-- made: (\S+)(.*?) -->$", re.MULTILINE)
H200 = RATES["sm_90"]
TORCH = {"nn": (fusedact.nn, torch.nn), "functional": (fusedact.functional, torch.nn.functional)}
AN_ACTIVATION = "an activation, fused into the layer before it"


def on_page_markdown(markdown: str, **page: Any) -> str:
    """mkdocs calls this for each page."""
    return expanded(markdown)


def expanded(markdown: str) -> str:
    return MADE.sub(lambda made: MAKERS[made[1]](*made[2].split()), markdown)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Names


def own(module: ModuleType) -> dict[str, Any]:
    """The public functions and classes of ours that a module defines or, where it is a package, offers."""
    home = module.__name__.partition(".")[0] if hasattr(module, "__path__") else module.__name__
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and (value.__module__ == home or value.__module__.startswith(f"{home}."))
    }


def api(name: str, level: str = "2") -> str:
    """A reference of each of a module's names, under the name by which a user has it and a heading of that level."""
    values = {each: value for each, value in own(importlib.import_module(name)).items() if inspect.getdoc(value)}
    return "\n".join(_reference(name, each, values[each], int(level)) for each in sorted(values, key=str.lower))


def _reference(module: str, name: str, value: Any, level: int) -> str:
    """By mkdocstrings, which reads sources; here, where what it is was made from torch's or the table's."""
    if _is_written(value):
        options = f"      heading: {module}.{name}\n      heading_level: {level}\n"
        return f"::: {value.__module__}.{value.__qualname__}\n    options:\n{options}"
    stock = next((each for ours, each in TORCH.values() if ours.__name__ == module and hasattr(each, name)), None)
    said = f"Arguments, result and documentation are `{stock.__name__}.{name}`'s." if stock else inspect.getdoc(value)
    return f"{'#' * level} {module}.{name}\n\n```python\n{name}{inspect.signature(value)}\n```\n\n{said}\n"


def _is_written(value: Any) -> bool:
    """Whether its name and its docstring stand in the text of its module."""
    text = ast.parse(inspect.getsource(importlib.import_module(value.__module__)))
    written = {
        node.name for node in text.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
    }
    return value.__qualname__ in written


def api_of_package(name: str) -> str:
    """The same of each of a package's modules, under the module's docstring."""
    modules = (each.name for each in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."))
    return "\n".join(_module_reference(each) for each in modules)


def _module_reference(name: str) -> str:
    said = as_markdown(inspect.getdoc(importlib.import_module(name)) or "")
    return f"## {name}\n\n{said}\n\n{api(name, '3')}"


def as_markdown(docstring: str, names: Collection[str] = ()) -> str:
    """Plain text, with shapes such as (*, N) in it: no asterisk outside of code is emphasis.

    A line that says what one of these names is begins a list's item.
    """
    parts = QUOTED.split(docstring)
    parts[::2] = [part.replace("*", r"\*") for part in parts[::2]]
    return ITEM.sub(lambda item: "\n- " if item[1] in names else "", "".join(parts))


def migration(which: str) -> str:
    """Each name of ours beside torch's: what it does, and the arguments that torch's lacks."""
    ours, stock = TORCH[which]
    rows = []
    for name, value in sorted(own(ours).items(), key=lambda each: each[0].lower()):
        there = getattr(stock, name, None)
        said = _first_sentence(value) if there is None or _is_written(value) else AN_ACTIVATION
        known = _arguments(there) if there else ()
        beyond = ", ".join(f"`{argument}`" for argument in _arguments(value) if argument not in known)
        rows.append((f"`{name}`" if there else "", f"`{name}`", said, beyond if there else "all are its own"))
    others = sum(not name.startswith("_") and name not in own(ours) for name in dir(stock))
    return (
        table((stock.__name__, ours.__name__, "what ours is", "arguments beyond those that torch documents"), rows)
        + f"\n\nThe {others} other public names of `{stock.__name__}` are torch's own objects."
    )


def _arguments(value: Any) -> list[str]:
    """Of a builtin, which has no signature, by the first line of its documentation."""
    try:
        return list(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        first = (inspect.getdoc(value) or "").partition("->")[0]
        return re.findall(r"[(,]\s*\*?,?\s*(\w+)", first)


def _first_sentence(value: Any) -> str:
    first, *_ = re.split(r"(?<=\.)\s", inspect.getdoc(value) or "")
    return " ".join(first.split()).rstrip(".").replace("|", "\\|").replace("*", "\\*")


def commands() -> str:
    """What each command says of itself, a group's own ones after it."""
    runner = CliRunner(env={"COLUMNS": "110", "TERM": "dumb", "NO_COLOR": "1"})
    return "\n\n".join(_said(runner, name) for name in command_names(app))


def command_names(of: typer.Typer, before: str = "") -> Iterator[str]:
    """Of commands and groups, as they are called."""
    for command in of.registered_commands:
        yield f"{before}{command.name or command.callback.__name__}"
    for group in of.registered_groups:
        yield f"{before}{group.name}"
        yield from command_names(group.typer_instance, f"{before}{group.name} ")


def _said(runner: CliRunner, name: str) -> str:
    said = runner.invoke(app, [*name.split(), "--help"], prog_name="fusedact").output
    lines = "\n".join(line.rstrip() for line in said.splitlines())
    return f"## fusedact {name}\n\n```text\n{lines.strip()}\n```"


# Figures


def machine_code(*launchers: str) -> str:
    """Of each launcher and each case that the report compiles: what one program takes of each chip, and the floor."""
    record = json.loads(CODE.read_text())
    reports = [each for each in record["reports"] if each["launcher"] in launchers and " tile=" not in each["case"]]
    chips = list(dict.fromkeys(each["chip"] for each in record["reports"]))
    cases: dict[str, dict[str, dict]] = {}
    for each in reports:
        cases.setdefault(each["case"], {})[each["chip"]] = each
    rows = [
        (f"`{case}`", *(_taken(on.get(chip)) for chip in chips), _floor(next(iter(on.values()))))
        for case, on in cases.items()
    ]
    return (
        f"Compiled by Triton {record['triton']}, run by nobody: record `bench/results/codegen.json`, by\n"
        "`python -m bench.codegen`. Registers a thread, shared memory in KB, spills where there are any, the matrix\n"
        "instruction; the floor is that of the least bytes at the H200's copy rate or of the FLOPs at its rate, by\n"
        "whichever is longer.\n\n" + table(("case", *chips, "floor on an H200, µs"), rows)
    )


def _taken(report: dict | None) -> str:
    if report is None:
        return ""
    if report["error"]:
        return "does not compile"
    parts = [str(report["registers"]), f"{report['shared_memory'] / 1024:.0f} KB"]
    parts += [f"**{report['spills']} bytes spilled**"] if report["spills"] else []
    return ", ".join([*parts, *report["matrix"]])


def _floor(report: dict) -> str:
    by_bytes = report["bytes"] / H200.copy
    floor, by = report["floor_us"], "bytes" if report["floor_us"] <= round(by_bytes * 1e6, 3) else "FLOPs"
    return f"{floor:,.0f}, {by}" if floor >= 100 else f"{floor:.3g}, {by}" if floor else "under 0.001"


SHAPES = (  # M, N, K of a linear layer
    (4096, 1024, 1024),
    (4096, 4096, 4096),
    (8192, 8192, 8192),
    (16384, 16384, 16384),
    (65536, 4096, 64),
    (65536, 256, 64),
)
PRODUCTS = {"bf16": (2, H200.half), "fp32": (4, H200.single), "tf32x3": (4, H200.tf32 / 3)}  # bytes, FLOPs a second
WAYS = (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "tf32x3"))  # stock's product, ours


def limits() -> str:
    """The most that fusing an activation into a linear layer saves, by bytes and FLOPs on an H200.

    Forward, stock's activation reads and writes the product's result. Backward, its derivative reads two such tensors
    and writes one, and the bias reads one, beside two products: the same ratio.
    """
    rows = []
    for shape in SHAPES:
        for stock, ours in WAYS:
            product, passes = seconds(shape, stock), 2 * a_pass(shape, stock)
            least = seconds(shape, ours)
            figures = (f"{product * 1e6:,.1f}", f"{passes * 1e6:,.1f}", f"{least * 1e6:,.1f}")
            way = stock if stock == ours else f"{stock}, ours by {ours}"
            rows.append((" x ".join(f"{n:,}" for n in shape), way, *figures, f"{(product + passes) / least:.3f}"))
    return table(("M x N x K", "dtype", "stock's product, µs", "its activation, µs", "ours, µs", "at most"), rows)


def seconds(shape: tuple[int, int, int], way: str) -> float:
    """Of a layer's product: of its FLOPs or, where these take longer, of its bytes."""
    (M, N, K), (itemsize, rate) = shape, PRODUCTS[way]
    return max(2 * M * N * K / rate, (M * K + N * K + M * N) * itemsize / H200.copy)


def a_pass(shape: tuple[int, int, int], way: str) -> float:
    """Of reading or writing its result."""
    M, N, _ = shape
    return M * N * PRODUCTS[way][0] / H200.copy


SCALED = {"hidden": 4096, "classes": 128256}  # the head of docs/scale.md
TOKENS = 4096  # of a GPU
GPUS = (8, 64, 1024)


def scale(which: str) -> str:
    """The head's step by fusedact.distributed.scaling: its ways at each number of GPUs; or rows of a chunk."""
    return {"ways": _ways, "chunks": _chunks}[which]()


def _ways() -> str:
    rows = []
    for gpus in GPUS:
        for way in SHARINGS:
            cost = head_step(TOKENS * gpus, gpus=gpus, way=way, **SCALED)
            hidden = head_step(TOKENS * gpus, gpus=gpus, way=way, behind=1.0, **SCALED)
            parts = (cost.products, cost.passes, cost.exchange, cost.inputs, cost.weights)
            rows.append(
                (
                    *(f"{gpus:,}", way, f"{cost.chunk_rows:,}", f"{cost.sent / 1e9:,.2f}", *map(_ms, parts)),
                    *(f"**{_ms(cost.total)}**", _ms(hidden.total)),
                    f"{sum(cost.memory) / 2**30:,.1f}",
                )
            )
    sums = ("sum of dx", "sum of dW", "step, ms", "dW hidden", "GiB")
    return table(("GPUs", "way", "rows of a chunk", "sent, GB", "products", "passes", "exchange", *sums), rows)


def _chunks() -> str:
    rows = []
    for gpus in GPUS:
        ruled = head_step(TOKENS * gpus, gpus=gpus, way="sharded", **SCALED).chunk_rows
        for count in (ruled // 8 << doubled for doubled in range(5)):
            cost = head_step(TOKENS * gpus, gpus=gpus, way="sharded", chunk_rows=count, **SCALED)
            taken = (cost.exchange / cost.chunks, cost.products / cost.chunks / 3)
            alive = (cost.memory.logits, cost.memory.sums)
            shown = f"**{count:,}**" if count == ruled else f"{count:,}"
            figures = (*(f"{1e6 * each:,.0f}" for each in taken), *(f"{each / 2**20:,.0f}" for each in alive))
            rows.append((f"{gpus:,}", shown, *figures, _ms(cost.total)))
    heads = ("rows", "exchange of a chunk, µs", "product of the next, µs", "logits alive, MiB", "sums, MiB", "step, ms")
    return table(("GPUs", *heads), rows)


def _ms(seconds: float) -> str:
    """Milliseconds, to three digits where there are as many."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}" if seconds >= 1e-5 else "0"


CHARTS = {
    "speedup": "Stock's time over each contender's, by op",
    "trainers": "Stock's time over each contender's, by trainer",
    "roofline": "Each op on the roofline",
    "accuracy": "Our errors against stock's",
    "memory": "What losses hold at their peak, by way of taking them",
}


def charts(device: str, *names: str) -> str:
    """Of a device those that its records have been drawn to."""
    there = [name for name in names if (ROOT / "docs" / "images" / f"{device}-{name}.png").is_file()]
    return "\n\n".join(f"![{CHARTS[name]}](images/{device}-{name}.png)" for name in there)


MAKERS: dict[str, Callable[..., str]] = {
    "api": api,
    "api-of-package": api_of_package,
    "migration": migration,
    "commands": commands,
    "machine-code": machine_code,
    "limits": limits,
    "scale": scale,
    "charts": charts,
}
