"""The report of fuse(): sites that repeat in one row, lines that fit, positions counted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedact
from fusedact.fusion.reporting import Passed, Report, positions
from fusedact.fusion.rows import rows
from fusedact.fusion.site import Site

NORM = "BatchNorm2d stands between it and relu"
WIDTHS = (80, 90, 100, 120, 200)


def site(module, *names, label="Linear(4, 8) + gelu", **given):
    parts = tuple(f"{module}.{name}".lstrip(".") for name in names or ("fc",))
    return Site(module, parts, given.pop("kind", "linear"), label, **given)


def vit(blocks=12):
    chain = {"kind": "chain", "width": 3072, "launches": (1, 2), "moves": (1, 2)}
    label = "Linear(768, 3072) + gelu, Linear(3072, 768)"
    mlps = [site(f"vit.layers.{i}.mlp", "fc1", "act", "fc2", label=label, **chain) for i in range(blocks)]
    pooler = site("vit.pooler", label="Linear(768, 768) + tanh", width=768, launches=(1, 1), moves=(2, 1))
    return Report((*mlps, pooler, site("", "classifier", label="Linear(768, 1000)", reason="no activation follows")))


def resnet():
    left = [site("resnet.embedder", label="Conv2d(3, 64) + relu", reason=NORM)]
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(blocks):
            path = f"resnet.encoder.stages.{stage}.layers.{block}"
            before = width * (4 if block else 2 if stage else 1)
            for at, channels in enumerate((before, width)):
                label = f"Conv2d({channels}, {width}) + relu"
                left.append(site(f"{path}.layer.{at}", "convolution", label=label, reason=NORM))
    return Report(tuple(left))


# Rows


@pytest.mark.parametrize(
    ("modules", "wheres"),
    [
        (["vit.layers.0.mlp", "vit.layers.1.mlp", "vit.layers.2.mlp"], ["vit.layers.{0..2}.mlp"]),
        (["layers.1", "layers.3", "layers.7"], ["layers.{1, 3, 7}"]),
        (["layers.4", "layers.5"], ["layers.{4, 5}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], ["a.{0, 1}.b.{0, 1}"]),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], ["a.0.b.{0, 1}", "a.1.b.0"]),
        (["a.0.b.0", "a.0.b.1", "a.0.b.2", "a.1.b.1"], ["a.0.b.{0..2}", "a.1.b.1"]),
        (["layer1", "layer2"], ["layer1", "layer2"]),
        ([""], ["(the model)"]),
    ],
)
def test_paths_that_differ_in_numbers_are_one_row(modules, wheres):
    found = rows([site(module) for module in modules])
    assert sorted(row.where for row in found) == sorted(wheres)
    assert sum(len(row.sites) for row in found) == len(modules)


def test_a_row_holds_equal_sites_alone():
    others = [{"label": "Linear(4, 9) + gelu"}, {"width": 8}, {"launches": (1, 2)}, {"kind": "chain"}, {"itemsize": 2}]
    sites = [site("blocks.0"), *(site(f"blocks.{at}", **other) for at, other in enumerate(others, 1))]
    assert [row.where for row in rows(sites)] == [f"blocks.{at}" for at in range(6)]


def test_several_sites_of_a_module_stand_at_their_layers():
    features = [site("features", str(at), str(at + 1)) for at in (0, 2, 4)]
    assert [row.where for row in rows(features)] == ["features.{0, 2, 4}"]
    left = [site("mlp", "fc2", reason="no activation follows"), Site("mlp", ("mul",), "gated", "mul", "no")]
    assert [row.where for row in rows(left)] == ["mlp.fc2", "mlp"]
    top = [site("", "0"), site("", "2"), *(site("", "softmax", kind="softmax", label="softmax") for _ in range(2))]
    assert [(row.where, len(row.sites)) for row in rows(top)] == [("{0, 2}", 2), ("(the model)", 2)]


def test_a_resnet_is_parted_as_little_as_can_be():
    wheres = {row.where: len(row.sites) for row in rows(resnet().sites)}
    assert wheres["resnet.encoder.stages.0.layers.{0..2}.layer.1.convolution"] == 3
    assert wheres["resnet.encoder.stages.2.layers.{1..5}.layer.0.convolution"] == 5
    assert len(wheres) == 13


# Text


def test_a_report_reads_so():
    assert vit().text(109).splitlines() == [
        "Sites fused: 13 of 14",
        "  where                         what                                         launches each  bytes a position",
        "  vit.layers.{0..11}.mlp  12 x  Linear(768, 3072) + gelu, Linear(3072, 768)          1 + 2   12,288 + 24,576",
        "  vit.pooler                    Linear(768, 768) + tanh                              1 + 1     6,144 + 3,072",
        "",
        "Saved in a step, forward + backward: 13 + 25 launches. By formula, in training, where Triton runs, against",
        "torch's operations one after the other; an activation of several operations counts as one, a linear layer's",
        "product as our own kernel's (where the library's is faster, the forward saves nothing). A position is a row",
        "of a linear layer, or a pixel of a convolution's output; report(model, inputs) counts them.",
        "",
        "Sites left as they are: 1",
        "  1: no activation follows",
        "    classifier    Linear(768, 1000)",
    ]


def test_with_positions_it_says_what_a_step_saves():
    paths = [f"vit.layers.{i}.mlp.fc1" for i in range(12)]
    counted = vit().measured({path: Passed(1, 1576, path) for path in paths})
    text = counted.text(110)
    assert "positions  launches  bytes a step" in text and "bytes a position" not in text
    assert "18,912   12 + 24     697.17 MB" in text  # 12 x 1576 x 3072 x 4 x 3
    assert "-     1 + 1             -" in text
    assert "13 + 25 launches and 232.39 MB + 464.78 MB of reads and writes." in text
    assert counted.launches == (13, 25) and counted.bytes == (232_390_656, 464_781_312)
    assert vit().bytes is None
    assert "counts them" not in vit().measured({}).text(110)


def test_a_site_without_a_layer_of_its_own_takes_its_modules_positions():
    gated = Site("mlp", ("mlp.act", "mul"), "gated", "silu * up", None, 10, 2, (1, 2), (2, 4))
    beside = {path: Passed(1, m, path) for path, m in (("mlp.gate", 7), ("mlp.up", 7), ("head", 9))}
    assert Report((gated,)).measured(beside).bytes == (7 * 10 * 2 * 2, 7 * 10 * 2 * 4)
    assert Report((gated,)).measured(beside | {"mlp.down": Passed(1, 8, "mlp.down")}).bytes is None


def test_a_layer_called_often_saves_often():
    once = Report((site("shared", width=8, launches=(1, 1), moves=(2, 1)),))
    often = once.measured({"shared.fc": Passed(3, 30, "shared.fc")})
    assert once.launches == (1, 1) and often.launches == (3, 3) and often.bytes == (1920, 960)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.fc(x)) + torch.tanh(self.fc(x + 1))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 8)

    def forward(self, x):
        gate, up = self.proj(x).chunk(2, -1)
        return F.silu(gate) * up


class Either(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, x, first=True):
        return (self.a if first else self.b)(x)


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Sequential(layer, nn.ReLU()), nn.Sequential(layer, nn.Tanh()))


@pytest.mark.parametrize(
    ("build", "launches", "sizes"),
    [
        (Twice, (2, 2), (640, 320)),  # 2 sites of 10 positions, 4 features, 4 bytes; 2 moves forward, 1 backward
        (tied, (2, 2), (640, 320)),
        (Either, (1, 1), (320, 160)),
        (Gated, (1, 2), (320, 640)),
    ],
    ids=["called twice", "in two places", "not called", "gated"],
)
def test_each_site_saves_as_often_as_it_runs(build, launches, sizes):
    report = fusedact.report(fusedact.fuse(build()), torch.zeros(10, 4))
    assert report.launches == launches and report.bytes == sizes
    assert report.left == ()


def test_a_layer_that_is_fused_once_and_left_once_saves_once():
    mixed = (site("", "fc", width=8, launches=(1, 1)), site("", "fc", label="Linear(4, 8)", reason="it is the result"))
    assert Report(mixed).measured({"fc": Passed(2, 20, "fc")}).launches == (1, 1)


def test_a_loss_is_taken_once():
    loss = Site("", ("LogSoftmax", "NLLLoss"), "loss", "LogSoftmax + NLLLoss", launches=(1, 1))
    assert Report((loss,)).measured({"fc": Passed(3, 30, "fc")}).launches == (1, 1)


def test_halves_of_a_projection():
    (found,) = fusedact.report(fusedact.fuse(Gated().bfloat16())).fused
    assert (found.label, found.width, found.itemsize) == ("silu(half of Linear(4, 8)) * its other half", 4, 2)
    assert found.parts == ("proj", "silu")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    "report", [vit(), resnet(), vit().measured({"vit.pooler.fc": Passed(1, 8, "vit.pooler.fc")})], ids=range(3)
)
def test_lines_fit(report, width):
    lines = report.text(width).splitlines()
    assert all(len(line) <= width and line == line.rstrip() for line in lines)


def test_a_narrow_line_breaks_at_dots_and_spaces():
    text = " ".join(vit().text(80).split())
    for word in ("{0..11}.", "mlp", "gelu,", "classifier"):
        assert word in text
    long = Report((site("", "x" * 40, label="y" * 90, width=1),))
    assert "yyy…yyy" in long.text(80)


def test_it_is_as_wide_as_the_terminal(monkeypatch):
    for width in (80, 160):
        monkeypatch.setenv("COLUMNS", str(width))
        assert str(vit()) == vit().text(width)


def test_nothing_found():
    assert str(Report(())).startswith("No site: ")
    assert resnet().text(100).startswith("Sites fused: 0 of 33\n\nSites left as they are: 33\n")


# Positions


class Conv1D(nn.Module):
    """transformers': a linear layer with the weight transposed."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        shape = x.size()[:-1] + (4,)  # noqa: RUF005, as it is recognized
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Odd(nn.Module):
    """No layer, though it has a matrix: one that raises, or one that gives a scalar."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 4))

    @property
    def weight(self):
        raise RuntimeError("not yet")

    def forward(self, x):
        return (x * self.matrix).sum()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.shared = nn.Linear(6, 6)
        self.again = self.shared
        self.transposed = Conv1D()
        self.conv = nn.Conv2d(1, 3, 3, stride=2)
        self.up = nn.ConvTranspose1d(3, 2, 2, stride=2)
        self.norm = nn.BatchNorm1d(2)
        self.unused = nn.Linear(1, 1)
        self.modes = []

    def forward(self, tokens, image):
        self.modes.append((self.training, self.norm.training, torch.is_grad_enabled()))
        words = self.transposed(self.again(self.shared(self.embed(tokens))))
        return words, self.norm(self.up(self.conv(image).flatten(2)))


INPUTS = {"tokens": torch.zeros(2, 7, dtype=torch.long), "image": torch.ones(4, 1, 9, 9)}
FOUND = {
    "shared": Passed(2, 28, "shared"),
    "again": Passed(2, 28, "shared"),
    "transposed": Passed(1, 14, "transposed"),
    "conv": Passed(1, 4 * 4 * 4, "conv"),
    "up": Passed(1, 4 * 32, "up"),
    "unused": Passed(0, 0, "unused"),
}


@pytest.mark.parametrize("inputs", [INPUTS, tuple(INPUTS.values())], ids=["keywords", "arguments"])
def test_positions(inputs):
    model = Model()
    model.norm.eval()
    before = {name: (module.training, dict(module._forward_hooks)) for name, module in model.named_modules()}
    mean = model.norm.running_mean.clone()
    assert positions(model, inputs) == FOUND
    assert model.modes == [(False, False, False)] and torch.equal(model.norm.running_mean, mean)
    assert before == {name: (module.training, dict(module._forward_hooks)) for name, module in model.named_modules()}


def test_positions_of_one_tensor_and_of_an_image_without_a_batch():
    assert positions(nn.Linear(3, 5), torch.ones(2, 4, 3)) == {"": Passed(1, 8, "")}
    assert positions(nn.Conv2d(3, 5, 1), torch.ones(3, 4, 6)) == {"": Passed(1, 24, "")}


def test_positions_look_at_no_weight():
    assert positions(Odd(), torch.ones(2, 4)) == {}
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5))
    before = model.state_dict()["parametrizations.weight.0._u"].clone()
    assert positions(model, torch.ones(2, 3)) == {"": Passed(1, 2, "")}
    assert torch.equal(model.state_dict()["parametrizations.weight.0._u"], before)


@pytest.mark.parametrize("inputs", [[torch.ones(1, 3)], "x", 3], ids=lambda value: type(value).__name__)
def test_inputs_are_a_tensor_a_tuple_or_a_mapping(inputs):
    with pytest.raises(TypeError, match=f"inputs must be a Tensor, a tuple .* not {type(inputs).__name__}"):
        positions(nn.Linear(3, 5), inputs)


def test_a_fault_in_the_model_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(3, 3))
    model[1].eval()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        positions(model, torch.ones(1, 2))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
