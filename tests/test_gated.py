"""The gated pair act(gate) * up through its kernel, against float64 PyTorch."""

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
from fusedact.kernels import activations, elementwise, gated

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAMES = [name for name, a in ACTIVATIONS.items() if not a.learned]
FREQUENT = ["silu", "gelu", "gelu_tanh", "sigmoid", "relu", "elu"]
OPTIONS = {"elu": {"alpha": 0.7}}
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "first_half": lambda t: torch.cat([t, t], -1).chunk(2, -1)[0],
    "second_half": lambda t: torch.cat([t, t], -1).chunk(2, -1)[1],
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
    "cropped": lambda t: torch.nn.functional.pad(t, [1, 1] * t.dim())[(slice(1, -1),) * t.dim()],
    "one_number": lambda t: t.flatten()[0].expand_as(t),
}


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, scale=4):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def stock(gate, up, name="silu", **options):
    a = ACTIVATIONS[name]
    return a.reference(gate, *a.parameters(options)) * up


def exact(gate, up, name="silu", **options):
    """torch's own hardsigmoid takes a float32's 1/6 in float64 too."""
    return torch.nn.functional.relu6(gate + 3) / 6 * up if name == "hardsigmoid" else stock(gate, up, name, **options)


def outcome(function, gate, up, dy, *args, **options):
    """The value and both gradients."""
    leaves = [t.detach().requires_grad_() for t in (gate, up)]
    y = function(*leaves, *args, **options)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y))]


def check(compare, gate, up, dy, *args, **options):
    """Ours, torch's in the same dtype and the float64 truth: the value and both gradients."""
    doubles = (t.cpu().double() for t in (gate, up, dy))
    own, torchs = (outcome(function, gate, up, dy, *args, **options) for function in (F.gated, stock))
    for each in zip(own, torchs, outcome(exact, *doubles, *args, **options), strict=True):
        compare(*each)


