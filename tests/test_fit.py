"""`fit` against the stock loop over a DataLoader: batches, costs, weights, the optimizer's state; faults; choices."""

import copy
import math
import re
import sys
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fusedact
from fusedact import data
from fusedact.fitting import Training, fit
from fusedact.fitting.order import orders
from fusedact.fitting.recipe import read

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.3),
    "decayed": partial(torch.optim.SGD, lr=0.1, weight_decay=0.01),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.02),
    "adamw": partial(torch.optim.AdamW, lr=0.01),
}
# The last activation, the loss, and whether its targets are labels.
LOSSES = {
    "bce": (nn.Sigmoid(), nn.BCELoss(), False),
    "bce not of a sigmoid": (nn.Hardsigmoid(), nn.BCELoss(reduction="sum"), False),
    "bce on logits": (nn.Identity(), fusedact.nn.BCEWithLogitsLoss(), False),
    "cross-entropy": (nn.Identity(), nn.functional.cross_entropy, True),
    "cross-entropy of tanh": (nn.Tanh(), nn.CrossEntropyLoss(reduction="sum"), True),
    "squared error": (nn.Tanh(), nn.MSELoss(), False),
}
ROWS = 23


def stock_loop(model, x, y, loss, optimizer, *, epochs, batch_size, drop_last=False, shuffle=True, generator=None):
    """The costs of the loop that `fit` stands for."""
    costs = []
    for _ in range(epochs):
        loader = DataLoader(
            TensorDataset(x, y), batch_size, shuffle=shuffle, drop_last=drop_last, generator=generator
        )  # fmt: skip
        steps = []
        for rows, targets in loader:
            optimizer.zero_grad()
            cost = loss(model(rows), targets)
            cost.backward()
            optimizer.step()
            steps.append(cost.item())
        costs.append(sum(steps) / len(steps))
    return costs


def case(name, dtype):
    last, loss, labels = LOSSES[name]
    model = nn.Sequential(
        nn.Linear(3, 5), nn.GELU(), fusedact.nn.Linear(5, 4, bias=False, activation="relu"), nn.Linear(4, 2), last
    ).to(dtype)  # fmt: skip
    x = torch.randn(ROWS, 3, dtype=dtype)
    return model, x, torch.randint(0, 2, (ROWS,)) if labels else torch.rand(ROWS, 2, dtype=dtype), loss


