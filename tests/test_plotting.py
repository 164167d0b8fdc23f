"""Training curves: what is drawn, at which scale, and that both runs show."""

import math

import pytest

from fusedact.plotting import png, training_curves

FALLING = [100 / 2**i for i in range(15)]


def test_both_runs_show_where_they_coincide():
    axes = training_curves({"stock": FALLING, "fused": FALLING}, "mnist-mlp").axes[0]
    stock, fused = axes.lines
    assert list(stock.get_ydata()) == list(fused.get_ydata()) == FALLING
    assert list(stock.get_xdata()) == list(range(1, 16))
    assert stock.get_linewidth() > fused.get_linewidth()
    assert fused.is_dashed() and not stock.is_dashed()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "stock: 0.006104",
        "fused: 0.006104",
    ]
    assert (axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()) == ("mnist-mlp", "epoch", "cost")


@pytest.mark.parametrize(
    ("costs", "scale"),
    [
        (FALLING, "log"),
        ([13.7, 13.6], "linear"),
        ([1.0, 0.0], "linear"),
        ([100.0, 1.0, math.nan], "log"),
        ([math.inf, 1.0], "linear"),
        ([math.nan], "linear"),
        ([0.5], "linear"),
    ],
)
def test_scale_follows_the_range(costs, scale):
    figure = training_curves({"fused": costs}, "xor")
    assert figure.axes[0].get_yscale() == scale
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")


def test_many_epochs_are_means():
    axes = training_curves({"stock": [1.0, 3.0] * 5000}, "binary").axes[0]
    [line] = axes.lines
    assert list(line.get_xdata()) == list(range(40, 10_001, 40))
    assert set(line.get_ydata()) == {2.0}
    assert axes.get_xlabel() == "epoch (means of 40)"
