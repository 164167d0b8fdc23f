"""linear(d, 1) and BCE on logits as one head, forward and backward, against float64 PyTorch."""

import copy
import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F
from fusedact import nn
from fusedact.kernels import linear_bce

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
HEAD = importlib.import_module("fusedact.autograd.linear_bce")  # whose name the function hides
ours = F.linear_binary_cross_entropy_with_logits


def stock(input, linear_weight, target, *, linear_bias=None, **options):
    z = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return torch.nn.functional.binary_cross_entropy_with_logits(z, target, **options)


@pytest.fixture(params=["early", "late"])
def moment(request, monkeypatch):
    """When gradients are made: with the loss, where they can be, or once dloss is known."""
    monkeypatch.setattr(HEAD, "_costs_less_late", lambda x: request.param == "late")
    return request.param


def drawn(shape, seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if positive else torch.randn)(shape, generator=generator, dtype=torch.float64)


def inputs(shape, dtype, device, bias=True):
    """input (*, d), linear_weight, linear_bias and target (*, 1), for logits of a few units."""
    *rows, d = shape
    tensors = drawn(shape, 0), 2 * drawn((1, d), 1) / max(1, d) ** 0.5, drawn((1,), 2), drawn((*rows, 1), 3, True)
    x, w, b, target = (t.to(device, dtype) for t in tensors)
    return x, w, b if bias else None, target


