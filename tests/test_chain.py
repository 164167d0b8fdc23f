"""Linear layers in a row as one op: values, gradients, what it saves, its launches, and when it steps aside."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples.tiles import every_tile

from fusedact import functional as F
from fusedact import nn
from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, bias_activation, chain

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TILES = every_tile("backward", [torch.float16, torch.float32])


def network(widths, names, device, dtype=torch.float32, of=nn, bias=True):
    """Linear layers of those widths, each with the activation of that name after it; None for none."""
    modules = []
    for (inputs, outputs), name in zip(pairwise(widths), names, strict=True):
        modules.append(of.Linear(inputs, outputs, bias=bias))
        if name is not None:
            modules.append(ACTIVATIONS[name].build())
    return of.Sequential(*modules).to(device, dtype)


def both(widths, names, device, dtype=torch.float32, bias=True):
    ours = network(widths, names, device, dtype, bias=bias)
    stock = network(widths, names, device, dtype, torch.nn, bias)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def value_and_gradients(model, x, dy):
    x = x.detach().requires_grad_()
    y = model(x)
    return [y, *torch.autograd.grad(y, [x, *model.parameters()], dy)]


def check(ours, stock, x, dy, compare):
    truth = value_and_gradients(stock.double().cpu(), x.detach().double().cpu(), dy.double().cpu())
    stock.to(x.device, x.dtype)
    for results in zip(value_and_gradients(ours, x, dy), value_and_gradients(stock, x, dy), truth, strict=True):
        compare(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("widths", "names"),
    [
        ((7, 33, 10), ("relu", None)),
        ((7, 33, 40, 10), ("relu", "tanh", None)),
        ((16, 1, 20, 3), ("gelu", "silu", "sigmoid")),
        ((5, 8, 6), ("prelu", "elu")),
        ((3, 70, 2), ("threshold", "softsign")),
    ],
    ids=str,
)
def test_value_and_every_gradient(widths, names, dtype, device, as_accurate_as_torch):
    ours, stock = both(widths, names, device, dtype)
    x, dy = (torch.randn(37, width, device=device).to(dtype) for width in (widths[0], widths[-1]))
    check(ours, stock, x, dy, as_accurate_as_torch)


@settings(max_examples=15)
@given(
    widths=st.lists(st.integers(0, 40), min_size=3, max_size=5),
    rows=st.integers(0, 40),
    bias=st.booleans(),
    data=st.data(),
)
def test_any_network(widths, rows, bias, data, device, as_accurate_as_torch):
    names = [
        *(data.draw(st.sampled_from([n for n, a in ACTIVATIONS.items() if a.module])) for _ in widths[2:]),
        data.draw(st.sampled_from([None, "relu", "gelu"])),
    ]
    torch.manual_seed(0)
    ours, stock = both(widths, names, device, torch.float64, bias)  # where no sum of a few loses too many digits
    x, dy = (torch.randn(rows, width, dtype=torch.float64, device=device) for width in (widths[0], widths[-1]))
    check(ours, stock, x, dy, as_accurate_as_torch)


@pytest.mark.parametrize("lead", [(), (2, 3)], ids=str)
def test_leading_dimensions(lead, device, as_accurate_as_torch):
    ours, stock = both((4, 6, 5), ("relu", "gelu"), device)
    x, dy = torch.randn(*lead, 4, device=device), torch.randn(*lead, 5, device=device)
    check(ours, stock, x, dy, as_accurate_as_torch)


@pytest.mark.parametrize("from_output", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("dtype", "tile"), TILES.values(), ids=TILES)
def test_every_tile(dtype, tile, from_output, device, as_accurate_as_torch):
    """The kernel alone, on two by two tiles, so that sums have several shares; with a slope for each channel."""
    if device == "cuda" and tile is not None and tile.precision == "tf32":
        pytest.skip("its error is of another size than torch's")
    M, N, K = (tile.block_m + 22, tile.block_n + 8, 96) if tile else (70, 40, 96)
    dz_next, weight, z = (torch.randn(shape, device=device).to(dtype) for shape in ((M, K), (K, N), (M, N)))
    slope = None if from_output else torch.linspace(0.1, 0.9, N, device=device).to(dtype)
    name = "relu" if from_output else "prelu"
    saved = z.relu() if from_output else z
    act, act_grad = getattr(activations, name), getattr(activations, f"{name}_grad")

    def stock(dz_next, weight, z, slope):
        z, slope = z.detach().requires_grad_(), slope if slope is None else slope.detach().requires_grad_()
        y = torch.relu(z) if slope is None else torch.nn.functional.prelu(z, slope)
        dz, *dslope = torch.autograd.grad(y, [z, *([] if slope is None else [slope])], dz_next @ weight)
        return dz, y.detach(), dz.sum(0), *dslope

    found = chain.backward(
        dz_next, weight, saved, act, act_grad, (), slope, from_output, True, slope is not None, tile,
        bias_activation.tile(M, N, dtype.itemsize),
    )  # fmt: skip
    inputs = dz_next, weight, z, slope
    truth = stock(*(t if t is None else t.cpu().double() for t in inputs))
    for ours, torchs, true in zip([t for t in found if t is not None], stock(*inputs), truth, strict=True):
        as_accurate_as_torch(ours, torchs, true)


@pytest.mark.parametrize(
    ("wanted", "launched"), [("all", 3 + 1 + 2 * 3), ("parameters", 3 + 1 + 2 * 2 + 1), ("last", 3 + 1 + 1)]
)
def test_launches_and_only_wanted_gradients(wanted, launched, device, launches):
    """Forward one a layer; backward one pass, then a product for each dz and each dW that is wanted."""
    model = network((8, 12, 10, 6), ("relu", "tanh", "relu"), device)
    x = torch.randn(20, 8, device=device, requires_grad=wanted == "all")
    if wanted == "last":
        model[:4].requires_grad_(False)
    launches.reset()
    model(x).sum().backward()
    assert launches.count == launched
    assert [p.grad is not None for p in model.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(("names", "kept"), [(("relu", "relu"), "y"), (("gelu", "gelu"), "z"), (("silu", None), "z")])
def test_what_is_saved(names, kept, device):
    """Beside the input and the parameters one tensor a layer that has an activation."""
    model = network((8, 12, 10), names, device)
    x = torch.randn(20, 8, device=device)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        y = model(x)
    own = sum(t.numel() for t in (x, *model.parameters()))
    assert sum(t.numel() for t in found) == own + 20 * 12 + (20 * 10 if names[-1] else 0)
    assert any(t.data_ptr() == y.data_ptr() for t in found) == (kept == "y")


def test_second_derivative(device):
    model = network((3, 4, 2), ("gelu", "tanh"), device, torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)

    def f(x, *parameters):
        return F.linear_chain(x, [(*parameters[:2], "gelu"), (*parameters[2:], "tanh")])

    assert torch.autograd.gradcheck(f, (x, *model.parameters()))
    assert torch.autograd.gradgradcheck(f, (x, *model.parameters()))


def test_bitwise_the_same_from_run_to_run(device):
    model = network((40, 50, 30), ("silu", "relu"), device)
    x, dy = torch.randn(300, 40, device=device), torch.randn(300, 30, device=device)
    runs = [value_and_gradients(model, x, dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def is_one_op(model, x) -> bool:
    node = model(x).grad_fn
    return "LinearChain" in type(node).__name__


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (lambda model: model, True),
        (lambda model: setattr(model, "1", torch.nn.LeakyReLU(0.2)), True),
        (lambda model: model[0].register_forward_hook(lambda *args: None), False),
        (lambda model: model[1].register_forward_hook(lambda *args: None), False),
        (lambda model: model.append(torch.nn.Softmax(1)), False),
        (lambda model: model.insert(1, torch.nn.Dropout(0.0)), False),
    ],
    ids=[
        "plain",
        "an activation with a parameter",
        "hook on a layer",
        "hook on an activation",
        "another module after it",
        "a module between",
    ],
)
def test_when_layers_are_one_op(changed, expected, device):
    model = network((4, 6, 5), ("relu", "relu"), device)
    changed(model)
    assert is_one_op(model, torch.randn(3, 4, device=device)) == expected


@pytest.mark.parametrize("lead", [(3,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("last", ["relu", "gelu", None])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("library", [False, True])
def test_the_result_may_be_changed_in_place_as_stocks_may(lead, last, layers, library, device, monkeypatch):
    """Unless it is what backward needs, which is then torch's error. Also where the library takes the products."""
    if library:
        monkeypatch.setattr("fusedact.autograd.linear.choose", lambda *problem: None)
    widths, names = (*(4, 6, 5)[:layers], 5), ("relu",) * (layers - 1) + (last,)
    model = network(widths, names, device)
    y = model(torch.randn(*lead, 4, device=device))
    y.mul_(2)
    if last == "relu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_negated_gradient(layers, device):
    """Whose memory holds the gradient with the other sign."""
    model = network((4, 6, 5)[: layers + 1], ("tanh", "gelu")[:layers], device)
    x = torch.randn(3, 4, device=device, requires_grad=True)
    y = model(x)
    grads = [
        torch.autograd.grad(y, x, dy, retain_graph=True)[0]
        for dy in (torch._neg_view(torch.ones_like(y)), -torch.ones_like(y))
    ]
    torch.testing.assert_close(*grads)


