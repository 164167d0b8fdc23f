"""The activations, each with its derivative, as a gallery and one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.activations import ACTIVATIONS, Activation
from fusedact.plotting.style import BLUE, GREEN, GREY, ORANGE, SMALL, legend, page, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Function = Callable[[Tensor], Tensor]  # float64 (n,) -> (n,)

OVER_ROWS = {"softmax": F.softmax, "softmin": F.softmin, "log_softmax": F.log_softmax}
OTHERS = (0.0, 1.0)  # the logits beside the one that varies
VALUE, DERIVATIVE, BY_SLOPE = "value", "derivative", "derivative by the slope"
LINES = {
    VALUE: {"color": BLUE, "linewidth": 2.2},
    DERIVATIVE: {"color": ORANGE, "linewidth": 1.6, "linestyle": (0, (5, 2))},
    BY_SLOPE: {"color": GREEN, "linewidth": 1.6, "linestyle": (0, (1, 1.5))},
}
DOTS = {VALUE: 6.5, DERIVATIVE: 4.5, BY_SLOPE: 3.0}  # so that all show where they coincide
REACH, MARGIN = 4.0, 1.5  # x goes from -4 to 4, or this far beyond the outermost jump
FARTHEST = 10.0  # that a jump is looked for
STEPS = 1601  # points of a line, closer than its pixels
HALVINGS = 33  # of the distance between two, after which a slope below 1e6 rises by less than JUMP
JUMP = 1e-6
COLUMNS = 4


@dataclass(frozen=True, eq=False)
class Curve:
    """A function's line, float64.

    x, y: (n,), with y NaN in the middle of each jump. jumps: (m,), where they are; sides: (m, 2), the values just
    before and after each; values: (m,), those at it.
    """

    x: Tensor
    y: Tensor
    jumps: Tensor
    sides: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Panel:
    """An activation's lines by what they are: VALUE, DERIVATIVE and, where the slope is learned, BY_SLOPE."""

    name: str
    note: str
    curves: Mapping[str, Curve]


def names() -> list[str]:
    """What `panel` takes: all in the table, registered ones too, and those over a row."""
    return [*ACTIVATIONS, *OVER_ROWS]


def panel(name: str) -> Panel:
    """The activation's lines, by its reference in float64 and autograd. ValueError for an unknown name."""
    if name not in names():
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(names())}")
    functions, note = _over_row(name) if name in OVER_ROWS else _elementwise(ACTIVATIONS[name])
    wide = [trace(function, -FARTHEST, FARTHEST) for function in functions.values()]
    jumps = [place for curve in wide for place in curve.jumps.tolist()]
    low = min([-REACH, *(place - MARGIN for place in jumps)])
    high = max([REACH, *(place + MARGIN for place in jumps)])
    return Panel(name, note, {kind: trace(function, low, high) for kind, function in functions.items()})


def trace(function: Function, low: float, high: float) -> Curve:
    """The function's line from low to high, broken where it jumps.

    Every step between two points is halved towards where most of its rise is. A continuous rise shrinks with the
    step; what is left is a jump.
    """
    x = torch.linspace(low, high, STEPS, dtype=torch.float64)
    left, right = x[:-1], x[1:]
    for _ in range(HALVINGS):
        middle = (left + right) / 2
        y = function(middle)
        in_first = (y - function(left)).abs() >= (function(right) - y).abs()
        left, right = torch.where(in_first, left, middle), torch.where(in_first, middle, right)
    sides = torch.stack([function(left), function(right)], 1)
    found = sides.diff(dim=1).abs().squeeze(1) > JUMP
    left, right, sides = left[found], right[found], sides[found]
    jumps = ((left + right) / 2).round(decimals=9) + 0.0  # not -0
    gaps = torch.full_like(jumps, math.nan)
    xs = torch.cat([x, left, (left + right) / 2, right])
    ys = torch.cat([function(x), sides[:, 0], gaps, sides[:, 1]])
    order = xs.argsort()
    return Curve(xs[order], ys[order], jumps, sides, function(jumps))


def gallery(panels: Sequence[Panel]) -> Figure:
    """All of them on one page, each on axes of its own."""
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = page(0.9 + 2.1 * rows, "Activations and their derivatives")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, one in zip(grid, panels, strict=False):
        _draw(axes, one)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    legend(figure, grid, loc="outside upper right", ncols=4)
    return figure


def single(one: Panel) -> Figure:
    """One alone."""
    figure = page(4.5, "", width=7)
    axes = figure.subplots()
    _draw(axes, one)
    axes.set_xlabel("x")
    legend(figure, [axes], loc="outside upper right", ncols=4)
    return figure


def _elementwise(activation: Activation) -> tuple[dict[str, Function], str]:
    if activation.learned:
        slope = activation.build(dtype=torch.float64).weight.detach()  # type: ignore[union-attr, operator]
        functions = {
            VALUE: lambda x: activation.reference(x, slope),
            BY_SLOPE: lambda x: _derivative(lambda s: activation.reference(x[None], s), slope.expand(len(x))),
        }
        note = f"slope = {slope.item():g}, learned"
    else:
        functions = {VALUE: lambda x: activation.reference(x, *activation.default_values)}
        note = ", ".join(f"{name} = {value:g}" for name, value in activation.defaults)
    value = functions[VALUE]
    return functions | {DERIVATIVE: lambda x: _derivative(value, x)}, note


def _over_row(name: str) -> tuple[dict[str, Function], str]:
    def value(x: Tensor) -> Tensor:
        row = torch.stack([x, *(torch.full_like(x, logit) for logit in OTHERS)], 1)
        return OVER_ROWS[name](row, dim=1)[:, 0]

    note = f"of logit x beside {' and '.join(f'{logit:g}' for logit in OTHERS)}"
    return {VALUE: value, DERIVATIVE: lambda x: _derivative(value, x)}, note


def _derivative(function: Function, x: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(x).sum(), x, materialize_grads=True)
    return slope


def _draw(axes: Axes, one: Panel) -> None:
    """Lines broken at jumps: a full dot on the value at the jump, a hollow one on a side that is not reached."""
    from matplotlib.ticker import MaxNLocator

    tidy(axes)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    kinds = [kind for kind in LINES if kind in one.curves]
    for kind in kinds:
        curve, line = one.curves[kind], LINES[kind]
        axes.plot(curve.x.numpy(), curve.y.numpy(), label=kind, **line)  # type: ignore[arg-type]
    for kind in kinds:
        curve, color, size = one.curves[kind], LINES[kind]["color"], DOTS[kind]
        apart = (curve.sides - curve.values[:, None]).abs() > JUMP
        places = curve.jumps[:, None].expand_as(curve.sides)[apart]
        axes.plot(
            places.numpy(), curve.sides[apart].numpy(), "o", color=color, markerfacecolor="white", markersize=size
        )
        axes.plot(curve.jumps.numpy(), curve.values.numpy(), "o", color=color, markersize=size)
    if any(len(curve.jumps) for curve in one.curves.values()):
        axes.plot([], [], "o", color=GREY, label="at a jump")
    axes.set_title("\n".join(filter(None, (one.name, one.note))), loc="left", fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