def pulled_back(function, x, w, b, target, **options):
    """The loss, and its gradients for some dloss."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    value = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    dloss = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return value, *torch.autograd.grad(value, [t for t in leaves if t is not None], dloss)


@pytest.fixture
def check(as_accurate_as_torch):
    def check(x, w, b, target, **options):
        def wide(t):
            return t.detach().cpu().double() if isinstance(t, torch.Tensor) else t

        truth = pulled_back(stock, *map(wide, (x, w, b, target)), **{k: wide(v) for k, v in options.items()})
        both = (pulled_back(function, x, w, b, target, **options) for function in (ours, stock))
        for results in zip(*both, truth, strict=True):
            as_accurate_as_torch(*results)

    return check


@pytest.mark.parametrize("shape", [(1, 1), (64, 3), (7, 10), (257, 16), (33, 1000), (20, 8192), (2, 16384)], ids=str)
def test_shapes(shape, device, moment, check, launches):
    tensors = inputs(shape, torch.float32, device)
    launches.reset()
    check(*tensors)
    adds = shape == (20, 8192)  # partial sums by a launch of their own
    assert launches.count == 2 + adds


@pytest.mark.parametrize("shape", [(5, 8193), (2, 16400), (3, 20000)], ids=str)
def test_rows_too_wide_take_the_two_functions(shape, device, check, launches):
    check(*inputs(shape, torch.float32, device))
    assert launches.count == 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, reduction, moment, device, check):
    check(*inputs((33, 100), dtype, device), reduction=reduction)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (3, 1, 4, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dimensions(shape, reduction, device, check):
    check(*inputs(shape, torch.float32, device), reduction=reduction)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [None, (), (1,), (6, 1)], ids=str)
@pytest.mark.parametrize("pos_weight", [None, (1,), (4, 6, 1)], ids=str)
def test_weights_broadcast(weight, pos_weight, bias, moment, device, check, launches):
    shapes = {"weight": weight, "pos_weight": pos_weight}
    options = {name: 3 * drawn(s, 4, True).to(device, torch.float32) for name, s in shapes.items() if s is not None}
    check(*inputs((4, 6, 5), torch.float32, device, bias), **options)
    assert launches.count == 2


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every other row": lambda t: torch.stack([t, t], 1)[:, 0],
    "every other column": lambda t: torch.stack([t, t], -1)[..., 0],
    "columns of wider rows": lambda t: torch.cat([t, t], -1)[:, : t.shape[1]],
    "one row for all": lambda t: t[:1].expand_as(t),
    "from the end": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_are_read_in_place(layout, device, check, launches):
    x, w, b, target = inputs((37, 20), torch.float32, device)
    arrange = LAYOUTS[layout]
    check(arrange(x), w, b, arrange(target))
    check(x, arrange(w), b, target, weight=arrange(target))
    assert launches.count == 4


def test_a_wide_transposed_input_takes_the_two_functions(device, check, launches):
    x, w, b, target = inputs((9, 300), torch.float32, device)
    check(x.t().contiguous().t(), w, b, target)
    assert launches.count == 2


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_gradient_of_any_strides(reduction, moment, device):
    """sum().backward() hands on one number for all; another function, a negated or a transposed one."""
    x, w, _, target = inputs((6, 5), torch.float32, device)
    for after in (torch.sum, lambda loss: -loss.sum(), lambda loss: (loss.reshape(-1, 1).t() * 3).sum()):
        pairs = (
            torch.autograd.grad(after(f(x, w.requires_grad_(), target, reduction=reduction)), w) for f in (ours, stock)
        )
        for mine, torchs in zip(*pairs, strict=True):
            torch.testing.assert_close(mine, torchs)


WANTED = [(x, w, b) for x in (0, 1) for w in (0, 1) for b in (0, 1)]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(wanted, reduction, moment, device, launches):
    x, w, b, target = inputs((50, 20), torch.float32, device)
    for t, want in zip((x, w, b), wanted, strict=True):
        t.requires_grad_(bool(want))
    loss = ours(x, w, target, linear_bias=b, reduction=reduction)
    assert launches.count == 1 and loss.requires_grad == any(wanted)
    if any(wanted):
        loss.sum().backward()
        assert launches.count == 2
    expected = stock(
        *(t.detach().requires_grad_() for t in (x, w)), target, linear_bias=b.detach(), reduction=reduction
    )
    torch.testing.assert_close(loss.detach(), expected.detach())
    assert [t.grad is not None for t in (x, w, b)] == [bool(want) for want in wanted]
    with torch.no_grad():
        assert torch.equal(ours(x, w, target, linear_bias=b, reduction=reduction), loss)


def test_gradients_come_early_of_a_large_input_that_wants_none(device, launches, monkeypatch):
    x, w, b, target = inputs((50, 20), torch.float32, device)
    late = []
    backward = linear_bce.backward
    monkeypatch.setattr(linear_bce, "backward", lambda *args: late.append(args) or backward(*args))
    for of_x, size, comes_late in ((False, 4000, 0), (False, 4001, 1), (True, 4000, 1)):
        monkeypatch.setattr(HEAD, "READ_AGAIN", size)
        late.clear()
        launches.reset()
        ours(x.requires_grad_(of_x), w.requires_grad_(), target, linear_bias=b.requires_grad_()).backward()
        assert launches.count == 2 and len(late) == comes_late


def test_a_gradient_of_the_target_is_the_two_functions(device, check):
    x, w, b, target = inputs((5, 4), torch.float32, device)
    target.requires_grad_()
    grads = [torch.autograd.grad(f(x, w, target, linear_bias=b), target)[0] for f in (ours, stock)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0)], ids=str)
def test_empty(shape, reduction, device):
    results = [pulled_back(f, *inputs(shape, torch.float32, device), reduction=reduction) for f in (ours, stock)]
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, equal_nan=True)


@pytest.mark.parametrize("pos_weight", [None, 0.0, 3.0])
@pytest.mark.parametrize("target", [0.0, 1.0, 0.5])
def test_far_out_as_torch(target, pos_weight, device):
    points = [0.0, -0.0, 30.0, -30.0, 1e4, -1e4, 3e38, math.inf, -math.inf, math.nan]
    x, w = torch.tensor(points, device=device)[:, None], torch.ones(1, 1, device=device)
    weight = None if pos_weight is None else torch.tensor([pos_weight], device=device)
    t = torch.full_like(x, target)
    results = [pulled_back(f, x, w, None, t, reduction="none", pos_weight=weight) for f in (ours, stock)]
    for mine, torchs in zip(*results, strict=True):
        torch.testing.assert_close(mine, torchs, equal_nan=True, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "programs", [pytest.param(1, marks=pytest.mark.exhaustive), 3, pytest.param(300, marks=pytest.mark.exhaustive)]
)
def test_sums_do_not_hang_on_who_adds_them(programs, device, as_accurate_as_torch):
    """Of few programs one adds; the partial sums of many take a launch."""
    N, d = 300, 64
    x, w, b, target = inputs((N, d), torch.float32, device)
    tile = linear_bce.tile(N, d, 4, 32, 132)._replace(rows=1, programs=programs)
    results = linear_bce.forward(x, w, b, target, None, None, N, (True, True, True), tile)
    leaves = [t.double().requires_grad_() for t in (x, w, b)]
    value = stock(*leaves[:2], target.double(), linear_bias=leaves[2])
    for mine, truth in zip(results, (value, *torch.autograd.grad(value, leaves)), strict=True):
        as_accurate_as_torch(mine, truth.detach().float(), truth)


def test_bitwise_the_same_from_run_to_run(moment, device):
    tensors = inputs((3000, 30), torch.float32, device)
    for first, second in zip(pulled_back(ours, *tensors), pulled_back(ours, *tensors), strict=True):
        assert torch.equal(first, second)


def test_float16_neither_overflows_nor_underflows(moment, device):
    """A gradient scaler's number comes before the rounding, the division by N before the sum is stored."""
    N = 3000
    x = torch.tensor([[64.0, 2**-18]], device=device).half().repeat(N, 1)
    w, target = torch.zeros(1, 2, device=device).half().requires_grad_(), torch.ones(N, 1, device=device).half()
    loss = ours(x, w, target)
    dw = torch.autograd.grad(loss, w, loss.new_tensor(1024.0))[0]
    torch.testing.assert_close(dw, w.new_tensor([[-(2**15), -(2**-9)]]), rtol=1e-3, atol=0)


