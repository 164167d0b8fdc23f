"""S9: the loss tutorial's printed values, its pairings on data against the usual wrong ones, and their pictures."""

import csv
import io
import math
import re
from importlib import import_module
from itertools import combinations

import pytest
import torch
from rich.console import Console

import fusedact
from fusedact.__main__ import main
from fusedact.catalogue import SNIPPETS, TASKS, Comparison, Outcome, Values, compare, comparing, values
from fusedact.catalogue.comparing import Look
from fusedact.plotting import losses

# Tutorial 004's code from its first snippet to its last, one after the other as in its notebook.
TUTORIAL = """
import torch
logits = torch.tensor([2.0, -1.0, 0.5])
sigmoid_outputs = torch.sigmoid(logits)
torch.set_printoptions(precision=2)
print('Sigmoid outputs:', sigmoid_outputs)

import torch.nn.functional as F
logits = torch.tensor([2.0, 1.0, 0.1])
softmax_outputs = F.softmax(logits, dim=-1)
print(f'{softmax_outputs=}')

softmax = torch.nn.Softmax(dim=-1)
softmax_outputs = softmax(logits)
print(f'{softmax_outputs=}')

log_softmax_outputs = F.log_softmax(logits, dim=0)
print('LogSoftmax outputs:', log_softmax_outputs)

import torch.nn as nn
outputs = torch.tensor([0.7, 0.2, 0.9], requires_grad=True).float()
targets = torch.tensor([1.0, 0.0, 1.0]).float()
criterion = nn.BCELoss()
outputs = torch.sigmoid(outputs)
loss = criterion(outputs, targets)
print('BCELoss:', loss.item())

raw_outputs = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
targets = torch.tensor([1.0, 0.0, 1.0])
criterion = nn.BCEWithLogitsLoss()
loss = criterion(raw_outputs, targets)
print(f'BCEWithLogitsLoss: {loss.item():.4f}')

raw_outputs = torch.tensor(
    [[1.0, 2.0, 3.0], [1.0, 2.0, 0.0], [0.0, 2.0, 1.0]], requires_grad=True).float()
targets = torch.tensor([2, 0, 1]).long()
print(targets.dtype)
criterion = nn.CrossEntropyLoss()
loss = criterion(raw_outputs, targets)
print(f'CrossEntropyLoss: {loss.item():.2f}')

logits = torch.tensor(
    [[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.5, 0.2]], requires_grad=True).float()
targets = torch.tensor([2, 0, 1]).long()
log_softmax = F.log_softmax(logits, dim=1)
criterion = nn.NLLLoss()
loss = criterion(log_softmax, targets)
print(f'NLLLoss with LogSoftmax: {loss.item():.2f}')
"""
EVERY = [pytest.param(snippet, id=f"{snippet.tutorial}-{snippet.name}") for snippet in SNIPPETS]
STATED = [param for param in EVERY if param.values[0].stated]
PAIRS = [pytest.param(task, pairing, id=f"{task.name}-{pairing.name}") for task in TASKS for pairing in task.pairings]
RIGHT = [param for param in PAIRS if param.values[1].right]
REFUSED = {  # by stock
    "logits + BCELoss",
    "Sigmoid + BCELoss, int64",
    "logits + BCEWithLogitsLoss, (N)",
    "logits + CrossEntropyLoss, one-hot int64",
    "logits + CrossEntropyLoss, float32 (N)",
}


@pytest.fixture
def printed(capsys):
    """printed(source) -> what the program prints, line by line; torch's print options are put back."""

    def run(source):
        exec(compile(source, "<004>", "exec"), {})
        return capsys.readouterr().out.splitlines()

    yield run
    torch.set_printoptions(profile="default")


@pytest.fixture(scope="module")
def compared():
    return {comparison.task.name: comparison for comparison in compare(seed=0)}


def batch(task):
    """Outputs of a last layer, and targets, of 6 rows."""
    z = torch.randn(6, task.outputs)
    return z, torch.arange(6) % task.outputs if task.exclusive else (torch.randn(6, task.outputs) > 0).float()


