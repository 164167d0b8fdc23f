"""Measurements: speed-up by case, roofline, memory, and accuracy against float64."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise, product
from typing import TYPE_CHECKING, NamedTuple

from fusedact.plotting.style import BLUE, GREEN, GREY, INK, ORANGE, SMALL, WIDTH, page, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that all kinds of sight tell apart, a marker to each and its size; stock's shows where others cover it.
LOOKS = {"fusedact": (BLUE, "o", 4.5), "stock": (GREY, "s", 7.5)}
OTHERS = (
    ("#e69f00", "D", 4.5),
    (GREEN, "^", 5.0),
    ("#cc79a7", "v", 5.0),
    (ORANGE, "P", 5.0),
    ("#56b4e9", "X", 5.0),
    ("#332288", "*", 6.5),
)
ROW = 0.19  # inches of a row
NAMED = 3  # errors
TALL = 30  # rows from which on the scale stands above them too
TICKS = (  # of ratios, from the finest
    (0.9, 0.95, 1, 1.05, 1.1),
    (0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4),
    (0.5, 0.7, 1, 1.4, 2),
    (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64),
    (0.1, 0.3, 1, 3, 10, 30, 100),
    (0.01, 0.1, 1, 10, 100, 1000),
)

# Where a text may begin, in typographic points from its point, the nearest first.
WAYS = [
    (reach * math.cos(turn * math.pi / 8), reach * math.sin(turn * math.pi / 8))
    for reach, turn in product(range(7, 32, 6), (0, 8, 1, 15, 7, 9, 2, 14, 6, 10, 3, 13, 5, 11))
]
Box = tuple[float, float, float, float]  # left, bottom, right, top
Look = tuple[str, str, float]  # colour, marker, its size


class Speedup(NamedTuple):
    """One contender in one phase of a case: stock's time over its own, with 20 and 80 % points.

    noise: of stock against itself, in the run that the contender was timed in.
    """

    group: str
    label: str
    phase: str
    contender: str
    ratio: float
    low: float
    high: float
    noise: float


class Kernel(NamedTuple):
    """One phase of a case: what it moves and computes at least, and what it took."""

    label: str
    phase: str
    bytes: int
    flops: int
    micros: float


class Held(NamedTuple):
    """What one contender holds at the peak of a case, MiB."""

    group: str
    label: str
    contender: str
    mib: float


class Errors(NamedTuple):
    """One result of a case against float64, relative: stock's and ours."""

    label: str
    dtype: str
    stock: float
    ours: float