def test_nothing_but_the_arguments_is_saved(moment, device):
    x, w, b, target = inputs((9, 5), torch.float32, device)
    kept = []
    w.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = ours(x, w, target, linear_bias=b)
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in (x, w, b, target)}
    loss = ours(x, w, target, linear_bias=b)
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_twice(moment, device):
    x, w, b, target = inputs((9, 5), torch.float32, device)
    loss = ours(x, w.requires_grad_(), target, linear_bias=b)
    first, second = (torch.autograd.grad(loss, w, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, w)[0], 3 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives(reduction, moment, device):
    x, w, b, target = inputs((4, 3), torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, w, b)]

    def loss(x, w, b):
        return ours(x, w, target, linear_bias=b, reduction=reduction, pos_weight=w.new_tensor([2.0]))

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_take_torchs_formula(transform, device):
    x, w, b, target = inputs((4, 3, 5), torch.float32, device)
    results = [
        {
            "vmap": lambda f=f: torch.vmap(lambda x, t: f(x, w, t, linear_bias=b))(x, target),
            "grad": lambda f=f: torch.func.grad(lambda w: f(x, w, target, linear_bias=b))(w),
            "jvp": lambda f=f: torch.func.jvp(lambda w: f(x, w, target, linear_bias=b), (w,), (w,))[1],
        }[transform]()
        for f in (ours, stock)
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_whole(reduction, moment, device):
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for N in (4, 6, 9):
        x, w, b, target = inputs((N, 5), torch.float32, device)
        results = [pulled_back(f, x, w, b, target, reduction=reduction) for f in (compiled, stock)]
        for mine, torchs in zip(*results, strict=True):
            torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(late, bias, device):
    x, w, b, target = inputs((6, 4), torch.float32, device, bias)
    leaves = [t if t is None else t.requires_grad_() for t in (x, w, b)]
    wanted = [t is not None for t in leaves]
    options = None, torch.rand(6, 1, device=device), "mean", late, wanted
    torch.library.opcheck(torch.ops.fusedact.linear_bce.default, (*leaves, target, *options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_float32(dtype, low, moment, device, launches):
    """Of parameters in float32 and an input in any precision, which is read as it is."""
    x, w, b, target = inputs((20, 6), torch.float32, device)
    x, w = x.to(dtype).requires_grad_(), w.requires_grad_()
    results = []
    for function in (ours, stock):
        with torch.autocast(device, dtype=low):
            loss = function(x, w, target, linear_bias=b)
        results.append((loss, *torch.autograd.grad(loss, (x, w))))
    for mine, torchs in zip(*results, strict=True):
        assert mine.dtype == torchs.dtype
        torch.testing.assert_close(mine, torchs, rtol=2e-2, atol=2e-2)
    truth = stock(x.detach().double(), w.detach().double(), target.double(), linear_bias=b.double())
    torch.testing.assert_close(results[0][0].double(), truth, rtol=1e-6, atol=0)
    assert launches.count == 2


def test_a_second_derivative_of_what_autocast_mixed(device):
    x, w, b, target = inputs((8, 3), torch.float32, device)
    w.requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ours(x.bfloat16(), w, target, linear_bias=b)
    (dw,) = torch.autograd.grad(loss, w, create_graph=True)
    (ddw,) = torch.autograd.grad(dw.sum(), w)
    (expected,) = torch.autograd.grad(
        torch.autograd.grad(stock(x.bfloat16().float(), w, target, linear_bias=b), w, create_graph=True)[0].sum(), w
    )
    torch.testing.assert_close(ddw, expected)


ones = torch.ones


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (lambda: (ones(4, 5), ones(1, 3), ones(4, 1)), {}, RuntimeError, "4x5 and 3x1"),
        (lambda: (ones(4, 5), ones(1, 5), ones(4)), {}, ValueError, "Target size .* must be the same as input size"),
        (lambda: (ones(4, 5), ones(2, 5), ones(4, 1)), {}, ValueError, "Target size .* must be the same as input size"),
        (lambda: (ones(4, 5), ones(1, 5), ones(3, 1)), {}, ValueError, "Target size .* must be the same as input size"),
        (lambda: (ones(4, 5), ones(1, 5), ones(4, 1)), {"reduction": "foo"}, ValueError, "foo is not a valid value"),
        (lambda: (ones(4, 5), ones(1, 5), ones(4, 1)), {"linear_bias": ones(3)}, (RuntimeError, ValueError), "size"),
        (lambda: (ones(4, 5), ones(1, 5), ones(4, 1)), {"weight": ones(3, 1)}, RuntimeError, "size of tensor"),
        (lambda: (ones(4, 5), ones(1, 5), ones(4, 1)), {"pos_weight": ones(2)}, RuntimeError, "shape"),
        (lambda: (ones(4, 5).double(), ones(1, 5), ones(4, 1)), {}, RuntimeError, "to? have the same dtype"),
        (lambda: (ones(4, 5), ones(1, 5), ones(4, 1).long()), {}, RuntimeError, "Long"),
        (lambda: (ones(()), ones(1, 5), ones(4, 1)), {}, RuntimeError, "at least 1D"),
        (lambda: ([1.0], ones(1, 1), ones(1)), {}, TypeError, "must be Tensor, not list"),
        (lambda: (ones(4, 5), [1.0], ones(4, 1)), {}, TypeError, "must be Tensor, not list"),
    ],
)
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_bad_input_is_torchs_error(make, options, kind, message, name, device, launches):
    with torch.device(device):
        tensors = make()
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with fusedact.use_backend(name), pytest.raises(kind, match=message):
        ours(*tensors, **options)
    assert launches.count == 0


def test_more_outputs_are_the_two_functions(device):
    x, w, target = ones(4, 5, device=device), torch.randn(3, 5, device=device), torch.rand(4, 3, device=device)
    torch.testing.assert_close(ours(x, w, target), stock(x, w, target))


@pytest.mark.parametrize("bias", [True, False])
def test_module(bias, device, launches):
    module = nn.LinearBCEWithLogitsLoss(5, bias, device=device, pos_weight=torch.tensor([2.0], device=device))
    assert list(module.state_dict()) == ["pos_weight", "linear.weight"] + ["linear.bias"] * bias
    x, _, _, target = inputs((8, 5), torch.float32, device)
    loss = copy.deepcopy(module)(x, target)
    assert launches.count == 1 and module.linear.in_features == 5
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(
        module.linear(x), target, pos_weight=module.pos_weight
    ))  # fmt: skip


@given(N=st.integers(1, 20), d=st.integers(1, 40), reduction=st.sampled_from(REDUCTIONS), bias=st.booleans())
def test_any_shape(N, d, reduction, bias, device, check):
    check(*inputs((N, d), torch.float32, device, bias), reduction=reduction)


@pytest.mark.contract(61)
def test_offsets_beyond_two_to_the_31(far_rows, device):
    _, w, b, target = inputs((4, 16), torch.float16, device)
    near = pulled_back(ours, far_rows.clone(), w, b, target)
    for mine, expected in zip(pulled_back(ours, far_rows, w, b, target), near, strict=True):
        assert torch.equal(mine, expected)
