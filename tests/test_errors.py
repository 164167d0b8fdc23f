"""What stock raises and what it accepts, row by row of docs/contract.md: ours does the same, before any launch."""

import re

import numpy as np
import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn

stock = torch.nn.functional
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def row(*numbers):
    """What makes a case that holds these rows."""
    return lambda *values: pytest.param(*values, marks=pytest.mark.contract(*numbers))


def raised(function, *args):
    with pytest.raises(Exception) as caught:
        function(*args)
    return caught.value


# ---- Linear, in each of the ways to write one


def plain(x, w, b=None):
    return F.linear(x, w, b)


def activated(x, w, b=None):
    return F.linear(x, w, b, activation="relu")


def by_module(x, w, b=None):
    return F.linear(x, w, b, activation=torch.nn.GELU())


def chained(x, w, b=None):
    return F.linear_chain(x, [(w, b, "relu"), (torch.ones(3, 2), None, None)])


WAYS = [plain, activated, by_module, chained]
FAULTS = {
    "integers": row(1)(
        lambda: (torch.ones(4, 3).long(), torch.ones(2, 3), torch.ones(2)),
        RuntimeError,
        "mat1 and mat2 must have the same dtype, but got Long and Float",
    ),
    "bfloat16": row(2)(
        lambda: (torch.ones(4, 3).bfloat16(), torch.ones(2, 3), torch.ones(2)),
        RuntimeError,
        "mat1 and mat2 must have the same dtype, but got BFloat16 and Float",
    ),
    "bias float64": row(3)(
        lambda: (torch.ones(4, 3), torch.ones(2, 3), torch.ones(2).double()),
        RuntimeError,
        "self and mat2 must have the same dtype, but got Double and Float",
    ),
    "in_features": row(4)(
        lambda: (torch.ones(4, 5), torch.ones(2, 3)),
        RuntimeError,
        r"mat1 and mat2 shapes cannot be multiplied \(4x5 and 3x2\)",
    ),
    "0-d": row(5)(
        lambda: (torch.ones(()), torch.ones(2, 3)),
        RuntimeError,
        "both arguments to linear need to be at least 1D, but they are 0D and 2D",
    ),
    "3-D weight": row(6)(
        lambda: (torch.ones(4, 3), torch.ones(2, 3, 1)),
        RuntimeError,
        r"t\(\) expects a tensor with <= 2 dimensions, but self is 3D",
    ),
    "bias length": row(7)(
        lambda: (torch.ones(4, 3), torch.ones(2, 3), torch.ones(3)),
        RuntimeError,
        r"The expanded size of the tensor \(2\) must match the existing size \(3\)",
    ),
    "list": row(12)(
        lambda: ([1.0, 2.0, 3.0], torch.ones(2, 3)),
        TypeError,
        r"linear\(\): argument 'input' \(position 1\) must be Tensor, not list",
    ),
    "ndarray": row(12)(
        lambda: (np.ones((4, 3), np.float32), torch.ones(2, 3)),
        TypeError,
        r"linear\(\): argument 'input' \(position 1\) must be Tensor, not numpy.ndarray",
    ),
    "no weight": (
        lambda: (torch.ones(4, 3), None),
        TypeError,
        r"linear\(\): argument 'weight' \(position 2\) must be Tensor, not NoneType",
    ),
}


@each_backend
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("make", "kind", "message"), FAULTS.values(), ids=FAULTS)
def test_a_linear_layer_raises_torchs_error(make, kind, message, way, backend, device, launches):
    with torch.device(device):
        tensors = make()
        torchs = raised(stock.linear, *tensors)
        with fusedact.use_backend(backend), pytest.raises(kind, match=message) as ours:
            way(*tensors)
    assert (type(torchs), str(torchs)) == (ours.type, str(ours.value))
    assert launches.count == 0