def three(*shape, dtype=torch.float32, device="cpu"):
    return [draw(*shape, dtype=dtype, device=device, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name, dtype, device, as_accurate_as_torch):
    check(as_accurate_as_torch, *three(37, 45, dtype=dtype, device=device), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FREQUENT)
def test_halves_of_one_tensor(name, dtype, device, as_accurate_as_torch):
    x, dy = draw(6, 3, 130, dtype=dtype, device=device), draw(6, 3, 65, dtype=dtype, device=device, seed=1)
    check(as_accurate_as_torch, *x.chunk(2, -1), dy, name, **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    "shape",
    [(), (1,), (2047,), (2048,), (2049,), (3 * 2048 + 7,), (0,), (3, 0, 2), (7, 129), (4, 512), (2, 3, 4, 5, 6)],
    ids=str,
)
def test_shapes(shape, device, as_accurate_as_torch):
    check(as_accurate_as_torch, *three(*shape, device=device))
    check(as_accurate_as_torch, *three(*shape, dtype=torch.float64, device=device), "gelu")


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, gradient, device, as_accurate_as_torch):
    """From what stands in memory as the result does, to what has to be copied."""
    gate, up, dy = three(3, 5, 4, 6, device=device)
    gate, dy = LAYOUTS[layout](gate), LAYOUTS[gradient](dy)
    check(as_accurate_as_torch, gate, LAYOUTS[layout](up), dy)
    check(as_accurate_as_torch, gate, LAYOUTS[gradient](up), dy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_keeps_the_strides_that_stocks_has(layout, device):
    gate, up = (LAYOUTS[layout](draw(3, 5, 4, 6, device=device, seed=seed)) for seed in range(2))
    assert F.gated(gate, up).stride() == stock(gate, up).stride()


@st.composite
def arranged(draw_, shape, device, seed):
    """A tensor of that shape with its dimensions in some order in memory, sliced and expanded."""
    order = draw_(st.permutations(range(len(shape))))
    steps = draw_(st.lists(st.sampled_from([1, 2, 0]), min_size=len(shape), max_size=len(shape)))
    base = draw(*(n * max(s, 1) if s else 1 for n, s in zip(shape, steps, strict=True)), device=device, seed=seed)
    base = base.permute(order).contiguous().permute([order.index(dim) for dim in range(len(shape))])
    return base[tuple(slice(None, None, max(s, 1)) for s in steps)].expand(shape)


@given(data=st.data(), shape=st.lists(st.integers(0, 9), max_size=5), dtype=st.sampled_from(DTYPES))
def test_any_shape_and_strides(data, shape, dtype, device, as_accurate_as_torch):
    tensors = [data.draw(arranged(shape, device, seed)) for seed in range(3)]
    check(as_accurate_as_torch, *(t.to(dtype) for t in tensors))


@pytest.mark.contract(61)
def test_offsets_beyond_two_to_the_31(far_rows):
    config, truth = elementwise.tile(2), far_rows.relu() * far_rows
    assert torch.equal(gated.forward(far_rows, far_rows, activations.relu, (), config), truth)
    functions = activations.relu, activations.relu_grad, ()
    dgate, dup = gated.backward(far_rows, far_rows, far_rows, *functions, True, True, config)
    assert torch.equal(dgate, truth) and torch.equal(dup, truth)


# ---- special values


def one_by_one(gate, up, name):
    """As torch computes on a GPU: its vectorized CPU code takes other branches at NaN."""
    return torch.stack([stock(g, u, name) for g, u in zip(gate, up, strict=True)])


@pytest.mark.parametrize("name", FREQUENT)
def test_far_out_as_torch(name, device):
    """Every number of a list with every other; infinite and NaN ones reach the gradient of a branch alone."""
    numbers = [0.0, -0.0, 0.5, -1.0, 20.0, -300.0, 1e-45, -1e4, math.inf, -math.inf, math.nan]
    gate, up = torch.tensor(list(itertools.product(numbers, numbers)), device=device).t().contiguous()
    own, torchs = F.gated(gate, up, name), one_by_one(gate, up, name)
    torch.testing.assert_close(own, torchs, equal_nan=True, rtol=2e-6, atol=1e-6)
    if name != "relu":
        gate, up = gate[up.isfinite()], up[up.isfinite()]
    dy = torch.ones_like(gate)
    for ours, theirs in zip(*(outcome(f, gate, up, dy, name) for f in (F.gated, one_by_one)), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_sixteen_bits_are_rounded_once(name, device):
    gate, up = (draw(4000, dtype=torch.bfloat16, device=device, seed=seed) for seed in range(2))
    truth = stock(gate.double(), up.double(), name)
    error = (F.gated(gate, up, name).double() - truth).abs() / truth.abs()
    assert error.max() <= torch.finfo(torch.bfloat16).eps / 2 * 1.001


# ---- launches, what is saved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_forward_and_one_backward(layout, device, launches):
    gate, up = (LAYOUTS[layout](draw(4, 5, 6, 7, device=device)).detach().requires_grad_() for _ in range(2))
    launches.reset()
    y = F.gated(gate, up)
    assert launches.count == 1
    y.sum().backward()
    assert launches.count == 2


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_wanted_gradients(wanted, device, launches):
    gate, up, dy = three(9, 5, device=device)
    expected = outcome(F.gated, gate, up, dy, "gelu")[1:]
    leaves = [t.requires_grad_(want) for t, want in zip((gate, up), wanted, strict=True)]
    y = F.gated(*leaves, "gelu")
    launches.reset()
    y.backward(dy)
    assert launches.count == 1
    for leaf, want, grad in zip(leaves, wanted, expected, strict=True):
        assert torch.equal(leaf.grad, grad) if want else leaf.grad is None


def test_one_tensor_as_both(device, as_accurate_as_torch):
    x, dy = draw(6, 7, device=device), draw(6, 7, device=device, seed=1)

    def gradient(function, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x, x), x, dy.to(x))[0]

    as_accurate_as_torch(gradient(F.gated, x), gradient(stock, x), gradient(stock, x.double()))


def test_what_is_saved(device):
    """Both by reference; nothing without gradients."""
    gate, up = draw(20, 24, device=device).requires_grad_().chunk(2, -1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.gated(gate, up)
        assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
        kept.clear()
        with torch.no_grad():
            F.gated(gate, up)
        F.gated(gate.detach(), up.detach())
    assert not kept


def test_bitwise_the_same_from_run_to_run(device):
    gate, up, dy = three(40, 70, dtype=torch.bfloat16, device=device)
    for first, second in zip(*(outcome(F.gated, gate, up, dy) for _ in range(2)), strict=True):
        assert torch.equal(first, second)


# ---- what is torch's


OTHERS = {
    "broadcast": lambda x: (x, x[0]),
    "a number each row": lambda x: (x[:, :1], x),
    "mixed": lambda x: (x.bfloat16(), x),
    "complex": lambda x: (x.cfloat(), x.cfloat()),
    "up of integers": lambda x: (x, x.int()),
    "up a number": lambda x: (x, 2.0),
    "meta": lambda x: (x.to("meta"), x.to("meta")),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_the_rest_is_torchs(kind, device, launches):
    gate, up = OTHERS[kind](draw(4, 3, device=device))
    ours, theirs = F.gated(gate, up, "tanh"), stock(gate, up, "tanh")
    assert launches.count == 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: (x, x[:, :2]), "must match the size"),
        (lambda x: (x.long(), x.long()), "not implemented for 'Long'"),
        (lambda x: (x.to_sparse(), x.to_sparse()), "silu"),
    ],
    ids=["shapes", "integers", "sparse"],
)
def test_what_stock_refuses(make, message, device, launches):
    for function in (F.gated, stock):
        with pytest.raises(RuntimeError, match=message):
            function(*make(draw(4, 3, device=device)))
    assert launches.count == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "unknown activation 'swish', expected one of"),
        ({"activation": None}, ValueError, "unknown activation None"),
        ({"alpha": 1.0}, TypeError, "activation 'silu' takes no parameter, got alpha"),
        ({"activation": "prelu"}, TypeError, "activation 'prelu' takes a slope= tensor"),
        ({"slope": torch.ones(1)}, TypeError, "activation 'silu' takes no slope= tensor"),
        ({"activation": nn.SiLU(), "alpha": 1.0}, TypeError, r"gated\(\) takes an activation's parameters from its"),
        ({"activation": "hardtanh", "min_val": 2.0}, ValueError, "min_val cannot be greater than max_val"),
    ],
    ids=str,
)
def test_wrong_activations(options, error, message, device, launches):
    with pytest.raises(error, match=message):
        F.gated(draw(3, device=device), draw(3, device=device), **options)
    assert launches.count == 0


