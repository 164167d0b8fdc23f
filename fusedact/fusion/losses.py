"""A loss joined with the end of a model: in training the model gives what the loss takes, in eval what it ever gave.

The loss's class is swapped in place, as a model's are.
"""

import weakref
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fusedact import functional
from fusedact import nn as fnn
from fusedact.fusion.codes import Untraceable
from fusedact.fusion.cuts import HIDDEN, LOGITS, End, Hidden, end_of
from fusedact.fusion.nodes import called, name_of, watched
from fusedact.fusion.programs import CUT, DIM, END, analysed, attach, forward_of
from fusedact.fusion.reads import original
from fusedact.fusion.site import Site
from fusedact.fusion.tracing import trace

_FUNCTIONS = {
    getattr(F, name): getattr(functional, name)
    for name in (
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "cross_entropy",
        "multilabel_soft_margin_loss",
        "nll_loss",
    )
}


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch's, on logits, or on the hidden state of a model whose last layer was joined with it."""

    _original = nn.CrossEntropyLoss

    def forward(self, input: Tensor | Hidden, target: Tensor) -> Tensor:  # type: ignore[override]
        return _cross_entropy(self, input, target, self.label_smoothing)


class NLLLoss(nn.NLLLoss):
    """torch's, on the logits or the hidden state of a model joined with it; log-probabilities are logits as well.

    What the model's softmax was not taken along the classes of, more dims than (N, C) of one along dim -1, it gives as
    log-probabilities, and these are taken as such.
    """

    _original = nn.NLLLoss

    def forward(self, input: Tensor | Hidden, target: Tensor) -> Tensor:  # type: ignore[override]
        if isinstance(input, Tensor) and (target.is_floating_point() or (vars(self)[DIM] == -1 and input.dim() != 2)):
            return functional.nll_loss(input, target, self.weight, None, self.ignore_index, None, self.reduction)
        return _cross_entropy(self, input, target, 0.0)


def _cross_entropy(loss: Any, input: Tensor | Hidden, target: Tensor, label_smoothing: float) -> Tensor:
    options = {"weight": loss.weight, "reduction": loss.reduction, "label_smoothing": label_smoothing}
    if isinstance(input, Hidden):
        ignore = None if loss.ignore_index == -100 else loss.ignore_index
        head = input.hidden, input.weight, target
        return functional.linear_cross_entropy(*head, linear_bias=input.bias, ignore_index=ignore, **options)
    return functional.cross_entropy(input, target, ignore_index=loss.ignore_index, **options)


class BCELoss(nn.BCELoss):
    """torch's, on the probabilities of the model that it was joined with or, while that one trains, on its logits."""

    _original = nn.BCELoss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if vars(self)[END] is None:
            raise RuntimeError("this BCELoss is a copy of one joined with another model: fuse(model, loss) a new one")
        end = vars(self)[END]()
        if end is not None and end.training and CUT in vars(end):
            return functional.binary_cross_entropy_with_logits(input, target, self.weight, reduction=self.reduction)
        return functional.binary_cross_entropy(input, target, self.weight, reduction=self.reduction)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), END: None}


def _alone(stock: type[nn.Module]) -> type[nn.Module]:
    """The stock class with our forward, which asks for nothing but torch's attributes."""
    name = stock.__name__
    names = {"__module__": __name__, "__qualname__": f"Alone{name}"}
    return type(name, (stock,), {**names, "forward": getattr(fnn, name).forward, "_original": stock})


AloneNLLLoss = _alone(nn.NLLLoss)
AloneBCELoss = _alone(nn.BCELoss)
AloneBCEWithLogitsLoss = _alone(nn.BCEWithLogitsLoss)
AloneMultiLabelSoftMarginLoss = _alone(nn.MultiLabelSoftMarginLoss)
_ALONE: dict[Any, Any] = {
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.NLLLoss: AloneNLLLoss,
    nn.BCELoss: AloneBCELoss,
    nn.BCEWithLogitsLoss: AloneBCEWithLogitsLoss,
    nn.MultiLabelSoftMarginLoss: AloneMultiLabelSoftMarginLoss,
}
_JOINED: dict[Any, Any] = {kind._original: kind for kind in (CrossEntropyLoss, NLLLoss, BCELoss)}


class Apart(Exception):
    """Why a loss is not joined with a model."""