def test_an_attribute_of_torchs_linear_is_no_activation(device):
    model = nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 5)).to(device)
    x = torch.randn(30, 4, device=device)
    expected = model(x)
    model[2].activation = torch.nn.ReLU()
    assert torch.equal(model(x), expected) and expected.min() < 0


def test_a_frozen_layer_in_front_keeps_nothing(device):
    model = network((8, 12, 10, 6), ("gelu", "gelu", "gelu"), device)
    model[:2].requires_grad_(False)
    found = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
        model(torch.randn(20, 8, device=device))
    own = sum(p.numel() for p in model[2:].parameters())
    assert sum(t.numel() for t in found) == own + 20 * (12 + 10 + 6)  # the chain's input, and two pre-activations


def test_layers_with_activations_of_their_own(device, as_accurate_as_torch):
    ours = nn.Sequential(nn.Linear(4, 6, activation="gelu"), nn.Linear(6, 5, activation="prelu")).to(device)
    stock = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.GELU(), torch.nn.Linear(6, 5), torch.nn.PReLU())
    for mine, theirs in zip(ours.parameters(), stock.to(device).parameters(), strict=True):
        theirs.data.copy_(mine.data)
    x, dy = torch.randn(9, 4, device=device), torch.randn(9, 5, device=device)
    assert is_one_op(ours, x)
    check(ours, stock, x, dy, as_accurate_as_torch)


def test_without_gradients_nothing_is_recorded(device):
    model = network((4, 6, 5), ("relu", None), device)
    with torch.no_grad():
        assert model(torch.randn(3, 4, device=device)).grad_fn is None


@pytest.mark.parametrize("way", ["vmap", "compile"])
def test_transforms_take_each_layer_by_itself(way, device):
    way = {"vmap": torch.func.vmap, "compile": lambda model: torch.compile(model, backend="aot_eager")}[way]
    model = network((4, 6, 5), ("relu", "tanh"), device)
    x = torch.randn(3, 4, device=device)
    torch.testing.assert_close(way(model)(x), model(x))


def test_autocast_casts_what_stock_casts(device):
    model, stock = both((4, 6, 5), ("relu", None), device)
    x = torch.randn(3, 4, device=device)
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16):
        y, expected = model(x), stock(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_errors_are_those_of_linear(device):
    model = network((4, 6, 5), ("relu", None), device)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.randn(3, 7, device=device))
    with pytest.raises(ValueError, match="unknown activation"):
        F.linear_chain(torch.randn(3, 4, device=device), [(torch.randn(6, 4), None, "relux")])