def assert_same(ours, theirs, rtol, atol):
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("engine", ["steps", "loop"])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LOSSES)
def test_fit_is_the_stock_loop(name, optimizer, drop_last, engine):
    """In float64 to its last digits; a resumed optimizer too, as the second call goes on from the first."""
    model, x, y, loss = case(name, torch.float64)
    twin = copy.deepcopy(model)
    ours, theirs = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, twin))
    for epochs in (2, 3):
        options = {"epochs": epochs, "batch_size": 5, "drop_last": drop_last}
        fitted = fit(
            model, x, y, loss=loss, optimizer=ours, engine=engine, generator=torch.Generator().manual_seed(3), **options
        )
        costs = stock_loop(twin, x, y, loss, theirs, generator=torch.Generator().manual_seed(3), **options)
        assert fitted.engine == engine and fitted.optimizer is ours
        assert fitted.costs == pytest.approx(costs, rel=1e-12)
        assert_same(model.state_dict(), twin.state_dict(), 1e-11, 1e-12)
        assert_same(ours.state_dict()["state"], theirs.state_dict()["state"], 1e-9, 1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_follows_to_rounding(name):
    model, x, y, loss = case(name, torch.float32)
    twin = copy.deepcopy(model)
    options = {"epochs": 20, "batch_size": 5, "shuffle": False}
    fitted = fit(model, x, y, loss=loss, optimizer=torch.optim.Adam, lr=0.01, **options)
    costs = stock_loop(twin, x, y, loss, torch.optim.Adam(twin.parameters(), lr=0.01), **options)
    assert fitted.costs == pytest.approx(costs, rel=1e-4)
    assert_same(model.state_dict(), twin.state_dict(), 1e-3, 1e-4)


@pytest.mark.parametrize("generator", [None, 5])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("rows", "batch_size"), [(1, 1), (7, 7), (10, 4), (12, 4)])
def test_order_is_the_data_loaders(rows, batch_size, shuffle, generator):
    """Also what it leaves of the generator, so that every later pass is the loader's too."""

    def generators():
        torch.manual_seed(1)
        return generator if generator is None else torch.Generator().manual_seed(generator)

    g = generators()
    loader = DataLoader(range(rows), batch_size, shuffle=shuffle, generator=g)
    theirs = [torch.cat(list(loader)).tolist() for _ in range(3)]
    left = torch.get_rng_state() if g is None else g.get_state()
    g = generators()
    assert orders(2, rows, g, shuffle).tolist() + orders(1, rows, g, shuffle).tolist() == theirs
    assert torch.equal(torch.get_rng_state() if g is None else g.get_state(), left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_saturated_sigmoids_meet_bceloss_clamp(scale, dtype):
    """p (1 - p) under 1e-12 for none, some and nearly all rows: the same weights whichever way a block takes."""
    x, y = (t.to(dtype) for t in data.binary(200))
    model = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(scale / 100)
    twin = copy.deepcopy(model)
    options = {"epochs": 5, "batch_size": 16, "shuffle": False}
    fitted = fit(model, x, y, loss=nn.BCELoss(), optimizer=torch.optim.SGD, lr=1e-4, engine="steps", **options)
    costs = stock_loop(twin, x, y, nn.BCELoss(), torch.optim.SGD(twin.parameters(), lr=1e-4), **options)
    tight = dtype == torch.float64
    assert fitted.costs == pytest.approx(costs, rel=1e-9 if tight else 1e-4)
    assert_same(model.state_dict(), twin.state_dict(), 1e-9 if tight else 1e-4, 1e-12 if tight else 1e-6)


@given(slices=st.lists(st.integers(1, 7), min_size=1, max_size=4), batch_size=st.integers(1, 40))
def test_how_a_run_is_cut_changes_no_bit(slices, batch_size):
    """Blocks, slices and the way around a clamp are no part of the result."""
    x, y = data.binary(100)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    twin = copy.deepcopy(model)
    common = {"loss": nn.BCELoss(), "optimizer": torch.optim.Adam, "lr": 0.1, "batch_size": batch_size}
    one, many = (Training(m, x, y, generator=torch.Generator().manual_seed(0), **common) for m in (model, twin))
    many._epochs_per_slice = sum(slices)
    many.slice(sum(slices))
    for epochs in slices:
        one._epochs_per_slice = epochs
        one.slice(epochs)
    assert one.fitted.costs == many.fitted.costs
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("engine", ["steps", "loop"])
@pytest.mark.parametrize("poison", ["x", "step"])
def test_what_is_not_finite_stops_before_that_step(engine, poison):
    """A NaN row is met in epoch 1, step 3; a rate of 1e38 makes the weights, and so the next cost, infinite."""
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    model = nn.Sequential(nn.Linear(3, 1))
    twin = copy.deepcopy(model)
    lr, steps = (0.1, 2) if poison == "x" else (1e38, 0)
    if poison == "x":
        x[9] = torch.nan
    stock_loop(
        twin, x[: 4 * steps], y[: 4 * steps], nn.MSELoss(), torch.optim.SGD(twin.parameters(), lr=lr),
        epochs=1 if steps else 0, batch_size=4, shuffle=False,
    )  # fmt: skip
    where = "the cost is nan at epoch 1, step 3" if poison == "x" else "at epoch 1, step"
    with pytest.raises(FloatingPointError, match=where):
        fit(
            model, x, y, loss=nn.MSELoss(), optimizer=torch.optim.SGD, lr=lr, epochs=4, batch_size=4, shuffle=False,
            engine=engine,
        )  # fmt: skip
    assert all(p.isfinite().all() for p in model.parameters())
    if poison == "x":
        assert_same(model.state_dict(), twin.state_dict(), 1e-5, 1e-6)


def test_a_fault_in_a_later_epoch_is_found():
    x, y = torch.ones(8, 1), torch.zeros(8, 1)
    model = nn.Linear(1, 1)
    options = {"loss": nn.MSELoss(), "lr": 2.0, "batch_size": 2}
    training = Training(model, x, y, optimizer=torch.optim.SGD, **options)
    training._epochs_per_slice = 100
    with pytest.raises(FloatingPointError, match=r"at epoch (\d+), step (\d+)") as fault:
        training.slice(100)
    weights = model.weight.item()
    assert abs(weights) < float("inf")
    assert f"epoch {len(training.fitted.costs) + 1}," in str(fault.value)
    with pytest.raises(FloatingPointError, match=r"at epoch 1, step 1;"):
        fit(model, x, y, optimizer=torch.optim.SGD, epochs=1, **options)
    assert model.weight.item() == weights and "epoch 1," not in str(fault.value)


def test_callback_sees_a_model_that_is_up_to_date():
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    model, seen = nn.Linear(3, 1), []

    def callback(fitted):
        seen.append((len(fitted.costs), model.weight.clone(), fitted.optimizer.state_dict()["state"][0]["step"].item()))
        return len(seen) == 3

    fitted = fit(
        model, x, y, loss=nn.MSELoss(), optimizer=torch.optim.Adam, epochs=100, batch_size=5, callback=callback, every=2
    )
    assert [(epochs, steps) for epochs, _, steps in seen] == [(2, 8), (4, 16), (6, 24)]
    assert len(fitted.costs) == 6 and torch.equal(seen[-1][1], model.weight)
    assert not torch.equal(seen[0][1], seen[1][1])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Sequential(nn.Linear(3, 1), nn.Dropout()), {}, r"layer '1' \(Dropout\) is not supported; supported"),
        (nn.Sequential(nn.Linear(3, 1), nn.PReLU()), {}, r"layer '1' \(PReLU\)"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 1)), {}, r"layer '0' \(ReLU\)"),
        (nn.Sequential(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))), {}, r"layer '0.1' \(BatchNorm1d\)"),
        (nn.Linear(3, 1), {"loss": nn.L1Loss()}, "loss L1Loss is not supported; BCELoss, "),
        (nn.Linear(3, 1), {"loss": nn.MSELoss(reduction="none")}, "MSELoss with reduction='none'"),
        (nn.Linear(3, 1), {"loss": nn.CrossEntropyLoss(ignore_index=1)}, "CrossEntropyLoss with ignore_index is not"),
        (nn.Linear(3, 1), {"loss": nn.BCEWithLogitsLoss(pos_weight=torch.ones(1))}, "with pos_weight is not"),
        (nn.Linear(3, 1), {"optimizer": torch.optim.RMSprop}, "RMSprop is not supported; SGD, Adam, AdamW are"),
        (nn.Linear(3, 1), {"optimizer": partial(torch.optim.Adam, amsgrad=True)}, "Adam with amsgrad=True"),
        (nn.Linear(3, 1).double(), {}, r"x of shape \(20, 3\) and torch.float32 .* expected \(20, 3\) torch.float64"),
        (nn.Linear(4, 1), {}, r"x of shape \(20, 3\) .* expected \(20, 4\)"),
        (nn.Linear(3, 2), {}, r"y of shape \(20, 1\) .* expected \(20, 2\)"),
        (nn.Linear(3, 1).requires_grad_(False), {"optimizer": torch.optim.SGD([torch.ones(1)])}, "frozen"),
        (nn.Linear(3, 1), {"engine": "persistent"}, "persistent"),
        (nn.Linear(3, 1), {"engine": "graph"}, "runs on a GPU, the model is on cpu"),
        (nn.Linear(3, 1), {"engine": "fast"}, "unknown engine 'fast', expected one of persistent, graph, steps, loop"),
        (nn.Linear(3, 1), {"precision": "fp4"}, "unknown precision 'fp4'"),
        (nn.Linear(3, 1), {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        (nn.Linear(3, 1), {"batch_size": 21, "drop_last": True}, "20 rows make no batch of 21"),
        (nn.Linear(3, 1), {"epochs": -1}, "epochs must be at least 0"),
        (nn.Linear(3, 1), {"y": torch.ones(19, 1)}, "x has 20 rows and y has 19"),
        (nn.Linear(3, 1), {"x": [1.0]}, "x must be a tensor of rows"),
    ],
)  # fmt: skip
def test_bad_input_is_a_value_error_that_says_what(model, options, message):
    before = copy.deepcopy(model.state_dict())
    given = {
        "x": torch.randn(20, 3), "y": torch.rand(20, 1), "loss": nn.MSELoss(), "optimizer": torch.optim.SGD,
        "epochs": 1, "batch_size": 4, "engine": "steps",
    } | options  # fmt: skip
    with pytest.raises(ValueError, match=message):
        fit(model, **given)
    assert_same(model.state_dict(), before, 0, 0)


