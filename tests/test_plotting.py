"""Training curves: what is drawn, at which scale, and that all runs show."""

import math

import pytest

from fusedact.plotting import png, sweep, training_curves

FALLING = [100 / 2**i for i in range(15)]


def test_all_runs_show_where_they_coincide():
    names = ["tutorial", "stock", "fused", "fit"]
    axes = training_curves(dict.fromkeys(names, FALLING), "mnist-mlp").axes[0]
    assert all(list(line.get_ydata()) == FALLING for line in axes.lines)
    assert list(axes.lines[0].get_xdata()) == list(range(1, 16))
    widths = [line.get_linewidth() for line in axes.lines]
    assert widths == sorted(widths, reverse=True) and len(set(widths)) == 4
    assert axes.lines[-1].is_dashed()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"{name}: 0.006104" for name in names]
    assert (axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()) == ("mnist-mlp", "epoch", "cost")


@pytest.mark.filterwarnings("error")
def test_names_are_written_as_they_are():
    names = ["$x_$", "_hidden", r"\frac{1}", "a$b$c"]
    figure = training_curves({name: [1.0] for name in names}, "xor")
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")
    legend = figure.axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [f"{name}: 1" for name in names]
    assert not any(text.get_parse_math() for text in legend.get_texts())
    colors = [line.get_color() for line in figure.axes[0].lines]
    assert [line.get_color() for line in legend.get_lines()] == colors and len(set(colors)) == 4


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ([1.0, 2.0, 0.25], "0.25"),
        ([1.0, math.nan, 0.5], "0.5"),
        ([1.0, math.nan, 2.0, math.inf, math.nan], "not finite from epoch 4"),
        ([math.nan, math.nan], "not finite from epoch 1"),
        ([1.0] * 1500 + [math.inf], "not finite from epoch 1,501"),
        ([math.inf, -math.inf] * 300, "not finite from epoch 1"),
    ],
)
def test_a_cost_that_is_not_finite_is_told(costs, said):
    """And the epochs without a point have their room."""
    figure = training_curves({"fit": costs}, "xor")
    figure.draw_without_rendering()
    [axes] = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [f"fit: {said}"]
    low, high = axes.get_xlim()
    assert 1 - 0.06 * len(costs) < low < 1 and len(costs) < high < 1.06 * len(costs) + 1


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


def test_sweep_shows_shares_by_epoch_and_each_last_cost():
    costs = [[0.3, 0.0, 0.3], [0.1, math.nan, math.inf]]
    figure = sweep([0.01, 3.0], [1, 10, 100], [[0.0, 0.0, 1 / 3], [0.0, 0.5, 2 / 3]], costs, "xor")
    learned, ended = figure.axes
    assert [list(line.get_ydata()) for line in learned.lines] == [[0.0, 0.0, 1 / 3], [0.0, 0.5, 2 / 3]]
    assert [text.get_text() for text in learned.get_legend().get_texts()] == ["0.01", "3"]
    assert learned.get_xscale() == "log" and learned.get_title("left") == "xor"
    assert [list(points.get_ydata()) for points in ended.lines] == [[0.0, 0.3, 0.3], [0.1]]
    assert len(set(ended.lines[0].get_xdata())) == 3
    assert [label.get_text() for label in ended.get_xticklabels()] == ["0.01\n33%", "3\n67%"]
    for share, last in zip(learned.lines, ended.lines, strict=True):
        assert list(share.get_color()) == list(last.get_color())
    assert png(figure).startswith(b"\x89PNG\r\n\x1a\n")
