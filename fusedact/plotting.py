"""Pictures. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = (  # the second lies on the first where they coincide, and both show
    {"color": "#fdae61", "linewidth": 4.5, "markersize": 8},
    {"color": "#2c5aa0", "linewidth": 1.6, "markersize": 4, "linestyle": (0, (4, 2))},
)
MOST_POINTS = 250  # more, and the noise from epoch to epoch hides the curve


def training_curves(costs: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Cost by epoch of one or two runs: for each name, its cost after epochs 1, 2, ...

    Many epochs are drawn as the means of equally many each. The scale is logarithmic where the costs are
    positive and span more than a factor of 10.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = max(map(len, costs.values()))
    size = math.ceil(epochs / MOST_POINTS)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="cost", xlabel="epoch" if size == 1 else f"epoch (means of {size})")
    axes.set_title(title, loc="left")
    for (name, values), line in zip(costs.items(), LINES, strict=False):
        means = [fmean(values[i : i + size]) for i in range(0, len(values), size)]
        ends = [min(i + size, len(values)) for i in range(0, len(values), size)]
        marker = "o" if epochs <= 30 else ""
        axes.plot(ends, means, label=f"{name}: {values[-1]:.4g}", marker=marker, **line)  # type: ignore[arg-type]
    finite = [value for values in costs.values() for value in values if math.isfinite(value)]
    if finite and 0 < 10 * min(finite) < max(finite):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False, title="cost at the end")
    return figure


def png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
