"""Bitwise the same from run to run, under use_deterministic_algorithms(True) too; nobody's random numbers drawn."""

import random

import numpy
import pytest
import torch

import fusedact
from fusedact import activations, backend
from fusedact import functional as F
from fusedact.tuning import measure
from fusedact.tuning.candidates import Problem


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["deterministic", "free"])
def algorithms(request):
    """torch.use_deterministic_algorithms(True), which raises where an operation has no such algorithm; or not."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def states():
    """Of every generator that a user may have seeded."""
    return random.getstate(), torch.get_rng_state(), numpy.random.get_state()


def same(one, other):
    arrays = zip(one[2], other[2], strict=True)
    return one[0] == other[0] and torch.equal(one[1], other[1]) and all(numpy.array_equal(a, b) for a, b in arrays)


@pytest.fixture
def untouched():
    """After the test every generator is where it was."""
    torch.manual_seed(5)
    before = states()
    yield
    assert same(states(), before)


def same_always(run, times):
    first = run()
    for _ in range(times - 1):
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


def values(op):
    """The result and the gradients: no number of theirs is memory that nobody wrote, NaN under True."""
    inputs = op.inputs()
    y = op.run(*inputs)
    found = [y, *torch.autograd.grad(y, inputs, op.dy(y))]
    assert all(t.isfinite().all() for t in found)
    return found


@pytest.mark.contract(58)
@pytest.mark.parametrize("algorithms", [True], ids=["deterministic"], indirect=True)
def test_every_op(every_op, algorithms, untouched):
    same_always(lambda: values(every_op), 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("algorithms", [True], ids=["deterministic"], indirect=True)
def test_a_hundred_runs(every_op, algorithms):
    same_always(lambda: values(every_op), 100)


def fitted(engine, options, generator=1):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape))
    x = torch.linspace(-1, 1, 33).view(11, 3)
    before = states()
    done = fusedact.fit(
        model, x, torch.arange(11) % 2, loss=torch.nn.CrossEntropyLoss(), epochs=2, batch_size=4, engine=engine,
        generator=torch.Generator().manual_seed(generator), **options,
    )  # fmt: skip
    assert done.engine == engine and same(states(), before)
    return [torch.tensor(done.costs), *model.parameters()]


@pytest.mark.contract(58)
@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("engine", ["steps", "loop"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_every_engine_of_a_cpu(optimizer, engine, times, algorithms):
    same_always(lambda: fitted(engine, {"optimizer": optimizer, "lr": 0.1}), times)


@pytest.mark.contract(58)
def test_the_engine_of_one_launch_interpreted(algorithms):
    with fusedact.use_backend("triton"):
        same_always(lambda: fitted("persistent", {"optimizer": torch.optim.SGD, "lr": 0.1, "device": "cpu"}), 2)


class Own(torch.nn.Module):
    """A network that fuse() reads, rewrites and, where it is told to, compares, dropout in it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, 6), torch.nn.Linear(6, 3)
        self.act, self.drop = torch.nn.GELU(), torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.last(self.drop(self.act(self.first(x)))).relu()


X = torch.linspace(-1, 1, 20).view(4, 5)
CHIP = backend.chip(torch.device("cpu"))
SILENT = {
    "fuse": lambda model: fusedact.fuse(model),
    "fuse and check": lambda model: fusedact.fuse(model, check=X),
    "report": lambda model: fusedact.report(model, X),
    "register_activation": lambda model: fusedact.register_activation(
        "doubled", reference=lambda x: 2 * x, derivative=lambda dy, x: 2 * dy, device=lambda: (None, None)
    ),
    "tune": lambda model: measure._inputs(measure.Layer(4, 3, 5, torch.float32, "ieee", CHIP), torch.device("cpu")),
    "tune --head": lambda model: measure.tune_head(
        Problem("head", 4, 3, 5, torch.float32, "ieee", False, CHIP),
        torch.device("cpu"),
        {"rule": lambda x, w, target: F.linear_cross_entropy(x, w, target)},
    ),
}


@pytest.mark.parametrize("call", SILENT.values(), ids=SILENT)
def test_nobodys_random_numbers_are_drawn(call, either_backend, monkeypatch):
    monkeypatch.setattr(measure, "_wall", lambda calls: 1.0)
    monkeypatch.setattr(activations, "ACTIVATIONS", dict(activations.ACTIVATIONS))
    model = Own()
    before = states()
    call(model)
    assert same(states(), before)
