"""What fusing saves, by formula and as counted: torch's operations, our kernels, the tensors that they are given."""

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedact import functional
from fusedact.activations import ACTIVATIONS, TABLE
from fusedact.fusion.formulas import (
    ChainLayer,
    Saves,
    activation_saves,
    chain_saves,
    convolution_saves,
    gated_saves,
    linear_saves,
)

pytestmark = [
    pytest.mark.usefixtures("triton_backend"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="launches are counted in the interpreter"),
]
M, K, N = 5, 7, 12  # products of two of them, and 2 N, are all different
SOME = [ACTIVATIONS[name] for name in ("relu", "silu", "prelu", "squared_relu")]


class Stock(TorchDispatchMode):
    """torch's operations but views: how many, and how many tensors of some size each they read and write."""

    def __init__(self, weights: Mapping[int, int]) -> None:
        super().__init__()
        self.weights, self.launches, self.moves = weights, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if not operation.is_view and operation is not torch.ops.aten.detach.default:
            self.launches += 1
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.moves += sum(self.weights.get(t.numel(), 0) for t in tensors)
        return out


class Kernels:
    """Our launches, counted in the same way."""

    def __init__(self, weights: Mapping[int, int]) -> None:
        self.weights, self.launches, self.moves = weights, 0, 0

    def __enter__(self):
        from triton.runtime.interpreter import GridExecutor

        call = self.call = GridExecutor.__call__

        def counted(executor, *args, **kwargs):
            self.launches += 1
            self.moves += sum(self.weights.get(t.numel(), 0) for t in args if isinstance(t, torch.Tensor))
            return call(executor, *args, **kwargs)

        GridExecutor.__call__ = counted
        return self

    def __exit__(self, *fault):
        from triton.runtime.interpreter import GridExecutor

        GridExecutor.__call__ = self.call


def saved(stock, ours, tensors, sizes, of_torch=(0, 0)):
    """Launches and moves fewer than stock, each (forward, backward).

    sizes: what a move of a tensor of so many elements counts for. of_torch: operations of ours that are torch's, each a
    launch and a move.
    """
    counts = []
    for function, counter in ((stock, Stock), (ours, Kernels)):
        given = [t.detach().clone().requires_grad_() for t in tensors]
        with counter(sizes) as forward:
            y = function(*given)
        dy = torch.ones_like(y)
        with counter(sizes) as backward:
            torch.autograd.grad(y, given, dy)
        counts.append((forward, backward))
    pairs = list(zip(*counts, of_torch, strict=True))
    return (
        tuple(theirs.launches - ours.launches - products for theirs, ours, products in pairs),
        tuple(theirs.moves - ours.moves - products for theirs, ours, products in pairs),
    )


def check(found, formula, act):
    """As many; more, where torch composes the activation of several operations."""
    if act.name == "logsigmoid":  # on a CPU torch's keeps a second tensor
        formula = Saves(formula.launches, (formula.moves[0] + 1, formula.moves[1] + 1))
    if act.fused_alone and not act.learned:
        assert all(n >= m for pair, least in zip(found, formula, strict=True) for n, m in zip(pair, least, strict=True))
        assert found[0][0] > formula.launches[0]
    else:
        assert found == formula


def with_slope(act, tensors, channels):
    return [*tensors, torch.full((channels,), 0.25)] if act.learned else tensors


@pytest.mark.parametrize(
    ("act", "bias"),
    [*((act, True) for act in TABLE), *((act, False) for act in SOME)],
    ids=lambda value: getattr(value, "name", f"bias-{value}"),
)
def test_linear_saves(act, bias):
    def stock(x, w, *rest):
        b, slope = (rest if bias else (None, *rest))[0], rest[-1:] if act.learned else act.default_values
        return act.reference(F.linear(x, w, b), *slope)

    def ours(x, w, *rest):
        b, slope = (rest if bias else (None, *rest))[0], rest[-1] if act.learned else None
        return functional.linear(x, w, b, activation=act.name, slope=slope)

    tensors = with_slope(act, [torch.randn(M, K), torch.randn(N, K), *([torch.randn(N)] if bias else [])], N)
    found = saved(stock, ours, tensors, {M * N: 1})
    check(found, linear_saves(act, torch.float32, act.default_values, bias), act)


