"""`fit` by one launch for many steps, interpreted, and by CUDA graphs, recorded as Python, against the plain loop."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fusedact.fitting import Training, fit, graph
from fusedact.fitting import persistent as one_launch

NETWORKS = {
    "one warp": lambda: nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid()),
    "one layer": lambda: nn.Sequential(nn.Linear(60, 3), nn.Sigmoid()),
    "layers": lambda: nn.Sequential(
        nn.Linear(20, 33), nn.GELU(), nn.Linear(33, 18, bias=False), nn.ReLU(), nn.Linear(18, 3)
    ),
}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.3),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.02),
}


def rows(model, device):
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    x, y = torch.randn(23, layers[0].in_features), torch.rand(23, layers[-1].out_features)
    return x.to(device), y.to(device)


def objective(name):
    return nn.MSELoss() if name == "layers" else nn.BCELoss()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_persistent_is_the_loop(name, optimizer, triton_backend, launches, device, as_accurate_as_torch):
    """With a shorter last batch, twice, so that the second run goes on from the first one's optimizer."""
    model = NETWORKS[name]().to(device)
    x, y = rows(model, device)
    runs = {}
    for engine, dtype in (("persistent", torch.float32), ("loop", torch.float32), ("truth", torch.float64)):
        twin = copy.deepcopy(model).to(dtype)
        made = OPTIMIZERS[optimizer](twin.parameters())
        costs = []
        for _ in range(2):
            launches.reset()
            fitted = fit(
                twin, x.to(dtype), y.to(dtype), loss=objective(name), optimizer=made, epochs=1, batch_size=8,
                generator=torch.Generator().manual_seed(1), engine="loop" if engine == "truth" else engine,
            )  # fmt: skip
            costs += fitted.costs
            assert engine != "persistent" or launches.count == 1
        moments = [t.to(dtype) for state in made.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        runs[engine] = [*(p.detach() for p in twin.parameters()), *moments, torch.tensor(costs, dtype=dtype)]
    for three in zip(*runs.values(), strict=True):
        as_accurate_as_torch(*three)


def test_a_long_run_is_several_launches_and_the_same_bits(triton_backend, launches, device, monkeypatch):
    model = NETWORKS["one warp"]().to(device)
    x, y = rows(model, device)
    twin = copy.deepcopy(model)
    common = {"loss": nn.BCELoss(), "optimizer": torch.optim.Adam, "lr": 0.1, "batch_size": 8, "shuffle": False}
    fit(model, x, y, epochs=3, engine="persistent", **common)
    monkeypatch.setattr(one_launch, "TINY_STEPS", 2)
    training = Training(twin, x, y, engine="persistent", **common)
    training._epochs_per_slice = 3
    launches.reset()
    training.slice(3)
    assert launches.count == 5
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", NETWORKS)
def test_persistent_stops_before_what_is_not_finite(name, triton_backend, device):
    model = NETWORKS[name]().to(device)
    x, y = rows(model, device)
    x[13] = torch.nan
    twin = copy.deepcopy(model)
    common = {"loss": objective(name), "optimizer": torch.optim.SGD, "lr": 0.1, "batch_size": 5, "shuffle": False}
    with pytest.raises(FloatingPointError, match="the cost is nan at epoch 1, step 3"):
        fit(model, x, y, epochs=2, engine="persistent", **common)
    fit(twin, x[:10], y[:10], epochs=1, engine="loop", **common)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_a_launch_whose_programs_waited_in_vain_is_an_error(triton_backend, device, monkeypatch):
    """The flag that a barrier sets when it gives up."""
    from fusedact.kernels import training_single

    model = NETWORKS["one layer"]().to(device)
    x, y = rows(model, device)
    kept = copy.deepcopy(model.state_dict())
    train = training_single.train

    def given_up(*args):
        train(*args)
        args[7].fill_(1)

    monkeypatch.setattr(training_single, "train", given_up)
    with pytest.raises(RuntimeError, match="waited for each other in vain"):
        Training(model, x, y, loss=nn.BCELoss(), optimizer=torch.optim.SGD, batch_size=8, engine="persistent").slice(1)
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)


