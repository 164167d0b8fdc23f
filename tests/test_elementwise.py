"""Activations alone and PReLU at any rank, through their kernels, against float64 PyTorch."""

import functools
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F
from fusedact import nn
from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, elementwise
from fusedact.kernels.workspace import tickets

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = [name for name, a in ACTIVATIONS.items() if not a.learned]
EXTREMES = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, -20.0, 300.0, -300.0, 1e-45, 1e4, -1e4]
# Where an infinite gradient meets a branch, torch selects; elsewhere it multiplies and the two differ by rounding.
SELECTS = ["relu", "leaky_relu", "threshold", "hardtanh", "relu6", "softshrink", "hardshrink", "prelu"]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
    "cropped": lambda t: torch.nn.functional.pad(t, [1, 1] * t.dim())[(slice(1, -1),) * t.dim()],
    "offset": lambda t: torch.cat([t.flatten().new_zeros(1), t.flatten()])[1:].view(t.shape),
}


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, scale=4):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def stock(name, x, slope=None):
    a = ACTIVATIONS[name]
    return a.reference(x, *(a.parameters({}) if slope is None else [slope]))


def exact(name, x, slope=None):
    """torch's own hardsigmoid takes a float32's 1/6 in float64 too."""
    return torch.nn.functional.relu6(x + 3) / 6 if name == "hardsigmoid" else stock(name, x, slope)


def ours(name, x, slope=None):
    return F.activate(x, name, slope=slope)


def outcome(function, name, tensors, dy):
    """The value and every gradient."""
    leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
    y = function(name, *leaves)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y))]


def check(name, x, dy, compare, slope=None):
    """Ours, torch's in the same dtype and the float64 truth: the value, its strides, and every gradient."""
    doubles = [t if t is None else t.cpu().double() for t in (x, slope)]
    own, torchs = (outcome(function, name, (x, slope), dy) for function in (ours, stock))
    for each in zip(own, torchs, outcome(exact, name, doubles, dy.cpu()), strict=True):
        compare(*each)
    if x.numel() and name != "logsigmoid":  # which torch makes contiguous on a CPU, though not on a GPU
        first, second = ([s for s, n in zip(y.stride(), x.shape, strict=True) if n > 1] for y in (own[0], torchs[0]))
        assert first == second


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name, dtype, device, as_accurate_as_torch):
    check(
        name,
        draw(37, 45, dtype=dtype, device=device),
        draw(37, 45, dtype=dtype, device=device, seed=1, scale=1),
        as_accurate_as_torch,
    )


@pytest.mark.parametrize(
    "shape", [(), (1,), (2047,), (2048,), (2049,), (0,), (3, 0, 2), (7, 129), (2, 3, 4, 5, 6)], ids=str
)
def test_shapes(shape, device, as_accurate_as_torch):
    check("gelu", draw(*shape, device=device), draw(*shape, device=device, seed=1), as_accurate_as_torch)


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, gradient, device, as_accurate_as_torch):
    """From what stands in memory as the result does, to what has to be copied: five dimensions apart."""
    shape = (3, 5, 4, 2, 6)
    dy = LAYOUTS[gradient](draw(*shape, device=device, seed=1))
    check("tanh", LAYOUTS[layout](draw(*shape, device=device)), dy, as_accurate_as_torch)
    check("softsign", LAYOUTS[layout](draw(*shape, device=device)), dy, as_accurate_as_torch)


def one_by_one(name, x, slope=None):
    """As torch computes on a GPU: its vectorized CPU code takes other branches at NaN."""
    return torch.cat([stock(name, x[i : i + 1], slope) for i in range(len(x))])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_far_out_as_torch(name, device):
    x = torch.tensor([*EXTREMES, math.inf, -math.inf, math.nan], device=device)
    slope = torch.tensor([0.25], device=device) if ACTIVATIONS[name].learned else None
    for dy in (1.0, math.inf, math.nan) if name in SELECTS else (1.0,):
        both = (outcome(function, name, (x, slope), torch.full_like(x, dy)) for function in (ours, one_by_one))
        for own, torchs in zip(*both, strict=True):
            torch.testing.assert_close(own, torchs, equal_nan=True, rtol=2e-6, atol=1e-6)


# ---- PReLU


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (600,), (70, 37), (3, 37, 50), (4, 5, 6, 7), (2, 3, 2, 3, 4)], ids=str)
def test_prelu_of_any_rank(shape, dtype, device, as_accurate_as_torch):
    x, dy = draw(*shape, dtype=dtype, device=device), draw(*shape, dtype=dtype, device=device, seed=1)
    for slopes in {1, shape[1] if len(shape) > 1 else 1}:
        check("prelu", x, dy, as_accurate_as_torch, torch.linspace(0.1, 0.4, slopes, dtype=dtype, device=device))
    check("prelu", x, dy, as_accurate_as_torch, torch.tensor(0.2, dtype=dtype, device=device))


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(20, 7), (4, 5, 6, 7)], ids=str)
def test_prelu_of_any_strides(shape, layout, gradient, device, as_accurate_as_torch):
    x, dy = LAYOUTS[layout](draw(*shape, device=device)), LAYOUTS[gradient](draw(*shape, device=device, seed=1))
    slopes = torch.linspace(0.1, 0.4, 2 * shape[1], device=device)
    for slope in (slopes[:1], slopes[::2], slopes[:1].expand(shape[1])):
        check("prelu", x, dy, as_accurate_as_torch, slope)