@each_backend
@pytest.mark.parametrize("change", ["dtype", "in_features", "bias", "name", "parameters"])
def test_nothing_of_a_chain_is_launched_before_a_later_layers_error(change, backend, device, launches):
    with torch.device(device):
        x, good, w, b, act = torch.randn(4, 3), (torch.randn(5, 3), torch.randn(5)), torch.randn(2, 5), None, "relu"
        w = {"dtype": w.double(), "in_features": w[:, :4]}.get(change, w)
        b = torch.randn(3) if change == "bias" else b
        act = {"name": "rellu", "parameters": torch.nn.CELU(0.0)}.get(change, act)
    for grad in (False, True):
        with fusedact.use_backend(backend), torch.set_grad_enabled(grad):
            error = raised(F.linear_chain, x.requires_grad_(grad), [(*good, "relu"), (w, b, act)])
        assert launches.count == 0
        if change == "name":
            assert "unknown activation 'rellu'" in str(error)
        elif change == "parameters":
            assert str(error) == str(raised(stock.celu, x, 0.0))
        else:
            assert str(error) == str(raised(stock.linear, stock.linear(x, *good), w, b))


@each_backend
@pytest.mark.parametrize("hidden", [lambda: None, torch.nn.ReLU], ids=["bare", "relu"])
@pytest.mark.parametrize("fault", ["integers", "bfloat16", "in_features", "0-d", "list"])
def test_modules_raise_torchs_error(fault, hidden, backend, device, launches):
    x, *_ = FAULTS[fault].values[0]()
    x = x.to(device) if isinstance(x, torch.Tensor) else x
    torchs = torch.nn.Linear(3, 2, device=device)
    models = [nn.Linear(3, 2, device=device, activation=hidden()), nn.Sequential(nn.Linear(3, 2, device=device))]
    models += [nn.Sequential(torchs, torch.nn.ReLU(), torch.nn.Linear(2, 2, device=device))]
    with fusedact.use_backend(backend):
        errors = [raised(model, x) for model in models]
    assert {(type(e), str(e)) for e in errors} == {(type(raised(torchs, x)), str(raised(torchs, x)))}
    assert launches.count == 0


# ---- What is accepted

ACCEPTED = {
    "1-D weight": row(6)(lambda: (torch.randn(4, 3), torch.randn(3))),
    "bias (1,)": row(7)(lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(1))),
    "bias (4, 2)": row(7)(lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2))),
    "no rows": row(8)(lambda: (torch.randn(0, 3), torch.randn(2, 3), torch.randn(2))),
    "K = 0": row(8)(lambda: (torch.randn(4, 0), torch.randn(2, 0), torch.randn(2))),
    "N = 0": row(8)(lambda: (torch.randn(4, 3), torch.randn(0, 3), torch.randn(0))),
    "int64": row(9)(lambda: (torch.randint(-9, 9, (4, 3)), torch.randint(-9, 9, (2, 3)))),
    "sparse": lambda: (torch.randn(4, 3).to_sparse(), torch.randn(2, 3)),
}


@each_backend
@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_what_stock_accepts_is_accepted(make, backend, device):
    with torch.device(device):
        tensors = make()
    expected = stock.linear(*tensors).relu()
    with fusedact.use_backend(backend):
        for y in (F.linear(*tensors, activation="relu"), F.linear(*tensors).relu()):
            assert y.shape == expected.shape
            torch.testing.assert_close(y, expected)


@pytest.mark.contract(8)
@each_backend
def test_without_features_the_bias_is_the_answer(backend, device):
    bias = torch.tensor([1.0, -2.0], device=device)
    with fusedact.use_backend(backend):
        y = F.linear(torch.randn(4, 0, device=device), torch.randn(2, 0, device=device), bias, activation="relu")
    assert torch.equal(y, bias.relu().expand(4, 2))


