"""Calls of the ops on DTensors: what they are given, how it is placed, and how their result is."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import fusedact
import fusedact.nn.functional as F

# What is launched is the same on a mesh, in a graph and in a model: `make test` takes torch's operations alone there.
or_kernels = pytest.mark.parametrize(
    "kernels", ["auto", pytest.param("triton", marks=pytest.mark.exhaustive)], indirect=True
)


def first(names: Iterable[str], *short: str) -> list:
    """The names, of which `make test` takes the short list."""
    return [name if name in short else pytest.param(name, marks=pytest.mark.exhaustive) for name in names]


def rows_of(cases: Iterable[tuple], short: Sequence[tuple]) -> list:
    """Test parameters, of which `make test` takes the short ones."""
    return [
        pytest.param(*case, id=", ".join(map(str, case)), marks=[] if case in short else pytest.mark.exhaustive)
        for case in cases
    ]


PLACEMENTS = {"r": Replicate(), "0": Shard(0), "1": Shard(1), "2": Shard(2)}
CLASSES, ROWS = 7, 5


def labels(rows: int | tuple[int, ...] = ROWS) -> Tensor:
    """All but two of each five rows are ignored: on some ranks all may be."""
    target = torch.randint(CLASSES, rows if isinstance(rows, tuple) else (rows,))
    return target.masked_fill(torch.arange(target.numel()).view(target.shape) % 5 < 3, -100)


class Case(NamedTuple):
    """A function of tensors: of each its shape, or what draws it, and how it is placed on each mesh dimension."""

    run: Callable[..., Any]
    tensors: tuple[tuple[Any, str], ...]
    result: str  # placements of the result


def loss(name: str, **options: Any) -> Callable[..., Any]:
    return lambda x, target, *others: getattr(F, name)(x, target, *others, **options)


def head(**options: Any) -> Callable[..., Any]:
    return lambda x, w, b, t: F.linear_cross_entropy(x, w, t, linear_bias=b, **options)


def probabilities() -> Tensor:
    return torch.rand(ROWS, CLASSES).softmax(1)


def yes_or_no(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape)


X, W, B = (ROWS, 6), (CLASSES, 6), (CLASSES,)
LOGITS = (ROWS, CLASSES)
CASES = {
    "linear of a batch": Case(
        lambda x, w, b: F.linear(x, w, b, activation="gelu"), ((X, "0"), (W, "r"), (B, "r")), "0"
    ),
    "linear of a sequence": Case(
        lambda x, w, b: F.linear(x, w, b, activation="relu"), (((2, *X), "1"), (W, "r"), (B, "r")), "1"
    ),
    "linear of a sequence, a slope of each": Case(
        lambda x, w, a: F.linear(x, w, activation="prelu", slope=a), (((2, *X), "1"), (W, "r"), ((ROWS,), "r")), "1"
    ),
    "linear of one row": Case(lambda x, w: F.linear(x, w, activation="gelu"), (((6,), "0"), (W, "1")), "r"),
    "linear by columns": Case(
        lambda x, w, b: F.linear(x, w, b, activation="silu"), ((X, "r"), (W, "0"), (B, "0")), "1"
    ),
    "linear by a column": Case(
        lambda x, w, b: F.linear(x, w, b, activation="silu"), ((X, "r"), ((3, 6), "0"), ((3,), "0")), "1"
    ),
    "linear by columns, a slope of each": Case(
        lambda x, w, b, a: F.linear(x, w, b, activation="prelu", slope=a),
        ((X, "r"), (W, "0"), (B, "r"), (B, "r")),
        "1",
    ),
    "linear by rows": Case(lambda x, w, b: F.linear(x, w, b, activation="tanh"), ((X, "1"), (W, "1"), (B, "r")), "r"),
    "linear of features": Case(lambda x, w: F.linear(x, w, activation="elu"), ((X, "1"), (W, "r")), "r"),
    "linear of features, columns": Case(lambda x, w: F.linear(x, w, activation="elu"), ((X, "1"), (W, "0")), "1"),
    "linear of a batch, columns": Case(lambda x, w: F.linear(x, w, activation="elu"), ((X, "0"), (W, "0")), "0"),
    "chain": Case(
        lambda x, w, v: F.linear_chain(x, [(w, None, "gelu"), (v, None, "relu"), (w, None, "tanh")]),
        ((X, "0"), (W, "r"), ((6, 7), "r")),
        "0",
    ),
    "gelu": Case(lambda x: F.activate(x, "gelu"), ((X, "0"),), "0"),
    "squared relu": Case(F.squared_relu, ((X, "1"),), "1"),
    "prelu": Case(F.prelu, ((X, "1"), ((6,), "r")), "1"),
    "prelu of one slope": Case(F.prelu, ((X, "0"), ((1,), "r")), "0"),
    "gated": Case(F.gated, ((X, "1"), (X, "0")), "1"),
    "softmax": Case(lambda x: F.softmax(x, 1), ((X, "0"),), "0"),
    "softmax along shards": Case(lambda x: F.log_softmax(x, -1), ((X, "1"),), "r"),
    "convolution of a batch": Case(
        lambda x, w, b: F.conv1d(x, w, b, padding=1, activation="gelu"),
        (((3, 2, 5), "0"), ((4, 2, 3), "r"), ((4,), "r")),
        "0",
    ),
    "convolution by channels": Case(
        lambda x, w, b: F.conv1d(x, w, b, activation="relu"), (((3, 2, 5), "r"), ((8, 2, 3), "0"), ((8,), "r")), "1"
    ),
    "convolution in groups": Case(
        lambda x, w: F.conv1d(x, w, groups=2, activation="relu"), (((3, 2, 5), "0"), ((4, 1, 3), "0")), "0"
    ),
    "transposed convolution": Case(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, activation="silu"),
        (((3, 2, 3, 3), "0"), ((2, 4, 2, 2), "r"), ((4,), "r")),
        "0",
    ),
    "nll": Case(loss("nll_loss"), ((LOGITS, "0"), (labels, "0"), (yes_or_no(*B), "r")), "r"),
    "nll, target elsewhere": Case(loss("nll_loss", reduction="none"), ((LOGITS, "0"), (labels, "r")), "0"),
    "nll along shards": Case(loss("nll_loss"), ((LOGITS, "1"), (labels, "r")), "r"),
    "cross-entropy": Case(loss("cross_entropy"), ((LOGITS, "0"), (labels, "0")), "r"),
    "cross-entropy, sum": Case(loss("cross_entropy", reduction="sum"), ((LOGITS, "0"), (labels, "0")), "r"),
    "cross-entropy, none": Case(loss("cross_entropy", reduction="none"), ((LOGITS, "0"), (labels, "0")), "0"),
    "cross-entropy, smoothed": Case(
        lambda x, t, w, s: F.cross_entropy(x, t, w, sample_weight=s, label_smoothing=0.1, z_loss=1e-2, softcap=3.0),
        ((LOGITS, "0"), (labels, "0"), (yes_or_no(CLASSES), "r"), (yes_or_no(ROWS), "0")),
        "r",
    ),
    "cross-entropy, of learned weights": Case(
        lambda x, t, s: F.cross_entropy(x, t, sample_weight=s), ((LOGITS, "0"), (labels, "0"), ((ROWS,), "0")), "r"
    ),
    "cross-entropy of probabilities": Case(loss("cross_entropy"), ((LOGITS, "0"), (probabilities, "0")), "r"),
    "cross-entropy of probabilities, classes": Case(loss("cross_entropy"), ((LOGITS, "1"), (probabilities, "1")), "r"),
    "cross-entropy of pictures": Case(
        loss("cross_entropy"), (((2, CLASSES, 5), "2"), (lambda: labels((2, 5)), "1")), "r"
    ),
    "cross-entropy of classes": Case(loss("cross_entropy"), ((LOGITS, "1"), (labels, "r")), "r"),
    "cross-entropy of classes, none": Case(
        loss("cross_entropy", reduction="none", label_smoothing=0.1),
        (((2, CLASSES, 5), "1"), (lambda: labels((2, 5)), "r")),
        "r",
    ),
    "cross-entropy of classes, target elsewhere": Case(
        lambda x, t, w, s: F.cross_entropy(x, t, w, sample_weight=s, label_smoothing=0.1, z_loss=1e-2, softcap=3.0),
        ((LOGITS, "1"), (labels, "0"), (yes_or_no(CLASSES), "0"), (yes_or_no(ROWS), "0")),
        "r",
    ),
    "bce with logits": Case(
        loss("binary_cross_entropy_with_logits"), ((X, "0"), (yes_or_no(*X), "0"), (yes_or_no(6), "r")), "r"
    ),
    "bce": Case(
        lambda x, t: F.binary_cross_entropy(x.sigmoid(), t, reduction="sum"), ((X, "1"), (yes_or_no(*X), "1")), "r"
    ),
    "bce, none": Case(
        loss("binary_cross_entropy_with_logits", reduction="none"), ((X, "1"), (yes_or_no(*X), "0")), "1"
    ),
    "multi-label": Case(loss("multilabel_soft_margin_loss"), ((X, "0"), (yes_or_no(*X), "0")), "r"),
    "multi-label along shards": Case(
        loss("multilabel_soft_margin_loss", reduction="none"), ((X, "1"), (yes_or_no(*X), "1")), "r"
    ),
    "head of yes or no": Case(
        F.linear_binary_cross_entropy_with_logits, ((X, "0"), ((1, 6), "r"), (yes_or_no(ROWS, 1), "0")), "r"
    ),
    "head of rows": Case(head(), ((X, "0"), (W, "r"), (B, "r"), (labels, "0")), "r"),
    "head of rows, none": Case(head(reduction="none"), ((X, "0"), (W, "r"), (B, "r"), (labels, "0")), "0"),
    "head of classes": Case(head(label_smoothing=0.1), ((X, "r"), (W, "0"), (B, "0"), (labels, "r")), "r"),
    "head of classes, sum": Case(head(reduction="sum"), ((X, "r"), (W, "0"), (B, "r"), (labels, "r")), "r"),
    "head of rows and classes": Case(head(), ((X, "0"), (W, "0"), (B, "0"), (labels, "0")), "r"),
}

ON_TWO_DIMENSIONS = {
    "linear of a batch by columns": Case(
        lambda x, w, b: F.linear(x, w, b, activation="gelu"), ((X, "0r"), (W, "r0"), (B, "r0")), "01"
    ),
    "linear of a batch in shards of shards": Case(
        lambda x, w: F.linear(x, w, activation="gelu"), ((X, "00"), (W, "0r")), "00"
    ),
    "linear of a batch by rows": Case(
        lambda x, w, b: F.linear(x, w, b, activation="gelu"), ((X, "01"), (W, "r1"), (B, "rr")), "0r"
    ),
    "cross-entropy": Case(loss("cross_entropy"), ((LOGITS, "0r"), (labels, "0r")), "rr"),
    "cross-entropy of rows and classes": Case(
        lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=0.1),
        ((LOGITS, "01"), (labels, "0r"), (yes_or_no(CLASSES), "rr")),
        "rr",
    ),
    "cross-entropy of classes and rows, sum": Case(
        loss("cross_entropy", reduction="sum"), ((LOGITS, "10"), (labels, "r0")), "rr"
    ),
    "cross-entropy of classes twice": Case(loss("cross_entropy"), ((LOGITS, "11"), (labels, "rr")), "rr"),
    "head of rows and classes": Case(head(), ((X, "0r"), (W, "r0"), (B, "r0"), (labels, "0r")), "rr"),
    "bce": Case(loss("binary_cross_entropy_with_logits"), ((X, "01"), (yes_or_no(*X), "0r")), "rr"),
}


def drawn(case: Case) -> list[Tensor]:
    return [make() if callable(make) else torch.randn(make) for make, _ in case.tensors]


def there(t: Tensor, mesh, letters: str) -> DTensor:
    """t, which is the same on all ranks, placed so."""
    return distribute_tensor(t, mesh, placed(letters), src_data_rank=None)


def placed(letters: str) -> list:
    return [PLACEMENTS[letter] for letter in letters]


def gradient_of(y: Tensor) -> Tensor:
    return torch.arange(1.0, 1 + y.numel()).cos().view(y.shape).to(y.dtype)


def learned(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that have no fixed values, wanting gradients."""
    return [t.requires_grad_() for t, (make, _) in zip(tensors, case.tensors, strict=True) if not callable(make)]


