"""What is to be trained, read off a model, a loss and an optimizer that all stay torch's."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fusedact import functional
from fusedact import nn as fused
from fusedact.activations import Activation, by_name, of_module
from fusedact.fusion.programs import CUT
from fusedact.fusion.reads import original
from fusedact.nn.hooks import is_plain

SUPPORTED = "linear layers, each with at most one elementwise activation after it, in a Sequential"
LOSSES: dict[Any, str] = {
    nn.BCELoss: "binary_cross_entropy",
    nn.BCEWithLogitsLoss: "binary_cross_entropy_with_logits",
    nn.CrossEntropyLoss: "cross_entropy",
    nn.MSELoss: "mse_loss",
}
_PLAIN_OPTIONS = {
    "weight": None,
    "pos_weight": None,
    "label_smoothing": 0.0,
    "ignore_index": -100,
}  # of a loss, that engines know
OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class Unsupported(ValueError):
    """Why an engine cannot train this, naming what is not supported and what is."""


class Layer(NamedTuple):
    """act(x Wᵀ + b); `activation` None: the identity."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    activation: Activation | None
    parameters: tuple[float, ...]


@dataclass(frozen=True)
class Objective:
    """A loss by its name in torch.nn.functional, its mean or its sum taken over the batch."""

    name: str
    mean: bool

    @property
    def labels(self) -> bool:
        """Targets are class indices."""
        return self.name == "cross_entropy"


@dataclass(frozen=True)
class Rule:
    """An optimizer's step: its numbers, and which of its tensors are the moments of a parameter.

    name: sgd, momentum, nesterov, adam or adamw. beta1 is also SGD's momentum.
    """

    name: str
    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    moments: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A network of linear layers, its loss, and the rule of its optimizer."""

    layers: tuple[Layer, ...]
    objective: Objective
    rule: Rule

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers that go into each layer, and those that come out of the last."""
        return (*(layer.weight.shape[1] for layer in self.layers), self.layers[-1].weight.shape[0])

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Weight and bias of each layer, in order."""
        return tuple(p for layer in self.layers for p in (layer.weight, layer.bias) if p is not None)

    @property
    def row_bytes(self) -> int:
        """Of a row of x and of the outputs."""
        return self.dtype.itemsize * (self.widths[0] + self.widths[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.layers[0].weight.device


def read(model: nn.Module, loss: Any, optimizer: torch.optim.Optimizer) -> Recipe:
    """The recipe; Unsupported where it is none."""
    layers = _layers(model)
    return Recipe(layers, _objective(loss), _rule(optimizer, layers))


def _layers(model: nn.Module) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for name, module in _in_order("", model):
        if type(module) in (nn.Linear, fused.Linear):
            layers.append(_linear(name, module))
        elif type(module) is not nn.Identity:
            layers.append(_activated(name, module, layers))
    if not layers:
        raise Unsupported(f"{type(model).__name__} has no linear layer; supported are {SUPPORTED}")
    parameters = [p for layer in layers for p in (layer.weight, layer.bias) if p is not None]
    if len({id(p) for p in parameters}) < len(parameters):
        raise Unsupported("a parameter stands in two places, which is not supported")
    for p in parameters:
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            raise Unsupported("parameters with hooks are not supported")
        if (p.dtype, p.device) != (parameters[0].dtype, parameters[0].device) or not p.requires_grad:
            raise Unsupported("parameters that are frozen, or of several dtypes or devices, are not supported")
    for before, after in pairwise(layers):
        if before.weight.shape[0] != after.weight.shape[1]:
            raise ValueError(
                f"a layer of {before.weight.shape[0]} outputs before one of {after.weight.shape[1]} inputs"
            )
    return tuple(layers)


def _in_order(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that are no Sequential, in the order of their calls, with their names in the model."""
    if not is_plain(module):
        raise Unsupported(f"{_named(name, module)} has hooks, is compiled or has its forward replaced; not supported")
    if original(type(module)) not in (nn.Sequential, fused.Sequential):
        return [(name, module)]
    if CUT in vars(module):
        raise Unsupported(f"{_named(name, module)} was joined with its loss by fuse(), which is not supported")
    keys = module._modules  # `named_children` would name a module in two places once
    return [found for key in keys for found in _in_order(f"{name}.{key}".strip("."), module.get_submodule(key))]


