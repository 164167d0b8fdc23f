"""softmax, log-softmax and softmin along any dimension, forward and backward, against float64 PyTorch."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F
from fusedact import nn
from fusedact.kernels import softmax as kernels

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = ["softmax", "log_softmax", "softmin"]
SHAPES = [
    ((), 0),
    ((1,), -1),
    ((7, 1), 1),
    ((1, 7), 1),
    ((300, 3), 1),
    ((129, 16), -1),
    ((33, 17), 1),
    ((3, 1000), 1),
    ((2, 2049), -1),
    ((33, 70), 0),
    ((2, 21, 65), 1),
    ((2, 300, 3), -2),
    ((90, 10, 2), 1),
    ((3, 2, 5, 4), 2),
]
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def drawn(shape, seed=0, scale=3.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(kind):
    return getattr(F, kind), getattr(torch.nn.functional, kind)


def run(function, x, dim, dy, dtype=None):
    """The result and the gradient."""
    x = x.detach().requires_grad_()
    y = function(x, dim, dtype=dtype)
    return y, torch.autograd.grad(y, x, dy.to(y.device, y.dtype))[0]


def check(kind, x, dim, compare, dtype=None, transposed=False):
    """Ours, torch's in the same dtype and the float64 truth."""
    ours, stock = both(kind)
    dy = drawn(x.shape, seed=1, scale=1.0).to(dtype or x.dtype)
    if transposed:
        dy = dy.transpose(0, -1).contiguous().transpose(0, -1)
    three = run(ours, x, dim, dy, dtype), run(stock, x, dim, dy, dtype), run(stock, x.cpu().double(), dim, dy)
    for results in zip(*three, strict=True):
        compare(*results)


@each_kind
@each_dtype
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_shapes(shape, dim, dtype, kind, device, as_accurate_as_torch):
    check(kind, drawn(shape).to(device, dtype), dim, as_accurate_as_torch)


@each_kind
@pytest.mark.parametrize(
    ("shape", "dim", "dtype"),
    [
        ((2, 33_000), 1, torch.float32),
        ((2, 5000), 1, torch.float64),
        ((1, 600, 40), 1, torch.bfloat16),
        ((200, 20), 0, torch.float64),
    ],
    ids=str,
)
def test_wider_than_the_registers(shape, dim, dtype, kind, device, as_accurate_as_torch):
    """Statistics are kept per lane, and the row is read again."""
    x = drawn(shape).to(device, dtype)
    assert all(
        kernels.tile(x.shape, x.stride(), dim, max(4, dtype.itemsize), operands, 32).lanes < shape[dim]
        for operands in (1, 2)
    )
    check(kind, x, dim, as_accurate_as_torch)


@each_kind
@pytest.mark.parametrize("classes", [1, 2, 21, 32])
def test_few_classes_of_many_rows(classes, kind, device, as_accurate_as_torch):
    """A thread takes them one after another, whatever rows are left over."""
    config = kernels.tile((16, classes, 65536), (classes * 65536, 65536, 1), 1, 4, 1, 32)
    assert config.lanes == 2 and config.rows == 1024
    x, dy = (drawn((2, classes, 1030), seed).to(device, torch.bfloat16) for seed in (0, 1))
    log, negate = kind == "log_softmax", kind == "softmin"
    stock, stock_dx = run(both(kind)[1], x, 1, dy)
    truth, truth_dx = run(both(kind)[1], x.cpu().double(), 1, dy)
    as_accurate_as_torch(kernels.forward(x, 1, x.dtype, log, negate, config), stock, truth)
    as_accurate_as_torch(kernels.backward(dy, stock.detach(), 1, x.dtype, log, negate, config), stock_dx, truth_dx)


@pytest.mark.parametrize("operands", [1, 2])
@pytest.mark.parametrize("classes", [1000, 8192, 16384, 32768, 65536, 131072])
def test_two_programs_side_by_side_or_rows_that_the_cache_holds(classes, operands):
    """In the registers no more than a quarter of a multiprocessor's; of what is read twice few rows on the way."""
    config = kernels.tile((4096, classes), (classes, 1), 1, 4, operands, 32)
    threads = 32 * config.num_warps
    if config.lanes >= classes:
        assert operands * config.rows * config.lanes * 4 <= 64 * 1024 and threads <= 512
    else:
        assert config.lanes == 16 * threads and threads == (512 if operands * classes <= 32768 else 1024)


