"""Activations and linear layers told by what they compute, whatever their class, and activations that nodes call."""

import copy
import math
import warnings
from functools import partial, wraps

import pytest
import torch
import torch.nn.functional as F
from torch import fx, is_grad_enabled, nn
from torch.nn.utils import prune

import fusedact
from fusedact.activations import ACTIVATIONS, TABLE, lines_of
from fusedact.fusion.recognized import activation_of, called_activation, transposed_linear
from fusedact.fusion.running import Act, own_attributes

COUNT, LOG, SLOPE = 0, [], 0.01


def module(forward, **attributes):
    """An instance of a new class with that forward."""
    made = type("Made", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


# The gradient at its ends, which relu6 stops and torch 2.13's clamp, unlike 2.15's, does not.
CLAMP_PASSES = bool(torch.func.grad(lambda x: x.clamp(0, 6))(torch.tensor(6.0)))


def name_of(made):
    known = activation_of(made)
    return known and known[0].name


def tanh_formula(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def decorated(function):
    @wraps(function)
    def wrapper(self, x):
        return function(self, x)

    return wrapper


class Erf(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.act = math.sqrt(0.5), self._formula

    def _formula(self, x):
        return 0.5 * x * (1 + torch.erf(x * self.scale))

    def forward(self, x):
        return self.act(x)


class Swish(nn.SiLU):
    """torch's, under another name."""


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (Erf(), "gelu"),
        (Swish(), "silu"),
        (module(lambda self, x: tanh_formula(x)), "gelu_tanh"),
        (module(decorated(lambda self, x: tanh_formula(x))), "gelu_tanh"),
        (module(lambda self, x: self.act(x), act=F.silu), "silu"),
        (module(lambda self, x: self.act(x), act=partial(F.gelu, approximate="tanh")), "gelu_tanh"),
        (module(lambda self, x: x * torch.tanh(F.softplus(x))), "mish"),
        (module(lambda self, x: torch.sigmoid(x) * x), "silu"),
        (module(lambda self, x: x / (1 + torch.exp(-x))), "silu"),
        (module(lambda self, x: x * torch.special.ndtr(x)), "gelu"),
        (module(lambda self, x: -F.softplus(-x)), "logsigmoid"),
        (module(lambda self, x: F.relu(x) ** 2), "squared_relu"),
        (module(lambda self, x: x.clamp(0, 6)), None if CLAMP_PASSES else "relu6"),
        (module(lambda self, x: x / (1 + abs(x))), "softsign"),
        (module(lambda self, x: F.leaky_relu(x)), "leaky_relu"),
        (module(lambda self, x: x - torch.tanh(x)), "tanhshrink"),
    ],
)
def test_what_computes_an_activation_is_one(made, name):
    activation, parameters, slope = activation_of(made.eval()) or (None, None, None)
    assert (activation and activation.name) == name
    if activation is not None:
        assert parameters == activation.default_values and slope is None
        assert name_of(copy.deepcopy(made).train()) == name


@pytest.mark.parametrize("activation", TABLE, ids=lambda a: a.name)
def test_the_tables_own_modules_and_a_call_of_each_function(activation):
    if activation.module is not None:
        assert activation_of(activation.build())[0] is activation
    if activation.name not in ("prelu", "step", "squared_relu"):  # torch's alone are not read
        made = module(lambda self, x: self.act(x), act=partial(activation.reference, **dict(activation.defaults)))
        assert name_of(made) == {"celu": "elu"}.get(activation.name, activation.name)


def counts_globally(self, x):
    global COUNT
    COUNT += 1
    return F.silu(x)


def logs(self, x):
    LOG.append(x)
    return F.silu(x)


def prints(self, x):
    print(x)
    return F.silu(x)


def warns(self, x):
    warnings.warn("called", stacklevel=1)
    return F.silu(x)


def counts(self, x):
    self.calls += 1
    return F.silu(x)


def keeps(self, x):
    self.register_buffer("last", x)
    return F.silu(x)


def collects(self, x):
    self.seen.append(x)
    return F.silu(x)


def remembers(x, seen=[]):  # noqa: B006
    seen.append(x)
    return F.silu(x)


class Selfmade(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.silu(x)


UNKNOWN = {
    "identity": lambda self, x: x,
    "quick": lambda self, x: x * torch.sigmoid(1.702 * x),
    "near": lambda self, x: F.silu(x) + 1e-9,
    "never 0": lambda self, x: F.relu(x) + 1e-12,
    "never 0 nor negative": lambda self, x: x.clamp(min=1e-12),
    "never 0, by the dtype": lambda self, x: F.relu(x) + torch.finfo(x.dtype).eps,
    "never 0, by a dtype": lambda self, x: F.relu(x) + torch.finfo(torch.float32).tiny,
    "never 0 in float64": lambda self, x: F.relu(x) + 1e-300,
    "bounded away from 0": lambda self, x: F.softplus(x) + 1e-12,
    "bounded away from 0 in float32": lambda self, x: F.softplus(x) + 1e-38,
    "bounded away from 0, by the dtype": lambda self, x: F.softplus(x) + torch.finfo(x.dtype).tiny,
    "overflows in float32": lambda self, x: torch.log1p(torch.exp(x)),
    "cancels in float32": lambda self, x: (x + 1e4) / 2 - 5e3 + (x / 2).abs(),
    "rounds": lambda self, x: F.silu(x.float()).type_as(x),
    "doubled": lambda self, x: 2 * F.silu(x),
    "straight through": lambda self, x: F.silu(x).detach() + x - x.detach(),
    "negative zero": lambda self, x: torch.where(x > 0, x, 0.0),
    "NaN": lambda self, x: F.silu(x.nan_to_num(0.0)),
    "rows": lambda self, x: F.silu(x) + 0 * x.sum(-1),
    "softmax": lambda self, x: x.softmax(-1),
    "flattens": lambda self, x: F.silu(x).flatten(),
    "widens": lambda self, x: F.silu(x.double()),
    "casts": lambda self, x: F.silu(x.double()).to(torch.float32),
    "no gradient": lambda self, x: (x >= 0).to(x.dtype),
    "in place without autograd": lambda self, x: F.silu(x + 0 * x.data.mul_(2).sum()),
    "a list that stays": lambda self, x: remembers(x),
    "in place": lambda self, x: F.silu(x, inplace=True),
    "random": lambda self, x: F.silu(x) + torch.rand_like(x),
    "dropout": lambda self, x: F.dropout(F.silu(x), 0.1, self.training),
    "two inputs": lambda self, x, scale=1.0: scale * F.silu(x),
    "a number outside": lambda self, x: F.leaky_relu(x, SLOPE),
    "a function of its own": lambda self, x: Selfmade.apply(x),
    "comprehends": lambda self, x: sum([F.silu(x) for _ in range(1)]),
    "raises": lambda self, x: F.silu(x) + torch.ones(3),
    "branches on rank": lambda self, x: F.silu(x) if x.dim() < 5 else x,
    "branches on device": lambda self, x: x if x.is_cuda else F.silu(x),
    "multiplies by device": lambda self, x: F.relu(x) * (1 - x.is_cuda),
    "multiplies by device's number": lambda self, x: F.relu(x) * (x.get_device() < 0),
    "multiplies by rank": lambda self, x: F.relu(x) * (x.dim() < 5),
    "multiplies by shape": lambda self, x: F.relu(x) * (x.shape[0] < 1000),
    "multiplies by length": lambda self, x: F.relu(x) * (len(x) < 1000),
    "multiplies by stride": lambda self, x: F.relu(x) * x.stride()[-1],
    "multiplies by dtype": lambda self, x: F.relu(x) * (x.dtype != torch.float16),
    "multiplies by truth": lambda self, x: F.relu(x) * bool(x.isnan().sum() < 7),
    "multiplies by what is recorded": lambda self, x: F.relu(x) * x.requires_grad,
    "multiplies by mode": lambda self, x: F.relu(x) * is_grad_enabled(),
    "multiplies by default dtype": lambda self, x: F.relu(x) * (torch.get_default_dtype() == torch.float32),
    "branches on values": lambda self, x: F.silu(x) if x.sum() != 3.0 else x,
    "counts globally": counts_globally,
    "logs": logs,
    "prints": prints,
    "warns": warns,
    "imports": lambda self, x: __import__("torch").nn.functional.silu(x),
}


@pytest.mark.parametrize("forward", UNKNOWN.values(), ids=UNKNOWN)
def test_what_computes_something_else_or_more_is_none(forward, capfd, recwarn):
    before = torch.get_rng_state()
    assert name_of(module(forward)) is None and name_of(module(forward).eval()) is None
    assert torch.get_rng_state().equal(before)
    assert COUNT == 0 and LOG == [] and capfd.readouterr().out == "" and not recwarn.list


@pytest.mark.parametrize(
    ("forward", "attributes"),
    [
        (counts, {"calls": 0}),
        (collects, {"seen": []}),
        (keeps, {}),
        (lambda self, x: F.silu(x), {"last": torch.ones(2)}),
        (lambda self, x: F.silu(x), {"weight": nn.Parameter(torch.ones(2))}),
        (lambda self, x: self.act(x), {"act": nn.SiLU()}),
        (lambda self, x: self.act(x), {"act": LOG.append}),
        (lambda self, x: F.leaky_relu(x, self.slope[0]), {"slope": [0.01]}),
    ],
)
def test_what_has_a_state_is_none_and_keeps_it(forward, attributes):
    made = module(forward, **attributes)
    before = {name: copy.copy(value) for name, value in vars(made).items()}
    assert name_of(made) is None
    assert vars(made).keys() == before.keys() and LOG == []
    assert all(value is before[name] or value == before[name] for name, value in vars(made).items() if name != "last")


def test_a_hook_is_a_reason_and_modes_of_torch_are_not():
    made = module(lambda self, x: F.silu(x))
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        assert name_of(made) == "silu"
    with torch.no_grad():
        assert name_of(made) == "silu"
    hook = made.register_forward_hook(lambda module, inputs, output: None)
    assert name_of(made) is None
    hook.remove()
    assert name_of(made) == "silu"
    made.forward = lambda x: F.silu(x)
    assert name_of(made) is None


def test_a_registered_activation_is_recognized():
    held = dict(ACTIVATIONS)
    try:
        fusedact.register_activation(
            "cosine",
            reference=lambda x, w: torch.cos(w * x),
            derivative=lambda dy, x, w: -w * torch.sin(w * x) * dy,
            device=lambda: None,
            defaults={"w": 2.0},
        )
        assert name_of(module(lambda self, x: torch.cos(2 * x))) == "cosine"
    finally:
        ACTIVATIONS.clear()
        ACTIVATIONS.update(held)


def test_what_is_remembered_of_a_class_is_its_forward_and_its_numbers():
    class Leaky(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = slope

        def forward(self, x):
            return F.leaky_relu(x, self.slope)

    assert [name_of(Leaky(slope)) for slope in (0.01, 0.2, 0.01)] == ["leaky_relu", None, "leaky_relu"]
    made = Leaky(0.01)
    made.child = nn.Identity()
    assert name_of(made) is None and name_of(Leaky(0.01)) == "leaky_relu"
    Leaky.forward = lambda self, x: F.silu(x)
    assert name_of(Leaky(0.01)) == "silu"


class Parent(nn.Module):
    beta = 1.0

    def helper(self, x):
        return F.silu(x)


class Child(Parent):
    def __init__(self):
        super().__init__()
        self.scale = 1.0

    def forward(self, x):
        return self.scale * self.helper(self.beta * x)


CHANGES = {
    "a number": (Child, "beta", 3.0),
    "a number of its parent": (Parent, "beta", 3.0),
    "a helper": (Child, "helper", lambda self, x: F.relu(x)),
    "a helper of its parent": (Parent, "helper", lambda self, x: F.relu(x)),
    "its forward": (Child, "forward", lambda self, x: x),
    "what stands before its own": (Parent, "scale", property(lambda self: 2.0, lambda self, value: None)),
}


@pytest.mark.parametrize(("owner", "name", "value"), CHANGES.values(), ids=CHANGES)
def test_a_class_that_changes_is_another(owner, name, value, monkeypatch):
    made = Child()
    assert name_of(made) == name_of(Child()) == "silu"
    act = Act("silu", known=(made, own_attributes(made)))
    assert act.now(made) == "silu"
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, value, raising=False)
        assert act.now(made) is None and name_of(made) != "silu" and name_of(Child()) != "silu"
    assert act.now(made) == name_of(made) == name_of(Child()) == "silu"
    made.scale = 2.0
    assert act.now(made) is None and name_of(made) is None


def test_another_class_is_looked_at():
    made = Child()
    act = Act("silu", known=(made, own_attributes(made)))
    made.__class__ = type("Child", (Child,), {"beta": 2.0})
    assert act.now(made) is None and name_of(made) is None
    made.__class__ = type("Child", (Child,), {})
    assert act.now(made) == name_of(made) == "silu"


# What nodes call


@pytest.mark.parametrize("activation", [a for a in TABLE if not a.learned], ids=lambda a: a.name)
def test_every_function_of_the_table_is_found(activation):
    given = dict(activation.defaults)
    named = {"approximate": activation.approximate} if activation.approximate else {}
    stock = getattr(activation.reference, "func", activation.reference)
    ours = getattr(fusedact.functional, next(iter(lines_of(stock).values())).name)
    graph = fx.Graph()
    x = graph.placeholder("x")
    for function in (stock, ours):
        node = graph.call_function(function, (x, *activation.default_values), named)
        assert called_activation(node) == (activation.name, given)
        node = graph.call_function(function, (), {"input": x, **given, **named})
        assert called_activation(node) == (activation.name, given)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.relu(x), ("relu", {})),
        (lambda x: F.relu_(x), ("relu", {})),
        (lambda x: x.relu_(), ("relu", {})),
        (lambda x: x.sigmoid(), ("sigmoid", {})),
        (lambda x: x.hardshrink(0.25), ("hardshrink", {"lambd": 0.25})),
        (lambda x: torch.tanh(input=x), ("tanh", {})),
        (lambda x: F.tanh(x), ("tanh", {})),
        (lambda x: F.gelu(x), ("gelu", {})),
        (lambda x: F.gelu(x, approximate="none"), ("gelu", {})),
        (lambda x: F.gelu(x, approximate="tanh"), ("gelu_tanh", {})),
        (lambda x: F.leaky_relu(x, 0.2), ("leaky_relu", {"negative_slope": 0.2})),
        (lambda x: F.leaky_relu_(x, 0.2), ("leaky_relu", {"negative_slope": 0.2})),
        (lambda x: F.silu(x, inplace=True), ("silu", {})),
        (lambda x: F.hardtanh(x, 0, 6), ("hardtanh", {"min_val": 0.0, "max_val": 6.0})),
        (lambda x: F.elu(x, alpha=2), ("elu", {"alpha": 2.0})),
        (lambda x: torch.celu(x, alpha=2.0), ("celu", {"alpha": 2.0})),
        (lambda x: F.softplus(x, 2.0), ("softplus", {"beta": 2.0})),
        (lambda x: F.threshold(x, 0.5, 0.0), ("threshold", {"threshold": 0.5, "value": 0.0})),
        (lambda x: F.gelu(x, approximate="erf"), None),
        (lambda x: F.hardtanh(x, 6, 0), None),
        (lambda x: F.leaky_relu(x, x), None),
        (lambda x: F.prelu(x, x), None),
        (lambda x: torch.sigmoid(x, out=x), None),
        (lambda x: x.exp(), None),
        (lambda x: torch.clamp(x, 0), None),
        (lambda x: x + 1, None),
        (lambda x: torch.square(x), None),
    ],
)
def test_called(function, expected):
    _, node, _ = fx.symbolic_trace(function).graph.nodes
    assert called_activation(node) == expected


