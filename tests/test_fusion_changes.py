"""A fused model whose layers, activations or parameters are not what they seem, or are changed after fuse()."""

import copy
import inspect

import pytest
import torch
from samples.networks import Low, Network, alike, answers, both, kinds
from torch import nn
from torch.nn.utils import parametrizations, prune

import fusedact

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def two(device):
    """The network fused, and its stock twin."""
    stock = Network().to(device).eval()
    return fusedact.fuse(copy.deepcopy(stock)), stock


@pytest.fixture
def x(device):
    return torch.randn(5, 3, 6, 6, device=device)


# Parameters that are not what they seem


def normed(model):
    for name in ("conv", "fc", "gate"):
        parametrizations.weight_norm(getattr(model, name))


def spectral(model):
    """In training each look at the weight moves the singular vectors on."""
    for name in ("conv", "fc", "gate"):
        parametrizations.spectral_norm(getattr(model, name))
    model.train()


def pruned(model):
    for name in ("conv", "fc", "gate"):
        prune.l1_unstructured(getattr(model, name), "weight", amount=0.5)


def tied(model):
    model.up.weight = model.gate.weight


def frozen(model):
    model.fc.requires_grad_(False)
    model.conv.weight.requires_grad_(False)


def legacy_normed(model):
    torch.nn.utils.weight_norm(model.fc)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("change", [normed, spectral, pruned, tied, frozen, legacy_normed])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_parameters_changed(change, before, device, x):
    stock = Network().to(device).eval()
    ours = copy.deepcopy(stock)
    if not before:
        fusedact.fuse(ours)
    both(change, (ours, stock))
    if before:
        fusedact.fuse(ours)
    results = []
    for model in (ours, stock):
        torch.manual_seed(3)
        results.append(answers(model, x))
    alike(*results)
    alike(ours.state_dict().values(), stock.state_dict().values())
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_all_frozen(two, x):
    ours, stock = (model.requires_grad_(False) for model in two)
    assert not ours(x).requires_grad
    torch.testing.assert_close(ours(x), stock(x))
    alike(answers(ours, x), answers(stock, x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, two, x):
    with mode():
        torch.testing.assert_close(two[0](x), two[1](x))


# What is changed after fuse()


def lora(model):
    model.fc = Low(model.fc)


def wider(model):
    model.fc, model.gate, model.up = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(9, 4)


def no_layer(model):
    model.fc = nn.Sequential(nn.Linear(4, 5), nn.Tanh())


def other_activation(model):
    model.act = nn.Tanh()


def no_activation(model):
    model.act = nn.Identity()


def of_rows(model):
    model.act = nn.Softmax(-1)


def learned(model):
    model.act = nn.PReLU()


def other_parameters(model):
    model.conv.stride, model.conv.padding_mode, model.conv.padding = (2, 2), "circular", (1, 1)


def tanh_gelu(model):
    model.act.approximate = "tanh"


def own_forward(model):
    model.act.forward = lambda x: 3 * x


def own_forward_of_the_owner(model):
    model.forward = lambda x: type(model).forward(model, x, 0.5)


def without_bias(model):
    model.fc.bias = None


AFTER = [
    lora,
    wider,
    no_layer,
    other_activation,
    no_activation,
    of_rows,
    learned,
    other_parameters,
    tanh_gelu,
    own_forward,
    own_forward_of_the_owner,
    without_bias,
]


@pytest.mark.parametrize("change", AFTER)
def test_changed_after(change, two, x, device):
    both(change, two)
    ours, stock = (model.to(device) for model in two)
    alike(answers(ours, x), answers(stock, x))


@pytest.mark.parametrize("change", AFTER)
def test_changed_before(change, device, x):
    stock = Network().to(device).eval()
    ours = copy.deepcopy(stock)
    both(change, (ours, stock))
    fusedact.fuse(ours)
    ours, stock = ours.to(device), stock.to(device)
    alike(answers(ours, x), answers(stock, x))


EDITS = {
    "slice": lambda model: model[1:],
    "sum": lambda model: model + model,
    "append": lambda model: model.append(nn.GELU()),
    "insert": lambda model: model.insert(1, nn.Linear(4, 4)),
    "delete": lambda model: model.__delitem__(1),
    "set": lambda model: model.__setitem__(1, nn.SiLU()),
    "extend": lambda model: model.extend([nn.Linear(4, 4), nn.ReLU()]),
    "copy": copy.copy,
}


@pytest.mark.parametrize("edit", EDITS)
def test_sequential_edited_after(edit, device):
    stock = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh())
    ours, x, results = fusedact.fuse(copy.deepcopy(stock)), torch.randn(3, 4, device=device), []
    for model in (ours, stock):
        torch.manual_seed(1)
        results.append(answers(model.to(device), x, (EDITS[edit](model) or model).to(device)))
    alike(*results)


