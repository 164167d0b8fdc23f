"""How pictures look: colours that every eye tells apart, few lines, sizes that are legible at a README's width."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

BLUE, ORANGE, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"  # Okabe and Ito's, for every kind of sight
INK, GREY, GRID = "#222222", "#8c8c8c", "#e6e6e6"
WIDTH = 10.0  # inches; a README shows them at 88 pixels each, 10 points as 12 pixels
SMALL = 9.0  # points; nothing is written smaller


def page(height: float, title: str, width: float = WIDTH) -> Figure:
    """An empty figure with its title, whose parts keep clear of each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure


def tidy(axes: Axes) -> None:
    """No frame above and to the right, a pale grid under the lines, small numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(labelsize=SMALL)


def legend(figure: FigureBase, parts: Iterable[Axes], **where: Any) -> None:
    """One for all the axes: each label that stands in any of them, once."""
    handles = {label: handle for axes in parts for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, **where)  # type: ignore[arg-type]