@pytest.mark.parametrize("programs", [1, 3, 1024])
@pytest.mark.parametrize("shape", [(5000,), (300, 130), (9, 3, 700), (2, 200, 3), (1, 1, 1)], ids=str)
def test_the_slopes_gradient_does_not_depend_on_how_it_is_shared(
    shape, programs, device, monkeypatch, as_accurate_as_torch
):
    monkeypatch.setattr(elementwise, "PROGRAMS", programs)
    x, dy = draw(*shape, device=device), draw(*shape, device=device, seed=1)
    for slopes in {1, shape[1] if len(shape) > 1 else 1}:
        check("prelu", x, dy, as_accurate_as_torch, torch.linspace(0.1, 0.4, slopes, device=device))
    assert not tickets(x.device, 1).any()  # as the next launch needs them


@pytest.mark.parametrize("slopes", [1, 7])
def test_prelu_bitwise_the_same_from_run_to_run(slopes, device):
    x, dy = draw(40, 7, 50, device=device), draw(40, 7, 50, device=device, seed=1)
    slope = torch.full((slopes,), 0.25, device=device, requires_grad=True)
    first, second = (torch.autograd.grad(F.prelu(x, slope), slope, dy)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("x", "slope", "message"),
    [
        ((4, 3), (2,), r"Found parameter numbers = 2 and channel size = 3\."),
        ((3,), (3,), r"Found parameter numbers = 3 and channel size = 1\."),
        ((), (3,), "zero-dim input"),
        ((4, 3), (3, 1), "scalar or 1D tensor"),
    ],
    ids=str,
)
def test_slopes_that_stock_refuses(x, slope, message, device, launches):
    with pytest.raises(RuntimeError, match=message):
        F.prelu(torch.randn(x, device=device), torch.rand(slope, device=device))
    with pytest.raises(RuntimeError, match="Type promoting not supported"):
        F.prelu(torch.randn(4, 3, device=device), torch.rand(3, device=device).double())
    assert launches.count == 0


# ---- launches, what is saved, modes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slopes", [None, 1, 5])
def test_one_launch_forward_and_one_backward(layout, slopes, device, launches):
    x = LAYOUTS[layout](draw(4, 5, 6, 7, device=device)).detach().requires_grad_()
    slope = None if slopes is None else torch.full((slopes,), 0.25, device=device, requires_grad=True)
    launches.reset()
    y = F.silu(x) if slope is None else F.prelu(x, slope)
    assert launches.count == 1
    y.sum().backward()
    assert launches.count == 2


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_wanted_gradients(wanted, device, launches):
    x, slope = draw(9, 5, device=device).requires_grad_(wanted[0]), torch.full((5,), 0.25, device=device)
    y = F.prelu(x, slope.requires_grad_(wanted[1]))
    launches.reset()
    y.backward(draw(9, 5, device=device))
    assert launches.count == 1
    assert (x.grad is not None, slope.grad is not None) == wanted


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "gelu", "softsign", "squared_relu"])
def test_what_is_saved(name, device):
    """One tensor by reference: the output where stock keeps that, the input otherwise; nothing without gradients."""
    x, kept = draw(20, 12, device=device).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = F.activate(x, name)
        of_output = ACTIVATIONS[name].derivative_from_output is not None
        assert [t.data_ptr() for t in kept] == [(y if of_output else x).data_ptr()]
        kept.clear()
        with torch.no_grad():
            F.activate(x, name)
    assert not kept


@pytest.mark.parametrize("changed", ["input", "output"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("step", "squared_relu", "tanhshrink")])
def test_what_may_be_changed_in_place_as_in_torch(name, changed, device):
    """tanhshrink apart: torch keeps tanh x, a tensor more, and so its input may change; ours keeps the input."""
    outcomes = []
    for function in (ours, stock):
        x = draw(5, device=device).requires_grad_() * 1
        y = function(name, x)
        with torch.no_grad():
            (x if changed == "input" else y).add_(1)
        try:
            outcomes.append(y.sum().backward())
        except RuntimeError as error:
            outcomes.append("modified by an inplace operation" in str(error))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_autocast_gives_stocks_dtype(name, low, dtype, device):
    x = draw(4, 3, device=device, dtype=dtype)
    slope = torch.full((3,), 0.25, device=device, dtype=dtype) if ACTIVATIONS[name].learned else None
    with torch.autocast(device, dtype=low):
        own, torchs = ours(name, x, slope), stock(name, x, slope)
    torch.testing.assert_close(own, torchs, rtol=2e-2, atol=2e-2)  # and its dtype


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivative(name, backend, device):
    x = draw(3, 4, dtype=torch.float64, device=device, scale=2).requires_grad_()
    slope = torch.full((4,), 0.25, dtype=torch.float64, device=device, requires_grad=True)
    inputs = (x, slope) if ACTIVATIONS[name].learned else (x,)
    f = functools.partial(ours, name)
    with fusedact.use_backend(backend):
        assert torch.autograd.gradcheck(f, inputs)
        if name == "hardsigmoid":
            with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):  # as stock
                torch.autograd.gradgradcheck(f, inputs)
        else:
            assert torch.autograd.gradgradcheck(f, inputs)


