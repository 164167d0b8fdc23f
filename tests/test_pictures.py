"""The pictures of `fusedact plot`: that they show the numbers that they say they show, and that nothing is cut off."""

import math
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from matplotlib.text import Text

import fusedact
from bench.reporting.pictures import written
from fusedact import activations as table
from fusedact.__main__ import main
from fusedact.catalogue import TASKS
from fusedact.plotting import activations, digits, files, losses, surfaces
from fusedact.trainers import Xor
from fusedact.trainers.checkpoint import save_checkpoint

VALUE, DERIVATIVE, BY_SLOPE = activations.VALUE, activations.DERIVATIVE, activations.BY_SLOPE
SMALL = ("--dpi", "50")
PNG = b"\x89PNG\r\n\x1a\n"

panel = cache(activations.panel)
each_activation = pytest.mark.parametrize("name", activations.names())


@pytest.fixture
def clean_folder(tmp_path, monkeypatch):
    """An empty working folder, no MNIST in a cache; torch's threads are put back."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def own():
    """An activation of a user's own, whose value jumps at 2 and whose derivative does at -6."""
    fusedact.register_activation(
        "own",
        reference=lambda x, scale: torch.where(x < -6, 0 * x, scale * (x + 6)) + (x > 2),
        derivative=lambda dy, x, scale: dy * torch.where(x < -6, 0.0, scale),
        device=lambda: None,
        defaults={"scale": 0.5},
    )
    yield "own"
    del table.ACTIVATIONS["own"]


def check_layout(figure):
    """All lies on the page, and no text on another; numbers along axes apart, which matplotlib keeps clear itself."""
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01, box
    ticks = {id(text) for axis in figure.findobj(Axis) for text in axis.get_ticklabels(which="both")}
    written = {
        text for text in figure.findobj(Text) if text.get_visible() and text.get_text() and id(text) not in ticks
    }
    places = [(text.get_text(), text.get_window_extent()) for text in written]
    for (one, here), (other, there) in combinations(places, 2):
        overlap = min(here.x1, there.x1) - max(here.x0, there.x0), min(here.y1, there.y1) - max(here.y0, there.y0)
        assert min(overlap) <= 1, f"{one!r} lies on {other!r}"


# Activations


def oracle(name, kind, x):
    """Value, derivative or derivative by the slope at one point, float64 (), by torch alone."""
    x = x.clone().requires_grad_()
    slope = torch.full((1,), 0.25, dtype=torch.float64, requires_grad=True)
    if name in activations.OVER_ROWS:
        y = activations.OVER_ROWS[name](torch.stack([x, torch.zeros_like(x), torch.ones_like(x)]), dim=0)[0]
    elif name == "prelu":
        y = torch.nn.functional.prelu(x.view(1), slope)[0]
    else:
        y = table.ACTIVATIONS[name].reference(x, *table.ACTIVATIONS[name].default_values)
    if kind == VALUE:
        return y.detach()
    of = x if kind == DERIVATIVE else slope
    return torch.autograd.grad(y, of, materialize_grads=True)[0].view(())


@each_activation
def test_lines_are_torchs_values_and_autograds_derivatives(name):
    curves = panel(name).curves
    assert list(curves) == ([VALUE, BY_SLOPE, DERIVATIVE] if name == "prelu" else [VALUE, DERIVATIVE])
    for kind, curve in curves.items():
        drawn = ~curve.y.isnan()
        for x, y in zip(curve.x[drawn][::97], curve.y[drawn][::97], strict=True):
            torch.testing.assert_close(y, oracle(name, kind, x), rtol=1e-12, atol=1e-12)
        for x, y in zip(curve.jumps, curve.values, strict=True):
            torch.testing.assert_close(y, oracle(name, kind, x), rtol=1e-12, atol=1e-12)


