"""Every kind of tensor as every argument and gradient: ours answers what stock answers, or raises what stock raises."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from samples import kinds, outcomes
from samples.kinds import KINDS, Call
from samples.outcomes import difference, outcome
from torch import Tensor

import fusedact
from fusedact import functional as F
from fusedact.kernels import activations, bias_activation

CALLS = {f"{name} {i}" if i else name: call for name, ways in kinds.calls().items() for i, call in enumerate(ways)}
USUAL = {"relu", "prelu", "softmax", "linear"}  # a check each
each_function = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in USUAL else pytest.mark.exhaustive) for n in CALLS]
)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
STOCKS_OWN_STRIDES = {"logsigmoid"}  # on a CPU it loses its input's
OWN_WORDS = "takes a slope= tensor|same device.* and meta"  # of an argument that stock has not; of an error it lacks
GRADIENTS = ["expanded", "one element, expanded", "transposed", "sliced", "flipped", "negated view", "sparse COO"]
GRADIENTS += ["float64", "meta", "empty", "0-d", "conjugated view", "int64", "mkldnn", "zeros without memory"]
LEAVES = ["empty", "expanded", "transposed", "sliced", "overlapping", "negated view", "transparent subclass"]


def dense(t):
    """The numbers of a tensor of any kind; None of one that has none."""
    if not isinstance(t, Tensor) or t.is_meta:
        return None
    if t.is_nested:
        return torch.cat([part.flatten() for part in t.unbind()])
    t = t.dequantize() if t.is_quantized else t
    t = t if t.layout == torch.strided else t.to_dense()
    t = t.float() if t.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else t
    return t.as_subclass(Tensor)


def described(t, strides):
    """What besides its numbers tells a tensor from another."""
    if not isinstance(t, Tensor) or t.is_nested:
        return type(t)
    looks = type(t), t.dtype, t.layout, t.device, t.shape, t.requires_grad
    return (*looks, t.stride()) if strides and t.layout == torch.strided and t.numel() else looks


def doubled(t):
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def words(error):
    """An error's text, less what no caller can choose: a jagged size's number, and how options were passed on."""
    return re.sub(r"\bj\d+\b", "j", str(error)).split(" (Tensor input,")[0].partition(" - got")[0]


def problem(call, tensors, name=""):
    """How ours differs from stock, or None."""
    ours, stock = outcome(call.ours, *tensors), outcome(call.stock, *tensors)
    if "Inference tensors cannot be saved" in str(ours.error):
        return None  # the forward has run by then; and `gated` saves its gate, where stock saves what it made of it
    if ours.error is not None and re.search(OWN_WORDS, str(ours.error)):
        same = stock.error is None or isinstance(stock.error, RuntimeError | type(ours.error))
        return None if same and not ours.launches else f"{ours.launches} launches, {ours.error!r}"
    if stock.error is not None and type(ours.error) is type(stock.error) and words(ours.error) == words(stock.error):
        return f"{ours.launches} launches before the error" if ours.launches else None
    if stock.error is None and ours.error is None:
        strides = name not in STOCKS_OWN_STRIDES
        for own, theirs in zip(*(torch.utils._pytree.tree_leaves(o.result) for o in (ours, stock)), strict=True):
            if described(own, strides) != described(theirs, strides):
                return f"{described(own, strides)}, not {described(theirs, strides)}"
    flat = [torch.utils._pytree.tree_map(dense, o.result) for o in (ours, stock)]
    truth = outcome(lambda *ts: call.stock(*map(doubled, ts)), *tensors)
    true = torch.utils._pytree.tree_map(dense, truth.result) if truth.error is None else None
    if any(isinstance(t, Tensor) and not t.is_floating_point() for t in torch.utils._pytree.tree_leaves(flat[1])):
        true = None
    ours, stock = (
        replace(o, result=r, warned=[w[:2] for w in o.warned]) for o, r in zip((ours, stock), flat, strict=True)
    )
    return difference(ours, stock, true)


def made(kind, t):
    """The tensor as that kind; Ellipsis where it cannot be one."""
    torch.manual_seed(0)
    try:
        return KINDS[kind](t)
    except (RuntimeError, NotImplementedError, IndexError):
        return ...


@pytest.fixture
def counted(launches, monkeypatch):
    monkeypatch.setattr(outcomes, "Launches", launches)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield launches
    torch.set_warn_always(before)


def mixed(call, chosen):
    """The call's tensors, where those of these places are of these kinds; None where one cannot be."""
    tensors = [made(chosen[at], t) if at in chosen else t for at, t in enumerate(call.tensors)]
    return None if any(t is ... for t in tensors) else tensors


def told(name, choices):
    """The differences where the tensors of these places are of these kinds, {place: kind} each."""
    found = []
    for chosen in choices:
        tensors = mixed(CALLS[name], chosen)
        if tensors is not None and (difference := problem(CALLS[name], tensors, name)):
            found.append(f"{chosen}: {difference}"[:400])
    return "\n".join(found)


