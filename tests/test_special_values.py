"""Parameters and options of activations, softmax and in-place calls that stock refuses or takes, row by row of
docs/contract.md, and what comes of special values.
"""

import numpy as np
import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn

stock = torch.nn.functional
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])


def raised(function, *args):
    with pytest.raises(Exception) as caught:
        function(*args)
    return caught.value


# ---- Parameters


@pytest.mark.contract(16)
@each_backend
def test_slopes_of_a_wrong_number(backend, device, launches):
    x, w, slope = (torch.ones(shape, device=device) for shape in ((4, 3), (3, 3), (2,)))
    message = "Mismatch of parameter numbers and input channel size. Found parameter numbers = 2 and channel size = 3."
    module = nn.PReLU(2, device=device)
    with fusedact.use_backend(backend):
        for call in (
            lambda: F.prelu(x, slope),
            lambda: F.activate(x, "prelu", slope=slope),
            lambda: F.linear(x, w, activation="prelu", slope=slope),
            lambda: F.conv1d(x[..., None], w[..., None], activation="prelu", slope=slope),
            lambda: F.gated(x, x, "prelu", slope=slope),
            lambda: module(x),
            lambda: nn.Sequential(nn.Linear(3, 3, device=device), module)(x),
        ):
            with pytest.raises(RuntimeError, match=message):
                call()
    assert launches.count == 0


REFUSED = {
    "hardtanh": ({"min_val": 2.0, "max_val": 1.0}, ValueError, "min_val cannot be greater than max_val"),
    "softshrink": ({"lambd": -1.0}, RuntimeError, r"lambda must be in range \[0, "),
    "celu": ({"alpha": 0.0}, RuntimeError, "alpha|ZeroDivisionError"),
}


@pytest.mark.contract(17)
@each_backend
@pytest.mark.parametrize("name", REFUSED)
def test_parameters_that_stock_refuses(name, backend, device, launches):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    parameters, kind, message = REFUSED[name]
    with fusedact.use_backend(backend):
        for call in (
            lambda: F.linear(x, w, activation=name, **parameters),
            lambda: getattr(F, name)(x, **parameters),
            lambda: F.activate(x, name, **parameters),
            lambda: F.gated(x, x, name, **parameters),
            lambda: F.conv1d(x[None], w[:2, :2, None], activation=name, **parameters),
        ):
            with pytest.raises(kind, match=message) as ours:
                call()
            assert str(ours.value) == str(raised(lambda: getattr(stock, name)(x, **parameters)))
    assert launches.count == 0


@pytest.mark.contract(17)
@each_backend
def test_gelu_and_glu(backend, device, launches):
    x = torch.randn(2, 3, device=device)
    unknown = nn.GELU(approximate="x")
    with fusedact.use_backend(backend):
        for call in (lambda: F.gelu(x, approximate="x"), lambda: unknown(x)):
            with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
                call()
        with pytest.raises(RuntimeError, match="approximate argument must be either none or tanh"):
            F.linear(x, x, activation=unknown)
        launched = launches.count  # a module that is in no table runs after the product, as stock's does
        for call in (F.glu, nn.GLU()):
            with pytest.raises(RuntimeError, match="Halving dimension must be even"):
                call(x)
    assert launches.count == launched == 0


@pytest.mark.contract(18)
@each_backend
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "softmin"])
def test_dimensions_of_a_softmax(name, backend, device, launches):
    x = torch.randn(4, 3, device=device)
    ours, module = getattr(F, name), {"softmax": nn.Softmax, "log_softmax": nn.LogSoftmax, "softmin": nn.Softmin}[name]
    message = r"Dimension out of range \(expected to be in range of \[-2, 1\], but got 2\)"
    with fusedact.use_backend(backend):
        for call in (lambda: ours(x, 2), lambda: module(2)(x)):
            with pytest.raises(IndexError, match=message):
                call()
        assert launches.count == 0
        for call in (lambda: ours(x), lambda: module()(x)):
            with pytest.warns(UserWarning, match="Implicit dimension choice") as warned:
                y = call()
            assert len(warned) == 1
            torch.testing.assert_close(y, getattr(stock, name)(x, 1))


# ---- In place


@pytest.mark.contract(19)
@each_backend
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "silu", "hardtanh"])
def test_in_place_where_it_cannot_be(name, backend, device, launches):
    leaf = "a leaf Variable that requires grad is being used in an in-place operation"
    view = "a view of a leaf Variable that requires grad is being used in an in-place operation"
    shared = "more than one element of the written-to tensor refers to a single memory location"
    cases = (
        (lambda: torch.ones(3, device=device, requires_grad=True), leaf),
        (lambda: torch.ones(3, device=device, requires_grad=True)[:2], view),
        (lambda: torch.ones(1, device=device).expand(3), shared),
    )
    with fusedact.use_backend(backend):
        for make, message in cases:
            calls = [lambda x: getattr(F, name)(x, inplace=True)]
            calls += [lambda x: getattr(F, f"{name}_")(x)] if hasattr(F, f"{name}_") else []
            for call in calls:
                with pytest.raises(RuntimeError, match=message):
                    call(make())
    assert launches.count == 0