def test_other_nodes_call_nothing():
    graph = fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph
    assert [called_activation(node) for node in graph.nodes] == [None] * 3


# Linear layers with their weight the other way round


def widened(x, width):
    """x's shape but for its last dimension."""
    return x.size()[:-1] + (width,)  # noqa: RUF005, a torch.fx.Proxy cannot be starred


class Transposed(nn.Module):
    def __init__(self, K=3, N=5):
        super().__init__()
        self.width = N
        self.weight = nn.Parameter(torch.randn(K, N))
        self.bias = nn.Parameter(torch.randn(N))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(widened(x, self.width))


def variant(forward, **attributes):
    made = type("Variant", (Transposed,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


OTHERS = {
    "linear": nn.Linear(3, 5),
    "bilinear": nn.Bilinear(1, 1, 1),
    "no parameters": nn.Module(),
    "wrong width": variant(Transposed.forward, width=15),
    "scaled": variant(
        lambda self, x: torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight, beta=2).view(widened(x, self.width))
    ),
    "other rows": variant(
        lambda self, x: torch.addmm(self.bias, x.view(-1, 3), self.weight).view(widened(x, self.width))
    ),
    "activated": variant(lambda self, x: Transposed.forward(self, x).relu()),
    "a second input": variant(lambda self, x, y=None: Transposed.forward(self, x)),
    "counts": variant(counts, calls=0),
    "a child": variant(Transposed.forward, child=nn.Identity()),
    "pruned": prune.l1_unstructured(Transposed(), "weight", 3),
    "parametrized": nn.utils.parametrizations.weight_norm(Transposed()),
}


def test_a_transposed_linear_is_proved_by_its_graph():
    layer = Transposed()
    assert transposed_linear(layer) and transposed_linear(layer.eval().double())
    assert transposed_linear(Transposed(2, 1)) and transposed_linear(copy.deepcopy(layer).to("meta"))
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    assert layer(x).allclose(F.linear(x, layer.weight.t(), layer.bias))
    layer.register_forward_hook(lambda module, inputs, output: None)
    assert not transposed_linear(layer)


@pytest.mark.parametrize("layer", OTHERS.values(), ids=OTHERS)
def test_another_layer_is_not(layer):
    assert not transposed_linear(layer)


# transformers


def test_activations_of_transformers():
    pytest.importorskip("transformers")
    from transformers.activations import ACT2FN

    found = {name: name_of(ACT2FN[name]) for name in ACT2FN}
    assert found == {
        **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
        **dict.fromkeys(("gelu_accurate", "gelu_fast", "gelu_new"), "gelu_tanh"),
        **dict.fromkeys(("gelu_python_tanh", "gelu_pytorch_tanh"), "gelu_tanh"),
        **dict.fromkeys(("silu", "swish"), "silu"),
        **{name: name for name in ("hardswish", "leaky_relu", "mish", "prelu", "relu", "relu6", "sigmoid", "tanh")},
        "relu2": "squared_relu",
        **dict.fromkeys(("gelu_10", "laplace", "linear", "quick_gelu", "sqrtsoftplus", "xielu")),
    }


def test_conv1d_of_transformers():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    assert transposed_linear(Conv1D(5, 3)) and transposed_linear(Conv1D(6, 3).eval().bfloat16())
