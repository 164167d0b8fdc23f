"""Many networks at once, each against the stock loop on the same batches."""

import copy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fusedact.fitting import batched, tiny
from fusedact.fitting.many import fit_many
from fusedact.trainers import sweep

ADAM_NUMBERS = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, weight_decay=0.1),
    "momentum": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": partial(torch.optim.Adam, **ADAM_NUMBERS),
    "adamw": partial(torch.optim.AdamW, **ADAM_NUMBERS),
}
NETWORKS = {  # the modules, made when called, and the loss
    "xor": (lambda: [nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid()], nn.BCELoss()),
    "one layer": (lambda: [nn.Linear(3, 1), nn.Sigmoid()], nn.BCELoss(reduction="sum")),
    "two outputs": (lambda: [nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.Sigmoid()], nn.BCELoss()),
    "logits": (lambda: [nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2)], nn.BCEWithLogitsLoss()),
    "labels": (lambda: [nn.Linear(3, 4, bias=False), nn.Softplus(2.0), nn.Linear(4, 3)], nn.CrossEntropyLoss()),
    "deep": (
        lambda: [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2, bias=False), nn.ELU(), nn.Linear(2, 2)],
        nn.MSELoss(),
    ),
    "summed": (lambda: [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Softsign()], nn.MSELoss(reduction="sum")),
}
LRS = [0.3, 0.02, 0.1]
ROWS = 23


@dataclass
class Case:
    """A model, its rows and what it is trained with."""

    model: nn.Module
    loss: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def fit(self, optimizer="sgd", **options):
        made = OPTIMIZERS[optimizer](self.model.parameters(), lr=0.1)
        given = {"epochs": 3, "batch_size": 8, "generator": torch.Generator().manual_seed(4)} | options
        return fit_many(self.model, self.x, self.y, loss=self.loss, optimizer=made, **given)

    def to(self, dtype):
        y = self.y if self.y.dtype == torch.int64 else self.y.to(dtype)
        return Case(copy.deepcopy(self.model).to(dtype), self.loss, self.x.to(dtype), y)

    def stock(self, optimizer="sgd", lr=0.1, parameters=None, epochs=3, **loader):
        """Costs and parameters after the tutorials' loop."""
        network = copy.deepcopy(self.model)
        network.load_state_dict(parameters or self.model.state_dict())
        made = OPTIMIZERS[optimizer](network.parameters(), lr=lr)
        options = {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(4)} | loader
        costs = []
        for _ in range(epochs):
            losses = []
            for x, y in DataLoader(TensorDataset(self.x, self.y), **options):
                made.zero_grad()
                losses.append(self.loss(network(x), y))
                losses[-1].backward()
                made.step()
            costs.append(torch.stack(losses).detach().mean())
        return torch.stack(costs), flattened(network.state_dict())


def flattened(parameters):
    return torch.cat([p.detach().flatten() for p in parameters.values()])


def parameters_of(fitted, i):
    return {name: value[i] for name, value in fitted.parameters.items()}


