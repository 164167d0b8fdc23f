"""A recipe as the kernels that train in one launch take it: functions, places and numbers."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedact.autograd.activation import gradient_function, value_function
from fusedact.fitting.recipe import Layer, Recipe, Rule

PIECE = 2**20  # factors at once


class Network(NamedTuple):
    """Layers, objective and rule of `kernels.training`, and the length of the flat parameters."""

    layers: tuple[Any, ...]
    objective: Any
    rule: Any
    size: int

    def views(self, flat: Tensor) -> list[Tensor]:
        """Each parameter in flat (..., size), in the recipe's order, shaped as the parameter."""
        found = []
        for layer in self.layers:
            weight = flat[..., layer.weight :][..., : layer.inputs * layer.outputs]
            found.append(weight.unflatten(-1, (layer.outputs, layer.inputs)))
            if layer.bias is not None:
                found.append(flat[..., layer.bias :][..., : layer.outputs])
        return found


def network(recipe: Recipe) -> Network:
    from fusedact.kernels import bce, training

    losses = {
        "binary_cross_entropy": bce.PROBABILITIES,
        "binary_cross_entropy_with_logits": bce.LOGITS,
        "mse_loss": training.SQUARED_ERROR,
        "cross_entropy": None,
    }
    places, size = training.places(recipe.widths, [layer.bias is not None for layer in recipe.layers])
    layers = tuple(_layer(layer, *place) for layer, place in zip(recipe.layers, places, strict=True))
    objective = training.Objective(losses[recipe.objective.name], recipe.objective.mean)
    return Network(layers, objective, getattr(training, recipe.rule.name.upper()), size)


def _layer(layer: Layer, weight: int, bias: int | None) -> Any:
    from fusedact.kernels import activations, training

    outputs, inputs = layer.weight.shape
    if layer.activation is None:
        return training.Layer(inputs, outputs, weight, bias, activations.identity, training.identity_grad, (), False)
    name, device = layer.activation.name, layer.weight.device
    from_output = layer.activation.from_output(layer.weight.dtype, *layer.parameters)
    act, act_grad = value_function(name, device), gradient_function(name, device, from_output)
    return training.Layer(inputs, outputs, weight, bias, act, act_grad, layer.parameters, from_output)


def rates(rule: Rule, steps: int) -> list[float]:
    """An optimizer's numbers after so many steps, as `kernels.training.RATES` orders them."""
    powers = [_power(rule.beta1, steps), _power(rule.beta2, steps)]
    return [rule.lr, rule.weight_decay, rule.beta1, rule.beta2, rule.eps, *powers]


def _power(beta: float, steps: int) -> float:
    """By one product a step, as a launch takes it: how a run is cut into launches then changes no digit."""
    power = 1.0
    for first in range(0, steps, PIECE):
        factors = torch.full((1 + min(PIECE, steps - first),), beta, dtype=torch.float64, device="cpu")
        factors[0] = power
        power = factors.cumprod(0)[-1].item()
    return power


def batches(order: Tensor, size: int) -> Tensor:
    """Which rows each step visits: order (epochs, rows) as int32 (steps, size), -1 where a batch is shorter."""
    missing = -order.shape[1] % size
    return torch.nn.functional.pad(order.int(), (0, missing), value=-1).reshape(-1, size)
