"""Digits with what a model says of them, and its confusion matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedact.plotting.style import BLUE, GREY, INK, ORANGE, SMALL, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

CLASSES = 10
WRONG_ROWS = 2
SPREAD = 0.4  # power of a share that gives its colour: a hundredth shows beside the diagonal


def confidence(logits: Tensor) -> Tensor:
    """log(p / (1 - p)) of each row's prediction, (n,), which tells apart those whose p rounds to 1."""
    first, *_ = logits.topk(1)
    others = logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)
    return first.squeeze(1) - others.logsumexp(1)


def confusion(labels: Tensor, predictions: Tensor) -> Tensor:
    """How often each digit (row) was taken for each (column), int64 (CLASSES, CLASSES)."""
    return torch.bincount(labels * CLASSES + predictions, minlength=CLASSES**2).view(CLASSES, CLASSES)


def digits(images: Tensor, labels: Tensor, logits: Tensor, title: str, source: str) -> Figure:
    """The first right one of each digit, then those that the model got wrong most confidently.

    images: (n, 28, 28); labels: (n,); logits: (n, CLASSES), the model's.
    """
    predictions, sure = logits.argmax(1), confidence(logits.double())
    right = predictions == labels
    first = [int(found[0]) for digit in range(CLASSES) if len(found := (right & (labels == digit)).nonzero())]
    wrong = (~right).nonzero().squeeze(1)
    wrong = wrong[sure[wrong].argsort(descending=True)][: WRONG_ROWS * CLASSES]

    figure = page(4.7, title)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, WRONG_ROWS + 0.3])  # type: ignore[misc]
    top.suptitle("Right, the first of each digit", x=0.01, ha="left", fontsize=10, color=BLUE)
    bottom.suptitle("Wrong, the most confident first", x=0.01, ha="left", fontsize=10, color=ORANGE)
    for axes, at in zip(_tiles(top, 1), first, strict=False):
        _draw_digit(axes, images[at], f"{labels[at]}")
    for axes, at in zip(_tiles(bottom, WRONG_ROWS), wrong.tolist(), strict=False):
        _draw_digit(axes, images[at], f"said {predictions[at]}, is {labels[at]}\n{_percent(sure[at].sigmoid().item())}")
    figure.supxlabel(source, x=0.01, ha="left", fontsize=SMALL, color=GREY)
    return figure


def confusion_matrix(counts: Tensor, title: str, source: str) -> Figure:
    """The counts, coloured by their share of the row. counts: (CLASSES, CLASSES), from `confusion`."""
    from matplotlib.colors import PowerNorm

    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    figure = page(6.6, title, width=8)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(SPREAD, 0, 1), aspect="auto")
    for row in range(CLASSES):
        for column in range(CLASSES):
            count, share = int(counts[row, column]), shares[row, column].item()
            color = "white" if share > 0.25 else INK if count else GREY
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=10)
    right = shares.diag().tolist()
    axes.set_xticks(range(CLASSES), map(str, range(CLASSES)))
    axes.set_yticks(range(CLASSES), [f"{digit}   ({share:.0%} right)" for digit, share in enumerate(right)])
    axes.set(xlabel="prediction", ylabel="digit")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, label="share of the digit's images", ticks=[0, 0.01, 0.1, 0.5, 1], fraction=0.045)
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    figure.supxlabel(source, x=0.01, ha="left", fontsize=SMALL, color=GREY)
    return figure


def _tiles(figure: FigureBase, rows: int) -> list[Axes]:
    """Axes in reading order, empty until something is drawn."""
    tiles = list(figure.subplots(rows, CLASSES).flat)
    for axes in tiles:
        axes.set_axis_off()
    return tiles


def _draw_digit(axes: Axes, image: Tensor, says: str) -> None:
    axes.imshow(image.numpy(), cmap="gray_r")
    axes.set_title(says, fontsize=SMALL)


def _percent(share: float) -> str:
    """Never 100% of what is less than all."""
    return "over 99.9%" if share > 0.999 else f"{share:.1%}"
