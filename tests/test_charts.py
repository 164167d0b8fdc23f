"""Charts of measurements: every number stands where it belongs, every name is legible, nothing is clipped."""

import math

import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.text import Text

from fusedact.plotting.charts import Errors, Held, Kernel, Speedup, accuracy, memory, roofline, speedups

LONG = "16384x4096x128256 bfloat16 chunks of 2048"
CAPTION = "A machine with a long name, 2 cores, 1 thread, torch 2.13.0, 2026-11-22, commit abcdef0. " * 4
BARS = [
    Speedup("linear_act", "relu 64x1x3 float32", "forward", "fusedact", 1.02, 0.97, 1.05, 0.03),
    Speedup("linear_act", "relu 64x1x3 float32", "forward", "compile", 0.4, 0.3, 0.5, 0.03),
    Speedup("linear_act", "relu 64x1x3 float32", "both", "fusedact", 1.9, 1.8, 2.0, 0.01),
    Speedup("linear_cross_entropy", LONG, "both", "fusedact", 12.0, 11.0, 13.0, 0.01),
]
KERNELS = [
    Kernel(f"cross_entropy {i}x32000 bfloat16", phase, 10**6, 10**6 * 2**i, 100.0 + phase_at)
    for i in range(12)
    for phase_at, phase in enumerate(("forward", "backward", "both"))
]
HELD = [
    Held("losses", LONG, "stock", 3006.0),
    Held("losses", LONG, "fusedact", 1002.0),
    Held("losses", LONG, "Liger", 0.0),
    Held("softmax", "4096x10 float32", "stock", 0.25),
    Held("softmax", "4096x10 float32", "fusedact", 0.25),
]
ERRORS = [
    Errors("linear_act near", "float32", 1e-6, 2.9e-6),
    Errors("linear_act equal", "float32", 3e-7, 3e-7),
    Errors("cross_entropy exact", "bfloat16", 0.0, 0.0),
    Errors("cross_entropy beyond", "bfloat16", 1e-3, 9e-3),
    Errors("softmax none", "float32", 1e-7, math.inf),
]


CEILINGS = {"fp32": 0.05, "tf32": 0.0501, "bf16": 0.02}
CHARTS = {
    "speedups": lambda: speedups(BARS, "Ops: right of 1 is faster", CAPTION),
    "roofline": lambda: roofline(KERNELS, 10.0, CEILINGS, "nearer is better", CAPTION),
    "memory": lambda: memory(HELD, "left is less", CAPTION),
    "accuracy": lambda: accuracy(ERRORS, "below is within", CAPTION),
}


def dots(axes, color=None):
    """What an axes shows as markers: (x, y) each."""
    lines = [line for line in axes.lines if line.get_marker() not in ("None", "", "|", None)]
    return [xy for line in lines if color in (None, line.get_color()) for xy in line.get_xydata().tolist()]


@pytest.mark.parametrize("name", CHARTS)
def test_nothing_is_clipped_and_the_caption_stands(name):
    figure = CHARTS[name]()
    figure.draw_without_rendering()
    drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 >= -0.01 and drawn.y0 >= -0.01
    assert drawn.x1 <= page.width + 0.01 and drawn.y1 <= page.height + 0.01
    assert " ".join(figure.get_supxlabel().split()) == CAPTION.strip()
    title, legend = figure._suptitle.get_window_extent(), figure.legends[0].get_window_extent()
    assert legend.y1 <= (title.y0 + title.y1) / 2  # on the title's second, empty line
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_speedups_are_dots_with_whiskers_by_phase():
    figure = CHARTS["speedups"]()
    forward, both = figure.axes
    assert [forward.get_title(), both.get_title()] == ["forward", "both"]
    assert sorted(x for x, _ in dots(forward)) == [0.4, 1.02]
    assert sorted(x for x, _ in dots(both)) == [1.9, 12.0]
    whiskers = [each for each in both.collections if isinstance(each, LineCollection)]
    spans = [segment[:, 0].tolist() for each in whiskers for segment in each.get_segments()]
    assert sorted(spans) == [pytest.approx([1.8, 2.0]), pytest.approx([11.0, 13.0])]
    names = [text.get_text().strip() for text in forward.get_yticklabels()]
    assert set(names) == {"linear_act", "linear_cross_entropy", "relu 64x1x3 float32", LONG}
    assert forward.get_xscale() == "log" and any(list(line.get_xdata()) == [1, 1] for line in forward.lines)
    low, high = both.get_xlim()
    assert low <= 0.3 and high >= 13
    assert 1 in both.get_xticks() and len(both.get_xticks()) >= 3
    assert len({text.get_text() for text in figure.legends[0].get_texts()}) == 2


def bands(axes):
    """What is grey behind a row's dots: (place, from, to)."""
    areas = [each for each in axes.collections if isinstance(each, PolyCollection)]
    corners = [each.get_paths()[0].vertices for each in areas]
    return [((y.min() + y.max()) / 2, x.min(), x.max()) for x, y in (each.T for each in corners)]