def _linear(name: str, module: Any) -> Layer:
    activation = getattr(module, "activation", None)
    layer = Layer(module.weight, module.bias, None, ())
    if activation is None:
        return layer
    if isinstance(activation, str):
        entry = by_name(activation)
        return Layer(module.weight, module.bias, entry, entry.default_values)
    return _activated(f"{name}.activation", activation, [layer])


def _activated(name: str, module: nn.Module, layers: list[Layer]) -> Layer:
    """The last of the layers, taken from the list, with this activation."""
    found = of_module(module)
    if found is None or found[0].learned or not is_plain(module) or not layers or layers[-1].activation is not None:
        raise Unsupported(f"{_named(name, module)} is not supported; supported are {SUPPORTED}")
    activation, parameters, _ = found
    layer = layers.pop()
    return Layer(layer.weight, layer.bias, activation, parameters)


def _named(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"{type(module).__name__}"


def _objective(loss: Any) -> Objective:
    names = [name for kind, name in LOSSES.items() if loss in (getattr(F, name), getattr(functional, name))]
    if names:
        return Objective(names[0], True)
    kind = original(type(loss)) if isinstance(loss, nn.Module) else loss
    name = getattr(kind, "__name__", repr(loss))
    kinds = [known for known in LOSSES if kind in (known, getattr(fused, known.__name__))]
    if not kinds:
        raise Unsupported(f"loss {name} is not supported; {', '.join(known.__name__ for known in LOSSES)} are")
    if not is_plain(loss):
        raise Unsupported(f"{name} with hooks, compiled or with its forward replaced is not supported")
    for option, plain in _PLAIN_OPTIONS.items():
        value = getattr(loss, option, plain)
        if value is not plain and value != plain:
            raise Unsupported(f"{name} with {option} is not supported")
    if loss.reduction not in ("mean", "sum"):
        raise Unsupported(f"{name} with reduction={loss.reduction!r} is not supported")
    return Objective(LOSSES[kinds[0]], loss.reduction == "mean")


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raises Unsupported for an optimizer whose step is not its class's, or none that is known."""
    kind = type(optimizer).__name__
    if type(optimizer) not in OPTIMIZERS:
        raise Unsupported(f"optimizer {kind} is not supported; {', '.join(k.__name__ for k in OPTIMIZERS)} are")
    own = vars(optimizer).get("step")  # a scheduler's counts calls
    replaced = own is not None and not hasattr(own, "_wrapped_by_lr_sched")
    if replaced or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise Unsupported(f"{kind} with hooks or with its step replaced is not supported")


def _rule(optimizer: torch.optim.Optimizer, layers: tuple[Layer, ...]) -> Rule:
    check_optimizer(optimizer)
    kind = type(optimizer).__name__
    if len(optimizer.param_groups) > 1:
        raise Unsupported(f"{kind} with {len(optimizer.param_groups)} parameter groups is not supported, one is")
    group = optimizer.param_groups[0]
    ours = {id(p) for layer in layers for p in (layer.weight, layer.bias) if p is not None}
    if {id(p) for p in group["params"]} != ours:
        raise Unsupported(f"{kind} must hold the model's parameters and no other")
    for option in ("amsgrad", "maximize", "dampening", "differentiable"):
        if group.get(option):
            raise Unsupported(f"{kind} with {option}={group[option]!r} is not supported")
    steps = {float(optimizer.state.get(p, {}).get("step", 0)) for p in group["params"]}
    if len(steps) > 1:
        raise Unsupported(f"{kind} whose parameters have taken {sorted(steps)} steps is not supported")
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if isinstance(optimizer, torch.optim.SGD):
        momentum = float(group["momentum"])
        name = ("nesterov" if group["nesterov"] else "momentum") if momentum else "sgd"
        return Rule(name, lr, decay, momentum, 0.0, 0.0, ("momentum_buffer",) if momentum else ())
    # AdamW is an Adam whose decay is decoupled, and Adam can be told to be one.
    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")
    beta1, beta2 = map(float, group["betas"])
    name = "adamw" if decoupled else "adam"
    return Rule(name, lr, decay, beta1, beta2, float(group["eps"]), ("exp_avg", "exp_avg_sq"))