JUMPS = {  # where each side's value is another, by what jumps
    "step": {VALUE: [(0, 0, 1)]},
    "threshold": {DERIVATIVE: [(0, 0, 1)]},
    "relu": {DERIVATIVE: [(0, 0, 1)]},
    "leaky_relu": {DERIVATIVE: [(0, 0.01, 1)]},
    "prelu": {DERIVATIVE: [(0, 0.25, 1)]},
    "hardswish": {DERIVATIVE: [(-3, 0, -0.5), (3, 1.5, 1)]},
    "hardsigmoid": {DERIVATIVE: [(-3, 0, 1 / 6), (3, 1 / 6, 0)]},
    "hardtanh": {DERIVATIVE: [(-1, 0, 1), (1, 1, 0)]},
    "relu6": {DERIVATIVE: [(0, 0, 1), (6, 1, 0)]},
    "selu": {DERIVATIVE: [(0, 1.7580993408473766, 1.0507009873554805)]},
    "softshrink": {DERIVATIVE: [(-0.5, 1, 0), (0.5, 0, 1)]},
    "hardshrink": {VALUE: [(-0.5, -0.5, 0), (0.5, 0, 0.5)], DERIVATIVE: [(-0.5, 1, 0), (0.5, 0, 1)]},
}


@each_activation
def test_jumps_are_found_and_break_the_line(name):
    for kind, curve in panel(name).curves.items():
        expected = JUMPS.get(name, {}).get(kind, [])
        found = torch.cat([curve.jumps[:, None], curve.sides], 1)
        expected = torch.tensor(expected, dtype=torch.float64).view(-1, 3)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert curve.y.isnan().sum() == len(expected)
        between = curve.y[:-1].isnan() | curve.y[1:].isnan()
        steps = curve.y.diff().abs()[~between]
        assert steps.max() < 0.1, "a line where it jumps"


def test_a_jump_of_a_steep_function_is_told_from_its_slope():
    curve = activations.trace(lambda x: torch.where(x < 1 / 3, 1e4 * x, 1e4 * x + 1e-2), -1, 1)
    torch.testing.assert_close(curve.jumps, torch.tensor([1 / 3], dtype=torch.float64), rtol=0, atol=1e-9)
    assert len(activations.trace(lambda x: 1e4 * x, -1, 1).jumps) == 0


def test_every_activation_has_axes_with_its_name(own):
    figure = activations.gallery([panel(name) for name in activations.names()])
    titles = [axes.get_title("left").split("\n") for axes in figure.axes if axes.axison]
    assert [title[0] for title in titles] == [*table.ACTIVATIONS, *activations.OVER_ROWS]
    notes = {title[0]: title[1:] for title in titles}
    assert notes["leaky_relu"] == ["negative_slope = 0.01"] and notes["prelu"] == ["slope = 0.25, learned"]
    assert notes["relu"] == [] and notes["softmax"] == ["of logit x beside 0 and 1"]
    assert notes[own] == ["scale = 0.5"]