def test_what_one_launch_cannot_hold_is_said(triton_backend, device):
    model = nn.Sequential(nn.Linear(4, 5000), nn.ReLU(), nn.Linear(5000, 3000)).to(device)
    x, y = torch.randn(8, 4, device=device), torch.randn(8, 3000, device=device)
    with pytest.raises(ValueError, match="does not hold a network of widths 4-5000-3000 at batch 4"):
        fit(
            model, x, y, loss=nn.MSELoss(), optimizer=torch.optim.SGD, epochs=1, batch_size=4, engine="persistent"
        )  # fmt: skip


def test_the_loop_fuses_torchs_own_layers_and_losses(triton_backend, launches, device):
    x, y = torch.randn(4, 3, device=device), torch.randint(0, 2, (4,), device=device)
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU()).to(device)
    fit(model, x, y, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD, epochs=1, batch_size=4, engine="loop")
    assert launches.count == 5  # linear+ReLU, cross-entropy; its gradient, dz with db, dW


# CUDA graphs


@pytest.fixture
def recorded(monkeypatch, device):
    """Without a GPU, what would be captured is called again at each replay."""
    if device == "cpu":

        def record(warm_up, body, device):
            for _ in range(graph.WARM_UP):
                warm_up()
            body()
            return SimpleNamespace(replay=body)

        monkeypatch.setattr(graph, "record", record)
        monkeypatch.setattr(graph, "DEVICES", ("cpu",))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_graph_is_the_loop(optimizer, drop_last, recorded, device, monkeypatch):
    """Of a model that one launch cannot hold, with a buffer; twice; a graph holds two steps at most."""
    monkeypatch.setattr(graph, "MOST_STEPS", 2)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.PReLU(), nn.Linear(6, 2)).to(device).double()
    x, y = rows(model, device)
    x, y, twin = x.double(), y.double(), copy.deepcopy(model)
    ours, theirs = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, twin))
    options = copy.deepcopy(ours.state_dict()["param_groups"])
    for epochs in (1, 2):
        common = {"loss": nn.MSELoss(), "epochs": epochs, "batch_size": 3, "drop_last": drop_last, "shuffle": False}
        fitted = fit(model, x, y, optimizer=ours, engine="graph", **common)
        stock = fit(twin, x, y, optimizer=theirs, engine="loop", **common)
        assert fitted.costs == pytest.approx(stock.costs, rel=1e-12)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=1e-9, atol=1e-12)
    assert ours.state_dict()["param_groups"] == options


def test_graph_stops_before_what_is_not_finite(recorded, device):
    model = nn.Sequential(nn.Linear(3, 2), nn.PReLU()).to(device)
    x, y = rows(nn.Sequential(model[0]), device)
    x[13] = torch.nan
    twin = copy.deepcopy(model)
    common = {"loss": nn.MSELoss(), "optimizer": torch.optim.Adam, "lr": 0.1, "batch_size": 5, "shuffle": False}
    with pytest.raises(FloatingPointError, match="the cost is nan at epoch 1, step 3"):
        fit(model, x, y, epochs=2, engine="graph", **common)
    fit(twin, x[:10], y[:10], epochs=1, engine="loop", **common)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_a_capture_that_fails_leaves_nothing_behind(recorded, device, monkeypatch):
    def record(warm_up, body, device):
        warm_up()
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(graph, "record", record)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(device)
    x, y = rows(nn.Sequential(model[0]), device)
    kept = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"cannot capture a step: operation not permitted when stream is capturing$"):
        Training(model, x, y, loss=nn.MSELoss(), optimizer=torch.optim.SGD, lr=0.5, batch_size=4, engine="graph")
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.RMSprop, "RMSprop is not supported"),
        (partial(torch.optim.SGD, momentum=0.9, dampening=0.1), "dampening"),
    ],
)
def test_what_a_graph_cannot_hold_is_said(optimizer, message, recorded, device):
    x, y = torch.randn(8, 3, device=device), torch.randn(8, 2, device=device)
    with pytest.raises(ValueError, match=message):
        Training(nn.Linear(3, 2).to(device), x, y, loss=nn.MSELoss(), optimizer=optimizer, batch_size=4, engine="graph")
