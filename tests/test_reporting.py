"""The report of fuse(): sites that repeat in one row, lines that fit, positions counted."""

import pytest
import torch
from torch import nn

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


def test_a_resnet_is_parted_as_little_as_can_be():
    wheres = {row.where: len(row.sites) for row in rows(resnet().sites)}
    assert wheres["resnet.encoder.stages.0.layers.{0..2}.layer.1.convolution"] == 3
    assert wheres["resnet.encoder.stages.2.layers.{1..5}.layer.0.convolution"] == 5
    assert len(wheres) == 13


# Text


def test_a_report_reads_so():
    assert vit().text(110).splitlines() == [
        "Sites fused: 13 of 14",
        "  where                         what                                         launches  bytes a position",
        "  vit.layers.{0..11}.mlp  12 x  Linear(768, 3072) + gelu, Linear(3072, 768)     1 + 2   12,288 + 24,576",
        "  vit.pooler                    Linear(768, 768) + tanh                         1 + 1     6,144 + 3,072",
        "",
        "Saved in a step, forward + backward: 13 + 25 launches. By formula, in training, where Triton runs, against",
        "torch's operations one after the other. A position is a row of a linear layer, or a pixel of a convolution's",
        "output; report(model, inputs) counts them.",
        "",
        "Sites left as they are: 1",
        "  1: no activation follows",
        "    classifier    Linear(768, 1000)",
    ]


def test_with_positions_it_says_what_a_step_saves():
    counted = vit().measured({f"vit.layers.{i}.mlp.fc1": Passed(1, 1576) for i in range(12)})
    text = counted.text(110)
    assert "launches  positions  bytes a step" in text and "bytes a position" not in text
    assert "1 + 2      1,576     697.17 MB" in text  # 12 x 1576 x 3072 x 4 x 3
    assert "1 + 1          -             -" in text
    assert "13 + 25 launches and 232.39 MB + 464.78 MB of reads and writes." in text
    assert counted.launches == (13, 25) and counted.bytes == (232_390_656, 464_781_312)
    assert vit().bytes is None


def test_a_site_without_a_layer_of_its_own_takes_its_modules_positions():
    gated = Site("mlp", ("mlp.act", "mul"), "gated", "silu * up", None, 10, 2, (1, 2), (2, 4))
    beside = {"mlp.gate": Passed(1, 7), "mlp.up": Passed(1, 7), "head": Passed(1, 9)}
    assert Report((gated,)).measured(beside).bytes == (7 * 10 * 2 * 2, 7 * 10 * 2 * 4)
    assert Report((gated,)).measured(beside | {"mlp.down": Passed(1, 8)}).bytes is None


def test_a_layer_called_often_saves_often():
    once = Report((site("shared", width=8, launches=(1, 1), moves=(2, 1)),))
    often = once.measured({"shared.fc": Passed(3, 30)})
    assert once.launches == (1, 1) and often.launches == (3, 3) and often.bytes == (1920, 960)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("report", [vit(), resnet(), vit().measured({"vit.pooler.fc": Passed(1, 8)})], ids=range(3))
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
        return x @ self.weight + self.bias


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
    "shared": Passed(2, 28),
    "again": Passed(2, 28),
    "transposed": Passed(1, 14),
    "conv": Passed(1, 4 * 4 * 4),
    "up": Passed(1, 4 * 32),
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
    assert positions(nn.Linear(3, 5), torch.ones(2, 4, 3)) == {"": Passed(1, 8)}
    assert positions(nn.Conv2d(3, 5, 1), torch.ones(3, 4, 6)) == {"": Passed(1, 24)}


def test_a_fault_in_the_model_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(3, 3))
    model[1].eval()
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        positions(model, torch.ones(1, 2))
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert not any(module._forward_hooks for module in model.modules())