def test_class_patched_after(two, x, monkeypatch):
    """As libraries do that replace the forward of a class of someone else's."""
    forward = Network.forward
    monkeypatch.setattr(Network, "forward", lambda self, x: 3 * forward(self, x))
    alike(answers(two[0], x), answers(two[1], x))


def test_train_and_eval(two, x):
    for mode in (True, False, True):
        results = []
        for model in two:
            torch.manual_seed(4)
            results.append(answers(model.train(mode), x))
        alike(*results)


# What it looks like


def test_identity(two):
    ours, stock = two
    assert isinstance(ours, Network) and type(ours).__name__ == "Network" and repr(ours) == repr(stock)
    assert type(ours).__qualname__ == "Network" and type(ours).__module__ == Network.__module__
    assert inspect.signature(ours.forward) == inspect.signature(stock.forward)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in stock.named_modules()]


@pytest.mark.parametrize(
    "call", [{"scale": 2.0}, {"scale": torch.tensor(0.5)}, {"x": None}], ids=["2.0", "tensor", "x"]
)
def test_arguments(call, two, x):
    results = [model(**{**call, "x": x}) if "x" in call else model(x, **call) for model in two]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("wrong", [(), (1,), (None,), ("x", "y", "z")])
def test_errors_are_stocks(wrong, two):
    errors = []
    for model in two:
        with pytest.raises(Exception) as caught:
            model(*wrong)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


def test_fused_twice_and_unfused_twice(two, x):
    ours, stock = two
    first = kinds(ours)
    assert kinds(fusedact.fuse(ours)) == first
    assert type(fusedact.unfuse(ours)) is Network
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)


class Registered(nn.Module):
    """A class that wants something of its subclasses."""

    def __init_subclass__(cls, *, name):
        super().__init_subclass__()
        cls.name = name


class Named(Registered, name="named"):
    def __init__(self):
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(self.fc(x))


def test_class_that_takes_part_in_subclassing(device):
    stock, x = Named().to(device), torch.randn(3, 4, device=device)
    ours = fusedact.fuse(copy.deepcopy(stock))
    alike(answers(ours, x), answers(stock, x))
    assert ours.name == "named"


def test_lazy_layers(device):
    """Left until they are made."""
    stock, x = nn.Sequential(nn.LazyLinear(4), nn.ReLU()).to(device), torch.randn(3, 4, device=device)
    ours = fusedact.fuse(copy.deepcopy(stock))
    for model in (ours, stock):
        torch.manual_seed(1)
        model(x)
    alike(answers(ours, x), answers(stock, x))
    assert kinds(fusedact.fuse(ours)) == ["linear"]


def test_one_module_at_two_places(device):
    shared = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    stock = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, shared)}).to(device)
    ours, x = fusedact.fuse(copy.deepcopy(stock)), torch.randn(3, 4, device=device)
    assert ours["a"] is ours["b"][0]
    alike(answers(ours, x, ours["b"]), answers(stock, x, stock["b"]))


def test_fit_takes_a_fused_model_as_it_takes_it_unfused():
    """By the same engine, but for a model whose end its loss took over."""
    stock, x, y = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(8, 4), torch.arange(8) % 3
    runs = []
    for joined in (None, False, True):
        model, loss = copy.deepcopy(stock), nn.CrossEntropyLoss()
        if joined is not None:
            model, loss = fusedact.fuse(model, loss) if joined else (fusedact.fuse(model), loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        runs.append(fusedact.fit(model, x, y, loss=loss, optimizer=optimizer, epochs=2, batch_size=4, shuffle=False))
    assert runs[0].engine == runs[1].engine != runs[2].engine == "loop"
    assert runs[1].costs == runs[0].costs and runs[2].costs == pytest.approx(runs[0].costs, rel=1e-5)
