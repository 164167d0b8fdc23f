"""A user's own activation: checked when registered and at its first launch, then fused wherever the table's are."""

import copy
import math

import pytest
import torch
import triton
import triton.language as tl

import fusedact
from fusedact import activations, nn
from fusedact import functional as F

pytestmark = pytest.mark.usefixtures("triton_backend")


@triton.jit
def snake(z, a):
    return z + tl.sin(z * a) * tl.sin(z * a) / a  # in float64 `a * z` would stop the interpreter


@triton.jit
def snake_grad(dy, z, a):
    return dy * (1.0 + 2.0 * tl.sin(z * a) * tl.cos(z * a))


@triton.jit
def snake_grad_off(dy, z, a):
    return dy * (1.0 + tl.sin(z * a) * tl.cos(z * a))


@triton.jit
def snake_overflowing(z, a):
    return snake(z, a) * tl.exp(z) / tl.exp(z)


def reference(x, a):
    return x + torch.sin(a * x) ** 2 / a


def derivative(dy, x, a):
    return dy * (1 + torch.sin(2 * a * x))


class Snake(torch.nn.Module):
    def __init__(self, a=0.5):
        super().__init__()
        self.a = a

    def forward(self, x):
        return reference(x, self.a)


@pytest.fixture(autouse=True)
def table():
    """The table as it was, after each test."""
    held = activations.ACTIVATIONS, activations._BY_MODULE
    before = [copy.copy(each) for each in held]
    yield
    for each, entries in zip(held, before, strict=True):
        each.clear()
        each.update(entries)


def register(name="snake", **changes):
    arguments = {
        "reference": reference,
        "derivative": derivative,
        "device": (snake, snake_grad),
        "defaults": {"a": 0.5},
    }
    fusedact.register_activation(name, **(arguments | changes))


def tensors(device, dtype=torch.float32):
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in ((9, 5), (7, 5), (7,))]


@pytest.mark.parametrize("device_pair", [(snake, snake_grad), lambda: (snake, snake_grad)], ids=["pair", "function"])
def test_it_is_fused_in_a_linear_layer(device_pair, device, launches, as_accurate_as_torch):
    register(device=device_pair)
    x, weight, bias = tensors(device)
    F.linear(x, weight, bias, activation="snake")  # the first launch, which checks the pair
    launches.reset()
    y = F.linear(x, weight, bias, activation="snake", a=2.0)
    assert launches.count == 1
    dy = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, [x, weight, bias], dy)]

    def stock(tensors, dy):
        y = reference(torch.nn.functional.linear(*tensors), 2.0)
        return [y, *torch.autograd.grad(y, tensors, dy)]

    doubles = [t.detach().cpu().double().requires_grad_() for t in (x, weight, bias)]
    for each in zip(ours, stock([x, weight, bias], dy), stock(doubles, dy.cpu().double()), strict=True):
        as_accurate_as_torch(*each)


def test_alone_and_by_its_module(device, launches):
    register(module=Snake)
    x = torch.randn(9, 5, device=device)
    torch.testing.assert_close(F.activate(x, "snake", a=0.3), reference(x, 0.3))
    model = nn.Sequential(nn.Linear(5, 7), Snake(0.25), nn.Linear(7, 2, activation="snake")).to(device)
    assert type(model[2].activation) is Snake
    model(x)
    launches.reset()
    ours = model(x)
    assert launches.count == 2
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(ours, model(x))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_derivatives(backend, device):
    register()
    inputs = tensors(device, torch.float64)
    with fusedact.use_backend(backend):
        for f in (
            lambda *t: F.linear(*t, activation="snake"),
            lambda x, *_: F.activate(x, "snake"),
        ):
            assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_compiled_and_exported(device):
    torch._dynamo.reset()
    register(module=Snake)
    model, x = nn.Sequential(nn.Linear(5, 7), Snake()).to(device), torch.randn(9, 5, device=device)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))
    program = torch.export.export(model, (x,))
    assert torch.ops.fusedact.linear_act.default in [node.target for node in program.graph.nodes]


def test_compiled_before_its_first_call_by_name(device):
    """Nothing that a first eager call leaves behind is needed."""
    torch._dynamo.reset()
    register()
    x, w, b = tensors(device, torch.float32)

    def call(x, w, b):
        return F.linear(x, w, b, activation="snake") + F.activate(F.linear(x, w, b), "snake")

    torch.testing.assert_close(torch.compile(call, fullgraph=True)(x, w, b), call(x, w, b))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ((snake_overflowing, snake_grad), r"value of activation 'snake' on c\w+(:0)? is nan at -?[\d.]+, not -?[\d.]+"),
        ((snake, snake_grad_off), r"gradient of activation 'snake' on c\w+(:0)? is -?[\d.]+ at -?[\d.]+, not -?[\d.]+"),
    ],
    ids=["value", "gradient"],
)
def test_a_pair_that_differs_is_refused_at_each_launch(pair, message, device):
    register(device=pair)
    x, weight, _ = tensors(device)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            F.linear(x, weight, activation="snake")
    with fusedact.use_backend("torch"):
        F.linear(x, weight, activation="snake")