@each_kind
@each_dtype
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), [((5, 12), 1), ((2, 9, 33), 1)], ids=str)
def test_from_any_dtype_to_any(shape, dim, to, dtype, kind, device, as_accurate_as_torch):
    check(kind, drawn(shape).to(device, dtype), dim, as_accurate_as_torch, dtype=to)


def test_narrowed_before_the_exponential(device):
    """As torch, which converts the input first: 2049 is 2048 in float16."""
    x = torch.tensor([2049.0, 2048.0], device=device)
    assert F.softmax(x, 0, dtype=torch.float16).tolist() == [0.5, 0.5]


LAYOUTS = {
    "transposed": ((12, 30), lambda x: x.t()),
    "sliced": ((30, 12, 2), lambda x: x[..., 0]),
    "expanded": ((1, 12), lambda x: x.expand(30, 12)),
    "one number": ((), lambda x: x.expand(30, 12)),
    "channels last": ((2, 5, 6, 7), lambda x: x.to(memory_format=torch.channels_last)),
    "heads after tokens": ((2, 5, 3, 8), lambda x: x.transpose(1, 2)),
    "back to front": ((5, 4, 3, 2), lambda x: x.permute(3, 2, 1, 0)),
    "more row dimensions than three": ((2, 3, 2, 3, 2), lambda x: x.permute(4, 2, 0, 3, 1)),
}