def test_the_noise_of_fusedacts_run_is_grey():
    bars = [
        Speedup("op", "both timed", "both", "fusedact", 1.0, 1.0, 1.0, 0.25),
        Speedup("op", "both timed", "both", "Liger", 1.0, 1.0, 1.0, 0.02),
        Speedup("op", "others alone", "both", "Liger", 1.0, 1.0, 1.0, 0.5),
        Speedup("op", "others alone", "both", "attorch", 1.0, 1.0, 1.0, 0.02),
    ]
    [axes] = speedups(bars, "", CAPTION).axes
    assert bands(axes) == [pytest.approx((1, 0.8, 1.25)), pytest.approx((2, 1 / 1.5, 1.5))]
    forward, _ = CHARTS["speedups"]().axes
    assert bands(forward) == [pytest.approx((1, 1 / 1.03, 1.03))]


def test_many_contenders_look_each_their_own():
    bars = [Speedup("op", "a case", "both", f"other {i}", 1.0, 1.0, 1.0, 0.0) for i in range(14)]
    looks = {(each.get_color(), each.get_marker()) for each in speedups(bars, "", CAPTION).legends[0].legend_handles}
    assert len(looks) == 14


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.1), (1e-9, 1e9)], ids=["0", "far"])
def test_whiskers_that_leave_the_scale_are_drawn(low, high):
    bars = [Speedup("op", "a case", phase, "fusedact", 1.05, low, high, 0.0) for phase in ("forward", "both", "step")]
    figure = speedups(bars, "", CAPTION)
    figure.draw_without_rendering()
    assert 1 in figure.axes[0].get_xticks() and 0 < figure.axes[0].get_xlim()[0] <= 0.95


def test_a_row_is_a_case_and_stands_under_its_group():
    [(_, relu), *_] = dots(CHARTS["speedups"]().axes[1])
    [*_, (_, head)] = dots(CHARTS["speedups"]().axes[1])
    assert round(relu) == 1 and round(head) == 3


def test_the_roofline_holds_every_kernel_and_ceiling():
    figure = CHARTS["roofline"]()
    axes, key = figure.axes
    expected = sorted((2.0**i, 2.0**i * 1e12 / (100 + at)) for i in range(12) for at in range(3))
    assert sorted(map(tuple, dots(axes))) == [pytest.approx(each) for each in expected]
    lines = [line.get_xydata().tolist() for line in axes.lines if len(line.get_xdata()) == 2]
    slope, *flat = lines
    assert all(y == pytest.approx(x * 10e9) for x, y in slope)
    assert slope[1][0] == pytest.approx(5.01)  # FLOPs a byte, where the fastest product's begins
    assert [line[0][0] for line in flat] == [pytest.approx(line[0][1] / 10e9) for line in flat]
    assert all(line[1] == [axes.get_xlim()[1], line[0][1]] for line in flat)
    assert sorted(line[0][1] for line in flat) == pytest.approx([0.02e12, 0.05e12, 0.0501e12])
    assert key.texts[0].get_text() == "1  cross_entropy 0x32000 bfloat16"
    assert len(key.texts) == 12


def test_no_label_covers_another():
    figure = CHARTS["roofline"]()
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's would have its line in it
    assert len(boxes) > 20
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]


def test_memory_is_in_figures_too_and_none_stands_at_the_edge():
    axes = CHARTS["memory"]().axes[0]
    assert sorted(x for x, _ in dots(axes)) == [axes.get_xlim()[0], 0.25, 0.25, 1002.0, 3006.0]
    assert [text.get_text() for text in axes.texts] == ["3,006 / 1,002", "0.25 / 0.25", "stock / fusedact"]


def test_accuracy_draws_what_the_contract_allows_and_names_who_is_farthest():
    axes = CHARTS["accuracy"]().axes[0]
    allowed = next(line for line in axes.lines if len(line.get_xdata()) == 101)
    assert all(y == pytest.approx(2 * x + 1e-6) for x, y in allowed.get_xydata())
    [as_stock] = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert len(as_stock.get_xydata()) > 1 and all(y == x for x, y in as_stock.get_xydata())
    low, high = axes.get_xlim()
    assert sorted(map(tuple, dots(axes))) == sorted(
        [(1e-6, 2.9e-6), (3e-7, 3e-7), (low, low), (1e-3, 9e-3), (1e-7, high)]
    )
    named = {text.get_text() for text in axes.texts}
    assert {"softmax none", "cross_entropy beyond"} <= named and "linear_act equal" not in named


@pytest.mark.parametrize("at", range(4))
def test_an_error_that_is_no_number_is_at_the_edge_and_named(at):
    errors = [Errors(f"op {i}", "float32", 1e-6, 1e-6 * i) for i in range(1, 5)]
    errors.insert(at, Errors("no number", "float32", 1e-7, math.nan))
    axes = accuracy(errors, "", CAPTION).axes[0]
    assert (1e-7, axes.get_ylim()[1]) in set(map(tuple, dots(axes)))
    named = [text.get_text() for text in axes.texts][2:]
    assert named == ["no number", "op 4", "op 3"]