def in_one_process(case: Case, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients of the floating tensors that have no fixed values."""
    given = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
    leaves = learned(case, given)
    with fusedact.use_backend("torch"):
        y = case.run(*given)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient_of(y))]


def on_ranks(case: Case, tensors: list[Tensor], mesh, dtype: torch.dtype, run: Callable | None = None) -> list[Tensor]:
    """The same on DTensors, whole again; the result and each gradient placed as they should be."""
    given = [
        there(t.to(dtype) if t.is_floating_point() else t, mesh, letters)
        for t, (_, letters) in zip(tensors, case.tensors, strict=True)
    ]
    leaves = learned(case, given)
    y = (run or case.run)(*given)
    assert list(y.placements) == placed(case.result)
    whole = y.full_tensor().detach()
    grads = torch.autograd.grad(y, leaves, there(gradient_of(whole), mesh, "r" * mesh.ndim))
    for t, grad in zip(leaves, grads, strict=True):
        assert grad.placements == t.placements and grad.shape == t.shape and grad.dtype == t.dtype
    return [whole, *(grad.full_tensor() for grad in grads)]


def check(equal, name: str, case: Case, mesh, dtype: torch.dtype = torch.float32, run: Callable | None = None) -> None:
    """Of low precision several draws, end to end: one number may happen to be rounded to the exact one."""
    draws = [drawn(case) for _ in range(1 if dtype == torch.float32 else 8)]
    ours, truth, one = (
        [torch.cat([t.flatten() for t in of_draws]) for of_draws in zip(*found, strict=True)]
        for found in (
            [on_ranks(case, tensors, mesh, dtype, run) for tensors in draws],
            [in_one_process(case, tensors, torch.float64) for tensors in draws],
            [in_one_process(case, tensors, dtype) for tensors in draws],
        )
    )
    equal(name, ours, truth, one)