def test_activation_saves():
    act = ACTIVATIONS["prelu"]
    tensors = with_slope(act, [torch.randn(M, N)], N)
    assert saved(act.reference, functional.prelu, tensors, {M * N: 1}) == activation_saves(act)
    assert activation_saves(ACTIVATIONS["relu"]) == ((0, 0), (0, 0))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("last", ["tanh", None])
@pytest.mark.parametrize("inner", [("relu", "silu"), ("gelu", "sigmoid")], ids="-".join)
def test_chain_saves(inner, last, bias):
    """Widths of 12, 18 and 9: moves are counted in 6 features, or 3 where the last layer is activated too."""
    names, widths = (*inner, last), (12, 18, 9)
    acts = [ACTIVATIONS.get(name) for name in names]

    def split(tensors):
        return zip(tensors[::2] if bias else tensors, tensors[1::2] if bias else (None,) * 3, strict=True)

    def stock(x, *tensors):
        for (w, b), act in zip(split(tensors), acts, strict=True):
            x = F.linear(x, w, b) if act is None else act.reference(F.linear(x, w, b))
        return x

    def ours(x, *tensors):
        layers = [(w, b, name) for (w, b), name in zip(split(tensors), names, strict=True)]
        return functional.linear_chain(x, layers)

    tensors = [torch.randn(M, K)]
    for before, width in zip((K, *widths), widths, strict=False):
        tensors += [torch.randn(width, before), torch.randn(width)][: 2 if bias else 1]
    layers = [ChainLayer(act, (), bias, width) for act, width in zip(acts, widths, strict=True)]
    unit, formula = chain_saves(layers, torch.float32)
    assert unit == (3 if last else 6)
    sizes = {M * width: max(1, width // unit) for width in widths}
    of_torch = (0, int(bias and not last))  # the bias's sum, where no activation's pass takes it
    assert saved(stock, ours, tensors, sizes, of_torch) == formula


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("act", SOME, ids=lambda act: act.name)
def test_convolution_saves(act, bias):
    """Stock as it is on CUDA, where the bias is added after cuDNN's product."""

    def stock(x, w, *rest):
        z, slope = F.conv2d(x, w), rest[-1:] if act.learned else act.default_values
        return act.reference(z.add_(rest[0].view(-1, 1, 1)) if bias else z, *slope)

    def ours(x, w, *rest):
        slope = rest[-1] if act.learned else None
        return functional.conv2d(x, w, rest[0] if bias else None, activation=act.name, slope=slope)

    tensors = [torch.randn(2, 3, 5, 6), torch.randn(4, 3, 2, 2), *([torch.randn(4)] if bias else [])]
    found = saved(stock, ours, with_slope(act, tensors, 4), {2 * 4 * 4 * 5: 1}, of_torch=(1, 1))
    check(found, convolution_saves(act, bias, False), act)


def test_a_depthwise_convolution_saves_nothing_forward():
    """Torch's own kernel adds the bias, as its operation on a CPU does; its db is a sum apart, which a CPU's is not."""
    found = saved(
        lambda x, w, b: F.relu(F.conv2d(x, w, b, groups=4)),
        lambda x, w, b: functional.conv2d(x, w, b, groups=4, activation="relu"),
        [torch.randn(2, 4, 5, 6), torch.randn(4, 1, 2, 2), torch.randn(4)],
        {2 * 4 * 4 * 5: 1},
        of_torch=(1, 1),
    )
    launches, moves = convolution_saves(ACTIVATIONS["relu"], True, True)
    assert (found[0][0], found[1][0]) == (launches[0], moves[0]) == (0, 0)
    assert (launches[1], moves[1]) == (1, 1)


@pytest.mark.parametrize("name", ["silu", "gelu", "sigmoid", "relu"])
def test_gated_saves(name):
    act = ACTIVATIONS[name]
    found = saved(
        lambda gate, up: act.reference(gate) * up,
        lambda gate, up: functional.gated(gate, up, name),
        [torch.randn(M, N), torch.randn(M, N)],
        {M * N: 1},
    )
    assert found == gated_saves()
