"""The table of activations: one line each. Names, errors, choices, tests and the README's list are read from it."""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """An elementwise activation.

    name: as in torch.nn.functional, and of its device pair in kernels/activations.py.
    reference: torch's own function, (x, *parameters) -> y.
    module: torch's class, or None where torch has none; `approximate` tells apart what one class holds.
    defaults: its parameters, named as torch names the arguments and the module's attributes.
    from_output: whether the derivative can be taken from the output, (dtype, *parameters) -> bool.
    valid: whether torch takes these parameters; where not, it is torch that says so.
    learned: its one parameter is a tensor, a slope per channel or one for all.
    low_precision: under CUDA autocast stock runs it in the low precision, not in float32.
    """

    name: str
    reference: Callable[..., Tensor]
    module: type[nn.Module] | None = None
    approximate: str | None = None
    defaults: tuple[tuple[str, float], ...] = ()
    from_output: Callable[..., bool] = lambda dtype, *parameters: False
    valid: Callable[..., bool] = lambda *parameters: True
    learned: bool = False
    low_precision: bool = True

    def parameters(self, given: dict[str, float]) -> tuple[float, ...]:
        """`given` over the defaults, in order; TypeError for a name that the activation does not have."""
        known = dict(self.defaults)
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(
                f"activation {self.name!r} takes {', '.join(known) or 'no parameter'}, got {', '.join(unknown)}"
            )
        return tuple(float(given.get(name, default)) for name, default in self.defaults)

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """torch's module for it, with the default parameters."""
        assert self.module is not None, self.name
        if self.learned:
            return self.module(device=device, dtype=dtype)
        if self.approximate is not None:
            return self.module(approximate=self.approximate)
        return self.module(**dict(self.defaults))


def _always(dtype: torch.dtype, *parameters: float) -> bool:
    return True


def _nonnegative_slope(dtype: torch.dtype, negative_slope: float) -> bool:
    return negative_slope >= 0


def _value_not_above(dtype: torch.dtype, threshold: float, value: float) -> bool:
    return value <= threshold and _exact(dtype, threshold, value)


@cache
def _exact(dtype: torch.dtype, *numbers: float) -> bool:
    """The output can stand at these numbers and be told from them: rounding moves none."""
    return all(torch.tensor(number, dtype=dtype).item() == number for number in numbers)


def _linear_part_is_exact(dtype: torch.dtype, beta: float, threshold: float) -> bool:
    """y tells which side of the threshold x was on only where softplus has become linear to float32's last digit."""
    return beta > 0 and threshold >= 20 and dtype != torch.float64


def _step(x: Tensor) -> Tensor:
    """1 where x >= 0, 0 where x < 0, NaN where x is; the gradient is 0."""
    return x.clamp(-1, 0).floor() + 1


def _squared_relu(x: Tensor) -> Tensor:
    y = F.relu(x)
    return y * y  # not `square`, which CUDA autocast would run in float32


# fmt: off
TABLE = (
    Activation("step", _step, from_output=_always),
    Activation("threshold", F.threshold, nn.Threshold, defaults=(("threshold", 0.0), ("value", 0.0)), from_output=_value_not_above),  # noqa: E501
    Activation("sigmoid", torch.sigmoid, nn.Sigmoid, from_output=_always),
    Activation("tanh", torch.tanh, nn.Tanh, from_output=_always),
    Activation("relu", F.relu, nn.ReLU, from_output=_always),
    Activation("leaky_relu", F.leaky_relu, nn.LeakyReLU, defaults=(("negative_slope", 0.01),), from_output=_nonnegative_slope),  # noqa: E501
    Activation("prelu", F.prelu, nn.PReLU, learned=True),
    Activation("elu", F.elu, nn.ELU, defaults=(("alpha", 1.0),)),
    Activation("gelu", F.gelu, nn.GELU, approximate="none"),
    Activation("gelu_tanh", partial(F.gelu, approximate="tanh"), nn.GELU, approximate="tanh"),
    Activation("silu", F.silu, nn.SiLU),
    Activation("mish", F.mish, nn.Mish),
    Activation("hardswish", F.hardswish, nn.Hardswish),
    Activation("hardsigmoid", F.hardsigmoid, nn.Hardsigmoid),
    Activation("hardtanh", F.hardtanh, nn.Hardtanh, defaults=(("min_val", -1.0), ("max_val", 1.0)), from_output=_exact, valid=operator.le),  # noqa: E501
    Activation("relu6", F.relu6, nn.ReLU6, from_output=_always),
    Activation("softplus", F.softplus, nn.Softplus, defaults=(("beta", 1.0), ("threshold", 20.0)), from_output=_linear_part_is_exact, low_precision=False),  # noqa: E501
    Activation("softsign", F.softsign, nn.Softsign),
    Activation("selu", F.selu, nn.SELU),
    Activation("celu", F.celu, nn.CELU, defaults=(("alpha", 1.0),), valid=lambda alpha: alpha != 0),
    Activation("logsigmoid", F.logsigmoid, nn.LogSigmoid),
    Activation("tanhshrink", F.tanhshrink, nn.Tanhshrink),
    Activation("softshrink", F.softshrink, nn.Softshrink, defaults=(("lambd", 0.5),), valid=lambda lambd: lambd >= 0),
    Activation("hardshrink", F.hardshrink, nn.Hardshrink, defaults=(("lambd", 0.5),)),
    Activation("squared_relu", _squared_relu),
)
# fmt: on

ACTIVATIONS = {activation.name: activation for activation in TABLE}
_BY_MODULE = {(a.module, a.approximate): a for a in TABLE if a.module is not None}


def by_name(name: str) -> Activation:
    """The activation of that name; ValueError that lists the names otherwise."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}") from None


def of_module(module: Any) -> tuple[Activation, tuple[float, ...], Tensor | None] | None:
    """The activation, parameters and slope of a torch.nn activation module, or None for any other module.

    A subclass is another module: it may compute something else.
    """
    activation = _BY_MODULE.get((type(module), getattr(module, "approximate", None)))
    if activation is None:
        return None
    parameters = tuple(float(getattr(module, name)) for name, _ in activation.defaults)
    return activation, parameters, module.weight if activation.learned else None