@pytest.mark.contract(9)
@each_backend
def test_complex_numbers(backend, device, launches):
    x, w = (torch.randn(shape, dtype=torch.complex64, device=device) for shape in ((4, 3), (2, 3)))
    with fusedact.use_backend(backend):
        assert torch.equal(F.linear(x, w), stock.linear(x, w))
        for call in (lambda: F.relu(x), lambda: F.linear(x, w, activation="relu"), lambda: nn.ReLU()(x)):
            with pytest.raises((NotImplementedError, RuntimeError), match="clamp is not supported for complex types"):
                call()
        assert type(raised(F.relu, x)) is type(raised(stock.relu, x))
    assert launches.count == 0


@pytest.mark.contract(10)
@each_backend
@pytest.mark.parametrize("name", ["leaky_relu", "gelu", "elu", "softmax", "log_softmax"])
def test_integers_that_stock_refuses(name, backend, device, launches):
    x, options = torch.ones(4, 3, device=device).long(), {"dim": 1} if "softmax" in name else {}
    torchs = raised(lambda: getattr(stock, name)(x, **options))
    module = {"leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "elu": nn.ELU, "softmax": nn.Softmax}.get(
        name, nn.LogSoftmax
    )
    with fusedact.use_backend(backend):
        calls = [lambda: getattr(F, name)(x, **options), lambda: module(**options)(x)]
        if not options:
            calls += [lambda: F.activate(x, name), lambda: F.linear(x, torch.ones_like(x), activation=name)]
        for call in calls:
            with pytest.raises(NotImplementedError, match="not implemented for 'Long'") as ours:
                call()
            assert str(ours.value) == str(torchs)
    assert launches.count == 0


@each_backend
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (2,), (0,)], ids=str)
def test_slopes_that_stock_refuses(shape, backend, device, launches):
    x, w, slope = (torch.ones(size, device=device) for size in ((3, 5), (4, 5), shape))
    torchs = raised(lambda: stock.prelu(stock.linear(x, w), slope))
    with fusedact.use_backend(backend):
        ours = raised(lambda: F.linear(x, w, activation="prelu", slope=slope))
    assert (type(ours), str(ours)) == (type(torchs), str(torchs)) and launches.count == 0


@pytest.mark.contract(10)
@each_backend
def test_integers_that_stock_takes(backend, device):
    x = torch.tensor([-1, 0, 2], device=device)
    with fusedact.use_backend(backend):
        assert F.relu(x).dtype == torch.int64 and F.relu(x).tolist() == [0, 0, 2]
        assert F.sigmoid(x).dtype == torch.float32 and torch.equal(F.sigmoid(x), stock.sigmoid(x))


@pytest.mark.contract(11)
@each_backend
def test_booleans(backend, device, launches):
    x = torch.ones(3, device=device).bool()
    with fusedact.use_backend(backend):
        for call in (F.relu, nn.ReLU(), lambda x: F.activate(x, "relu")):
            with pytest.raises(RuntimeError, match="Boolean inputs not supported for relu"):
                call(x)
    assert launches.count == 0


# ---- Devices

META_WEIGHTS = {
    "linear": lambda x, w: F.linear(x, w),
    "linear relu": lambda x, w: F.linear(x, w, activation="relu"),
    "linear, a module": lambda x, w: F.linear(x, w, activation=torch.nn.Softmax(1)),
    "linear_chain": lambda x, w: F.linear_chain(x, [(w, None, "relu"), (w, None, None)]),
    "nn.Linear": lambda x, w: nn.Linear(3, 3, device="meta")(x),
    "nn.Linear relu": lambda x, w: nn.Linear(3, 3, device="meta", activation="relu")(x),
    "nn.Sequential": lambda x, w: nn.Sequential(nn.Linear(3, 3, device="meta"), nn.ReLU())(x),
    "conv1d": lambda x, w: F.conv1d(x[None], w[..., None]),
    "conv1d relu": lambda x, w: F.conv1d(x[None], w[..., None], activation="relu"),
    "conv_transpose1d": lambda x, w: F.conv_transpose1d(x[None], w[..., None], activation=torch.nn.Softmax(1)),
    "nn.Conv1d": lambda x, w: nn.Conv1d(3, 3, 1, device="meta")(x[None]),
    "nn.ConvTranspose1d": lambda x, w: nn.ConvTranspose1d(3, 3, 1, device="meta")(x[None]),
}


