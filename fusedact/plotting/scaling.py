"""Time of a step against how many GPUs share it, with its parts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fusedact.plotting.style import BLUE, GREEN, INK, ORANGE, SKY, SMALL, WIDTH, legend, page, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = (BLUE, SKY, ORANGE, GREEN, "#cc79a7")  # of parts
LEAST = 1e-4  # of the longest: what is shorter is not drawn


class Step(NamedTuple):
    """Of so many GPUs: seconds of the whole, and of each part by its name, hidden behind others or not.

    row, column: the panel, by its titles.
    """

    row: str
    column: str
    gpus: int
    total: float
    parts: dict[str, float]


def scaling(steps: Sequence[Step], title: str, caption: str) -> Figure:
    """Milliseconds against GPUs on logarithmic scales: the whole step black, a part a colour."""
    rows, columns = (list(dict.fromkeys(getattr(step, name) for step in steps)) for name in ("row", "column"))
    names = list(dict.fromkeys(name for step in steps for name in step.parts))
    figure = page(1.1 + 2.7 * len(rows), f"{title}\n\n")
    panels = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    most = 1e3 * max(step.total for step in steps)
    for row, in_row in zip(rows, panels, strict=True):
        for column, axes in zip(columns, in_row, strict=True):
            shown = sorted((step for step in steps if (step.row, step.column) == (row, column)), key=lambda s: s.gpus)
            gpus = [step.gpus for step in shown]
            for name, color in zip(names, COLORS, strict=False):
                heights = [1e3 * step.parts.get(name, 0.0) or float("nan") for step in shown]
                axes.plot(gpus, heights, "o-", color=color, markersize=3.5, linewidth=1.6, label=name)
            axes.plot(gpus, [1e3 * step.total for step in shown], color=INK, linewidth=2.4, label="step", zorder=1.5)
            axes.set(xscale="log", yscale="log", ylim=(LEAST * most, 2 * most))
            axes.set_xticks(gpus, [f"{n:,}" for n in gpus])
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.set_title(f"{column}, {row}", fontsize=10)
            tidy(axes)
            axes.tick_params(labelsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("GPUs", fontsize=SMALL)
    for in_row in panels:
        in_row[0].set_ylabel("ms", fontsize=SMALL)
    below = 1 - 0.27 / figure.get_figheight()
    where = {"loc": "upper left", "bbox_to_anchor": (0, below), "ncols": len(names) + 1, "fontsize": SMALL}
    legend(figure, panels.flat, **where)
    figure.legends[0].set_in_layout(False)
    figure.supxlabel(textwrap.fill(caption, int(15 * WIDTH)), x=0.01, ha="left", fontsize=8, color="#555555")
    return figure