def join(model: nn.Module, loss: Any, allow_different: bool) -> tuple[Any, Site]:
    """The loss that takes what the model now gives in training, and what was joined, or why not."""
    if isinstance(loss, FunctionType | BuiltinFunctionType):
        ours = _FUNCTIONS.get(loss, loss)
        why = "by itself: a module joins with a model, a function does not" if ours is not loss else None
        name = getattr(loss, "__name__", str(loss))
        return ours, _loss_site(name, why, "it is no loss of torch's")
    stock = original(type(loss))
    name = stock.__name__
    if stock is not type(loss) or not isinstance(loss, nn.Module):
        return loss, _loss_site(name, None, "it is none of torch's own classes")
    if (why := watched(loss)) is not None:
        return loss, _loss_site(name, None, why)
    try:
        if stock not in _JOINED:
            raise Apart("no last layer joins with it")
        path, owner, end = _end_of_model(model)
        gives = _gives(stock, end, allow_different)
    except Apart as apart:
        loss.__class__ = _ALONE.get(stock, stock)
        return loss, _loss_site(name, f"by itself: {apart}" if stock in _ALONE else None, "it is no loss of torch's")
    vars(owner)[CUT] = gives
    attach(owner, analysed(owner, path)[0])
    loss.__class__ = _JOINED[stock]
    if stock is nn.BCELoss:
        vars(loss)[END] = weakref.ref(owner)
    if stock is nn.NLLLoss:
        vars(loss)[DIM] = end.dim
    parts = ["Linear"] if gives == HIDDEN else []
    parts += [] if end.activation is None else [end.activation.__name__]
    returns = "hidden state, weight and bias" if gives == HIDDEN else "logits"
    label = f"{' + '.join([*parts, name])}: in training the model returns {returns}"
    return loss, Site(path, (*parts, name), "loss", label, launches=(1, 1) if gives == LOGITS else (0, 0))


def _loss_site(name: str, how: str | None, why: str) -> Site:
    """A loss that is fused by itself, or left."""
    return Site("", (name,), "loss", name if how is None else f"{name}, {how}", why if how is None else None)


def _gives(kind: type[nn.Module], end: End, allow_different: bool) -> str:
    ending = "a linear layer" if end.activation is None else end.activation.__name__
    wanted = {nn.CrossEntropyLoss: None, nn.NLLLoss: nn.LogSoftmax, nn.BCELoss: nn.Sigmoid}[kind]  # type: ignore[index]
    if end.activation is not wanted:
        raise Apart(f"the model ends in {ending}")
    if kind is nn.NLLLoss and end.dim not in (1, -1):
        raise Apart(f"its LogSoftmax is along dim {end.dim}, not 1")
    if kind is nn.BCELoss:
        if not allow_different:
            raise Apart("torch's clamps would no longer act on Sigmoid and BCELoss: allow_different=True joins them")
        return LOGITS
    return HIDDEN if end.linear is not None else LOGITS


def _end_of_model(model: nn.Module) -> tuple[str, nn.Module, End]:
    """The module whose forward ends the model's, and how. Each before it hands on what the next one gives."""
    path, module = "", model
    times = {id(m): 0 for m in model.modules()}
    for _, m in model.named_modules(remove_duplicate=False):
        times[id(m)] += 1
    while True:
        try:
            traced = trace(module, forward_of(type(module)), True)
        except Untraceable as error:
            raise Apart(f"{type(module).__name__}: {error}") from error
        end = end_of(module, traced.graph)
        if end is not None:
            return path, module, end
        last = next(iter(reversed(traced.graph.nodes))).args[0]
        child = called(module, last) if isinstance(last, fx.Node) else None
        if child is None or next(child.children(), None) is None:
            raise Apart(f"the model ends in {_ending(child, last)}")
        if times[id(child)] > 1 or sum(node.target == last.target for node in traced.graph.nodes) > 1:
            raise Apart(f"{last.target} is called more than once")
        if traced.fixed or not all(read.of_structure for read in traced.reads):
            raise Apart(f"{type(module).__name__} does more than to hand on what {last.target} gives")
        if watched(child) is not None:
            raise Apart(f"{last.target}: {watched(child)}")
        path, module = f"{path}.{last.target}".lstrip("."), child


def _ending(child: nn.Module | None, last: Any) -> str:
    if child is not None:
        return type(child).__name__
    return name_of(last) if isinstance(last, fx.Node) else "more than one value"
