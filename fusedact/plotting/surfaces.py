"""What a network of two inputs has learned: its output over the plane, and how its cost fell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedact.plotting.style import BLUE, GREEN, GREY, INK, ORANGE, SKY, SMALL, legend, page, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOW, HIGH = -0.5, 1.5  # of both inputs
POINTS = 201  # along each
COLORS = "PuOr"  # from brown at 0 over white at 0.5 to purple at 1
CLASSES = {
    0: {"marker": "s", "color": "#7f3b08", "label": "row of class 0"},
    1: {"marker": "o", "color": "#2d004b", "label": "row of class 1"},
}
HIDDEN = (GREEN, SKY)  # of the units' lines, which are wide: the output's may lie on them
COSTS = ((BLUE, "-"), (ORANGE, (0, (5, 2))))  # a colour and dashes for each network in turn
MANY = 100  # epochs, whose scale is logarithmic
CHANCE = math.log(2)  # the binary cross-entropy of an output of 0.5


@dataclass(frozen=True, eq=False)
class Surface:
    """A network's output over the square from LOW to HIGH, (POINTS, POINTS), rows by the second input.

    rows: (n, 2), its inputs; classes: (n,), 0 or 1; outputs: (n,), its answers there. hidden: (units, 3), the weights
    and bias of each hidden unit, whose line is where they add up to 0. costs: by epoch.
    """

    title: str
    note: str
    square: Tensor
    rows: Tensor
    classes: Tensor
    outputs: Tensor
    hidden: Tensor
    costs: Sequence[float]


@torch.no_grad()
def over_square(model: Callable[[Tensor], Tensor]) -> Tensor:
    """The model's outputs over the square, [i, j] for inputs (ticks[j], ticks[i]), of `ticks()`."""
    second, first = torch.meshgrid(ticks(), ticks(), indexing="ij")
    return model(torch.stack([first, second], -1).view(-1, 2)).view(POINTS, POINTS)


def ticks() -> Tensor:
    """The places along each input, (POINTS,)."""
    return torch.linspace(LOW, HIGH, POINTS)


def decision_surfaces(surfaces: Sequence[Surface], title: str) -> Figure:
    """The surfaces side by side, then the cost of each by epoch."""
    figure = page(4.6, title)
    left, right = figure.subfigures(1, 2, width_ratios=[len(surfaces), 1.1])  # type: ignore[misc]
    squares = left.subplots(1, len(surfaces), squeeze=False).flatten().tolist()
    for axes, surface in zip(squares, surfaces, strict=True):
        image = _draw_square(axes, surface)
    bar = left.colorbar(image, ax=squares, location="bottom", aspect=40, shrink=0.8, label="output")
    bar.ax.axvline(0.5, color=INK, linewidth=1.8)
    legend(left, squares, loc="outside lower center", ncols=3, fontsize=SMALL)
    _draw_costs(right.subplots(), surfaces)
    return figure


def _draw_square(axes: Axes, surface: Surface) -> Any:
    places = ticks().numpy()
    image = axes.imshow(
        surface.square.numpy(), cmap=COLORS, vmin=0, vmax=1, origin="lower", extent=(LOW, HIGH, LOW, HIGH),
        interpolation="bilinear",
    )  # fmt: skip
    for unit, ((w1, w2, b), color) in enumerate(zip(surface.hidden.tolist(), HIDDEN, strict=False), 1):
        if w1 or w2:  # (x1, x2) is the point nearest to 0 of the line w1 x1 + w2 x2 + b = 0
            x1, x2 = (-b * w / (w1 * w1 + w2 * w2) for w in (w1, w2))
            axes.axline((x1, x2), (x1 - w2, x2 + w1), color=color, linewidth=5, label=f"hidden unit {unit} is 0.5")
    if surface.square.min() < 0.5 < surface.square.max():
        axes.contour(places, places, surface.square.numpy(), levels=[0.5], colors=[INK], linewidths=1.8)
    axes.plot([], [], color=INK, linewidth=1.8, label="output is 0.5")
    right = (surface.outputs >= 0.5) == surface.classes.bool()
    for place, kind, output in zip(surface.rows.tolist(), surface.classes.tolist(), surface.outputs, strict=True):
        style = CLASSES[int(kind)]
        axes.plot(*place, markersize=9, markeredgecolor="white", linestyle="", **style)  # type: ignore[arg-type]
        axes.annotate(
            f"{output:.3f}", place, (0, 9), textcoords="offset points", ha="center", fontsize=SMALL,
            bbox={"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip
    for style in CLASSES.values():
        axes.plot([], [], markersize=9, linestyle="", **style)  # type: ignore[arg-type]
    axes.set(xlim=(LOW, HIGH), ylim=(LOW, HIGH), xlabel="first input", xticks=[0, 1], yticks=[0, 1])
    axes.set_title(f"{surface.title}: {right.sum()} of {len(right)} right\n{surface.note}", loc="left", fontsize=SMALL)
    axes.set_ylabel("second input", labelpad=0)
    return image


def _draw_costs(axes: Axes, surfaces: Sequence[Surface]) -> None:
    from matplotlib.ticker import MaxNLocator

    tidy(axes)
    for surface, (color, dashes) in zip(surfaces, COSTS, strict=False):
        epochs = range(1, len(surface.costs) + 1)
        axes.plot(
            epochs, surface.costs, color=color, linestyle=dashes, label=f"{surface.title}: {surface.costs[-1]:.3g}"
        )
    axes.axhline(CHANCE, color=GREY, linewidth=1, linestyle=(0, (1, 1.5)), label="ln 2, of outputs 0.5")
    highest = max(CHANCE, *(max(surface.costs) for surface in surfaces))
    axes.set(xlabel="epoch", ylabel="cost", ylim=(0, 1.05 * highest))
    if max(len(surface.costs) for surface in surfaces) >= MANY:
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Cost, and its last value", loc="left", fontsize=SMALL)
    axes.legend(frameon=False, fontsize=SMALL)