IN_PLACE = {"elu": (nn.ELU, -0.5), "leaky_relu": (nn.LeakyReLU, -0.5), "celu": (nn.CELU, -0.5)}


@pytest.mark.contract(20)
@each_backend
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_with_a_negative_slope(name, backend, device):
    make, slope = IN_PLACE[name]
    x, own = torch.randn(4, 3, device=device), make(slope, inplace=True)
    torchs, product = getattr(torch.nn, make.__name__)(slope, inplace=True), nn.Linear(3, 3, device=device)
    told = "leakyReLu" if name == "leaky_relu" else "elu"
    with fusedact.use_backend(backend):
        for call in (
            lambda x: getattr(F, name)(x.clone(), slope, inplace=True),
            lambda x: own(x.clone()),
            lambda x: F.linear(x, product.weight, activation=own),
            lambda x: F.conv1d(x[None], x.new_ones(3, 4, 1), activation=torchs),
            nn.Sequential(product, own),
            nn.Sequential(torch.nn.Linear(3, 3, device=device), torchs),
            nn.Sequential(product, torch.nn.ReLU(), torch.nn.Linear(3, 3, device=device), torchs),
            nn.Linear(3, 3, device=device, activation=torchs),
        ):
            y = call(x.clone().requires_grad_()).sum()
            with pytest.raises(
                RuntimeError, match=f"In-place {told} backward calculation is triggered with a negative"
            ):
                y.backward()


# ---- The rest


@pytest.mark.contract(27)
def test_reversed_arrays_make_no_tensor():
    """So that none is ever given to an op; as they are, they are refused like every array."""
    reversed_rows = np.ones((4, 3), np.float32)[::-1]
    for make in (torch.from_numpy, torch.as_tensor):
        with pytest.raises(ValueError, match="At least one stride in the given numpy array is negative"):
            make(reversed_rows)
    with pytest.raises(TypeError, match=r"must be Tensor, not numpy\.ndarray"):
        F.linear(reversed_rows, torch.ones(2, 3), activation="relu")


# ---- Special values

INFINITE = float("inf")
NAN_KEEPERS = ["relu", "leaky_relu", "sigmoid", "tanh", "gelu", "elu", "hardtanh", "relu6", "hardswish", "threshold"]


@pytest.mark.contract(21)
@each_backend
@pytest.mark.parametrize("name", NAN_KEEPERS)
def test_nan_comes_through(name, backend, device):
    x = torch.full((2, 3), torch.nan, device=device)
    others = {"threshold": 0.5, "value": 0.1} if name == "threshold" else {}
    with fusedact.use_backend(backend):
        results = [
            getattr(F, name)(x, **others),
            F.activate(x, name, **others),
            F.linear(x, torch.ones(4, 3, device=device), activation=name, **others),
            F.gated(x, torch.ones_like(x), name, **others),
            F.conv1d(x[None], torch.ones(4, 2, 1, device=device), activation=name, **others),
        ]
    assert all(y.isnan().all() for y in results)


@pytest.mark.contract(22)
@each_backend
def test_relus_gradient_is_chosen_and_not_multiplied(backend, device):
    """1 at NaN; 0 below 0 even for an infinite gradient, where a product would give NaN."""
    x = torch.tensor([[torch.nan], [-1.0], [2.0]], device=device, requires_grad=True)
    dy = torch.tensor([[1.0], [INFINITE], [3.0]], device=device)
    one = torch.ones(1, 1, device=device)
    with fusedact.use_backend(backend):
        for call in (
            F.relu,
            lambda x: F.linear(x, one, activation="relu"),
            lambda x: F.linear_chain(x, [(one, None, None), (one, None, "relu")]),
            lambda x: F.gated(x, torch.ones_like(x), "relu"),
            lambda x: F.conv1d(x[:, None], one[None], activation="relu")[:, 0],
        ):
            (dx,) = torch.autograd.grad(call(x), x, dy)
            assert dx.flatten().tolist() == [1, 0, 3]


KINKS = {
    "relu": (0.0, {}, 0.0),
    "leaky_relu": (0.0, {}, 0.01),
    "elu": (0.0, {}, 1.0),
    "hardtanh": (1.0, {}, 0.0),
    "relu6 at 0": (0.0, {}, 0.0),
    "relu6 at 6": (6.0, {}, 0.0),
    "hardshrink": (0.5, {}, 0.0),
    "softshrink": (0.5, {}, 0.0),
    "hardsigmoid": (3.0, {}, 0.0),
    "hardswish": (-3.0, {}, 0.0),
    "threshold": (0.0, {"threshold": 0.0, "value": 0.0}, 0.0),
    "prelu": (0.0, {}, 0.25),
}