# Snippets


def test_prints_what_the_tutorial_prints(printed):
    lines = printed(TUTORIAL)
    found = [values(snippet) for snippet in SNIPPETS if snippet.tutorial == "004"]
    assert [value.stock_printed for value in found] == lines
    assert [value.ours_printed for value in found] == lines


@pytest.mark.parametrize("snippet", EVERY)
def test_is_as_the_text_states(snippet):
    assert values(snippet).is_as_stated is (True if snippet.stated else None)


@pytest.mark.parametrize("snippet", STATED)
def test_is_not_as_another_value_would_be(snippet):
    """What holds of the value does not hold of one 1e-3 beside it, floating then; of the vague one, of 1 more."""
    inputs = snippet.tensors("cpu", torch.float32)
    value = snippet.value(torch.nn, *inputs)
    beside = 1.0 if snippet.stated == "between 0 and 1" else 1e-3
    assert not snippet.is_as_stated(torch.nn, value + beside, *inputs)


@pytest.mark.parametrize("snippet", EVERY)
def test_kernels_are_as_accurate_as_stock(snippet, triton_backend, device, as_accurate_as_torch):
    found = values(snippet, device)
    assert found.is_as_stated is not False
    if found.ours.is_floating_point():
        as_accurate_as_torch(found.ours, found.stock, found.truth)
    assert found.differences() == pytest.approx((0, 0, 0), abs=2e-7)


# Pairings


@pytest.mark.parametrize(("task", "pairing"), RIGHT)
def test_launches_from_the_logits_to_the_cost_and_back(task, pairing, triton_backend, launches, device):
    z, y = (t.to(device) for t in batch(task))
    z.requires_grad_()
    layers, loss = fusedact.nn.Sequential(*pairing.layers(fusedact.nn)), getattr(fusedact.nn, pairing.loss)()
    cost = loss(layers(z), pairing.encode(y))
    there = launches.count
    cost.backward()
    assert (there, launches.count - there) == pairing.launches


def stepped(nn, task, pairing, device="cpu"):
    """The cost of a batch by the layers of `nn` and its gradient by the logits, or the error that refuses it."""
    torch.manual_seed(0)
    z, y = (t.to(device) for t in batch(task))
    z.requires_grad_()
    try:
        cost = getattr(nn, pairing.loss)()(nn.Sequential(*pairing.layers(nn))(z), pairing.encode(y))
    except (RuntimeError, ValueError) as error:
        return type(error), str(error)
    return torch.cat([cost.detach().view(1), torch.autograd.grad(cost, z)[0].flatten()]).tolist()


@pytest.mark.parametrize(("task", "pairing"), PAIRS)
def test_a_step_is_stocks_or_is_refused_as_stock_refuses_it(task, pairing):
    stock = stepped(torch.nn, task, pairing)
    assert stepped(fusedact.nn, task, pairing) == stock
    assert isinstance(stock, tuple) == (pairing.name in REFUSED)


