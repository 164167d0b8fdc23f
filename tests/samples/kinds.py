"""Kinds of tensor that a user may hold, and every function of fusedact.functional but the losses, beside torch's."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact import activations
from fusedact import functional as F

stock = torch.nn.functional
LOSSES = ("loss", "cross_entropy")  # in whose names; test_loss_errors has them
ARGUMENTS = {"threshold": (0.1, 0.2)}  # after the input


class Opaque(Tensor):
    """A subclass with torch's own __torch_function__, which wraps what comes out."""


class Transparent(Tensor):
    """A subclass that torch's functions see as a tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda t: t,
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "0-d": lambda t: t.flatten()[0],
    "1-D": torch.flatten,
    "expanded": lambda t: t[:1].expand(t.shape),
    "one element, expanded": lambda t: t.flatten()[0].expand(t.shape),
    "transposed": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "sliced": lambda t: torch.cat([t, t], -1)[..., ::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "flipped": lambda t: t.flip(0),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
    "negated view": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "conjugated view": lambda t: torch.complex(t, t).conj(),
    "meta": lambda t: t.to("meta"),
    "sparse COO": lambda t: t.to_sparse(),
    "sparse CSR": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t[:1]]),
    "jagged": lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged),
    "quint8": lambda t: torch.quantize_per_tensor(t, 0.1, 10, torch.quint8),
    "qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "inference": inference,
    "parameter": torch.nn.Parameter,
    "opaque subclass": lambda t: t.as_subclass(Opaque),
    "transparent subclass": lambda t: t.as_subclass(Transparent),
    "list": Tensor.tolist,
    "ndarray": Tensor.numpy,
    "None": lambda t: None,
    "number": lambda t: 1.0,
}
DTYPES = ["float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "complex32", "complex64", "complex128"]
DTYPES += ["int8", "int16", "int32", "int64", "uint8", "uint16", "bool"]
KINDS |= {name: partial(Tensor.to, dtype=getattr(torch, name)) for name in DTYPES}


class Call(NamedTuple):
    """Ours and torch's way to compute the same of these tensors."""

    ours: Callable[..., Any]
    stock: Callable[..., Any]
    tensors: tuple[Tensor, ...]


def public() -> list[str]:
    """The functions of fusedact.functional that are not torch's own."""
    names = [name for name in F.__all__ if callable(getattr(F, name))]
    ours = [name for name in names if getattr(F, name) is not getattr(stock, name, None)]
    return [name for name in ours if not any(loss in name for loss in LOSSES)]


def calls() -> dict[str, list[Call]]:
    """By the name of the function: each has one at least. KeyError where a new function has none here."""
    return {name: [Call(ours, torchs, drawn(*shapes)) for ours, torchs, shapes in _ways(name)] for name in public()}


def drawn(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _ways(name: str) -> list[tuple[Callable, Callable, tuple]]:
    ours = getattr(F, name)
    if name == "prelu":
        return [(ours, stock.prelu, ((4, 6), (6,)))]
    if name in activations.ACTIVATIONS:
        torchs = getattr(stock, name, None) or getattr(activations, name)
        others = ARGUMENTS.get(name, ())
        return [(lambda x: ours(x, *others), lambda x: torchs(x, *others), ((4, 6),))]
    if name in ("softmax", "log_softmax", "softmin"):
        return [(partial(ours, dim=d), partial(getattr(stock, name), dim=d), ((4, 6),)) for d in (0, 1)]
    if name.startswith("conv"):
        dims, transposed = int(name[-2]), "transpose" in name
        shapes = (2, 2, *(3,) * dims), ((2, 3) if transposed else (3, 2)) + (2,) * dims, (3,)
        return [(partial(ours, activation="relu"), lambda *t: getattr(stock, name)(*t).relu(), shapes)]
    return {"activate": _activate, "gated": _gated, "linear": _linear, "linear_chain": _chain}[name]()


def _activate() -> list[tuple[Callable, Callable, tuple]]:
    return [(lambda x: F.activate(x, "gelu"), stock.gelu, ((4, 6),))]


def _gated() -> list[tuple[Callable, Callable, tuple]]:
    return [(F.gated, lambda gate, up: stock.silu(gate) * up, ((4, 6), (4, 6)))]


def _linear() -> list[tuple[Callable, Callable, tuple]]:
    shapes = (4, 6), (3, 6), (3,)
    return [
        (partial(F.linear, activation="gelu"), lambda *t: stock.gelu(stock.linear(*t)), shapes),
        (
            lambda x, w, b, s: F.linear(x, w, b, activation="prelu", slope=s),
            lambda x, w, b, s: stock.prelu(stock.linear(x, w, b), s),
            (*shapes, (3,)),
        ),
        (F.linear, stock.linear, shapes),
    ]


def _chain() -> list[tuple[Callable, Callable, tuple]]:
    def ours(x, w, b, v, c):
        return F.linear_chain(x, [(w, b, "relu"), (v, c, None)])

    def torchs(x, w, b, v, c):
        return stock.linear(stock.linear(x, w, b).relu(), v, c)

    return [(ours, torchs, ((4, 6), (3, 6), (3,), (2, 3), (2,)))]
