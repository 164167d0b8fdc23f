"""Costs by epoch: of a few runs, and of a sweep of many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fusedact.plotting.style import tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = (  # each lies on those before it where they coincide, and all show
    {"color": "#d9d9d9", "linewidth": 8.0, "markersize": 12},
    {"color": "#fdae61", "linewidth": 4.5, "markersize": 8},
    {"color": "#2c5aa0", "linewidth": 1.8, "markersize": 5},
    {"color": "#b2182b", "linewidth": 1.2, "markersize": 3, "linestyle": (0, (4, 4))},
)
GOLDEN = (math.sqrt(5) - 1) / 2  # whose multiples spread evenly over 0 to 1, however many
MOST_POINTS = 250  # more, and the noise from epoch to epoch hides the curve


def training_curves(costs: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Cost by epoch of up to four runs: for each name, its cost after epochs 1, 2, ...

    Many epochs are drawn as the means of equally many each. The scale is logarithmic where the costs are
    positive and span more than a factor of 10. Names are written as they are, whatever matplotlib makes of `$` or `_`.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = max(map(len, costs.values()))
    size = math.ceil(epochs / MOST_POINTS)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="cost", xlabel="epoch" if size == 1 else f"epoch (means of {size})")
    axes.set_title(title, loc="left")
    lines = LINES if len(costs) > 1 else LINES[2:]
    for values, line in zip(costs.values(), lines, strict=False):
        means = [sum(some) / len(some) for some in (values[i : i + size] for i in range(0, len(values), size))]
        ends = [min(i + size, len(values)) for i in range(0, len(values), size)]
        marker = "o" if epochs <= 30 else ""
        axes.plot(ends, means, marker=marker, **line)  # type: ignore[arg-type]
    finite = [value for values in costs.values() for value in values if math.isfinite(value)]
    if finite and 0 < 10 * min(finite) < max(finite):
        axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    margin = 0.05 * max(epochs - 1, 1)
    axes.set_xlim(1 - margin, epochs + margin)
    tidy(axes)
    legend = axes.legend(axes.lines, ["-"] * len(axes.lines), frameon=False, title="cost at the end")
    for text, (name, values) in zip(legend.get_texts(), costs.items(), strict=False):
        text.set(text=f"{name}: {_end(values)}", parse_math=False)
    return figure


def _end(costs: Sequence[float]) -> str:
    """The last cost, or the epoch from which on none is finite."""
    if math.isfinite(costs[-1]):
        return f"{costs[-1]:.4g}"
    last = max((epoch for epoch, cost in enumerate(costs, 1) if math.isfinite(cost)), default=0)
    return f"not finite from epoch {last + 1:,}"


def sweep(
    lrs: Sequence[float],
    epochs: Sequence[int],
    shares: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    title: str,
) -> Figure:
    """What became of many networks at each learning rate: the share solved by epoch, and where each one's cost ended.

    shares: for each learning rate, of its networks after each of the epochs. costs: for each, every network's last.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    learned, ended = figure.subplots(1, 2)
    learned.set(xlabel="epoch", ylabel="share solved", xscale="log", ylim=(0, 1))
    learned.set_title(title, loc="left")
    ended.set(xlabel="learning rate, share solved at the end", ylabel="cost of the last epoch")
    colors = colormaps["viridis"].resampled(len(lrs) + 1).colors  # type: ignore[attr-defined]
    for at, (lr, share, last, color) in enumerate(zip(lrs, shares, costs, colors, strict=False)):
        learned.plot(epochs, share, color=color, label=f"{lr:g}")
        finite = sorted(filter(math.isfinite, last))
        places = [at + 0.8 * (rank * GOLDEN % 1 - 0.5) for rank in range(len(finite))]  # equal costs stand apart
        ended.plot(places, finite, ".", color=color, markersize=3, alpha=0.5, clip_on=False)
    ended.set_xticks(range(len(lrs)), [f"{lr:g}\n{share[-1]:.0%}" for lr, share in zip(lrs, shares, strict=True)])
    ended.set_ylim(bottom=0)
    for axes in (learned, ended):
        tidy(axes)
    learned.xaxis.set_major_formatter("{x:,.0f}")
    learned.legend(frameon=False, title="learning rate", loc="upper left")
    return figure