@pytest.mark.parametrize(("task", "pairing"), PAIRS)
def test_a_step_through_kernels_is_stocks(task, pairing, triton_backend, device):
    """What stock refuses is refused with its error, but for numbers out of range on a GPU: these give NaN."""
    stock, ours = stepped(torch.nn, task, pairing), stepped(fusedact.nn, task, pairing, device)
    if device == "cuda" and pairing.name == "logits + BCELoss":
        assert math.isnan(ours[0])
    elif isinstance(stock, tuple):
        assert ours[0] is stock[0] and (ours[1] == stock[1] or device == "cuda")
    else:
        assert ours == pytest.approx(stock, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "p", "y", "given"),
    [
        ("multi-label", [[0.9, 0.2], [0.6, 0.6], [0.5, 0.1]], [[1, 0], [1, 0], [1, 1]], [0.9, 0.8, 0.6, 0.4, 0.5, 0.1]),
        ("multi-class", [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0, 0.5, 0.5]], [0, 1, 0], [0.7, 0.3, math.exp(-100)]),
    ],
)
def test_score_of_three_rows(task, p, y, given):
    """Of each the first row alone is right: of labels all must be; an impossible truth costs 100."""
    [task] = [known for known in TASKS if known.name == task]
    log_loss, accuracy = comparing._score(task, torch.tensor(p), torch.tensor(y))
    assert log_loss == pytest.approx(-sum(map(math.log, given)) / len(given))
    assert accuracy == pytest.approx(1 / 3)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_right_pairings_agree(task, compared):
    first, *others = [outcome for outcome in compared[task.name].outcomes if outcome.pairing.right]
    assert others and first.farthest == 0
    for other in others:
        assert other.farthest < 1e-5
        for ours, its in zip(other.looks, first.looks, strict=True):
            assert ours == pytest.approx(its, rel=1e-4)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))])
def test_wrong_pairings_are_worse(seed, compared):
    """By -log of what they give the truth: by a tenth at least, where right ones near the best there is."""
    for comparison in compared.values() if seed == 0 else compare(seed):
        right = comparison.outcomes[0].looks[-1].log_loss
        assert right < 1.15 * comparison.best_log_loss
        trained = [outcome for outcome in comparison.outcomes if not outcome.pairing.right and not outcome.error]
        assert len(trained) >= 2
        for outcome in trained:
            assert outcome.looks[-1].log_loss > 1.1 * right, outcome.pairing.name
            assert outcome.farthest > 0.3


@pytest.mark.parametrize(
    ("task", "name", "reads"),
    [
        ("binary", "Sigmoid + BCEWithLogitsLoss", lambda look, zeros: look.cost > zeros * math.log(2)),
        ("binary", "Softmax + BCELoss", lambda look, zeros: look.cost == pytest.approx(100 * zeros)),
        ("multi-class", "Softmax + CrossEntropyLoss", lambda look, _: look.cost > math.log(1 + 2 / math.e)),
        ("multi-class", "Softmax + NLLLoss", lambda look, _: -1 <= look.cost < 0),
        ("multi-class", "logits + NLLLoss", lambda look, _: look.cost < -100),
    ],
)
def test_what_the_wrong_ones_compute(task, name, reads, compared):
    """As their sentences have it: what the cost cannot fall below, or that it falls without end."""
    [outcome] = [outcome for outcome in compared[task].outcomes if outcome.pairing.name == name]
    zeros = 1 - comparing._data(TASKS[0], 0, "cpu").y.mean().item()
    assert reads(outcome.looks[-1], zeros)


def test_numbers_in_the_sentences():
    why = {(task.name, pairing.name): pairing.why for task in TASKS for pairing in task.pairings}
    sigmoid = why["binary", "Sigmoid + BCEWithLogitsLoss"]
    for number in (math.log1p(1 / math.e), math.log(2)):
        assert f"= {number:.3f}" in sigmoid
    for output in (0.5, 1.0):  # the decision and the most that a sigmoid gives
        assert f" {1 / (1 + math.exp(-output)):.2f}" in sigmoid
    assert f"= {math.log1p(2 / math.e):.3f}" in why["multi-class", "Softmax + CrossEntropyLoss"]


def test_a_wrong_pairing_may_still_rank_well(compared):
    """Softmax before CrossEntropyLoss decides as well in the end, arrives later, and claims too much."""
    looks = {outcome.pairing.name: outcome.looks for outcome in compared["multi-class"].outcomes}
    right, wrong = looks["logits + CrossEntropyLoss"], looks["Softmax + CrossEntropyLoss"]
    assert wrong[-1].accuracy > right[-1].accuracy - 0.01
    assert wrong[2].accuracy < right[2].accuracy - 0.03


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_refusals_are_told(task, compared):
    told = {outcome.pairing.name: outcome.error for outcome in compared[task.name].outcomes if outcome.error}
    assert set(told) == {pairing.name for pairing in task.pairings} & REFUSED
    assert all(re.match(r"(Runtime|Value)Error: \S", error) for error in told.values())


