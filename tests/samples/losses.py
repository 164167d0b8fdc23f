"""Each loss of fusedact.functional by every way into it (function, module, head, joined), and stock's beside it."""

from collections.abc import Callable
from typing import Any

import torch
from samples.outcomes import difference, outcome
from torch import Tensor

import fusedact
from fusedact import functional as F
from fusedact import nn

stock = torch.nn.functional
TORCH_HAS_THE_HEAD = hasattr(stock, "linear_cross_entropy")  # from 2.13 on; its words for bad input are ours
CLASSES = {"cross_entropy": "CrossEntropyLoss", "nll_loss": "NLLLoss"}
BINARY = {
    "binary_cross_entropy": "BCELoss",
    "binary_cross_entropy_with_logits": "BCEWithLogitsLoss",
    "multilabel_soft_margin_loss": "MultiLabelSoftMarginLoss",
}


def linear_bce(input, linear_weight, target, *, linear_bias=None, **options):
    return stock.binary_cross_entropy_with_logits(stock.linear(input, linear_weight, linear_bias), target, **options)


def _linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, **options):
    return stock.cross_entropy(stock.linear(input, linear_weight, linear_bias), target, **options)


def stock_of(name: str) -> Callable[..., Tensor]:
    """torch's function of that name, or what it would be."""
    absent = linear_bce if "binary" in name else _linear_cross_entropy
    return getattr(stock, name, absent)


def pair(loss: str, way: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """f(input, target, **options) of ours and of stock's. A head's weight is the identity: its input is the logits."""
    if way == "function":
        return getattr(F, loss), stock_of(loss)
    if way == "module":
        kind = (CLASSES | BINARY)[loss]
        return _module(getattr(nn, kind)), _module(getattr(torch.nn, kind))
    if way == "joined":
        return _joined(loss), stock_of(loss)
    name = "linear_" + loss
    return _head(getattr(F, name)), _head(stock_of(name))


def _module(kind: Any) -> Callable[..., Tensor]:
    return lambda input, target, **options: kind(**options)(input, target)


def _head(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(input, target, **options):
        eye = torch.eye(input.shape[-1] if input.dim() else 1, device=input.device).to(input.dtype)
        return function(input, eye, target, **options)

    return run


def _joined(loss: str) -> Callable[..., Tensor]:
    """A classifier in training whose last layer, or log-softmax, was joined with its loss."""

    def run(input, target, **options):
        features = input.shape[-1] if input.dim() else 1
        layer = torch.nn.Linear(features, features, bias=False, device=input.device, dtype=input.dtype)
        layer.weight.data = torch.eye(features, device=input.device, dtype=input.dtype)
        end = [] if loss == "cross_entropy" else [torch.nn.LogSoftmax(1)]
        model, criterion = fusedact.fuse(
            torch.nn.Sequential(torch.nn.Identity(), layer, *end), getattr(torch.nn, CLASSES[loss])(**options)
        )
        return criterion(model(input), target)

    return run


def problem(ours: Callable, stock: Callable, launches: Any, arguments: dict[str, Any]) -> str | None:
    """What torch would not have done, or None; the numbers of a launch may be off as roundings are."""
    before, always = launches.count, torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # ours is the second
    theirs, own = (outcome(f, **arguments) for f in (stock, ours))
    torch.set_warn_always(always)
    own.launches = launches.count - before
    own.warned, theirs.warned = (sorted(w[:2] for w in o.warned) for o in (own, theirs))
    if any(isinstance(o.result, Tensor) and o.result.layout == torch.sparse_coo for o in (own, theirs)):
        own.result, theirs.result = own.result.to_dense(), theirs.result.to_dense()
    return difference(own, theirs, theirs.result if own.launches else None)


def losses() -> list[str]:
    """The losses of fusedact.functional that are ours, by name."""
    ours = [name for name in F.__all__ if getattr(F, name) is not getattr(stock, name, None)]
    return [name for name in ours if "loss" in name or "cross_entropy" in name]


def arguments_of(loss: str) -> dict[str, Tensor]:
    """Every tensor that a loss takes, of four rows; in it dimensions are alike, so that each kind of tensor fits."""
    draw = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(shape, generator=draw)

    labels, of_class = torch.tensor([0, 2, 1, 3]), rand(4)
    return {
        "cross_entropy": lambda: {"input": rand(4, 4), "target": labels, "weight": of_class},
        "nll_loss": lambda: {"input": rand(4, 4).log(), "target": labels, "weight": of_class},
        "binary_cross_entropy": lambda: {"input": rand(4, 4), "target": rand(4, 4), "weight": of_class},
        "binary_cross_entropy_with_logits": lambda: {
            "input": rand(4, 4), "target": rand(4, 4), "weight": of_class, "pos_weight": rand(4),
        },
        "multilabel_soft_margin_loss": lambda: {"input": rand(4, 4), "target": rand(4, 4), "weight": of_class},
        "linear_cross_entropy": lambda: {
            "input": rand(4, 4), "linear_weight": rand(4, 4), "target": labels, "linear_bias": rand(4),
            "weight": of_class,
        },
        "linear_binary_cross_entropy_with_logits": lambda: {
            "input": rand(4, 4), "linear_weight": rand(1, 4), "target": rand(4, 1), "linear_bias": rand(1),
            "weight": rand(1), "pos_weight": rand(1),
        },
    }[loss]()  # fmt: skip


def _inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


class Plain(Tensor):
    """A subclass with torch's own __torch_function__."""


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "list": lambda t: t.tolist(),
    "array": lambda t: t.cpu().numpy(),
    "empty": lambda t: t[:0],
    "number": lambda t: t.flatten()[0],
    "batched": lambda t: t[None],
    "expanded": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: t.t().contiguous().t(),
    "flipped": lambda t: t.flip(0),
    "negated": lambda t: torch._neg_view(-t),
    "complex": lambda t: t.to(torch.complex64),
    "conjugated": lambda t: t.to(torch.complex64).conj(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t.unbind(0))),
    "jagged": lambda t: torch.nested.nested_tensor(list(t.unbind(0)), layout=torch.jagged),
    "int64": lambda t: t.long(),
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "float16": lambda t: t.half(),
    "float32": lambda t: t.float(),
    "float64": lambda t: t.double(),
    "inference": _inference,
    "learned": lambda t: torch.nn.Parameter(t.clone()),
    "buffer": lambda t: torch.nn.Buffer(t),
    "subclass": lambda t: t.as_subclass(Plain),
}