def assert_same(fitted, i, stock):
    """The network is the stock loop's, to rounding in float64."""
    for ours, theirs in zip((fitted.costs[i], flattened(parameters_of(fitted, i))), stock, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


def case(name, dtype=torch.float32, rows=ROWS, distinct=True):
    modules, loss = NETWORKS[name]
    model = nn.Sequential(*modules())
    x = torch.randn(rows, model[0].in_features)
    outputs = [module for module in model if isinstance(module, nn.Linear)][-1].out_features
    y = torch.randint(outputs, (rows,)) if name == "labels" else torch.rand(rows, outputs)
    if not distinct:
        x = (x > 0).float()
        y = x.sum(1, keepdim=True) % 2
    return Case(model, loss, x, y).to(dtype)


def check(compare, trained, optimizer, engine, lrs=LRS, **options):
    """Each network against the stock loop."""
    fitted = trained.fit(optimizer, lrs=lrs, **options)
    assert fitted.engine == engine
    for i, lr in enumerate(lrs):
        stock = trained.stock(optimizer, lr, **options)
        truth = trained.to(torch.float64).stock(optimizer, lr, **options)
        for ours, torchs, true in zip(
            (fitted.costs[i], flattened(parameters_of(fitted, i))), stock, truth, strict=True
        ):
            compare(ours, torchs, true)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_is_trained_as_by_the_stock_loop(name, optimizer):
    trained = case(name, torch.float64)
    fitted = trained.fit(optimizer, lrs=LRS)
    for i, lr in enumerate(LRS):
        assert_same(fitted, i, trained.stock(optimizer, lr))


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("name", ["xor", "labels"])
def test_in_float32(name, optimizer, as_accurate_as_torch):
    check(as_accurate_as_torch, case(name), optimizer, "batched")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("drop_last", [True, False])
def test_rows_that_repeat_are_computed_once(dtype, drop_last, monkeypatch, as_accurate_as_torch):
    monkeypatch.delattr(batched, "EachRow")
    trained = case("xor", dtype, rows=70, distinct=False)
    check(as_accurate_as_torch, trained, "nesterov", "batched", batch_size=16, drop_last=drop_last)


@pytest.mark.parametrize(
    "options", [{"drop_last": True}, {"batch_size": 40}, {"batch_size": 1, "epochs": 1}, {"shuffle": False}], ids=str
)
def test_batches(options, as_accurate_as_torch):
    check(as_accurate_as_torch, case("two outputs", torch.float64), "adam", "batched", **options)


def test_the_global_generator_gives_the_order_and_is_left_as_the_loader_leaves_it():
    trained = case("xor", torch.float64)
    torch.manual_seed(8)
    fitted = trained.fit(lrs=LRS[:1], generator=None)
    left = torch.get_rng_state()
    torch.manual_seed(8)
    assert_same(fitted, 0, trained.stock(lr=LRS[0], generator=None))
    assert torch.equal(torch.get_rng_state(), left)


# Where the networks start


def test_seeds_draw_what_torch_draws():
    trained = case("deep")
    before = torch.get_rng_state()
    fitted = trained.fit(seeds=[5, 0, 7], lrs=[0.0, 0.0, 0.0])
    assert torch.equal(torch.get_rng_state(), before)
    for i, seed in enumerate([5, 0, 7]):
        torch.manual_seed(seed)
        drawn = nn.Sequential(*NETWORKS["deep"][0]()).state_dict()
        assert drawn.keys() == fitted.parameters.keys()
        assert torch.equal(flattened(parameters_of(fitted, i)), flattened(drawn))


def test_seeds_of_a_float64_model_draw_in_the_default_dtype():
    fitted = case("xor", torch.float64).fit(seeds=[3], lrs=[0.0])
    torch.manual_seed(3)
    drawn = nn.Sequential(*NETWORKS["xor"][0]()).double().state_dict()
    assert torch.equal(flattened(parameters_of(fitted, 0)), flattened(drawn))


@pytest.mark.parametrize("flat", [False, True], ids=["by name", "flat"])
def test_inits(flat):
    trained = case("deep", torch.float64)
    inits = {name: torch.randn(2, *p.shape) for name, p in trained.model.named_parameters()}
    before = {name: init.clone() for name, init in inits.items()}
    given = torch.cat([init.flatten(1) for init in inits.values()], 1) if flat else inits
    fitted = trained.fit(inits=given)
    for i in range(2):
        start = {name: init[i].double() for name, init in inits.items()}
        assert_same(fitted, i, trained.stock(parameters=start))
    assert all(torch.equal(inits[name], before[name]) for name in inits)


def test_model_and_optimizer_stay_as_they_are():
    trained = case("xor")
    optimizer = torch.optim.Adam(trained.model.parameters())
    before = copy.deepcopy((trained.model.state_dict(), optimizer.state_dict()))
    fit_many(
        trained.model, trained.x, trained.y, loss=trained.loss, optimizer=optimizer, epochs=2, batch_size=8, lrs=[1]
    )
    assert optimizer.state_dict() == before[1]
    assert all(torch.equal(p, before[0][name]) for name, p in trained.model.state_dict().items())


def test_the_optimizers_own_rate_and_what_makes_an_optimizer():
    trained = case("xor", torch.float64)
    make = partial(torch.optim.SGD, lr=0.3, weight_decay=0.1)
    fitted = fit_many(
        trained.model, trained.x, trained.y, loss=trained.loss, optimizer=make, epochs=3, batch_size=8,
        generator=torch.Generator().manual_seed(4), inits={n: p[None] for n, p in trained.model.named_parameters()},
    )  # fmt: skip
    assert_same(fitted, 0, trained.stock(lr=0.3))


# Numbers at their ends


def test_a_saturated_sigmoid_stays_as_torchs_clamps_leave_it():
    """Of some rows the output is 0 or 1 in float64, and of others p (1 - p) is below what BCELoss divides by."""
    trained = case("one layer", torch.float64)
    trained.y.round_()
    inits = torch.tensor([[30.0, -20.0, 10.0, 1.0], [500.0, 300.0, -200.0, 0.0]], dtype=torch.float64)
    fitted = trained.fit(inits=inits)
    for i, init in enumerate(inits):
        start = {"0.weight": init[None, :3], "0.bias": init[3:]}
        stock = trained.stock(parameters=start)
        assert stock[0][0] > 90  # a row's cost is at most 100
        assert_same(fitted, i, stock)


@pytest.mark.parametrize("name", ["xor", "labels", "deep"])
def test_one_that_is_not_finite_does_not_stop_the_others(name):
    trained = case(name, torch.float64)
    fitted = trained.fit("nesterov", lrs=[0.1, torch.inf, 0.02], epochs=4)
    assert not fitted.costs[1, -1].isfinite()
    for i, lr in ((0, 0.1), (2, 0.02)):
        assert_same(fitted, i, trained.stock("nesterov", lr, epochs=4))


def test_blocks_of_networks(monkeypatch):
    trained = case("two outputs", torch.float64)
    whole = trained.fit("adam", lrs=LRS)
    monkeypatch.setattr(batched, "BLOCK", 2 * 8 * 3)
    parts = trained.fit("adam", lrs=LRS)
    torch.testing.assert_close(parts.costs, whole.costs, rtol=1e-13, atol=0)
    for i in range(len(LRS)):
        torch.testing.assert_close(parameters_of(parts, i), parameters_of(whole, i), rtol=1e-13, atol=1e-15)


# Programs


@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("name", ["xor", "labels", "summed"])
def test_a_program_each(name, optimizer, triton_backend, as_accurate_as_torch):
    check(as_accurate_as_torch, case(name), optimizer, "tiny", lrs=LRS[:2], epochs=2)


def test_several_launches(triton_backend, launches, monkeypatch, as_accurate_as_torch):
    monkeypatch.setattr(tiny, "MOST_NUMBERS", 50)
    check(as_accurate_as_torch, case("xor"), "adam", "tiny", lrs=LRS[:2])
    assert launches.count == 2


@pytest.mark.parametrize(
    ("dtype", "batch_size", "reason"),
    [(torch.float64, 8, "computes in float32, not torch.float64"), (torch.float32, 700, "a warp's registers")],
)
def test_what_programs_cannot_do_is_batched_and_said(dtype, batch_size, reason, triton_backend):
    fitted = case("xor", dtype, rows=700).fit(lrs=LRS, batch_size=batch_size, epochs=1)
    assert fitted.engine == "batched" and reason in fitted.reason


# What does not fit together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of seeds, inits and lrs must say which"),
        ({"seeds": [1], "inits": torch.zeros(1, 9)}, "give one of them"),
        ({"seeds": [1, 2], "lrs": [0.1]}, "one for each network, got 2 seeds, 1 lrs"),
        ({"lrs": []}, "one for each network, got 0 lrs"),
        ({"lrs": [-0.1]}, "at least 0"),
        ({"lrs": torch.ones(2, 1)}, "at least 0"),
        ({"inits": torch.zeros(2, 8)}, r"must be \(networks, 9\), got \(2, 8\)"),
        ({"inits": {"0.weight": torch.zeros(1, 2, 2)}}, "must have the model's parameters 0.weight, 0.bias, 2.weight"),
        ({"lrs": [1.0], "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lrs": [1.0], "batch_size": 24, "drop_last": True}, "23 rows make no batch of 24"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        case("xor").fit(**options)


def test_errors_of_shapes_and_modules():
    trained = case("xor")
    inits = {name: torch.zeros(1, *p.shape) for name, p in trained.model.named_parameters()}
    with pytest.raises(ValueError, match=r"inits\['2.bias'\] must be \(1, 1\), got \(1, 2\)"):
        trained.fit(inits=inits | {"2.bias": torch.zeros(1, 2)})
    with pytest.raises(ValueError, match=r"expected \(23, 2\) torch.float32"):
        Case(trained.model, trained.loss, trained.x[:, :1], trained.y).fit(lrs=[1.0])
    with pytest.raises(ValueError, match="computes in float32 and float64"):
        case("xor", torch.bfloat16).fit(lrs=[1.0])


# The sweep


def test_sweep_is_one_run_looked_at_now_and_then():
    done = []
    swept = sweep.sweep_xor(seeds=3, lrs=(1.0, 3.0), epochs=60, progress=done.append)
    assert done == list(swept.epochs) and done[0] == 1 and done[-1] == 60
    assert swept.solved.shape == (2, 3, len(done)) and swept.shares.shape == (2, len(done))
    trainer = sweep.Xor(nn, sweep.Xor.defaults)
    whole = fit_many(
        trainer.model, trainer.x, trainer.y, loss=trainer.criterion, optimizer=trainer.optimizer, epochs=60,
        batch_size=64, drop_last=True, generator=torch.Generator().manual_seed(0),
        seeds=[0, 1, 2] * 2, lrs=[1.0] * 3 + [3.0] * 3,
    )  # fmt: skip
    assert torch.equal(swept.costs.flatten(), whole.costs[:, -1])
    for (i, j), expected in {(0, 0): True, (0, 1): False, (1, 1): True}.items():
        trainer.model.load_state_dict({name: value[i, j] for name, value in swept.parameters.items()})
        assert swept.solved[i, j, -1] == (trainer.evaluate().accuracy == 1) == expected
    assert [len(line.get_ydata()) for line in swept.figure().axes[0].lines] == [len(done)] * 2
    records = swept.records()
    assert [(r["lr"], r["seed"]) for r in records] == [(lr, seed) for lr in (1.0, 3.0) for seed in range(3)]
    assert [r["solved_by"] > 0 for r in records] == swept.solved[:, :, -1].flatten().tolist()