@pytest.mark.exhaustive
def test_through_kernels(triton_backend, device, monkeypatch):
    """A step of every pairing on a few rows ends where it ends on stock's operations."""
    monkeypatch.setattr(comparing, "ROWS", 12)
    monkeypatch.setattr(comparing, "HELD_OUT", 5)
    ours = compare(seed=0, device=device, steps=1)
    with fusedact.use_backend("torch"):
        stock = compare(seed=0, device=device, steps=1)
    for one, other in zip(ours, stock, strict=True):
        for a, b in zip(one.outcomes, other.outcomes, strict=True):
            assert a.error == b.error
            assert [look.cost for look in a.looks] == pytest.approx([look.cost for look in b.looks], rel=1e-5)


# Pictures


def test_derivatives_drawn_are_the_formulas():
    """Of the logit losses sigmoid(z) - t, over three labels a third of it; of cross-entropy softmax - (1 - e + e/3)."""
    panels = {panel.title: panel for panel in losses.PANELS}
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    chance = z.exp() / (z.exp() + 1 + math.e)
    expected = {
        "BCEWithLogitsLoss": [z.sigmoid() - t for t in (0.0, 0.5, 1.0)],
        "MultiLabelSoftMarginLoss": [(z.sigmoid() - t) / 3 for t in (0.0, 1.0)],
        "CrossEntropyLoss": [chance - 1, chance - (0.9 + 0.1 / 3)],
        "NLLLoss": [torch.full_like(z, -1.0)],
    }
    for title, slopes in expected.items():
        for line, slope in zip(panels[title].lines, slopes, strict=True):
            assert torch.allclose(losses.curve(line.cost, z)[1], slope, rtol=0, atol=1e-12), title
    p = torch.tensor([0.0, 1e-50, 0.25], dtype=torch.float64)
    cost, slope = losses.curve(panels["BCELoss"].lines[1].cost, p)
    assert cost.tolist() == pytest.approx([100, 100, math.log(4)])
    assert slope.tolist() == pytest.approx([-1e12, -1e12, -4])


@pytest.fixture(scope="module")
def drawn(compared):
    return losses.figures() | {"course": losses.pairings(list(compared.values()))}


def test_nothing_is_clipped_and_no_text_lies_on_another(drawn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for name, figure in drawn.items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        whole = figure.get_tightbbox(canvas.get_renderer())
        assert min(whole.extents) >= 0 and whole.x1 <= figure.get_figwidth() and whole.y1 <= figure.get_figheight(), (
            name
        )
        ticks = {text for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels()}
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible() and text not in ticks]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        assert len(boxes) > 10
        for text, box in boxes:
            assert (box.p0 >= 0).all() and (box.p1 <= canvas.get_width_height()).all(), (name, text)
        for (one, box), (other, its) in combinations(boxes, 2):
            assert not box.overlaps(its), (name, one, other)


def test_panels_draw_costs_and_derivatives(drawn):
    for axes, panel in zip(drawn["losses"].axes, losses.PANELS, strict=False):
        x = torch.linspace(*panel.span, losses.POINTS, dtype=torch.float64)
        expected = [part.tolist() for line in panel.lines for part in losses.curve(line.cost, x)]
        *lines, zero = axes.lines
        assert [list(line.get_ydata()) for line in lines] == expected and list(zero.get_ydata()) == [0, 0]
        assert axes.get_title("left") == panel.title