def test_what_steps_cannot_is_the_loops_and_torchs_own_errors_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    fitted = fit(model, x, y, loss=nn.MSELoss(), optimizer=torch.optim.SGD, lr=0.1, epochs=1, batch_size=4)
    assert fitted.engine == "loop" and "LayerNorm" in fitted.reason
    with pytest.raises(IndexError, match="Target 3 is out of bounds"):
        fit(
            nn.Linear(3, 3), x, torch.full((20,), 3), loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD, epochs=1,
            batch_size=4,
        )  # fmt: skip


def clip(optimizer):
    """As a user may replace its step."""
    step = optimizer.step

    def clipped(*args):
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1e-3)
        return step(*args)

    optimizer.step = clipped


@pytest.mark.parametrize(
    ("watch", "reason"),
    [
        (lambda model, optimizer: model[0].weight.register_hook(lambda g: g / 2), "parameters with hooks"),
        (
            lambda model, optimizer: model[0].weight.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2)),
            "parameters with hooks",
        ),
        (lambda model, optimizer: optimizer.register_step_pre_hook(lambda *a: None), "its step replaced"),
        (lambda model, optimizer: optimizer.register_step_post_hook(lambda *a: None), "its step replaced"),
        (lambda model, optimizer: clip(optimizer), "its step replaced"),
        (lambda model, optimizer: optimizer.state[model[0].bias].update(step=torch.tensor(5.0)), "taken .* steps"),
    ],
)
def test_what_somebody_watches_is_the_loops(watch, reason):
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    model = nn.Sequential(nn.Linear(3, 1))
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(2.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)
        }  # fmt: skip
    watch(model, optimizer)
    training = Training(model, x, y, loss=nn.MSELoss(), optimizer=optimizer, batch_size=4)
    assert training.engine == "loop" and re.search(reason, training.reason)


