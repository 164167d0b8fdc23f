"""The losses, each with its derivative; which output goes with which; and the course of right and wrong pairings."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.catalogue import TASKS, Comparison, Pairing, Task
from fusedact.plotting.style import BLUE, GREEN, GREY, GRID, INK, ORANGE, SMALL, page, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 1001
OTHER_LOGITS = (0.0, 1.0)  # beside the target's
EDGE = 1e-6  # at 0 and 1 themselves torch's clamp makes BCELoss's derivative 0
SMALLEST = -60.0  # power of ten of the least probability drawn, beyond BCELoss's clamp at exp(-100)
COST = {"linewidth": 2.2}
SLOPE = {"linewidth": 1.6, "linestyle": (0, (5, 2))}
COURSE = (ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00")  # of wrong pairings
COINCIDING = ({"linewidth": 7.0, "color": "#c6dbef"}, {"linewidth": 4.0, "color": "#6baed6"}, {"color": BLUE},
              {"color": INK, "linestyle": (0, (2, 4))})  # fmt: skip


@dataclass(frozen=True)
class Line:
    """cost(x), float64 (n,) -> (n,), and its label."""

    label: str
    color: str
    cost: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Panel:
    """A loss over some span of what it is given; the axis is cut at `top`."""

    title: str
    xlabel: str
    span: tuple[float, float]
    top: float
    lines: tuple[Line, ...]


def _against(loss: Callable[..., Tensor], target: float) -> Callable[[Tensor], Tensor]:
    """The loss of each x alone, all with that target."""
    return lambda x: loss(x, torch.full_like(x, target), reduction="none")


def _class_cost(smoothing: float, x: Tensor) -> Tensor:
    """Cross-entropy of rows (x, *OTHER_LOGITS) at class 0."""
    logits = torch.stack([x, *(torch.full_like(x, other) for other in OTHER_LOGITS)], 1)
    target = torch.zeros(len(x), dtype=torch.int64)
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)


def _likelihood(x: Tensor) -> Tensor:
    """nll_loss of rows of one class."""
    return F.nll_loss(x[:, None], torch.zeros(len(x), dtype=torch.int64), reduction="none")


def _label_cost(label: float, x: Tensor) -> Tensor:
    """MultiLabelSoftMarginLoss of rows (x, *OTHER_LOGITS), whose other labels are 0."""
    logits = torch.stack([x, *(torch.full_like(x, other) for other in OTHER_LOGITS)], 1)
    target = torch.zeros_like(logits)
    target[:, 0] = label
    return F.multilabel_soft_margin_loss(logits, target, reduction="none")


PANELS = (
    Panel(
        "BCELoss", "probability p", (EDGE, 1 - EDGE), 6.0,
        tuple(
            Line(f"t = {t:g}", color, _against(F.binary_cross_entropy, t)) for t, color in ((0.0, BLUE), (1.0, ORANGE))
        ),
    ),
    Panel(
        "BCEWithLogitsLoss", "logit z", (-6.0, 6.0), 6.0,
        tuple(
            Line(f"t = {t:g}", color, _against(F.binary_cross_entropy_with_logits, t))
            for t, color in ((0.0, BLUE), (0.5, GREEN), (1.0, ORANGE))
        ),
    ),
    Panel(
        "CrossEntropyLoss", "logit of the target; the others are 0 and 1", (-6.0, 8.0), 8.0,
        (
            Line("class index", BLUE, partial(_class_cost, 0.0)),
            Line("label_smoothing=0.1", ORANGE, partial(_class_cost, 0.1)),
        ),
    ),
    Panel("NLLLoss", "log-probability of the target", (-6.0, 0.0), 6.5, (Line("any class", BLUE, _likelihood),)),
    Panel(
        "MultiLabelSoftMarginLoss", "one logit; beside it 0 and 1, of label 0", (-6.0, 6.0), 3.5,
        tuple(
            Line(f"label {t:g}", color, partial(_label_cost, t)) for t, color in ((0.0, BLUE), (1.0, ORANGE))
        ),
    ),
)  # fmt: skip


def curve(cost: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """cost(x) and its derivative by x, (n,) each, by autograd."""
    x = x.detach().requires_grad_()
    y = cost(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def figures() -> dict[str, Figure]:
    """Each loss with its derivative, and the table of pairings, by file name."""
    return {"losses": gallery(), "losses-pairings": table(TASKS)}


def gallery() -> Figure:
    """A panel for each loss, and one for BCELoss where its logarithm is clamped."""
    figure = page(7.2, "The losses (solid) and their derivatives (dashed)")
    *axes, last = figure.subplots(2, 3).flat
    for at, panel in zip(axes, PANELS, strict=True):
        _draw(at, panel)
    _draw_clamp(last)
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    x = torch.linspace(*panel.span, POINTS, dtype=torch.float64)
    lowest = 0.0
    for line in panel.lines:
        y, slope = curve(line.cost, x)
        axes.plot(x, y, color=line.color, label=line.label, **COST)  # type: ignore[arg-type]
        axes.plot(x, slope, color=line.color, **SLOPE)  # type: ignore[arg-type]
        lowest = min(lowest, slope.min().item())
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    axes.set_ylim(max(1.1 * lowest, -panel.top) - 0.1, panel.top)
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel(panel.xlabel, fontsize=SMALL)
    axes.legend(frameon=False, fontsize=SMALL, loc="upper center")
    tidy(axes)


def _draw_clamp(axes: Axes) -> None:
    """BCELoss of t = 1 where p is tiny: the cost ends at 100, the derivative at 1e12."""
    p = torch.logspace(SMALLEST, math.log10(1 - EDGE), POINTS, dtype=torch.float64)
    cost, slope = curve(_against(F.binary_cross_entropy, 1.0), p)
    axes.plot(p, cost, color=ORANGE, label="cost", **COST)  # type: ignore[arg-type]
    axes.set(xscale="log", ylim=(0, 110), xticks=[1e-60, 1e-40, 1e-20, 1])
    axes.set_title("BCELoss, t = 1, where p is tiny", loc="left", fontsize=10)
    axes.set_xlabel("probability p", fontsize=SMALL)
    axes.set_ylabel("cost, at most 100", fontsize=SMALL)
    tidy(axes)
    slopes = axes.twinx()
    slopes.plot(p, -slope, color=ORANGE, **SLOPE)  # type: ignore[arg-type]
    slopes.set(yscale="log", ylim=(1e-1, 1e14))
    slopes.set_ylabel("-derivative, at most 1e12", fontsize=SMALL)
    slopes.tick_params(labelsize=SMALL)
    slopes.spines["top"].set_visible(False)


HEADS = ("", "output", "loss", "targets", "launches", "")
PLACES = (0.0, 0.11, 0.21, 0.44, 0.58, 0.67)  # of the columns, of the width


def table(tasks: Sequence[Task]) -> Figure:
    """The right pairings of each task: output, loss, targets, launches to the cost and back, and why."""
    rows = [(task, pairing) for task in tasks for pairing in task.pairings if pairing.right]
    figure = page(0.42 * (len(rows) + 3), "Which output goes with which loss")
    axes = figure.add_subplot(xlim=(0, 1), ylim=(len(rows) + 1.4, -0.8))
    axes.set_axis_off()
    write = partial(axes.text, va="center", fontsize=SMALL, color=INK)
    for place, head in zip(PLACES, HEADS, strict=True):
        write(place, -0.4, head, weight="bold")
    for y, (task, pairing) in enumerate(rows):
        starts = pairing is task.pairings[0]
        axes.axhline(y, color=GREY if starts else GRID, linewidth=1.0)
        for place, text in zip(PLACES, _cells(task, pairing, starts), strict=True):
            write(place, y + 0.5, text, weight="bold" if place == 0 else "normal")
    axes.axhline(len(rows), color=GREY, linewidth=1.0)
    note = (
        "Launches of fusedact's kernels from the logits to the cost, and back. After a Linear in a Sequential, Sigmoid "
        "is in the layer's own launch;\nfuse(model, loss) makes LogSoftmax + NLLLoss one cross-entropy in training, "
        "and joins a Linear before them to it."
    )
    write(0, len(rows) + 0.8, note, color=GREY)
    return figure


def _cells(task: Task, pairing: Pairing, starts: bool) -> tuple[str, ...]:
    launches = " + ".join(map(str, pairing.launches or ()))
    why = textwrap.fill(pairing.why, 46)
    return task.name * starts, pairing.output or "logits", pairing.loss, pairing.targets or task.targets, launches, why


def pairings(compared: Sequence[Comparison]) -> Figure:
    """By step, -log of the probability that each pairing gives to what was true, and the share of rows right.

    Both are of held-out rows; grey is what the chances reach that drew the labels.
    """
    from matplotlib.ticker import LogLocator

    figure = page(
        8.6, "Right pairings (blue, on each other), wrong ones, and the true chances (grey), on held-out rows"
    )
    axes = figure.subplots(2, len(compared), sharex=True, squeeze=False)
    for comparison, losses, shares in zip(compared, *axes, strict=True):
        wrong, right = iter(COURSE), iter(COINCIDING)
        for outcome in comparison.outcomes:
            if not outcome.looks:
                continue
            style = next(right) if outcome.pairing.right else {"color": next(wrong)}
            steps = [look.step for look in outcome.looks]
            losses.plot(steps, [look.log_loss for look in outcome.looks], label=outcome.pairing.name, **style)
            shares.plot(steps, [look.accuracy for look in outcome.looks], **style)
        for panel, best in ((losses, comparison.best_log_loss), (shares, comparison.best_accuracy)):
            panel.axhline(best, color=GREY, linewidth=1.0)
            tidy(panel)
        losses.set_yscale("log", subs=[])
        losses.yaxis.set_major_locator(LogLocator(subs=(1, 2, 4, 6)))
        losses.yaxis.set_major_formatter("{x:g}")
        losses.set_title(comparison.task.name, loc="left", fontsize=10)
        shares.yaxis.set_major_formatter("{x:.0%}")
        shares.set_xlabel("step", fontsize=SMALL)
        losses.legend(frameon=False, fontsize=SMALL, loc="lower left", bbox_to_anchor=(-0.15, 1.1))
    axes[0][0].set_ylabel("-log p of what was true", fontsize=SMALL)
    axes[1][0].set_ylabel("rows right", fontsize=SMALL)
    figure.align_ylabels(axes[:, 0])
    return figure