def test_the_clamp_is_drawn_whole(drawn):
    """-log p to 100, 1 / p to 1e12, from far below the clamps to EDGE from 1."""
    costs, slopes = drawn["losses"].axes[-2:]
    [cost], [slope] = costs.lines, slopes.lines
    p = torch.from_numpy(cost.get_xdata())
    assert (p[0].item(), 1 - p[-1].item()) == pytest.approx((1e-60, 1e-6), rel=1e-6)
    assert cost.get_ydata() == pytest.approx((-p.log()).clamp(max=100).numpy())
    assert slope.get_ydata() == pytest.approx((1 / p.clamp(min=1e-12)).numpy(), rel=1e-5)
    for axes, most in ((costs, 100), (slopes, 1e12)):
        assert axes.get_ylim()[0] < 1 < most < axes.get_ylim()[1]


TABLE = [  # of the right pairings: task, output, loss, targets, launches
    ("binary", "logits", "BCEWithLogitsLoss", "float32 (N, 1)", "1 + 1"),
    ("", "Sigmoid", "BCELoss", "float32 (N, 1)", "2 + 2"),
    ("multi-label", "logits", "MultiLabelSoftMarginLoss", "float32 (N, C)", "1 + 1"),
    ("", "Sigmoid", "BCELoss", "float32 (N, C)", "2 + 2"),
    ("", "logits", "BCEWithLogitsLoss", "float32 (N, C)", "1 + 1"),
    ("multi-class", "logits", "CrossEntropyLoss", "int64 (N)", "1 + 1"),
    ("", "LogSoftmax", "NLLLoss", "int64 (N)", "2 + 2"),
    ("", "logits", "CrossEntropyLoss", "float32 (N, C)", "1 + 1"),
    ("", "LogSoftmax", "CrossEntropyLoss", "int64 (N)", "2 + 2"),
]


def test_table_has_every_right_pairing(drawn):
    *texts, note = [text.get_text() for text in drawn["losses-pairings"].axes[0].texts]
    wide = len(losses.HEADS)
    heads, *rows = [tuple(texts[i : i + wide]) for i in range(0, len(texts), wide)]
    assert heads == losses.HEADS and note.startswith("Launches")
    assert [row[:-1] for row in rows] == TABLE
    assert [row[-1].replace("\n", " ") for row in rows] == [param.values[1].why for param in RIGHT]


def test_course_is_drawn_by_step(drawn, compared):
    for at, comparison in enumerate(compared.values()):
        looks = [outcome.looks for outcome in comparison.outcomes if outcome.looks]
        above, below = drawn["course"].axes[at::3]
        for axes, kind, best in ((above, 2, comparison.best_log_loss), (below, 3, comparison.best_accuracy)):
            *lines, grey = axes.lines
            expected = [[[look[0], look[kind]] for look in course] for course in looks]
            assert [line.get_xydata().tolist() for line in lines] == expected
            assert list(grey.get_ydata()) == [best, best]


# The command

command = import_module("fusedact.cli.catalogue")


@pytest.fixture
def by_hand():
    """Two right pairings, then two wrong ones, the worst first, and one that is refused; no number is there twice."""
    right, also, wrong, worse, refused, *_ = TASKS[0].pairings

    def ends(*last):
        return [Look(0, 9.0, 8.0, 0.125), Look(300, *last)]

    return Comparison(
        TASKS[0],
        [
            Outcome(right, ends(0.25, 0.5, 0.9), 0.0),
            Outcome(also, ends(0.2501, 0.501, 0.898), 2e-7),
            Outcome(worse, ends(-1698.25, 5.0, 0.5), 1.0),
            Outcome(wrong, ends(0.7, 1.0, 0.8925), 0.3),
            Outcome(refused, [], math.nan, "RuntimeError: [no]"),
        ],
        0.45,
        0.95,
    )


