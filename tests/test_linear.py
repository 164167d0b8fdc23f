"""act(x Wᵀ + b), forward and backward, against float64 PyTorch: shapes around every block, strides, dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples.tiles import every_tile

from fusedact import functional as F
from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, linear

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
TILES = every_tile("forward", [torch.float16, torch.float32, torch.float64])
SHAPES = [  # M, K, N
    (1, 1, 1),
    (1, 3, 1),
    (64, 3, 1),
    (5, 784, 10),
    (31, 63, 33),
    (32, 64, 32),
    (33, 65, 97),
    (100, 16, 130),
    (200, 20, 7),
]


def tensors(M, K, N, dtype, device, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    x, weight = draw(M, K).requires_grad_(), (draw(N, K) / max(K, 1) ** 0.5).requires_grad_()
    return x, weight, draw(N).requires_grad_() if bias else None, draw(M, N)


def composite(x, weight, bias, name, slope=None):
    z = torch.nn.functional.linear(x, weight, bias)
    params = [v for _, v in ACTIVATIONS[name].defaults]
    return ACTIVATIONS[name].reference(z, *(params if slope is None else [slope]))


def result_and_gradients(run, inputs, dy):
    y = run(*inputs)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    return [y, *torch.autograd.grad(y, wanted, dy)]


def check(name, inputs, dy, compare, slope=None):
    """Ours, torch's in the same dtype and the float64 truth: the value and every gradient."""
    slopes = [] if slope is None else [slope]
    doubles = [t if t is None else t.detach().cpu().double().requires_grad_() for t in (*inputs, *slopes)]

    def ours(x, weight, bias, slope=None):
        return F.linear(x, weight, bias, activation=name, slope=slope)

    def stock(x, weight, bias, slope=None):
        return composite(x, weight, bias, name, slope)

    three = (
        result_and_gradients(ours, (*inputs, *slopes), dy),
        result_and_gradients(stock, (*inputs, *slopes), dy),
        result_and_gradients(stock, doubles, dy.cpu().double()),
    )
    for own, torchs, truth in zip(*three, strict=True):
        compare(own, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_at_odd_shapes(shape, dtype, device, as_accurate_as_torch):
    x, weight, bias, dy = tensors(*shape, dtype, device)
    check("relu", (x, weight, bias), dy, as_accurate_as_torch)


@pytest.mark.parametrize("name", [name for name, a in ACTIVATIONS.items() if not a.learned])
def test_every_activation(name, device, as_accurate_as_torch):
    x, weight, bias, dy = tensors(33, 20, 17, torch.float32, device)
    check(name, (x, weight, bias), dy, as_accurate_as_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slopes", [1, 37])
def test_prelu_learns_its_slope(slopes, dtype, device, as_accurate_as_torch):
    x, weight, bias, dy = tensors(70, 12, 37, dtype, device)
    slope = torch.linspace(0.1, 0.4, slopes, dtype=dtype, device=device).requires_grad_()
    check("prelu", (x, weight, bias), dy, as_accurate_as_torch, slope)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "offset"])
def test_any_strides_are_read_in_place(layout, device, as_accurate_as_torch):
    x, weight, bias, dy = (t.detach() for t in tensors(33, 40, 21, torch.float32, device))
    arrange = {
        "transposed": lambda t: t.t().contiguous().t(),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
        "expanded": lambda t: t[:1].expand_as(t),
        "offset": lambda t: torch.cat([t.new_zeros(1, t.shape[1]), t])[1:],
    }[layout]
    inputs = arrange(x).requires_grad_(), arrange(weight).requires_grad_(), bias.requires_grad_()
    check("gelu", inputs, arrange(dy), as_accurate_as_torch)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (2, 0, 3)], ids=str)
def test_leading_dimensions(lead, bias, device, as_accurate_as_torch):
    _, weight, b, _ = tensors(1, 5, 4, torch.float32, device, bias)
    x = torch.randn(*lead, 5, device=device).requires_grad_()
    check("tanh", (x, weight, b), torch.randn(*lead, 4, device=device), as_accurate_as_torch)


@pytest.mark.parametrize("shape", [(0, 3, 4), (4, 0, 3), (4, 3, 0), (0, 0, 0)], ids=str)
def test_empty(shape, device, as_accurate_as_torch):
    x, weight, bias, dy = tensors(*shape, torch.float32, device)
    check("sigmoid", (x, weight, bias), dy, as_accurate_as_torch)