@each_kind
@pytest.mark.parametrize("of", ["x", "dy"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_read_in_place(layout, of, kind, device, launches):
    shape, arrange = LAYOUTS[layout]
    arranged = arrange(drawn(shape).to(device))
    dense = drawn(arranged.shape, seed=1).to(device)
    x, dy = (arranged, dense) if of == "x" else (dense, arranged)
    for dim in range(x.dim()):
        ours, stock = both(kind)
        plain = dense.clone().copy_(x)
        for results in zip(run(ours, x, dim, dy), run(stock, plain, dim, dy), strict=True):
            torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert launches.count == 2 * x.dim()


ROWS = {
    "nan": [0.0, math.nan, 0.0],
    "+inf": [0.0, math.inf, 0.0],
    "-inf": [0.0, -math.inf, 0.0],
    "one of -inf": [-math.inf, 0.0, -math.inf],
    "all -inf": [-math.inf] * 3,
    "all +inf": [math.inf] * 3,
    "both": [math.inf, -math.inf, 0.0],
    "largest": [3e38, -3e38, 3e38],
    "lowest": [torch.finfo(torch.float32).min] * 3,
    "far out": [1e4, 1e4 + 1, 1e4 - 1],
    "denormal": [1e-45, -1e-45, -0.0],
}


@each_kind
@pytest.mark.parametrize("classes", [3, 4100])
@pytest.mark.parametrize("row", ROWS)
def test_extreme_rows_as_torch(row, classes, kind, device):
    """In the registers, and over more steps than one; the second row is an ordinary one and must stay so."""
    x = torch.zeros(2, classes, dtype=torch.float64 if classes > 3 else torch.float32, device=device)
    x[0] = ROWS[row][-1]
    x[0, :3], x[1, :3] = torch.tensor(ROWS[row], device=device), torch.tensor([1.0, 2.0, 3.0], device=device)
    if classes > 3:
        assert kernels.tile(x.shape, x.stride(), 1, 8, 1, 32).lanes < classes
    ours, stock = (run(function, x, 1, drawn(x.shape)) for function in both(kind))
    for results in zip(ours, stock, strict=True):
        torch.testing.assert_close(*results, equal_nan=True)


@each_kind
@pytest.mark.parametrize(("shape", "dim"), [((0, 3), 1), ((3, 0), 1), ((3, 0), 0), ((2, 0, 4), -1)], ids=str)
def test_empty(shape, dim, kind, device, launches):
    x = torch.randn(shape, device=device, requires_grad=True)
    y = getattr(F, kind)(x, dim, dtype=torch.bfloat16)
    assert y.shape == x.shape and y.dtype == torch.bfloat16
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape and launches.count == 0


@each_kind
@pytest.mark.parametrize(("shape", "dim"), [((300, 10), 1), ((3, 40, 50), 1), ((1, 33_000), 1), ((), 0)], ids=str)
def test_one_launch_forward_and_one_backward(shape, dim, kind, device, launches):
    x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = getattr(F, kind)(x, dim, dtype=torch.float32)
    assert launches.count == 1
    y.backward(torch.ones_like(y))
    assert launches.count == 2 and x.grad.dtype == torch.bfloat16


@each_kind
def test_saves_the_output_alone(kind, device):
    x, kept = torch.randn(30, 10, device=device, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = getattr(F, kind)(x, 1)
        assert kept == [y.data_ptr()]
        with torch.no_grad():
            getattr(F, kind)(x, 1)
    assert len(kept) == 1


def test_the_input_may_be_changed_and_the_output_not(device):
    x = torch.randn(3, 4, device=device, requires_grad=True)
    middle = x * 1
    y = F.softmax(middle, 1)
    middle.zero_()
    ours, stock = (torch.autograd.grad(y.square().sum(), x) for y in (y, x.softmax(1)))
    torch.testing.assert_close(ours, stock)
    y = F.softmax(x, 1)
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    order=st.randoms(use_true_random=False),
    dtype=st.sampled_from(DTYPES),
    to=st.sampled_from([None, torch.float64]),  # a narrower one's gradient errs by the few roundings of its result
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 9),
)
def test_any_shape_and_order(shape, order, dtype, to, kind, seed, device, as_accurate_as_torch):
    x = drawn(shape, seed).to(device, dtype).permute(order.sample(range(len(shape)), len(shape)))
    dim = order.randrange(max(1, x.dim()))
    check(kind, x, dim, as_accurate_as_torch, to, transposed=x.dim() > 1)


@each_kind
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_bitwise_the_same_from_run_to_run(dim, kind, device):
    x = torch.randn(12, 40, 20, device=device)
    assert torch.equal(getattr(F, kind)(x, dim), getattr(F, kind)(x, dim))


@each_kind
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dim", [0, 1])
def test_derivatives(dim, backend, kind, device):
    x = drawn((3, 2)).to(device).requires_grad_()
    with fusedact.use_backend(backend):
        assert torch.autograd.gradcheck(lambda x: getattr(F, kind)(x, dim), x)
        assert torch.autograd.gradgradcheck(lambda x: getattr(F, kind)(x, dim), x)


@each_kind
def test_second_derivative_with_a_dtype(kind, device):
    """The path of create_graph, from the output."""
    found = []
    for function in both(kind):
        x = drawn((4, 3)).to(device, torch.float32).requires_grad_()
        (dx,) = torch.autograd.grad(function(x, 1, dtype=torch.float64).square().sum(), x, create_graph=True)
        found.append((dx, torch.autograd.grad(dx.square().sum(), x)[0]))
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock)


@each_kind
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "hessian", "many gradients at once"])
def test_transforms_as_torchs(transform, kind, device):
    x = torch.randn(3, 4, device=device)

    def many(f):
        leaf = x.clone().requires_grad_()
        basis = torch.eye(x.numel(), device=device).view(-1, *x.shape)
        return torch.autograd.grad(f(leaf), leaf, basis, is_grads_batched=True)[0]

    apply = {
        "vmap": lambda f: torch.vmap(f)(x[None]),
        "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        "hessian": lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x),
        "many gradients at once": many,
    }[transform]
    torch.testing.assert_close(*(apply(lambda x, f=f: f(x, -1)) for f in both(kind)))


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
def test_compiled_whole(device):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Softmin(1), nn.LogSoftmax(0), nn.Softmax())

    def loss(x):
        return F.softmax(model(x), -1, dtype=torch.float64).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(rows, 4, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(x), loss(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.contract(61)
def test_offsets_beyond_two_to_the_31(far_rows):
    near = far_rows.clone()
    for dim in (0, 1):
        y = F.softmax(near, dim)
        assert torch.equal(F.softmax(far_rows, dim), y)
        config = kernels.tile(y.shape, y.stride(), dim, 4, 2, 32)
        assert torch.equal(*(kernels.backward(dy, y, dim, y.dtype, False, False, config) for dy in (far_rows, near)))


# What torch says


@each_kind
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (lambda: torch.ones(2, 3), {"dim": 2}, IndexError, r"Dimension out of range \(expected to be in range of \[-2"),
        (lambda: torch.ones(()), {"dim": 1}, IndexError, "Dimension out of range"),
        (lambda: torch.ones(3).long(), {"dim": 0}, NotImplementedError, "not implemented for 'Long'"),
        (lambda: torch.ones(3), {"dim": 0, "dtype": torch.int32}, NotImplementedError, "not implemented for 'Int'"),
        (lambda: torch.ones(3), {"dim": True}, TypeError, r"must be int, not bool|got \(bool\)"),
        (lambda: torch.ones(3), {"dim": 0, "dtype": []}, TypeError, "must be torch.dtype, not list|dtype=list"),
    ],
    ids=["dim", "dim of a number", "integers", "to integers", "dim of another kind", "dtype of another kind"],
)
def test_bad_input_is_torchs_error(make, options, error, message, backend, kind, device, launches):
    x = make().to(device)
    with fusedact.use_backend(backend), pytest.raises(error, match=message):
        getattr(F, kind)(x, **options)
    assert launches.count == 0


