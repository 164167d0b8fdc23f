"""The report of a model's sites: what was fused and what that saves, what was left and why."""

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fusedact.fusion.columns import GAP, table
from fusedact.fusion.rows import Row, rows
from fusedact.fusion.site import Site


class Passed(NamedTuple):
    """What went through a product layer in one forward: its calls, and the positions of all of them.

    A position is a row of a linear layer, or a pixel of a convolution's output.
    """

    calls: int
    positions: int


def positions(model: nn.Module, inputs: Any) -> dict[str, Passed]:
    """{path: what went through}, of each linear layer and convolution that model(inputs) calls.

    inputs: a tensor, a tuple of arguments or a mapping of keyword arguments. Runs once, in eval mode, without
    gradients; modes are put back and hooks taken away, also when it raises.
    """
    found: dict[str, Passed] = {}

    def counting(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def count(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.numel():
                width = module.out_channels if isinstance(module, _ConvNd) else output.shape[-1]
                calls, rows = found.get(path, (0, 0))
                found[path] = Passed(calls + 1, rows + output.numel() // width)

        return count

    modes = {module: module.training for module in model.modules()}
    named = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if _is_product(module)]
    hooks = [module.register_forward_hook(counting(path)) for path, module in named]
    try:
        model.eval()
        with torch.no_grad():
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _is_product(module: nn.Module) -> bool:
    """A convolution, a linear layer, or what holds a matrix as one does: transformers' Conv1D."""
    if isinstance(module, nn.Linear | _ConvNd):
        return True
    weight = getattr(module, "weight", None)
    matrix = isinstance(weight, nn.Parameter) and weight.dim() == 2
    return matrix and not isinstance(module, nn.Embedding) and not list(module.children())


@dataclass(frozen=True)
class Report:
    """The sites of a model in its order; `print` shows them, those alike in one row.

    passed: what `positions` counted, if it was asked to.
    """

    sites: tuple[Site, ...]
    passed: Mapping[str, Passed] | None = None

    @property
    def fused(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.fused)

    @property
    def left(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if not site.fused)

    @property
    def launches(self) -> tuple[int, int]:
        """Launches fewer than stock in a step, forward and backward; each site is called once, or as was counted."""
        calls = [(site, passed.calls if (passed := self.passed_at(site)) else 1) for site in self.fused]
        return sum(n * site.launches[0] for site, n in calls), sum(n * site.launches[1] for site, n in calls)

    @property
    def bytes(self) -> tuple[int, int] | None:
        """Bytes fewer than stock in a step, forward and backward, of the sites whose positions were counted."""
        counted = [(site, passed) for site in self.fused if site.width and (passed := self.passed_at(site))]
        if not counted:
            return None
        each = [(passed.positions * site.width * site.itemsize, site.moves) for site, passed in counted]
        return sum(size * moves[0] for size, moves in each), sum(size * moves[1] for size, moves in each)

    def measured(self, passed: Mapping[str, Passed]) -> "Report":
        """The same with what `positions` counted."""
        return replace(self, passed=passed)

    def passed_at(self, site: Site) -> Passed | None:
        """What went through a site: through a layer of its own, else through those of its module, where all agree."""
        if self.passed is None:
            return None
        own = [self.passed[part] for part in site.parts if part in self.passed]
        beside = {passed for path, passed in self.passed.items() if path.rpartition(".")[0] == site.module}
        return own[0] if own else beside.pop() if len(beside) == 1 else None

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size((120, 24)).columns)

    def text(self, width: int) -> str:
        """The report in lines of so many characters, where that is possible."""
        return "\n".join(_lines(self, width))


def _lines(report: Report, width: int) -> Iterator[str]:
    if not report.sites:
        yield "No site: no layer has an activation after it, and there is nothing else that one kernel could run."
        return
    yield f"Sites fused: {len(report.fused)} of {len(report.sites)}"
    if report.fused:
        yield from _fused_table(report, width)
        yield ""
        yield from textwrap.wrap(_totals(report), width)
    if report.left:
        yield ""
        yield f"Sites left as they are: {len(report.left)}"
        yield from _left_tables(report, width)


def _fused_table(report: Report, width: int) -> Iterator[str]:
    """With what a step saves where positions were counted, else with what one position saves."""
    fused = rows(report.fused)
    cells = [[row.where, _times(row), row.sites[0].label, _both(row.sites[0].launches)] for row in fused]
    heads = ["where", "", "what", "launches"]
    if report.passed is None:
        heads += ["bytes a position"]
        cells = [[*line, _a_position(row.sites[0])] for line, row in zip(cells, fused, strict=True)]
    else:
        heads += ["positions", "bytes a step"]
        cells = [[*line, *_a_step(report, row)] for line, row in zip(cells, fused, strict=True)]
    return table(heads, cells, (1, *range(3, len(heads))), width)


def _left_tables(report: Report, width: int) -> Iterator[str]:
    """One for each reason, under it."""
    by_reason: dict[str | None, list[Site]] = {}
    for site in report.left:
        by_reason.setdefault(site.reason, []).append(site)
    for reason, sites in by_reason.items():
        yield from textwrap.wrap(f"{len(sites)}: {reason}", width, initial_indent=GAP, subsequent_indent=GAP)
        cells = [[row.where, _times(row), row.sites[0].label] for row in rows(sites)]
        yield from table((), cells, (1,), width, 2 * GAP)


def _a_position(site: Site) -> str:
    size = site.width * site.itemsize
    return _both((size * site.moves[0], size * site.moves[1])) if size else "-"


def _a_step(report: Report, row: Row) -> tuple[str, str]:
    """The positions of each site of the row, and the bytes of all of them; '-' for what was not counted."""
    seen = [passed.positions for site in row.sites if (passed := report.passed_at(site))]
    saved = replace(report, sites=tuple(row.sites)).bytes
    spelled = " to ".join(f"{n:,}" for n in sorted({min(seen), max(seen)})) if seen else "-"
    return spelled, "-" if saved is None else _size(sum(saved))


def _totals(report: Report) -> str:
    saved = report.bytes
    traffic = "" if saved is None else f" and {_size(saved[0])} + {_size(saved[1])} of reads and writes"
    ask = "; report(model, inputs) counts them" if saved is None else ""
    return (
        f"Saved in a step, forward + backward: {_both(report.launches)} launches{traffic}. By formula, in training, "
        "where Triton runs, against torch's operations one after the other. A position is a row of a linear layer, or "
        f"a pixel of a convolution's output{ask}."
    )


def _times(row: Row) -> str:
    return f"{len(row.sites)} x" if len(row.sites) > 1 else ""


def _both(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} + {pair[1]:,}"


def _size(n: int) -> str:
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if n >= size:
            return f"{n / size:,.2f} {unit}"
    return f"{n} B"