@given(
    shape=st.tuples(*[st.integers(0, 40)] * 3),
    name=st.sampled_from([n for n, a in ACTIVATIONS.items() if not a.learned]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, name, dtype, bias, seed, device, as_accurate_as_torch):
    x, weight, b, dy = tensors(*shape, dtype, device, bias, seed)
    check(name, (x, weight, b), dy, as_accurate_as_torch)


@pytest.mark.parametrize("layout", ["by K", pytest.param("across K", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("dtype", "tile"), TILES.values(), ids=TILES)
def test_every_tile(dtype, tile, layout, device, as_accurate_as_torch):
    """Through the whole epilogue: bias, a slope per channel, and z beside y; two by two tiles."""
    M, N = (tile.block_m + 22, tile.block_n + 8) if tile else (70, 40)
    x, weight, bias, _ = (t.detach() for t in tensors(M, 96, N, dtype, device))
    if layout == "across K":
        lines = [torch.nn.functional.pad(t, (0, 0, 0, -len(t) % 16)).t().contiguous() for t in (x, weight)]
        x, weight = (line.t()[: len(t)] for line, t in zip(lines, (x, weight), strict=True))
    slope = torch.linspace(-1, 1, N, dtype=dtype, device=device)
    y, z = linear.forward(x, weight, bias, activations.prelu, (), slope, tile, save_z=True)
    stock = torch.nn.functional.linear(x, weight, bias)
    truth = torch.nn.functional.linear(*(t.cpu().double() for t in (x, weight, bias)))
    tf32 = tile is not None and tile.precision == "tf32"
    if device == "cpu" or not tf32:  # its error is of another size; the interpreter's dot is exact
        as_accurate_as_torch(z, stock, truth)
    as_accurate_as_torch(
        y, torch.nn.functional.prelu(z, slope), torch.nn.functional.prelu(z.cpu().double(), slope.cpu().double())
    )


@pytest.mark.parametrize(
    ("wanted", "expected"), [((1, 1, 1), 3), ((0, 1, 1), 2), ((1, 0, 0), 2), ((0, 0, 1), 1)], ids=str
)
def test_launches_and_only_wanted_gradients(wanted, expected, device, launches):
    """One launch forward; backward one pass for dz and db, then a product for each of dx and dW that is wanted."""
    x, weight, bias, dy = tensors(20, 8, 12, torch.float32, device)
    for tensor, want in zip((x, weight, bias), wanted, strict=True):
        tensor.requires_grad_(bool(want))
    launches.reset()
    y = F.linear(x, weight, bias, activation="relu")
    assert launches.count == 1
    y.backward(dy)
    assert launches.count == 1 + expected
    assert [t.grad is not None for t in (x, weight, bias)] == [bool(w) for w in wanted]


@pytest.mark.parametrize(("name", "saves"), [("relu", "y"), ("tanh", "y"), ("gelu", "z"), ("silu", "z")])
def test_what_is_saved(name, saves, device):
    """x and W by reference, and one tensor of y's size: y itself, or z; nothing without gradients."""
    x, weight, bias, _ = tensors(20, 8, 12, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = F.linear(x, weight, bias, activation=name)
        assert sum(t.numel() for t in kept) == x.numel() + weight.numel() + bias.numel() + y.numel()
        assert any(t.data_ptr() == y.data_ptr() for t in kept) == (saves == "y")
        kept.clear()
        with torch.no_grad():
            F.linear(x, weight, bias, activation=name)
    assert not kept


def test_bitwise_the_same_from_run_to_run(device):
    x, weight, bias, dy = tensors(300, 40, 50, torch.float32, device)
    runs = [result_and_gradients(lambda *t: F.linear(*t, activation="silu"), (x, weight, bias), dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["relu", "gelu", "prelu", "softplus"])
def test_second_derivative(name, device):
    x, weight, bias, _ = (t.detach().double().requires_grad_() for t in tensors(4, 3, 5, torch.float64, device))
    inputs = [x, weight, bias]
    if ACTIVATIONS[name].learned:
        inputs.append(torch.full((5,), 0.25, dtype=torch.float64, device=device, requires_grad=True))

    def f(x, weight, bias, slope=None):
        return F.linear(x, weight, bias, activation=name, slope=slope)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_a_gradient_through_both_arguments_is_counted_once(device):
    """dW must not flow into dx behind the op when the weight is made from the input."""
    x = torch.randn(3, 3, dtype=torch.float64, device=device, requires_grad=True)
    first = {}
    for name, f in (
        ("ours", lambda x: F.linear(x, x * 2, activation="tanh")),
        ("torch", lambda x: torch.tanh(x @ (x * 2).t())),
    ):
        (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        first[name] = g, torch.autograd.grad(g.square().sum(), x)[0]
    for ours, torchs in zip(first["ours"], first["torch"], strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.contract(61)
def test_offsets_beyond_two_to_the_31(far_rows, device):
    weight = torch.randn(8, 16, dtype=torch.float16, device=device)
    dense = far_rows.clone()
    for rows, cols in ((far_rows, dense), (far_rows.t(), dense.t())):
        other = weight if rows.shape[1] == 16 else weight[:, :4]
        assert torch.equal(F.linear(rows, other, activation="relu"), F.linear(cols, other, activation="relu"))