@pytest.mark.contract(9, 10, 11, 12, 13)
@pytest.mark.filterwarnings("ignore")
@each_backend
@each_function
def test_every_kind_of_tensor(name, backend, counted):
    places = range(len(CALLS[name].tensors))
    chosen = [{at: kind} for at, kind in product(places, KINDS)]
    chosen += [dict.fromkeys(places, kind) for kind in KINDS] if len(places) > 1 else []
    with fusedact.use_backend(backend):
        assert not told(name, chosen)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["linear", "gated"])
def test_mixed_kinds(name, counted, triton_backend):
    """Every second pair of kinds, the others of the other function."""
    pairs = [{0: first, 1: second} for first, second in product(KINDS, KINDS)]
    assert not told(name, pairs[name == "gated" :: 2])


def pulled_back(function, gradient):
    """The gradients of the function for that of its result."""

    def run(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        return torch.autograd.grad(y, leaves, gradient(y.detach()))

    return run


def gradient_of(kind):
    def gradient(y):
        if kind == "zeros without memory":
            return torch._efficientzerotensor(y.shape, dtype=y.dtype)
        dy = torch.linspace(0.5, 2, y.numel()).view(y.shape)
        return KINDS[kind](dy if kind in kinds.DTYPES else dy.to(y.dtype))

    return gradient


@pytest.mark.contract(26)
@pytest.mark.filterwarnings("ignore")
@each_backend
@each_function
def test_every_kind_of_gradient(name, backend, counted):
    found = []
    call = CALLS[name]
    for kind in GRADIENTS:
        own, stocks = (pulled_back(f, gradient_of(kind)) for f in (call.ours, call.stock))
        ours, stock = outcome(own, *call.tensors), outcome(stocks, *call.tensors)
        ours.launches = 0  # the forward's
        if stock.error is None and ours.error is None:
            stock.result, ours.result = ([dense(t) for t in o.result] for o in (stock, ours))
        truth = outcome(stocks, *map(doubled, call.tensors))
        unlike = difference(ours, stock, None if truth.error else [dense(t) for t in truth.result])
        found += [f"{kind}: {unlike}"[:400]] if unlike else []
    assert not found, "\n".join(found)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@each_function
def test_every_layout_as_a_leaf(name, counted, triton_backend):
    """What is saved for the backward may have any strides too."""

    def squared(function):
        def run(*tensors):
            leaves = [t.detach().requires_grad_() for t in tensors]
            return torch.autograd.grad(function(*leaves).square().sum(), leaves)

        return run

    call = CALLS[name]
    call = Call(squared(call.ours), squared(call.stock), call.tensors)
    found = []
    for at, kind in product(range(len(call.tensors)), LEAVES):
        tensors = mixed(call, {at: kind})
        ours, stock = outcome(call.ours, *tensors), outcome(call.stock, *tensors)
        truth = outcome(call.stock, *map(doubled, tensors))
        ours.launches = 0
        unlike = difference(ours, stock, None if truth.error else truth.result)
        found += [f"{at} {kind}: {unlike}"[:400]] if unlike else []
    assert not found, "\n".join(found)


# More than 2**31 elements: addresses in 64 bits. The forwards and the losses are in the files of their kernels.


@pytest.mark.contract(61)
def test_a_linear_layers_gradient_beyond_two_to_the_31(far_rows, device, triton_backend):
    near = far_rows.clone()
    x, w, b = (torch.randn(s, dtype=torch.float16, device=device).requires_grad_() for s in ((4, 8), (16, 8), (16,)))
    for name in ("relu", "gelu"):
        y = F.linear(x, w, b, activation=name)
        far, expected = (torch.autograd.grad(y, (x, w, b), dy, retain_graph=True) for dy in (far_rows, near))
        assert all(map(torch.equal, far, expected))


@pytest.mark.contract(61)
@pytest.mark.parametrize("shape", [(4, 16), (4, 4, 4), (1, 4, 16)], ids=str)
def test_a_convolutions_result_beyond_two_to_the_31(shape, far_rows, device, triton_backend):
    """As bias and activation take it, (N, C, *), of any strides, and in its memory."""
    far = far_rows.unsqueeze(0) if shape[0] == 1 else far_rows.unflatten(1, (4, 4)) if len(shape) == 3 else far_rows
    near, config = far.clone(), bias_activation.tile_of_walk(2)
    bias = torch.randn(shape[1], dtype=torch.float16, device=device)
    wanted = (True, True, False)
    truth = bias_activation.forward_channels(near, bias, activations.relu, (), None, config, False)
    grads = [
        bias_activation.backward_channels(dy, truth, bias, activations.relu_grad, (), None, True, wanted, config)[:2]
        for dy in (far, near)
    ]
    assert all(map(torch.equal, *grads))
    y = bias_activation.forward_channels(far, bias, activations.relu, (), None, config, True)
    assert y.data_ptr() == far.data_ptr() and torch.equal(y, truth)
