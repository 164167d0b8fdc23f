"""The numbers contract in one table: every op, dtype and hand-picked row, value and gradients.

An error against float64 of at most twice torch's own in the same dtype. What is peculiar to an op is in its own file.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F
from fusedact.activations import ACTIVATIONS

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Every size of a power of two beside its neighbours, what broadcasts, what is empty, and a row wider than a block.
SHAPES = [(1, 1), (2, 16), (3, 17), (15, 10), (31, 63), (33, 65), (129, 3), (2, 1000), (257, 1), (0, 5), (1, 2049)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(generator, *shape):
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def labels(generator, N, C):
    return torch.randint(0, C, (N,), generator=generator)


def linear(activation):
    def draw(g, N, C):
        slope = [0.1 + uniform(g, 24)] if ACTIVATIONS[activation].learned else []
        return normal(g, N, C), normal(g, 24, C) / C**0.5, normal(g, 24), *slope

    def run(x, weight, bias, slope=None):
        return F.linear(x, weight, bias, activation=activation, slope=slope)

    return run, draw


def alone(name):
    return getattr(F, name), lambda g, N, C: (3 * normal(g, N, C),)


def of_classes(function, *weights, **options):
    """A loss of logits, a label and a number for each class."""

    def run(x, target, weight):
        return function(x, target, weight if weights else None, **options)

    return run, lambda g, N, C: (3 * normal(g, N, C), labels(g, N, C), 0.5 + uniform(g, C))


# function, and (generator, N, C) -> its arguments, of which the floating ones take the dtype and the first the layout
OPS = {
    "linear relu": linear("relu"),
    "linear gelu": linear("gelu"),
    "linear softplus": linear("softplus"),
    "linear prelu": linear("prelu"),
    "gelu": alone("gelu"),
    "softsign": alone("softsign"),
    "tanhshrink": alone("tanhshrink"),
    "prelu": (F.prelu, lambda g, N, C: (normal(g, N, C), uniform(g, C))),
    "softmax": (lambda x: F.softmax(x, 1), lambda g, N, C: (3 * normal(g, N, C),)),
    "log_softmax over rows": (lambda x: F.log_softmax(x, 0), lambda g, N, C: (3 * normal(g, N, C),)),
    "softmin": (lambda x: F.softmin(x, -1), lambda g, N, C: (3 * normal(g, N, C),)),
    "cross_entropy": of_classes(F.cross_entropy),
    "cross_entropy of all": of_classes(F.cross_entropy, "weight", label_smoothing=0.2, z_loss=0.1, softcap=5.0),
    "cross_entropy, none": of_classes(F.cross_entropy, "weight", reduction="none"),
    "nll_loss": of_classes(lambda x, *others: F.nll_loss(x, *others, reduction="sum"), "weight"),
    "probabilities": (
        lambda x, target: F.cross_entropy(x, target, label_smoothing=0.1),
        lambda g, N, C: (3 * normal(g, N, C), uniform(g, N, C).softmax(1)),
    ),
    "bce with logits": (
        lambda x, target, weight: F.binary_cross_entropy_with_logits(x, target, pos_weight=weight),
        lambda g, N, C: (3 * normal(g, N, C), uniform(g, N, C), 0.5 + uniform(g, C)),
    ),
    "bce, weight broadcast": (
        lambda x, target, weight: F.binary_cross_entropy(x, target, weight[:, None], reduction="none"),
        lambda g, N, C: (0.01 + 0.98 * uniform(g, N, C), uniform(g, N, C), 0.5 + uniform(g, N)),
    ),
    "multilabel": (
        F.multilabel_soft_margin_loss,
        lambda g, N, C: (3 * normal(g, N, C), torch.randint(0, 2, (N, C), generator=g).double()),
    ),
}
WEIGHTS = ("cross_entropy", "nll_loss", "bce")  # whose last argument takes no gradient


def results(op, arguments):
    wanted = arguments[:1] if op.startswith(WEIGHTS) or op in ("probabilities", "multilabel") else arguments
    leaves = [t.detach().requires_grad_() for t in wanted]
    y = OPS[op][0](*leaves, *arguments[len(wanted) :])
    dy = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.float64).to(y).view(y.shape)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(op, shape, dtype, layout, seed, device, compare):
    first, *others = OPS[op][1](torch.Generator().manual_seed(seed), *shape)
    exact = [t.to(dtype).double() if t.is_floating_point() else t for t in (LAYOUTS[layout](first), *others)]
    given = [t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in exact]
    ours = results(op, given)
    with fusedact.use_backend("torch"):
        stock, truth = results(op, given), results(op, exact)
    for a, b, c in zip(ours, stock, truth, strict=True):
        compare(a, b, c)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_as_accurate_as_torch(op, shape, dtype, device, as_accurate_as_torch):
    check(op, shape, dtype, "contiguous", 0, device, as_accurate_as_torch)


@given(
    op=st.sampled_from(list(OPS)),
    shape=st.tuples(st.integers(0, 70), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 99),
)
def test_any_shape_and_layout(op, shape, dtype, layout, seed, device, as_accurate_as_torch):
    check(op, shape, dtype, layout if shape[0] else "contiguous", seed, device, as_accurate_as_torch)