@pytest.mark.parametrize(
    "names",
    [
        ["prelu"],
        ["step", "threshold", "hardtanh", "softplus", "log_softmax", "prelu"],
        pytest.param(activations.names(), marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_a_gallery_is_whole(names):
    check_layout(activations.gallery([panel(name) for name in names]))


def test_a_registered_activation_is_drawn_as_far_as_it_jumps(own):
    curves = activations.panel(own).curves
    assert curves[VALUE].jumps.tolist() == [2.0] and curves[DERIVATIVE].jumps.tolist() == [-6.0]
    assert (curves[VALUE].x[0].item(), curves[VALUE].x[-1].item()) == (-7.5, 4.0)


def test_numbers_along_x_keep_clear_of_each_other():
    """From any outermost jump to any other, in a gallery's narrow axes."""
    flat = torch.zeros(0, dtype=torch.float64)
    spans = [(-4, 4), (-4, 7.5), (-8, 8), (-9.4, 6), (-11.5, 4), (-11.5, 11.5)]
    panels = []
    for span in spans:
        x = torch.tensor(span, dtype=torch.float64)
        line = activations.Curve(x, x, flat, flat.view(0, 2), flat)
        panels.append(activations.Panel("own", "", {VALUE: line}))
    figure = activations.gallery(panels)
    figure.draw_without_rendering()
    for axes, (low, high) in zip(figure.axes, spans, strict=False):
        boxes = [text.get_window_extent() for text in axes.get_xticklabels() if low <= text.get_position()[0] <= high]
        assert len(boxes) >= 3
        assert all(after.x0 - box.x1 > 4 for box, after in pairwise(boxes)), (low, high)


def test_dots_stand_at_the_value_and_at_the_side_not_reached():
    [axes] = activations.single(activations.panel("step")).axes
    hollow, full = [line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert (hollow.get_xydata().tolist(), full.get_xydata().tolist()) == ([[0.0, 0.0]], [[0.0, 1.0]])
    assert hollow.get_markerfacecolor() == "white" != full.get_markerfacecolor()


@pytest.mark.parametrize("name", ["prelu", "hardtanh", "log_softmax"])
def test_a_single_is_whole(name):
    check_layout(activations.single(panel(name)))


# Surfaces


def surface(model, hidden, title="Two layers"):
    rows = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    outputs = model(rows).squeeze(1).detach()
    square, note = surfaces.over_square(model), "lr 0.001, 10,000 epochs\nseed 9223372036854775807"
    return surfaces.Surface(title, note, square, rows, rows.sum(1) == 1, outputs, hidden, [0.7, 0.69, 0.2])


def test_square_holds_the_models_outputs():
    model = Xor(torch.nn, Xor.defaults).model
    square, ticks = surfaces.over_square(model), surfaces.ticks()
    assert (ticks[0], ticks[-1]) == (-0.5, 1.5) and not square.requires_grad
    for i, j in [(0, 0), (0, 200), (200, 0), (50, 150), (117, 3)]:
        x = torch.stack([ticks[j], ticks[i]])
        torch.testing.assert_close(square[i, j], model(x)[0].detach(), rtol=1e-6, atol=0)


def test_surfaces_show_rows_lines_and_costs():
    torch.manual_seed(0)
    two = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sigmoid(), torch.nn.Linear(2, 1), torch.nn.Sigmoid())
    one = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Sigmoid())
    first = two[0]
    hidden = torch.cat([first.weight, first.bias[:, None]], 1).detach()
    drawn = [surface(two, hidden), surface(one, torch.empty(0, 3), "One layer")]
    figure = surfaces.decision_surfaces(drawn, "XOR")
    left, right, costs = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    for axes, shown in ((left, drawn[0]), (right, drawn[1])):
        np.testing.assert_array_equal(axes.images[0].get_array(), shown.square.numpy())
        assert [text.get_text() for text in axes.texts] == [f"{output:.3f}" for output in shown.outputs]
        right_rows = ((shown.outputs >= 0.5) == shown.classes).sum()
        assert axes.get_title("left").startswith(f"{shown.title}: {right_rows} of 4 right")
    lines = [line for line in left.lines if line.get_label().startswith("hidden unit")]
    assert len(lines) == 2
    for line, (w1, w2, b) in zip(lines, hidden.tolist(), strict=True):
        x, y = line.get_xy1()
        assert abs(w1 * x + w2 * y + b) < 1e-6
        x, y = line.get_xy2()
        assert abs(w1 * x + w2 * y + b) < 1e-6
    assert [list(line.get_ydata()) for line in costs.lines] == [[0.7, 0.69, 0.2]] * 2 + [[math.log(2)] * 2]
    assert costs.get_ylim()[0] == 0 and costs.get_ylim()[1] > 0.7
    check_layout(figure)


@pytest.mark.parametrize("output", [0.1, math.nan])
def test_a_plane_without_a_boundary_is_drawn(output):
    flat = surface(lambda x: x[:, :1] * 0 + output, torch.zeros(2, 3))
    check_layout(surfaces.decision_surfaces([flat], "XOR"))


# Digits


def predictions(n, right):
    """Labels 0 to 9 in turn, and logits of which so many of the first are right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    logits = torch.rand(n, 10, generator=generator)
    logits[torch.arange(n), (labels + (torch.arange(n) >= right)) % 10] += 1 + torch.arange(n) / 10
    return labels, logits


def test_confusion_counts_as_numpy_does():
    generator = torch.Generator().manual_seed(0)
    labels, said = (torch.randint(10, (500,), generator=generator) for _ in range(2))
    expected = np.zeros((10, 10), np.int64)
    np.add.at(expected, (labels.numpy(), said.numpy()), 1)
    counts = digits.confusion(labels, said)
    assert counts.tolist() == expected.tolist()
    assert counts.sum(1).tolist() == np.bincount(labels.numpy(), minlength=10).tolist()


def test_confusion_matrix_shows_counts_and_shares():
    counts = torch.arange(100).view(10, 10) * 100
    counts[3] = 0
    figure = digits.confusion_matrix(counts, "mnist-mlp", "embedded")
    axes = figure.axes[0]
    assert [int(text.get_text().replace(",", "")) for text in axes.texts] == counts.flatten().tolist()
    np.testing.assert_allclose(axes.images[0].get_array()[4], counts[4] / counts[4].sum(), rtol=1e-6)
    assert float(axes.images[0].get_array()[3].sum()) == 0
    assert axes.get_yticklabels()[4].get_text() == f"4   ({counts[4, 4] / counts[4].sum():.0%} right)"
    check_layout(figure)


def test_confidence_is_the_log_odds_of_the_prediction():
    logits = torch.randn(20, 10, dtype=torch.float64)
    best = logits.softmax(1).amax(1)
    torch.testing.assert_close(digits.confidence(logits), (best / (1 - best)).log())
    sure = digits.confidence(torch.tensor([[1e4] + [0.0] * 9, [2e4] + [0.0] * 9]))
    assert sure[0] < sure[1] < math.inf


@pytest.mark.parametrize("right", [100, 4])
def test_digits_are_the_first_right_and_the_most_confidently_wrong(right):
    labels, logits = predictions(100, right)
    images = torch.arange(100.0)[:, None, None].expand(100, 28, 28)
    figure = digits.digits(images, labels, logits, "mnist-mlp: accuracy", "where from")
    check_layout(figure)
    shown = [(int(axes.images[0].get_array()[0, 0]), axes.get_title()) for axes in figure.axes if axes.images]
    first = [(i, str(i)) for i in range(min(right, 10))]
    assert shown[: len(first)] == first
    wrong = torch.arange(right, 100)
    expected = wrong[digits.confidence(logits.double())[wrong].argsort(descending=True)][:20].tolist()
    assert [at for at, _ in shown[len(first) :]] == expected
    share = logits.double().softmax(1).amax(1)
    for at, title in shown[len(first) :]:
        assert title == f"said {(at + 1) % 10}, is {at % 10}\n" + (
            "over 99.9%" if share[at] > 0.999 else f"{share[at]:.1%}"
        )


# The command


def test_plot_activations(clean_folder, capsys):
    assert main(["plot", "activations", "relu", "softmin", "--out", "out", *SMALL]) == 0
    written = ["out/activations.png", "out/activations/relu.png", "out/activations/softmin.png"]
    assert capsys.readouterr().out.split() == written
    assert main(["plot", "activations", "relu", *SMALL]) == 0
    assert capsys.readouterr().out.split() == ["runs/plots/activations/relu.png"]
    assert all((clean_folder / path).read_bytes().startswith(PNG) for path in written)


def test_an_activation_named_twice_is_drawn_once(clean_folder, capsys):
    assert main(["plot", "activations", "relu", "relu", *SMALL]) == 0
    assert capsys.readouterr().out.split() == ["runs/plots/activations/relu.png"]


def test_plot_xor(clean_folder, capsys):
    assert main(["plot", "xor", "--epochs", "3", "--seed", "1", "--lr", "0.5", "--device", "cpu", *SMALL]) == 0
    assert capsys.readouterr().out.split() == ["runs/plots/xor.png"]
    assert (clean_folder / "runs/plots/xor.png").read_bytes().startswith(PNG)


def test_plot_mnist_trains_or_reads_a_checkpoint(clean_folder, capsys, monkeypatch):
    """Each title tells the share that its images give; a checkpoint's are those of its run, raw pixels here."""
    drawn, titles, count, draw = [], [], digits.confusion, digits.digits
    monkeypatch.setattr(digits, "confusion", lambda *given: drawn.append(given) or count(*given))
    monkeypatch.setattr(digits, "digits", lambda *given: titles.append(given[3]) or draw(*given))
    training = ["mnist-softmax", "--epochs", "1", "--device", "cpu"]
    assert main(["train", *training, "--layers", "stock", "--raw-pixels", "--out", "trained"]) == 0
    accuracy = float(capsys.readouterr().out.split("Accuracy: ")[1].split()[0])
    assert main(["plot", "mnist", "--trainer", *training, *SMALL]) == 0
    path = "trained/mnist-softmax-stock.pt"
    assert main(["plot", "mnist", "--trainer", training[0], "--checkpoint", path, "--out", "again", *SMALL]) == 0
    written = [f"{out}/mnist-softmax-{what}.png" for out in ("runs/plots", "again") for what in ("digits", "confusion")]
    assert capsys.readouterr().out.split() == written
    assert all((clean_folder / path).read_bytes().startswith(PNG) for path in written)
    now, loaded = ((labels == said).float().mean().item() for labels, said in drawn)
    assert loaded == pytest.approx(accuracy) and now != pytest.approx(accuracy)
    assert titles == [f"mnist-softmax, 1 epoch: {share:.2%} of 1,000 test images right" for share in (now, loaded)]


def test_a_checkpoint_is_tested_on_the_images_of_its_run(clean_folder, capsys):
    """By --data where that is given, else by the run's."""
    where = {"data": "gone", "raw_pixels": "False"}
    save_checkpoint(Path("model.pt"), torch.nn.Linear(784, 10).state_dict(), {"settings": where})
    asked = ["plot", "mnist", "--trainer", "mnist-softmax", "--checkpoint", "model.pt"]
    for given, folder in ([], "gone"), (["--data", "other"], "other"):
        assert main([*asked, *given]) == 2
        assert f"{folder}: expected train-images-idx3-ubyte" in capsys.readouterr().err


def test_plot_curves_of_a_run_and_of_a_csv(clean_folder, capsys, monkeypatch):
    from fusedact import plotting

    command, made = import_module("fusedact.cli.plotting"), {}
    train = command._trained
    monkeypatch.setattr(command, "_trained", lambda *given: made.update(given[0]) or train(*given))
    drawn, original = [], plotting.training_curves
    monkeypatch.setattr(plotting, "training_curves", lambda costs, title: drawn.append(costs) or original(costs, title))
    assert main(["plot", "curves", "xor", "--epochs", "2", "--device", "cpu", *SMALL]) == 0
    assert capsys.readouterr().out.split() == ["runs/plots/xor-curves.png"]
    assert {label: len(costs) for label, costs in drawn[0].items()} == {"stock": 2, "fused": 2, "fit": 2}
    layers = {label: type(next(trainer.model.children())).__module__ for label, trainer in made.items()}
    assert {label: name.partition(".")[0] for label, name in layers.items()} == {
        "stock": "torch",
        "fused": "fusedact",
        "fit": "torch",
    }
    assert [made[label].settings.engine for label in ("stock", "fused", "fit")] == ["plain", "plain", "auto"]
    lines = ["run,epoch,cost,step_seconds", "stock,1,0.5,1e-3", "fit,1,0.4,1e-3", "stock,2,0.25,1e-3"]
    (clean_folder / "xor.csv").write_text("\n".join(lines))
    assert main(["plot", "curves", "xor", "--from", "xor.csv", "--out", "out"]) == 0
    assert drawn[1] == {"stock": [0.5, 0.25], "fit": [0.4]}
    assert capsys.readouterr().out.split() == ["out/xor-curves.png"]


def test_plot_losses(clean_folder, capsys):
    assert main(["plot", "losses", "--out", "out", *SMALL]) == 0
    written = capsys.readouterr().out.split()
    assert written and all((clean_folder / path).read_bytes().startswith(PNG) for path in written)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["activations", "rely"], "unknown activation 'rely', expected one of step, threshold, sigmoid"),
        (["mnist", "--trainer", "xor"], "unknown trainer 'xor', expected one of mnist-mlp, mnist-softmax, mnist-cnn"),
        (["mnist", "--checkpoint", "absent.pt"], "'absent.pt' does not exist"),
        (["mnist", "--checkpoint", "text"], "text: not a whole checkpoint"),
        (["mnist", "--checkpoint", "text", "--epochs", "2"], "takes no --epochs"),
        (["mnist", "--data", "absent"], "absent: expected train-images-idx3-ubyte"),
        (["mnist", "--rows", "7"], "batch size 100 exceeds the 7 training rows"),
        (["curves", "xor", "--from", "text"], "text: expected 1 to 4 runs, found 0"),
        (["curves", "xor", "--from", "other.csv"], "other.csv: expected a CSV of train or compare: no column 'run'"),
        (["curves", "xor", "--from", "words.csv"], "words.csv: expected a CSV of train or compare: could not convert"),
        (["curves", "xor", "--from", "binary.csv"], "binary.csv: expected a CSV of train or compare"),
        (["curves", "xor", "--from", "back.csv"], "back.csv, line 2: expected epoch 1 of run 'stock', found '2'"),
        (["curves", "xor", "--from", "gap.csv"], "gap.csv, line 4: expected epoch 2 of run 'fit', found '3'"),
        (["curves", "xor", "--from", "twice.csv"], "twice.csv, line 4: expected epoch 3 of run 'fit', found '1'"),
        (["curves", "xor", "--from", "short.csv"], "short.csv: expected a CSV of train or compare: no column 'epoch'"),
        (["curves", "xor", "--from", "nan.csv"], "nan.csv: expected a cost that is finite, found none"),
        (["curves", "xor", "--from", "text", "--lr", "1"], "takes no --lr"),
        (["curves", "xnor"], "unknown trainer 'xnor'"),
        (["xor", "--epochs", "0"], "--epochs"),
        (["xor", "--out", "text"], "text: File exists"),
        (["activations", "--dpi", "7"], "--dpi"),
        (["paintings"], "No such command 'paintings'"),
    ],
)
def test_faults_are_one_line(clean_folder, capsys, args, said):
    (clean_folder / "text").write_text("run,epoch,cost\n")
    (clean_folder / "other.csv").write_text("lr,seed,cost\n1,2,3\n")
    (clean_folder / "back.csv").write_text("run,epoch,cost\nstock,2,1.0\nstock,1,5.0\n")
    (clean_folder / "gap.csv").write_text("run,epoch,cost\nfit,1,1.0\nstock,1,2.0\nfit,3,5.0\n")
    (clean_folder / "twice.csv").write_text("run,epoch,cost\n" + 2 * "fit,1,1.0\nfit,2,5.0\n")
    (clean_folder / "short.csv").write_text("run,cost\nfit,1.0\n")
    (clean_folder / "nan.csv").write_text("run,epoch,cost\nfit,1,nan\nfit,2,inf\n")
    (clean_folder / "words.csv").write_text("run,epoch,cost\nfit,1,low\n")
    (clean_folder / "binary.csv").write_bytes(b"run,cost\n\x00\xff\xfe,\n")
    assert main(["plot", *args]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and said in captured.err, captured.err


def test_a_checkpoint_of_another_model_is_refused(clean_folder, capsys):
    assert main(["train", "xor", "--epochs", "1", "--out", "out", "--device", "cpu"]) == 0
    assert main(["plot", "mnist", "--checkpoint", "out/xor-fused.pt"]) == 2
    assert "out/xor-fused.pt: holds no model of mnist-mlp; --trainer is one of" in capsys.readouterr().err


# Those of the docs

NAMES = activations.names()  # of the package: other tests register their own
DOCS = Path(__file__).parents[1] / "docs/images"


@pytest.mark.parametrize(
    ("stem", "draw"),
    [
        ("activations", lambda: activations.gallery([panel(name) for name in NAMES])),
        ("losses", losses.gallery),
        ("losses-pairings", lambda: losses.table(TASKS)),
    ],
    ids=["activations", "losses", "losses-pairings"],
)
def test_pictures_of_the_docs_show_what_there_is(stem, draw):
    assert written(DOCS / f"{stem}.png") == files.digest(draw()), "stale: make pictures"


@pytest.mark.exhaustive
def test_xor_of_the_docs_is_what_it_trains_to(clean_folder):
    assert main(["plot", "xor", "--device", "cpu"]) == 0
    assert written(DOCS / "xor.png") == written(Path("runs/plots/xor.png")), "stale: make pictures"


def test_a_digest_is_of_what_is_written(tmp_path):
    """Not of numbers along axes, which come and go as it is drawn."""
    table = losses.table(TASKS)
    path = tmp_path / "table.png"
    path.write_bytes(files.png(table, 50))
    assert written(path) == files.digest(table) == files.digest(losses.table(TASKS))
    some = [panel("relu"), panel("leaky_relu")]
    noted = [panel("relu"), replace(panel("leaky_relu"), note="negative_slope = 0.1")]
    first, *rest = TASKS
    retold = [replace(first, pairings=(replace(first.pairings[0], launches=(1, 2)), *first.pairings[1:])), *rest]
    figures = [table, losses.table(retold), *map(activations.gallery, (some, some[:1], noted))]
    assert len({files.digest(figure) for figure in figures}) == 5
