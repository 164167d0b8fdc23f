"""The report of a model's sites: what was fused and what that saves, what was left and why."""

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedact.fusion.columns import GAP, table
from fusedact.fusion.inputs import arguments, evaluating
from fusedact.fusion.nodes import is_product
from fusedact.fusion.rows import Row, rows
from fusedact.fusion.site import Site
from fusedact.fusion.tracing import CONVOLUTIONS


class Passed(NamedTuple):
    """What went through a product layer in one forward: its calls, and the positions of all of them.

    A position is a row of a linear layer, or a pixel of a convolution's output. layer: its first path.
    """

    calls: float
    positions: float
    layer: str


def positions(model: nn.Module, inputs: Any) -> dict[str, Passed]:
    """{path: what went through}, of each linear layer and convolution of the model as model(inputs) calls it, or not.

    inputs: a tensor, a tuple of arguments or a mapping of keyword arguments. Runs once, in eval mode, without
    gradients; modes are put back and hooks taken away, also when it raises.
    """
    args, kwargs = arguments(inputs)
    found = {module: Passed(0, 0, path) for path, module in model.named_modules() if is_product(module)}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        calls, passed, path = found[module]
        if isinstance(output, Tensor) and output.numel():
            width = module.out_channels if isinstance(module, CONVOLUTIONS) else output.shape[-1]
            found[module] = Passed(calls + 1, passed + output.numel() // width, path)

    hooks = [module.register_forward_hook(count) for module in found]
    try:
        with evaluating(model), torch.no_grad():
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: found[module] for path, module in model.named_modules(remove_duplicate=False) if module in found}


@dataclass(frozen=True)
class Report:
    """The sites of a model in its order; `print` shows them, those alike in one row.

    passed: what went through each layer for one of the sites that name it, if that was counted.
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
        forward, backward = (sum(n * site.launches[at] for site, n in calls) for at in (0, 1))
        return round(forward), round(backward)

    @property
    def bytes(self) -> tuple[int, int] | None:
        """Bytes fewer than stock in a step, forward and backward, of the sites whose positions were counted."""
        counted = [(site, passed) for site in self.fused if site.width and (passed := self.passed_at(site))]
        if not counted:
            return None
        each = [(passed.positions * site.width * site.itemsize, site.moves) for site, passed in counted]
        forward, backward = (sum(size * moves[at] for size, moves in each) for at in (0, 1))
        return round(forward), round(backward)

    def measured(self, passed: Mapping[str, Passed]) -> "Report":
        """The same with what `positions` counted; where a layer stands in several places, each has an equal share."""
        places = Counter(passed[part].layer for site in self.sites for part in site.parts if part in passed)
        shares: dict[str, Passed] = {}
        for path, (calls, seen, layer) in passed.items():
            among = places[layer] or 1
            shares[path] = Passed(calls / among, seen / among, layer)
        return replace(self, passed=shares)

    def passed_at(self, site: Site) -> Passed | None:
        """What went through a site: through a layer of its own, or, if it has none, its module's, where all agree."""
        if self.passed is None or site.kind == "loss":
            return None
        own = [self.passed[part] for part in site.parts if part in self.passed]
        beside = [passed for path, passed in self.passed.items() if path.rpartition(".")[0] == site.module]
        agree = len({passed[:2] for passed in beside}) == 1
        return own[0] if own else beside[0] if agree else None

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
    """With what the sites of a row save in a step where positions were counted, else with what each of them saves."""
    fused = rows(report.fused)
    heads = ["where", "", "what"]
    if report.passed is None:
        heads += ["launches each", "bytes a position"]
        saved = [_each(row.sites[0]) for row in fused]
    else:
        heads += ["positions", "launches", "bytes a step"]
        saved = [_a_step(report, row) for row in fused]
    cells = [[row.where, _times(row), row.sites[0].label, *more] for row, more in zip(fused, saved, strict=True)]
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


def _each(site: Site) -> tuple[str, ...]:
    size = site.width * site.itemsize
    return _both(site.launches), _both((size * site.moves[0], size * site.moves[1])) if size else "-"


def _a_step(report: Report, row: Row) -> tuple[str, ...]:
    """Positions, launches and bytes of all sites of the row; '-' for what was not counted."""
    seen = [passed.positions for site in row.sites if (passed := report.passed_at(site))]
    saved = replace(report, sites=tuple(row.sites))
    spelled = f"{round(sum(seen)):,}" if seen else "-"
    return spelled, _both(saved.launches), "-" if saved.bytes is None else _size(sum(saved.bytes))


def _totals(report: Report) -> str:
    saved = report.bytes
    traffic = "" if saved is None else f" and {_size(saved[0])} + {_size(saved[1])} of reads and writes"
    ask = "; report(model, inputs) counts them" if report.passed is None else ""
    return (
        f"Saved in a step, forward + backward: {_both(report.launches)} launches{traffic}. By formula, in training, "
        "where Triton runs, against torch's operations one after the other; an activation of several operations counts "
        "as one, a linear layer's product as our own kernel's (where the library's is faster, the forward saves "
        f"nothing). A position is a row of a linear layer, or a pixel of a convolution's output{ask}."
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
