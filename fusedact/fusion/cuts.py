"""Where a forward ends in what a loss takes over: its last softmax, sigmoid or linear layer."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedact import functional
from fusedact.fusion.codes import Untraceable
from fusedact.fusion.nodes import called, product
from fusedact.fusion.reads import Read
from fusedact.fusion.running import Module
from fusedact.nn.hooks import is_plain
from fusedact.nn.linear import Linear

LOGITS, HIDDEN = "logits", "hidden"  # what a forward that was cut gives in training


class Hidden(NamedTuple):
    """What a model whose last linear layer went into the loss returns in training: hidden weightᵀ + bias are logits.

    hidden (*, K), weight (C, K), bias (C,) or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class End(NamedTuple):
    """The last operations of a forward: a softmax or sigmoid, or none, and a linear layer before it, or none."""

    activation: type[nn.Module] | None  # nn.LogSoftmax or nn.Sigmoid
    dim: int | None
    logits: fx.Node
    linear: fx.Node | None


def end_of(module: nn.Module, graph: fx.Graph) -> End | None:
    """None where the forward gives anything else than one value of such an operation."""
    last = _output(graph).args[0]
    if not isinstance(last, fx.Node):
        return None
    activation, dim = _activation(module, last)
    if activation is not None:
        before = last.args[0]
        if len(last.users) > 1 or not isinstance(before, fx.Node):
            return None
        last = before
    found = product(module, last)
    linear = found is not None and type(found.layer) in (nn.Linear, Linear) and found.why is None
    ends = linear and len(last.users) == 1
    return End(activation, dim, last, last if ends else None) if activation is not None or ends else None


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _activation(module: nn.Module, node: fx.Node) -> tuple[type[nn.Module] | None, int | None]:
    layer = called(module, node)
    if type(layer) in (nn.LogSoftmax, nn.Sigmoid) and is_plain(layer):
        return type(layer), getattr(layer, "dim", None)
    if node.target in (F.log_softmax, torch.log_softmax, "log_softmax") and node.op != "call_module":
        given = {**dict(zip(("dim",), node.args[1:], strict=False)), **node.kwargs}
        dim = given.get("dim")
        plain = len(node.args) <= 2 and given.get("dtype") is None and isinstance(dim, int)
        return (nn.LogSoftmax, dim) if plain else (None, None)  # type: ignore[return-value]
    if node.target in (F.sigmoid, torch.sigmoid, "sigmoid") and node.op != "call_module" and len(node.args) == 1:
        return nn.Sigmoid, None
    return None, None


def cut(module: nn.Module, graph: fx.Graph, gives: str) -> list[Read]:
    """Let the graph end before what the loss takes over; what must then stay as it is.

    Untraceable where it no longer ends so.
    """
    end = end_of(module, graph)
    if end is None or (gives == HIDDEN and end.linear is None):
        raise Untraceable("it no longer ends in what its loss took over")
    output = _output(graph)
    last: Any = output.args[0]
    kept = [] if end.activation is None or last.op != "call_module" else _kept(str(last.target), end)
    with graph.inserting_before(output):
        if gives == HIDDEN:
            layer = graph.create_node("get_attr", str(end.linear.target))  # type: ignore[union-attr]
            new = graph.call_function(_hidden, (end.linear.args[0], layer, end.dim))  # type: ignore[union-attr]
        else:
            new = end.logits if end.dim is None else graph.call_function(_logits, (end.logits, end.dim))
    output.args = (new,)
    while last is not new and not last.users:
        last, unused = last.args[0], last
        graph.erase_node(unused)
    return kept


def _kept(target: str, end: End) -> list[Read]:
    """The module of the activation: its class, its dimension, and that nobody watches it."""
    path = tuple(target.split("."))
    dim = [] if end.dim is None else [Read(path, "dim", end.dim)]
    return [Read(path, "__class__", end.activation), Read(path, "__call__", None), *dim]


def _hidden(x: Tensor, layer: Module, dim: int | None) -> Hidden | Tensor:
    """The hidden state of rows; of anything else what the model would give but for its last softmax."""
    if type(layer) in (nn.Linear, Linear) and is_plain(layer) and x.dim() == 2:
        return Hidden(x, layer.weight, layer.bias)
    return layer(x) if dim is None else _logits(layer(x), dim)


def _logits(logits: Tensor, dim: int) -> Tensor:
    """The loss takes the softmax along its classes, dimension 1; along any other the model does."""
    is_classes = dim == 1 or (dim == -1 and logits.dim() == 2)
    return logits if is_classes and logits.dim() > 1 else functional.log_softmax(logits, dim)