def speedups(bars: Sequence[Speedup], title: str, caption: str) -> Figure:
    """A dot for each contender, with whiskers from 20 to 80 %: a row a case, a panel a phase.

    Grey is the noise of fusedact's run, or the most where it was not timed.
    """
    phases = list(dict.fromkeys(bar.phase for bar in bars))
    places = _rows((bar.group, bar.label) for bar in bars)
    figure = _titled(1.9 + ROW * (max(places.values()) + 1), title)
    panels = figure.subplots(1, len(phases), sharex=True, sharey=True, squeeze=False)[0]
    looks = _looks(bar.contender for bar in bars)
    low = min([0.95, *(bar.low for bar in bars if bar.low > 0)]) / 1.03
    high = max([1.05, *(bar.high for bar in bars)]) * 1.03
    for axes, phase in zip(panels, phases, strict=True):
        shown = [bar for bar in bars if bar.phase == phase]
        for key, noise in _noises(shown).items():
            place = places[key]
            axes.fill_betweenx((place - 0.4, place + 0.4), 1 / (1 + noise), 1 + noise, color="#d0d0d0", linewidth=0)
        for at, (contender, (color, marker, size)) in enumerate(looks.items()):
            mine = [bar for bar in shown if bar.contender == contender]
            heights = [places[bar.group, bar.label] + (at - (len(looks) - 1) / 2) * 0.7 / len(looks) for bar in mine]
            whiskers = [[bar.ratio - bar.low for bar in mine], [bar.high - bar.ratio for bar in mine]]
            dots = {"fmt": marker, "color": color, "markersize": size, "elinewidth": 1.2}
            axes.errorbar([bar.ratio for bar in mine], heights, xerr=whiskers, **dots)
        axes.axvline(1, color=INK, linewidth=1, zorder=1)
        axes.set(xscale="log", xlim=(low, high))
        axes.set_title(phase, fontsize=10)
        _name_rows(axes, places)
    ticks = _ticks(low, high, least=0.05 * len(phases))
    panels[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panels[0].set_xticks([], minor=True)
    _legend(figure, looks)
    return _captioned(figure, caption)


def _noises(bars: Iterable[Speedup]) -> dict[tuple[str, str], float]:
    """Of each (group, label)."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for bar in bars:
        found.setdefault((bar.group, bar.label), {})[bar.contender] = bar.noise
    return {key: noises.get("fusedact", max(noises.values())) for key, noises in found.items()}


def roofline(kernels: Sequence[Kernel], gbps: float, tflops: Mapping[str, float], title: str, caption: str) -> Figure:
    """FLOP/s against FLOPs a byte on logarithmic scales, under the measured rates of a copy and of products.

    Each case has a number, whose key stands below; each phase a colour.
    """
    from matplotlib.ticker import EngFormatter

    numbers = {label: i for i, label in enumerate(dict.fromkeys(kernel.label for kernel in kernels), 1)}
    columns = 3 if max(map(len, numbers)) < 40 else 2
    lines = -(-len(numbers) // columns)
    figure = _titled(6.7 + 0.15 * lines, title)
    axes, below = figure.subplots(2, 1, height_ratios=(6, 0.15 * lines + 0.1))
    intensities = [kernel.flops / kernel.bytes for kernel in kernels]
    rates = [kernel.flops / kernel.micros * 1e6 for kernel in kernels]
    knee = 1e3 * max(tflops.values()) / gbps  # FLOPs a byte from which on the copy is no limit
    axes.set(xscale="log", yscale="log", xlabel="least FLOPs for each byte moved")
    axes.set_xlim(min(*intensities, knee) / 2, max(*intensities, knee) * 3)
    axes.set_ylim(min(rates) / 2, max(*rates, 1e12 * max(tflops.values())) * 2)
    axes.yaxis.set_major_formatter(EngFormatter(unit="FLOP/s"))
    axes.xaxis.set_major_formatter("{x:g}")
    looks = _looks(kernel.phase for kernel in kernels)
    for phase, (color, marker, size) in looks.items():
        at = [i for i, kernel in enumerate(kernels) if kernel.phase == phase]
        axes.plot([intensities[i] for i in at], [rates[i] for i in at], marker, color=color, markersize=size)
    tidy(axes)
    below.axis("off")
    for label, number in numbers.items():
        column, line = divmod(number - 1, lines)
        below.text(column / columns, 1 - line / lines, f"{number}  {label}", va="top", fontsize=7.5, clip_on=False)
    _ceilings(axes, gbps, tflops)
    _legend(figure, looks)
    _captioned(figure, caption)
    texts = [str(numbers[kernel.label]) for kernel in kernels]
    _place(figure, list(zip(intensities, rates, strict=True)), texts, [looks[kernel.phase][0] for kernel in kernels])
    return figure


def _ceilings(axes: Axes, gbps: float, tflops: Mapping[str, float]) -> None:
    """The copy's line up to the fastest product's, and each product's, named at the right."""
    from matplotlib.ticker import EngFormatter

    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    knee = 1e3 * max(tflops.values()) / gbps
    axes.plot([left, knee], [left * gbps * 1e9, knee * gbps * 1e9], color=INK, linewidth=1.2, zorder=1)
    axes.annotate(
        f"copy, {_figure(gbps)} GB/s", (knee, knee * gbps * 1e9), (-6, 6), textcoords="offset points", ha="right",
        fontsize=SMALL,
    )  # fmt: skip
    flops, height = EngFormatter("FLOP/s", places=0), 0.0
    for name, rate in sorted(tflops.items(), key=lambda each: each[1]):
        axes.plot([1e3 * rate / gbps, right], [rate * 1e12] * 2, color=INK, linewidth=1.2, zorder=1)
        height = max(math.log(rate * 1e12 / bottom) / math.log(top / bottom), height + 0.04)
        text = f"{name}, {flops(rate * 1e12)}"
        axes.text(1.01, height, text, transform=axes.transAxes, va="center", fontsize=SMALL)


def memory(held: Sequence[Held], title: str, caption: str) -> Figure:
    """What each contender holds at its peak on a logarithmic scale: a row a case, what it is in figures beside it."""
    places = _rows((each.group, each.label) for each in held)
    figure = _titled(1.9 + ROW * (max(places.values()) + 1), title)
    axes = figure.subplots()
    looks = _looks(each.contender for each in held)
    positive = [each.mib for each in held if each.mib > 0]
    floor, most = min(positive, default=1) / 2, max(positive, default=1) * 1.5
    for place in {places[each.group, each.label] for each in held}:
        inside = [max(each.mib, floor) for each in held if places[each.group, each.label] == place]
        axes.plot((min(inside), max(inside)), (place, place), color=GREY, linewidth=1, zorder=1)
    for contender, (color, marker, size) in looks.items():
        mine = [each for each in held if each.contender == contender]
        at = [places[each.group, each.label] for each in mine]
        axes.plot(
            [max(each.mib, floor) for each in mine], at, marker, color=color, markersize=size + 1.5, clip_on=False
        )
    axes.set(xscale="log", xlim=(floor, most), xlabel="MiB; 0 stands at the left edge")
    axes.xaxis.set_major_formatter("{x:,g}")
    _name_rows(axes, places)
    two = {(each.group, each.label, each.contender): each.mib for each in held}
    for (group, label), place in places.items():
        if (group, label, "stock") in two and (group, label, "fusedact") in two:
            text = " / ".join(_figure(two[group, label, name]) for name in ("stock", "fusedact"))
            axes.annotate(text, (1, place), (6, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)
    axes.annotate("stock / fusedact", (1, 0), (6, -3), ("axes fraction", "data"), "offset points", fontsize=8)
    _legend(figure, looks)
    return _captioned(figure, caption)


def accuracy(errors: Sequence[Errors], title: str, caption: str) -> Figure:
    """Our error against stock's on logarithmic scales, with the line that the contract draws; the nearest are named.

    NaN is drawn as infinity, at the edge.
    """
    errors = [each._replace(stock=_or_infinite(each.stock), ours=_or_infinite(each.ours)) for each in errors]
    figure = _titled(7, title)
    axes = figure.subplots()
    looks = _looks(each.dtype for each in errors)
    values = [value for each in errors for value in (each.stock, each.ours) if 0 < value < math.inf]
    floor, most = min([*values, 1e-8]) / 3, max([*values, 1e-6]) * 3

    def inside(value: float) -> float:
        return min(max(value, floor), most)

    line = [floor * (most / floor) ** (i / 100) for i in range(101)]
    axes.plot(line, [2 * x + 1e-6 for x in line], color=INK, linewidth=1.2)
    axes.plot(line, line, color=GREY, linewidth=1, linestyle="--")
    for dtype, (color, marker, size) in looks.items():
        mine = [each for each in errors if each.dtype == dtype]
        points = [inside(each.stock) for each in mine], [inside(each.ours) for each in mine]
        axes.plot(*points, marker, color=color, markersize=size, alpha=0.8, clip_on=False)
    axes.set(xscale="log", yscale="log", xlim=(floor, most), ylim=(floor, most))
    axes.set(xlabel="stock's error; 0 stands at the edge", ylabel="fusedact's error")
    tidy(axes)
    axes.annotate("allowed up to 2x + 1e-6", (floor, 1e-6), (6, 6), textcoords="offset points", fontsize=SMALL)
    axes.annotate("as stock", (floor * 4, floor * 4), (8, -4), textcoords="offset points", color=GREY, fontsize=SMALL)
    _legend(figure, looks)
    _captioned(figure, caption)
    by_nearness = sorted(errors, key=_nearness, reverse=True)
    named = [each.label if rank < NAMED else "" for rank, each in enumerate(by_nearness)]
    at = [(inside(each.stock), inside(each.ours)) for each in by_nearness]
    _place(figure, at, named, [INK] * len(named))
    return figure


def _or_infinite(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _nearness(error: Errors) -> float:
    """1 on the line, more beyond it."""
    return math.inf if error.ours == math.inf else error.ours / (2 * error.stock + 1e-6)


def _titled(height: float, title: str) -> Figure:
    """A page with a line free under its title, for the legend."""
    return page(height, f"{title}\n")


def _looks(names: Iterable[str]) -> dict[str, Look]:
    """Stock's and ours are the same in every chart; stock's first, so that others are drawn over it.

    Where others are more than OTHERS, colours come again with the next one's marker.
    """
    found = sorted(dict.fromkeys(names), key=lambda name: name != "stock")
    turns, colors = range(len(OTHERS)), [color for color, _, _ in OTHERS]
    others = cycle((colors[at], *OTHERS[(at + turn) % len(OTHERS)][1:]) for turn, at in product(turns, turns))
    return {name: LOOKS.get(name) or next(others) for name in found}


def _ticks(low: float, high: float, least: float) -> list[float]:
    """Those of TICKS that put most marks on the axis, no two nearer than that share of it; else 1 alone."""
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in TICKS]
    nearest = (high / low) ** least
    return max((t for t in inside if all(b / a >= nearest for a, b in pairwise(t))), key=len, default=[1])


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _rows(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
    """The height of each (group, label), from the top down, a row free above each group for its name."""
    by_group: dict[str, dict[str, None]] = {}
    for group, label in keys:
        by_group.setdefault(group, {})[label] = None
    places, height = {}, 0.0
    for group, labels in by_group.items():
        height += 1
        for label in labels:
            places[group, label] = height
            height += 1
    return places


def _name_rows(axes: Axes, places: Mapping[tuple[str, str], float]) -> None:
    tidy(axes)
    axes.grid(axis="y", visible=False)
    first = {group: place - 1 for (group, _), place in reversed(list(places.items()))}
    heights, names = [*first.values(), *places.values()], [*first, *(f"{label}  " for _, label in places)]
    axes.set_yticks(heights, names, fontsize=8)
    for at, text in enumerate(axes.get_yticklabels()):
        text.set_fontweight("bold" if at < len(first) else "normal")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", top=len(places) > TALL, labeltop=len(places) > TALL)
    axes.set_ylim(max(places.values()) + 0.7, -0.7)


def _legend(figure: Figure, looks: Mapping[str, Look]) -> None:
    """Under the title, on the line that _titled() left free."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=color, marker=marker, markersize=size, linestyle="", label=name)
        for name, (color, marker, size) in looks.items()
    ]
    options = {"ncols": len(handles), "frameon": False, "fontsize": SMALL, "borderpad": 0, "handletextpad": 0}
    below = 1 - 0.27 / figure.get_figheight()
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, below), **options).set_in_layout(False)


def _captioned(figure: Figure, caption: str) -> Figure:
    lines = textwrap.fill(caption, int(15 * WIDTH))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=8, color="#555555")
    return figure


def _place(figure: Figure, points: Sequence[tuple[float, float]], texts: Sequence[str], colors: Sequence[str]) -> None:
    """Each text beside its point, as near as it can be without covering another or a point; without room none."""
    figure.draw_without_rendering()  # lays out, and with that fixes where the points are
    axes = figure.axes[0]
    unit = figure.dpi / 72  # pixels of a typographic point
    pixels = [(x / unit, y / unit) for x, y in axes.transData.transform(points)]
    left, bottom, right, top = (edge / unit for edge in axes.bbox.extents)
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in pixels]

    def free(box: Box) -> bool:
        inside = box[0] >= left and box[1] >= bottom and box[2] <= right and box[3] <= top
        return inside and not any(box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3] for t in taken)

    for point, (x, y), text, color in zip(points, pixels, texts, colors, strict=True):
        width = 4.8 * len(text) + 2
        boxes = {way: (x + way[0] - width * (way[0] < 0), y + way[1] - 4.5) for way in WAYS}
        ways = (way for way, (at, low) in boxes.items() if free((at, low, at + width, low + 9)))
        if not text or (way := next(ways, None)) is None:
            continue
        at, low = boxes[way]
        taken.append((at, low, at + width, low + 9))
        edge = (float(way[0] < 0), 0.5)  # of the text, from which the line goes
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": edge}
        axes.annotate(
            text, point, way, textcoords="offset points", ha="right" if way[0] < 0 else "left", va="center",
            fontsize=7.5, color=INK, arrowprops=line if math.hypot(*way) > 12 else None,
        )  # fmt: skip
