"""The modules: torch.nn's arguments, state, repr and identity, and which neighbours Sequential fuses."""

import copy
import pickle

import pytest
import torch

import fusedact
from fusedact import nn
from fusedact.activations import ACTIVATIONS


@pytest.fixture
def fused_calls(monkeypatch):
    """Names of the activations that were fused, of one layer or of a row of them, in order."""
    calls = []
    originals = fusedact.autograd.linear_act, fusedact.autograd.linear_chain

    def layer(*args):
        calls.append(args[4])
        return originals[0](*args)

    def chain(x, activations, tensors):
        calls.extend(activation[0] for activation in activations if activation)
        return originals[1](x, activations, tensors)

    monkeypatch.setattr(fusedact.autograd, "linear_act", layer)
    monkeypatch.setattr(fusedact.autograd, "linear_chain", chain)
    return calls


def pair(first=None, second=None):
    return nn.Sequential(first or nn.Linear(4, 3), second or nn.ReLU())


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Louder(torch.nn.ReLU):
    def forward(self, x):
        return 3 * super().forward(x)


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


def replaced(module):
    module.forward = lambda x: torch.zeros_like(x[..., :3])
    return module


@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (lambda: pair(), ["relu"]),
        (lambda: pair(torch.nn.Linear(4, 3)), ["relu"]),
        (lambda: pair(second=nn.GELU("tanh")), ["gelu_tanh"]),
        (lambda: pair(second=nn.LeakyReLU(0.3)), ["leaky_relu"]),
        (lambda: pair(second=nn.ReLU(inplace=True)), ["relu"]),
        (lambda: pair(second=nn.PReLU(3)), ["prelu"]),
        (lambda: pair(nn.Linear(4, 3, activation="tanh")), ["tanh"]),
        (lambda: nn.Sequential(pair(), nn.Linear(3, 2), nn.Sigmoid()), ["relu", "sigmoid"]),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.ReLU()), []),
        (lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), []),
        (lambda: pair(second=nn.Softmax(1)), []),
        (lambda: pair(Doubled(4, 3)), []),
        (lambda: pair(second=Louder()), []),
        (lambda: pair(hooked(nn.Linear(4, 3))), []),
        (lambda: pair(second=hooked(nn.ReLU())), []),
        (lambda: pair(replaced(nn.Linear(4, 3))), []),
        (lambda: pair(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), []),
    ],
)
def test_what_sequential_fuses(model, fused, device, triton_backend, fused_calls):
    torch.manual_seed(0)
    model, x = model().to(device), torch.randn(5, 4, device=device)
    ours = model(x)
    assert fused_calls == fused
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(ours, model(x))
    assert fused_calls == fused


def test_one_activation_object_at_several_places(device, triton_backend, fused_calls):
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 5), relu, nn.Linear(5, 5), relu, nn.Linear(5, 2)).to(device)
    model(torch.randn(3, 4, device=device))
    assert fused_calls == ["relu", "relu"]


def test_a_global_hook_is_seen_by_every_module(device, triton_backend, fused_calls):
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m).__name__))
    try:
        pair().to(device)(torch.randn(3, 4, device=device))
    finally:
        handle.remove()
    assert seen == ["Linear", "ReLU", "Sequential"] and not fused_calls


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (lambda: nn.Linear(4, 3), lambda: torch.nn.Linear(4, 3)),
        (lambda: nn.Linear(4, 3, bias=False), lambda: torch.nn.Linear(4, 3, bias=False)),
        (lambda: nn.Linear(4, 3, activation="relu"), lambda: torch.nn.Linear(4, 3)),
        (
            lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU()),
            lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.PReLU()),
        ),
        (lambda: nn.CrossEntropyLoss(torch.ones(3)), lambda: torch.nn.CrossEntropyLoss(torch.ones(3))),
        (
            lambda: nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
            lambda: torch.nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
        ),
    ],
)
def test_state_dict_is_stocks(ours, stock):
    ours, stock = ours(), stock()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in stock.state_dict().items()}
    ours.load_state_dict(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    assert isinstance(ours, type(stock))


def test_repr_is_stocks():
    relu = torch.nn.ReLU()
    ours = nn.Sequential(nn.Linear(4, 3), relu, nn.Linear(3, 2, bias=False))
    stock = torch.nn.Sequential(torch.nn.Linear(4, 3), relu, torch.nn.Linear(3, 2, bias=False))
    assert repr(ours) == repr(stock)
    assert repr(nn.CrossEntropyLoss()) == repr(torch.nn.CrossEntropyLoss())
    assert "activation='step'" in repr(nn.Linear(4, 3, activation="step"))


def test_same_weights_from_the_same_seed():
    torch.manual_seed(3)
    ours = nn.Sequential(nn.Linear(4, 3, activation="prelu"), nn.Linear(3, 2))
    torch.manual_seed(3)
    stock = [torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)]
    for a, b in zip(ours, stock, strict=True):
        assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(clone):
    model = nn.Sequential(nn.Linear(4, 3, activation="gelu"), nn.Linear(3, 2), nn.Tanh())
    twin, x = clone(model), torch.randn(5, 4)
    assert type(twin) is nn.Sequential and torch.equal(twin(x), model(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_linear_takes_every_name(name, device, triton_backend, fused_calls):
    layer = nn.Linear(4, 3, activation=name).to(device)
    x = torch.randn(5, 4, device=device)
    ours = layer(x)
    assert fused_calls == [name]
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(ours, layer(x))


def test_linear_takes_a_module_it_does_not_know(device, triton_backend, fused_calls):
    layer = nn.Linear(4, 3, activation=nn.Softmax(-1)).to(device)
    assert torch.allclose(layer(torch.randn(5, 4, device=device)).sum(-1), torch.ones(5, device=device))
    assert not fused_calls


def test_linear_respects_its_activations_hooks(device, triton_backend, fused_calls):
    layer = nn.Linear(4, 3, activation=hooked(nn.ReLU())).to(device)
    assert layer(torch.randn(5, 4, device=device)).min() >= 1 and not fused_calls


def test_slicing_and_editing_a_sequential(device, triton_backend, fused_calls):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh()).to(device)
    assert type(model[:2]) is nn.Sequential
    model[1] = nn.SiLU()
    del model[3]
    model.append(nn.ELU())
    model(torch.randn(2, 4, device=device))
    assert fused_calls == ["silu", "elu"]


def test_optimizer_and_training_step(device, triton_backend):
    """Ten steps of Adam on ours and on stock from one state: the same weights."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    stock = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).to(device)
    stock.load_state_dict(ours.state_dict())
    x, target = torch.randn(20, 4, device=device), torch.randint(0, 3, (20,), device=device)
    for model, loss in ((ours, nn.CrossEntropyLoss()), (stock, torch.nn.CrossEntropyLoss())):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model(x), target).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