def cells(table):
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_comparison_table(by_hand):
    table = command._comparison_table(by_hand)
    assert cells(table) == [
        ("[bold]right[/bold]", "", "", "", ""),
        ("logits + BCEWithLogitsLoss", "0.25", "0.500", "90.0%", "0.0e+00"),
        ("Sigmoid + BCELoss", "0.2501", "0.501", "89.8%", "2.0e-07"),
        ("[bold]wrong[/bold]", "", "", "", ""),
        ("Softmax + BCELoss", "-1698", "5.000", "50.0%", "1.0e+00"),
        ("Sigmoid + BCEWithLogitsLoss", "0.7", "1.000", "89.2%", "3.0e-01"),
        ("logits + BCELoss", "raises", "", "", ""),
    ]
    assert table.title == "binary: outputs 1, targets float32 (N, 1), decided by p ≥ 0.5"
    assert table.caption.endswith("reach 0.450 and 95.0%.")


def test_verdict(by_hand):
    assert command._verdict(by_hand.outcomes) == (
        "Right ones agree to 2.0e-07 in every probability; wrong ones' -log p is 2 to 10 times theirs. "
        "As many rows right, to 1%, all the same: Sigmoid + BCEWithLogitsLoss."
    )


def test_snippet_table():
    stock, ours, truth = (torch.tensor([0.5, last]) for last in (1.0, 1.25, 2.0))
    found = Values(SNIPPETS[0], stock, ours, truth.double(), "stock [a]", "ours [a]", False)
    assert cells(command._snippet_table([found])) == [
        ("004", "[bold]sigmoid[/bold]: logits [2.0, -1.0, 0.5]", "", ""),
        ("torch.nn", r"stock \[a]", "", "1.0e+00"),
        ("fusedact.nn", r"ours \[a]", "2.5e-01", "7.5e-01"),
        ("its text", "between 0 and 1 (DOES NOT HOLD)", "", ""),
    ]


@pytest.mark.parametrize("width", [34, 40, 60, 100])
def test_numbers_are_whole_in_a_narrow_terminal(width, by_hand, monkeypatch):
    """And names and what else was read off are not cut, though they go over several lines."""
    narrow = Console(width=width, file=io.StringIO())
    monkeypatch.setattr(command, "console", narrow)
    command._print_comparison(by_hand)
    narrow.print(command._snippet_table([values(snippet) for snippet in SNIPPETS]))
    out = narrow.file.getvalue()
    words = re.split(r"[\s│┃]+", out)
    for number in ("0.2501", "-1698", "5.000", "89.8%", "2.0e-07", "raises", "4.9e-08"):
        assert number in words
    assert "…" not in out and "RuntimeError: [no]" in " ".join(words)
    assert width < 40 or re.search(r"│ ?logits \+", out)
    assert max(map(len, out.splitlines())) <= width


def test_catalogue_prints_and_writes(tmp_path, capsys, monkeypatch, compared):
    def as_asked(seed, device, progress):
        assert (seed, device) == (3, "cpu")
        for done in range(1, len(PAIRS) + 1):
            progress(done)
        return list(compared.values())

    monkeypatch.setattr(command, "compare_pairings", as_asked)
    threads = torch.get_num_threads()
    assert main(["catalogue", "--seed", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "seed 3" in out and "BCELoss: 0.514159619808197" in out and "DOES NOT HOLD" not in out
    assert out.count("Right ones agree to") == len(TASKS)
    with (tmp_path / "catalogue-snippets.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == [snippet.name for snippet in SNIPPETS]
    with (tmp_path / "catalogue-pairings.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["task"], row["pairing"]) for row in rows} == {(t.name, p.name) for t in TASKS for p in t.pairings}
    assert {row["pairing"] for row in rows if row["error"]} == REFUSED
    assert (tmp_path / "catalogue-pairings.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_help_says_what_out_gets(capsys):
    assert main(["catalogue", "--help"]) == 0
    told = " ".join(re.split(r"[\s│]+", capsys.readouterr().out))
    assert "For both tables as CSV and the pairings' course as a picture." in told


@pytest.mark.parametrize(
    ("args", "named"),
    [(["--seed", "-1"], "--seed"), (["--seed", "x"], "--seed"), (["--device", "moon"], "moon"), (["more"], "more")],
)
def test_bad_input_is_one_line(args, named, capsys):
    assert main(["catalogue", *args]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1