def test_the_pair_is_looked_at_once_a_device(device, launches):
    asked = []
    register(device=lambda: asked.append(1) or (snake, snake_grad))
    x = torch.randn(4, device=device)
    assert launches.count == 0 and not asked
    for expected in (3, 4, 5):  # the value and the gradient of the check, then a launch each time
        F.activate(x, "snake")
        assert launches.count == expected
    assert len(asked) == 1


def test_a_function_that_returns_no_pair(device):
    register(device=lambda: snake)
    with pytest.raises(TypeError, match="'snake' must return a pair"):
        F.activate(torch.randn(4, device=device), "snake")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"name": "relu"}, ValueError, "'relu' exists already"),
        ({"name": "my snake"}, ValueError, "must be an identifier, got 'my snake'"),
        ({"name": "lambda"}, ValueError, "must be an identifier, got 'lambda'"),
        ({"name": 5}, ValueError, "must be an identifier, got 5"),
        ({"reference": None}, TypeError, "reference of activation 'snake' must be a function"),
        ({"derivative": 1.0}, TypeError, "derivative of activation 'snake' must be a function"),
        ({"device": snake.__name__}, TypeError, "must be a pair of functions or return one"),
        ({"device": (snake,)}, TypeError, "must be a pair of functions or return one"),
        ({"device": (snake, snake_grad, snake)}, TypeError, "must be a pair of functions or return one"),
        ({"device": (snake, None)}, TypeError, "device of activation 'snake' must be a function"),
        ({"defaults": {"slope": 0.5}}, ValueError, "cannot have a parameter named 'slope'"),
        ({"defaults": {3: 0.5}}, ValueError, "cannot have a parameter named 3"),
        ({"defaults": {"a b": 0.5}}, ValueError, "cannot have a parameter named 'a b'"),
        ({"defaults": {"a": "half"}}, TypeError, "parameter 'a' of activation 'snake' must be a number, got 'half'"),
        ({"module": torch.sin}, TypeError, "must be a class of modules"),
        ({"module": torch.nn.ReLU}, ValueError, "ReLU is the module of another activation"),
        ({"module": nn.ReLU}, ValueError, "ReLU is the module of another activation"),
        ({"module": torch.nn.Flatten}, TypeError, "unexpected keyword argument 'a'"),
        ({"reference": lambda x, a: x.sum()}, ValueError, "reference of activation 'snake' must keep"),
        ({"derivative": lambda dy, x, a: dy.float()}, ValueError, "derivative of activation 'snake' must keep"),
        ({"derivative": lambda dy, x, a: dy[:, None]}, ValueError, "derivative of activation 'snake' must keep"),
        ({"derivative": lambda dy, x, a: dy * math.nan}, ValueError, "no finite derivative"),
        ({"derivative": lambda dy, x, a: dy}, ValueError, r"'snake' is [\d.]+ at -?[\d.]+, not"),
        ({"reference": lambda x, a: x * math.inf}, ValueError, "no finite derivative"),
        ({"reference": lambda x, a: x.detach()}, ValueError, "reference of activation 'snake' has no gradient"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_refused_when_registered(change, kind, message, launches):
    before = list(activations.ACTIVATIONS)
    with pytest.raises(kind, match=message):
        register(**change)
    assert list(activations.ACTIVATIONS) == before and launches.count == 0


def test_a_module_must_hold_its_defaults():
    class Forgetful(Snake):
        def __init__(self, a=1.0):
            super().__init__(1.0)

    with pytest.raises(ValueError, match=r"Forgetful\(a=0\.5\) of activation 'snake' has a = 1\.0"):
        register(module=Forgetful)


def test_kinks_and_infinities_do_not_stand_in_the_way(device):
    """exp overflows in float32 from 89 on, where there is nothing to compare."""

    @triton.jit
    def bump(z):
        return tl.exp(z)

    @triton.jit
    def bump_grad(dy, z):
        return dy * tl.exp(z)

    register("bump", reference=torch.exp, derivative=lambda dy, x: dy * x.exp(), device=(bump, bump_grad), defaults={})
    x = torch.randn(5, device=device)
    torch.testing.assert_close(F.activate(x, "bump"), x.exp())


def test_names_list_it_and_builtins_stay():
    register()
    with pytest.raises(ValueError, match=r"unknown activation 'snak', expected one of .*relu.*snake"):
        F.activate(torch.ones(3), "snak")
    assert "snake" not in [a.name for a in activations.TABLE]