@pytest.mark.contract(23)
@each_backend
@pytest.mark.parametrize("kink", KINKS)
def test_derivatives_at_the_kinks(kink, backend, device):
    at, parameters, expected = KINKS[kink]
    name, one = kink.split(" at ")[0], torch.ones(1, 1, device=device)
    x = torch.full((1, 1), at, device=device, requires_grad=True)
    given = {"slope": torch.full((1,), 0.25, device=device)} if name == "prelu" else parameters
    alone = given.values() if name == "prelu" else parameters.values()
    with fusedact.use_backend(backend):
        results = [
            getattr(F, name)(x, *alone),
            F.activate(x, name, **given),
            F.linear(x, one, activation=name, **given),
            F.gated(x, one, name, **given),
            F.conv1d(x[None], one[..., None], activation=name, **given),
        ]
        for y in results:
            assert torch.autograd.grad(y.sum(), x)[0].item() == pytest.approx(expected, abs=1e-9)


@pytest.fixture
def flushing():
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.contract(24)
@each_backend
def test_signed_zeros_and_denormals(backend, device, flushing):
    x = torch.tensor([-0.0, 0.0, 1e-45, 1e-40], device=device)
    one = torch.ones(1, 1, device=device)
    with fusedact.use_backend(backend):
        assert F.relu(x).signbit().tolist() == stock.relu(x).signbit().tolist() == [True, False, False, False]
        for y in (F.relu(x), F.linear(x[:, None], one, activation="relu").flatten()):
            assert torch.equal(y[1:], x[1:]) and (y[2:] > 0).all()


def bits(t):
    """Of float32: a flushed comparison would call a denormal equal to zero."""
    return t.view(torch.int32).tolist()


@pytest.mark.contract(24)
@each_backend
def test_denormals_are_flushed_where_torch_was_told_to(backend, device, flushing):
    """By the CPU's arithmetic; the interpreter's ReLU has none, it chooses."""
    if device == "cuda":
        pytest.skip("torch flushes on a CPU alone")
    alone = "relu" if backend == "torch" else "softsign"
    x, one = torch.tensor([-0.0, 0.0, 1e-45, 1e-40]), torch.ones(1, 1)
    if not flushing(True):
        pytest.skip("a CPU that cannot")
    with fusedact.use_backend(backend):
        ours = getattr(F, alone)(x), F.linear(x[:, None], one, activation="relu").flatten()
    stocks = getattr(stock, alone)(x), stock.linear(x[:, None], one).relu().flatten()
    flushing(False)
    assert list(map(bits, ours)) == list(map(bits, stocks))
    assert all(bits(y)[2:] == [0, 0] for y in ours)


@pytest.mark.contract(25)
@each_backend
def test_float16_products_are_added_in_float32(backend, device):
    x = torch.full((2, 2), 300.0, dtype=torch.float16, device=device)
    w = torch.tensor([[300.0, 300.0], [300.0, -300.0]], dtype=torch.float16, device=device)
    with fusedact.use_backend(backend):
        for y in (F.linear(x, w, activation="relu"), F.linear_chain(x, [(w, None, "relu")]), F.linear(x, w)):
            assert y.tolist() == [[INFINITE, 0.0]] * 2


@pytest.mark.contract(26)
@each_backend
@pytest.mark.parametrize("name", ["relu", "softmax", "linear", "gated", "conv1d"])
def test_gradients_of_the_strides_that_autograd_makes(name, backend, device):
    x, w = torch.randn(4, 3, device=device), torch.randn(3, 3, device=device)
    kernel = w[..., None]
    ours, torchs = {
        "relu": (F.relu, stock.relu),
        "softmax": (lambda x: F.softmax(x, 1), lambda x: stock.softmax(x, 1)),
        "linear": (lambda x: F.linear(x, w, activation="gelu"), lambda x: stock.gelu(stock.linear(x, w))),
        "gated": (lambda x: F.gated(x, x), lambda x: stock.silu(x) * x),
        "conv1d": (lambda x: F.conv1d(x, kernel, activation="relu"), lambda x: stock.conv1d(x, kernel).relu()),
    }[name]
    weights, strides, results = torch.arange(12.0, device=device).view(3, 4), [], []
    for call, chosen in ((ours, backend), (torchs, "torch")):
        for reduced in (torch.sum, lambda y: (y.reshape(4, 3).t().contiguous() * weights).sum()):
            leaf = (x[:, :, None] if name == "conv1d" else x).clone().requires_grad_()
            with fusedact.use_backend(chosen):
                y = call(leaf)
                y.register_hook(lambda dy: strides.append(dy.stride()[:2]))
                reduced(y).backward()
            results.append(leaf.grad)
    assert strides[:2] == [(0, 0), (1, 4)]
    for ours, torchs in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(ours, torchs)