def test_compiled_whole_and_only_once_more(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.PReLU(5), nn.GELU("tanh"), nn.LeakyReLU(0.1), nn.Step(), nn.ReLU()).to(device)

    def loss(x):
        return model[:3](x).square().sum() + F.relu(model[3:](x)).sum() + F.softplus(x, beta=2.0).mean()

    compiled = torch.compile(loss, fullgraph=True)
    for rows in (11, 17, 23):
        x = draw(rows, 5, device=device).requires_grad_()
        both = (torch.autograd.grad(f(x), [x, model[0].weight]) for f in (compiled, loss))
        for traced, eager in zip(*both, strict=True):
            torch.testing.assert_close(traced, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("transform", ["vmap", "jvp", "hessian"])
@pytest.mark.parametrize("name", ["relu", "gelu", "squared_relu"])
def test_transforms_take_torchs_formula(name, transform, device):
    x = draw(5, 3, device=device)

    apply = {
        "vmap": lambda f: torch.vmap(f)(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
    }[transform]
    torch.testing.assert_close(*(apply(functools.partial(function, name)) for function in (ours, stock)))


@pytest.mark.parametrize("name", ["tanh", "gelu"])
def test_many_gradients_at_once(name, device):
    x, basis = draw(6, device=device).requires_grad_(), torch.eye(6, device=device)
    both = (torch.autograd.grad(f(name, x), x, basis, is_grads_batched=True)[0] for f in (ours, stock))
    torch.testing.assert_close(*both)


@st.composite
def arranged(draw_, device):
    """A tensor with some dimension permuted, sliced, expanded or empty, and a gradient for it."""
    shape = draw_(st.lists(st.integers(0, 9), max_size=5))
    steps = draw_(st.lists(st.sampled_from([1, 2, 0]), min_size=len(shape), max_size=len(shape)))
    order = draw_(st.permutations(range(len(shape))))
    base = draw(*(n * max(s, 1) if s else 1 for n, s in zip(shape, steps, strict=True)), device=device)
    x = base[tuple(slice(None, None, max(s, 1)) for s in steps)].expand(shape).permute(order)
    back = draw_(st.booleans())
    return x, draw(*shape, device=device, seed=1).permute(order) if back else draw(*x.shape, device=device, seed=1)


@given(data=st.data(), slopes=st.sampled_from(["one", "each", None]), dtype=st.sampled_from(DTYPES))
def test_any_shape_and_strides(data, slopes, dtype, device, as_accurate_as_torch):
    x, dy = (t.to(dtype) for t in data.draw(arranged(device)))
    count = x.shape[1] if slopes == "each" and x.dim() > 1 else 1
    slope = torch.linspace(0.1, 0.4, count, dtype=dtype, device=device)
    check("mish" if slopes is None else "prelu", x, dy, as_accurate_as_torch, None if slopes is None else slope)


def test_blocks_of_every_shape():
    """None is empty, and none more than a program takes."""
    sizes = [1, 2, 5, 17, 32, 33, 64, 129, 513, 5000]
    for elements, even, *shape in itertools.product([1024, 2048], [True, False], sizes, sizes, sizes):
        block = elementwise._block(tuple(shape), even, elements)
        assert min(block) >= 1 and math.prod(block) <= elements, (shape, even, block)


def test_a_gradient_of_other_strides_in_float64(device, as_accurate_as_torch):
    x, dy = draw(2, 32, 64, dtype=torch.float64, device=device), draw(2, 64, 32, dtype=torch.float64, seed=1)
    slope = torch.linspace(0.1, 0.4, 32, dtype=torch.float64, device=device)
    check("prelu", x, dy.to(device).transpose(1, 2), as_accurate_as_torch, slope)


@pytest.mark.contract(61)
def test_offsets_beyond_two_to_the_31(far_rows):
    config, truth = elementwise.tile(2), far_rows.clone().relu()
    assert torch.equal(elementwise.forward(far_rows, activations.relu, (), None, config), truth)
    dx, _ = elementwise.backward(far_rows, far_rows, activations.relu_grad, (), None, True, False, config)
    assert torch.equal(dx, truth)