MODULES = {
    "stock": (torch.nn.SiLU(), 1),
    "ours": (nn.GELU("tanh"), 1),
    "parameter": (torch.nn.ELU(0.3), 1),
    "slope": (torch.nn.PReLU(), 0),
    "unknown": (torch.nn.RReLU(0.1, 0.2).eval(), 0),
    "written to": (torch.nn.ReLU(inplace=True), 0),
}


@pytest.mark.parametrize(("module", "launched"), MODULES.values(), ids=MODULES)
def test_modules(module, launched, device, launches):
    module = module.to(device)
    gate, up = draw(4, 5, device=device), draw(4, 5, device=device, seed=1)
    gates = gate.clone(), gate.clone()
    launches.reset()
    ours = F.gated(gates[0], up, module)
    assert launches.count == launched
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(ours, module(gates[1]) * up)
    assert torch.equal(*gates)


def test_slope_by_keyword(device):
    gate, up, slope = draw(4, 5, device=device), draw(4, 5, device=device, seed=1), torch.rand(5, device=device)
    ours = F.gated(gate, up, "prelu", slope=slope)
    torch.testing.assert_close(ours, torch.nn.functional.prelu(gate, slope) * up)


@pytest.mark.parametrize("name", FREQUENT)
def test_without_triton_torchs_own_operations(name, device):
    gate, up = draw(4, 5, device=device), draw(4, 5, device=device, seed=1)
    with fusedact.use_backend("torch"):
        assert torch.equal(F.gated(gate, up, name), stock(gate, up, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "softplus", "squared_relu"])
def test_autocast_gives_stocks_dtype(name, low, dtype, device):
    gate, up = draw(4, 3, device=device, dtype=dtype), draw(4, 3, device=device, dtype=dtype, seed=1)
    with torch.autocast(device, dtype=low):
        own, torchs = F.gated(gate, up, name), stock(gate, up, name)
    torch.testing.assert_close(own, torchs, rtol=2e-2, atol=2e-2)  # and its dtype


# ---- autograd and compilers


@pytest.mark.parametrize("name", ["silu", "gelu", "sigmoid", "elu"])
def test_second_derivative(name, device):
    inputs = [draw(3, 4, dtype=torch.float64, device=device, seed=seed).requires_grad_() for seed in range(2)]

    def f(gate, up):
        return F.gated(gate, up, name, **OPTIONS.get(name, {}))

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "hessian", "batched gradients"])
def test_transforms_take_torchs_formula(transform, device):
    gate, up = draw(5, 3, device=device, scale=1), draw(5, 3, device=device, seed=1)
    x = torch.cat([gate, up], -1)
    whole = gate.clone().requires_grad_()
    basis = torch.eye(15, device=device).view(15, 5, 3)

    apply = {
        "vmap": lambda f: torch.vmap(f)(gate, up),
        "jvp": lambda f: torch.func.jvp(f, (gate, up), (up, gate))[1],
        "hessian": lambda f: torch.func.hessian(lambda x: f(*x.chunk(2, -1)).sum())(x),
        "batched gradients": lambda f: torch.autograd.grad(f(whole, up), whole, basis, is_grads_batched=True)[0],
    }[transform]
    torch.testing.assert_close(*(apply(function) for function in (F.gated, stock)))


class Block(nn.Module):
    """A gated feed-forward block as transformers' models have it."""

    def __init__(self):
        super().__init__()
        self.gate_and_up, self.down = nn.Linear(5, 16), nn.Linear(8, 5)

    def forward(self, x):
        gate, up = self.gate_and_up(x).chunk(2, -1)
        return self.down(F.gated(gate, up, "gelu_tanh"))


def test_compiled_whole_and_only_once_more(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Block().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (11, 17, 23):
        x = draw(rows, 5, device=device).requires_grad_()
        both = (torch.autograd.grad(f(x).square().sum(), [x, *model.parameters()]) for f in (compiled, model))
        for traced, eager in zip(*both, strict=True):
            torch.testing.assert_close(traced, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_exported_as_one_operation(device):
    model, x = Block().to(device).eval(), torch.randn(11, 5, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert [node.target for node in program.graph.nodes].count(torch.ops.fusedact.gated.default) == 1
    more = torch.randn(23, 5, device=device)
    torch.testing.assert_close(program.module()(more), model(more))