@pytest.mark.parametrize("engine", ["steps", "loop"])
@pytest.mark.parametrize("change", ["scheduler", "clamp", "state"])
def test_what_a_callback_changes_is_trained_on(change, engine):
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    model = nn.Linear(3, 1)
    runs = []
    for fitted in (True, False):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def callback(_, twin=twin, optimizer=optimizer, scheduler=scheduler):
            if change == "scheduler":
                scheduler.step()
            elif change == "clamp":
                twin.weight.data.clamp_(-0.1, 0.1)
                twin.bias.detach().fill_(0.3)
            else:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                optimizer.state[twin.bias]["exp_avg"].fill_(1.0)

        options = {"batch_size": 5, "shuffle": False}
        if fitted:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                options |= {"callback": callback, "engine": engine}
                fit(twin, x, y, loss=nn.MSELoss(), optimizer=optimizer, epochs=4, **options)
        else:
            for _ in range(4):
                stock_loop(twin, x, y, nn.MSELoss(), optimizer, epochs=1, **options)
                callback(None)
        runs.append(twin.state_dict())
    assert_same(*runs, 1e-5, 1e-6)


def test_the_loop_takes_what_the_stock_loop_takes():
    """A parameter without elements, a loss of shape (1,), gradients whose sum is no float32."""
    model = nn.Sequential(nn.Linear(1, 1)).double()
    model.empty = nn.Parameter(torch.empty(0, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-300)
    x, y = torch.full((4, 1), 1e150, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    fitted = fit(
        model, x, y, loss=lambda output, target: (output - target).square().mean()[None] * 1e-150, optimizer=optimizer,
        epochs=2, batch_size=2, engine="loop",
    )  # fmt: skip
    assert len(fitted.costs) == 2 and all(math.isfinite(cost) for cost in fitted.costs)


@pytest.mark.parametrize("engine", ["steps", "loop"])
def test_a_batch_beyond_the_rows_is_all_of_them(engine):
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD, "lr": 0.1, "epochs": 2, "engine": engine}
    models = [nn.Linear(3, 1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, batch_size in zip(models, (20, sys.maxsize), strict=True):
        fit(model, x, y, batch_size=batch_size, generator=torch.Generator().manual_seed(0), **options)
    assert_same(*(model.state_dict() for model in models), 1e-5, 1e-7)


def test_autocast_and_precision_are_refused_not_ignored():
    x, y = torch.randn(20, 3), torch.rand(20, 1)
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD, "batch_size": 4}
    with torch.autocast("cpu"):
        assert "autocast" in Training(nn.Linear(3, 1), x, y, **options).reason
    with pytest.raises(ValueError, match=r"steps: .*precision='bf16'.*; loop: .*precision='bf16'"):
        Training(nn.Linear(3, 1), x, y, precision="bf16", **options)


def test_one_relu_in_two_places_runs_twice():
    """`named_children` would name it once."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(2, 3), relu, nn.Linear(3, 3), relu, nn.Linear(3, 1))
    recipe = read(model, nn.MSELoss(), torch.optim.SGD(model.parameters()))
    assert [layer.activation is not None for layer in recipe.layers] == [True, True, False]


def test_an_interrupted_run_is_at_the_end_of_a_pass(monkeypatch):
    from fusedact.fitting.passes import Passes

    x, y = torch.randn(20, 3), torch.rand(20, 1)
    model = nn.Linear(3, 1)
    training = Training(model, x, y, loss=nn.MSELoss(), optimizer=torch.optim.SGD, lr=0.1, batch_size=4)
    training.slice(1)
    kept = model.weight.clone()

    def interrupted(self, calls, steps):
        calls[0]()
        self.network.state.numbers.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(Passes, "_call", interrupted)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        training.slice(1)
    assert torch.equal(model.weight, kept) and torch.equal(torch.get_rng_state(), before)