@each_kind
def test_integers_are_torchs(kind, device, launches):
    ours, stock = (function(torch.arange(4, device=device), 0, dtype=torch.float64) for function in both(kind))
    assert torch.equal(ours, stock) and launches.count == 0


def test_more_classes_than_are_counted_in_32_bits_are_torchs(device, launches, monkeypatch):
    monkeypatch.setattr("fusedact.functional.softmaxes.MOST_CLASSES", 4)
    for x in (torch.randn(5, 4, device=device), torch.randn((), device=device)):
        torch.testing.assert_close(F.softmax(x, 0), x.softmax(0))
    assert launches.count == 1


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("kind", [*KINDS, "Softmax", "LogSoftmax", "Softmin"])
def test_the_implicit_dimension_with_torchs_warning(kind, shape, backend, device):
    x, said = torch.randn(shape, device=device), []
    for home in (nn, torch.nn) if kind[0].isupper() else (F, torch.nn.functional):
        function = getattr(home, kind)() if kind[0].isupper() else getattr(home, kind)
        with fusedact.use_backend(backend), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            y = function(x)
        said.append((y, [(str(w.message), w.filename, w.lineno) for w in caught if w.category is UserWarning]))
    (ours, own), (stock, torchs) = said
    torch.testing.assert_close(ours, stock)
    assert own == torchs and "Implicit dimension choice" in own[0][0]
    assert kind[0].isupper() or own[0][1] == __file__


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", [None, torch.float64], ids=str)
@each_kind
def test_autocast_as_torchs(kind, to, low, device):
    for dtype in DTYPES:
        x = torch.randn(4, 7, device=device, dtype=dtype, requires_grad=True)
        with torch.autocast(device, dtype=low):
            ours, stock = (function(x, 1, dtype=to) for function in both(kind))
        assert ours.dtype == stock.dtype
        torch.testing.assert_close(ours, stock)
        assert torch.autograd.grad(ours.sum(), x)[0].dtype == dtype


MODULES = [
    ("Softmax", (1,), (3, 4)),
    ("LogSoftmax", (0,), (3, 4)),
    ("Softmin", (-1,), (3, 4)),
    ("Softmax2d", (), (3, 4, 5)),
]


@pytest.mark.parametrize(("name", "arguments", "shape"), MODULES, ids=str)
def test_modules(name, arguments, shape, device, launches):
    ours, stock = getattr(nn, name)(*arguments), getattr(torch.nn, name)(*arguments)
    assert isinstance(ours, type(stock)) and repr(ours) == repr(stock) and ours.__dict__ == stock.__dict__
    x = torch.randn(shape, device=device)
    torch.testing.assert_close(ours(x), stock(x))
    assert launches.count == 1


def test_softmax_2d_of_another_rank(device, launches):
    with pytest.raises(ValueError, match="expected input to be 3D or 4D, got 2D instead"):
        nn.Softmax2d()(torch.ones(2, 3, device=device))
    assert launches.count == 0