@pytest.mark.contract(13)
@each_backend
@pytest.mark.parametrize("call", META_WEIGHTS.values(), ids=META_WEIGHTS)
def test_a_weight_without_values_is_refused(call, backend, device, launches):
    """Stock gives what the result's memory held."""
    x, w = torch.ones(3, 3, device=device), torch.ones(3, 3, device="meta")
    with (
        fusedact.use_backend(backend),
        pytest.raises(RuntimeError, match=f"same device.* two devices, {device}.* meta"),
    ):
        call(x, w)
    assert launches.count == 0


@pytest.mark.contract(14)
@each_backend
@pytest.mark.parametrize("other", ["meta", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def test_two_devices(other, backend, launches):
    """Stock words it by the devices: the row has both."""
    x, w, b = torch.ones(4, 3), torch.ones(2, 3), torch.ones(2)
    text = {
        "cuda": "Expected all tensors to be on the same device, but (got .* is on cpu|found at least two devices)",
        "meta": "Tensor on device (meta|cpu) is not on the expected device (cpu|meta)",
    }[other]
    with fusedact.use_backend(backend):
        for ours, torchs, tensors in (
            (activated, stock.linear, (x.to(other), w, b)),
            (activated, stock.linear, (x, w, b.to(other))),
            (F.prelu, stock.prelu, (x.to(other), torch.ones(1))),
            (F.prelu, stock.prelu, (x, torch.ones(1, device=other))),
            (F.gated, lambda gate, up: stock.silu(gate) * up, (x, x.to(other))),
        ):
            expected, error = raised(torchs, *tensors), raised(ours, *tensors)
            assert (type(error), str(error)) == (type(expected), str(expected))
            assert isinstance(error, RuntimeError) and re.search(text, str(error))
    assert launches.count == 0


@pytest.mark.contract(15)
@each_backend
def test_all_on_meta(backend, launches):
    w, b = torch.empty(2, 3, device="meta"), torch.empty(2, device="meta")
    with fusedact.use_backend(backend):
        for rows in (4, 2**33):
            x = torch.empty(rows, 3, device="meta")
            for y in (activated(x, w, b), F.linear_chain(x, [(w, b, "gelu"), (w.t(), None, None), (w, None, "relu")])):
                assert y.shape == (rows, 2) and y.is_meta
            assert F.softmax(x, 1).shape == F.gated(x, x).shape == F.relu(x).shape == x.shape
        for call in (activated, plain):
            with pytest.raises(RuntimeError, match="Storage size calculation overflowed"):
                call(torch.empty(2**40, 1, device="meta"), torch.empty(2**24, 1, device="meta"))
    assert launches.count == 0


# ---- Parameters of any kind


@pytest.mark.parametrize("slope", [np.float32(0.25), torch.tensor(0.25), 1])
def test_parameters_may_be_any_number(slope, device, triton_backend):
    x, layer = torch.randn(2, 3, device=device), torch.nn.LeakyReLU(slope)
    model = nn.Sequential(nn.Linear(3, 4), layer).to(device)
    torch.testing.assert_close(model(x), layer(model[0](x)))


def test_a_module_brings_its_own_parameters(device):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    with pytest.raises(TypeError, match="from its module"):
        F.linear(x, w, activation=torch.nn.LeakyReLU(), negative_slope=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7])
def test_bounds_that_rounding_moves(bound, dtype, device, triton_backend):
    """A saturated unit's output is the bound rounded: its derivative must be 0 all the same."""
    x = torch.tensor([[3.0], [-3.0], [0.05]], device=device, dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for name, parameters, expected in (
        ("hardtanh", {"min_val": -bound, "max_val": bound}, [0, 0, 1]),
        ("threshold", {"threshold": bound, "value": bound}, [1, 0, 0]),
    ):
        y = F.linear(x, one, activation=name, **parameters)
        assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == expected
