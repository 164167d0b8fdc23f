"""The table of activations: one line each. Names, errors, choices, tests and the README's list are read from it.

`register_activation` adds a user's own line.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from keyword import iskeyword
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise activation.

    name: as in torch.nn.functional, and of its device pair in kernels/activations.py.
    reference: torch's own function, (input, *parameters) -> y.
    module: torch's class, or None where torch has none; `approximate` tells apart what one class holds.
    defaults: its parameters, named as torch names the arguments and the module's attributes.
    from_output: whether the derivative can be taken from the output, (dtype, *parameters) -> bool.
    valid: whether torch takes these parameters; where not, it is torch that says so.
    learned: its one parameter is a tensor, a slope per channel or one for all.
    low_precision: under CUDA autocast stock runs it in the low precision, not in float32.
    fused_alone: its own kernel is worth a launch without a linear layer before it, since stock launches several;
        prelu's does in the backward, where its slope learns. Stock's one kernel is as fast as memory.
    in_place: whether torch takes the derivative of it done in place, (*parameters) -> bool, where that depends on them.
    derivative_from_output: where stock saves nothing but its result, (dy, y) -> dx in torch's operations.
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
    fused_alone: bool = False
    in_place: Callable[..., bool] | None = None
    derivative_from_output: Callable[[Tensor, Tensor], Tensor] | None = None
    default_values: tuple[float, ...] = field(init=False)

    def parameters(self, given: dict[str, float]) -> tuple[float, ...]:
        """`given` over the defaults, in order; TypeError for a name that the activation does not have."""
        if not (given or self.defaults):
            return ()
        known = dict(self.defaults)
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(
                f"activation {self.name!r} takes {', '.join(known) or 'no parameter'}, got {', '.join(unknown)}"
            )
        return tuple(float(given.get(name, default)) for name, default in self.defaults)

    def __post_init__(self) -> None:
        object.__setattr__(self, "default_values", self.parameters({}))

    def build(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """torch's module for it, with the default parameters."""
        assert self.module is not None, self.name
        if self.learned:
            return self.module(device=device, dtype=dtype)
        if self.approximate is not None:
            return self.module(approximate=self.approximate)
        return self.module(**dict(self.defaults))


@dataclass(frozen=True, kw_only=True, eq=False)
class Registered(Activation):
    """An activation of the user's own, equal to itself alone.

    derivative: (dy, input, *parameters) -> dx, in torch's operations.
    device: its pair of triton.jit functions, or a function without arguments that returns it.
    """

    derivative: Callable[..., Tensor]
    device: Any


def _always(dtype: torch.dtype, *parameters: float) -> bool:
    return True


def _nonnegative(number: float) -> bool:
    return number >= 0


def _nonnegative_slope(dtype: torch.dtype, negative_slope: float) -> bool:
    return negative_slope >= 0


def _value_not_above(dtype: torch.dtype, threshold: float, value: float) -> bool:
    return value <= threshold and _exact(dtype, threshold, value)


@lru_cache(4096)
def _exact(dtype: torch.dtype, *numbers: float) -> bool:
    """The output can stand at these numbers and be told from them: rounding moves none."""
    return all(torch.tensor(number, dtype=dtype).item() == number for number in numbers)


def _linear_part_is_exact(dtype: torch.dtype, beta: float, threshold: float) -> bool:
    """y tells which side of the threshold x was on only where softplus has become linear to float32's last digit."""
    return beta > 0 and threshold >= 20 and dtype != torch.float64


def step(input: Tensor) -> Tensor:
    """1 where input >= 0, 0 where it is below, NaN where it is NaN; the gradient is 0."""
    return input.clamp(-1, 0).floor() + 1


def squared_relu(input: Tensor) -> Tensor:
    """relu(input)², elementwise."""
    y = F.relu(input)
    return y * y  # not `square`, which CUDA autocast would run in float32


def _relu_derivative(dy: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(dy, y, 0)


# fmt: off
TABLE = (
    Activation("step", step, from_output=_always, fused_alone=True),
    Activation("threshold", F.threshold, nn.Threshold, defaults=(("threshold", 0.0), ("value", 0.0)), from_output=_value_not_above),  # noqa: E501
    Activation("sigmoid", F.sigmoid, nn.Sigmoid, from_output=_always, derivative_from_output=torch.ops.aten.sigmoid_backward),  # noqa: E501
    Activation("tanh", F.tanh, nn.Tanh, from_output=_always, derivative_from_output=torch.ops.aten.tanh_backward),
    Activation("relu", F.relu, nn.ReLU, from_output=_always, derivative_from_output=_relu_derivative),
    Activation("leaky_relu", F.leaky_relu, nn.LeakyReLU, defaults=(("negative_slope", 0.01),), from_output=_nonnegative_slope, in_place=_nonnegative),  # noqa: E501
    Activation("prelu", F.prelu, nn.PReLU, learned=True, fused_alone=True),
    Activation("elu", F.elu, nn.ELU, defaults=(("alpha", 1.0),), in_place=_nonnegative),
    Activation("gelu", F.gelu, nn.GELU, approximate="none"),
    Activation("gelu_tanh", partial(F.gelu, approximate="tanh"), nn.GELU, approximate="tanh"),
    Activation("silu", F.silu, nn.SiLU),
    Activation("mish", F.mish, nn.Mish),
    Activation("hardswish", F.hardswish, nn.Hardswish),
    Activation("hardsigmoid", F.hardsigmoid, nn.Hardsigmoid),
    Activation("hardtanh", F.hardtanh, nn.Hardtanh, defaults=(("min_val", -1.0), ("max_val", 1.0)), from_output=_exact, valid=operator.le),  # noqa: E501
    Activation("relu6", F.relu6, nn.ReLU6, from_output=_always),
    Activation("softplus", F.softplus, nn.Softplus, defaults=(("beta", 1.0), ("threshold", 20.0)), from_output=_linear_part_is_exact, low_precision=False),  # noqa: E501
    Activation("softsign", F.softsign, nn.Softsign, fused_alone=True),
    Activation("selu", F.selu, nn.SELU),
    Activation("celu", F.celu, nn.CELU, defaults=(("alpha", 1.0),), valid=lambda alpha: alpha > 0, in_place=_nonnegative),  # noqa: E501
    Activation("logsigmoid", F.logsigmoid, nn.LogSigmoid),
    Activation("tanhshrink", F.tanhshrink, nn.Tanhshrink, fused_alone=True),
    Activation("softshrink", F.softshrink, nn.Softshrink, defaults=(("lambd", 0.5),), valid=lambda lambd: lambd >= 0),
    Activation("hardshrink", F.hardshrink, nn.Hardshrink, defaults=(("lambd", 0.5),)),
    Activation("squared_relu", squared_relu, fused_alone=True),
)
# fmt: on

ACTIVATIONS = {activation.name: activation for activation in TABLE}
_BY_MODULE = {(a.module, a.approximate): a for a in TABLE if a.module is not None}
_ARGUMENTS = ("input", "weight", "bias", "activation", "slope")  # of functional.linear


def by_name(name: str) -> Activation:
    """The activation of that name; ValueError that lists the names otherwise."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown activation {name!r}, expected one of {', '.join(ACTIVATIONS)}") from None


def lines_of(stock: Callable[..., Any]) -> dict[str | None, Activation]:
    """The table's lines that this function or class stands for, by the `approximate` that tells them apart."""
    return {a.approximate: a for a in TABLE if stock in (a.module, getattr(a.reference, "func", a.reference))}


def of_module(module: Any) -> tuple[Activation, tuple[float, ...], Tensor | None] | None:
    """The activation, parameters and slope of an activation module, or None for any other module, and for one that
    torch does in place and cannot differentiate so.

    The module is torch.nn's, ours or a registered one. A subclass is another module: it may compute something else.
    """
    kind = type(module)
    lines = vars(kind).get("_lines")
    approximate = getattr(module, "approximate", None)
    activation = _BY_MODULE.get((kind, approximate)) if lines is None else lines.get(approximate)
    if activation is None:
        return None
    parameters = tuple(float(getattr(module, name)) for name, _ in activation.defaults)
    if activation.in_place is not None and vars(module).get("inplace") and not activation.in_place(*parameters):
        return None  # torch's own, whose backward says so
    return activation, parameters, module.weight if activation.learned else None


def register_activation(
    name: str,
    *,
    reference: Callable[..., Tensor],
    derivative: Callable[..., Tensor],
    device: Any,
    module: type[nn.Module] | None = None,
    defaults: Mapping[str, float] | None = None,
) -> None:
    """Add an elementwise activation of your own, which linear layers then fuse as they fuse torch's.

    name: what `activation=` takes. defaults: its parameters, in the order in which the functions take them.
    reference(input, *parameters) -> y and derivative(dy, input, *parameters) -> dx are in torch's operations.
    device: the same two as triton.jit functions on loaded tiles, f(z, *parameters) and f_grad(dy, z, *parameters), or a
    function without arguments that returns the pair, for machines without Triton.
    module: its class, made and read with the parameters' names; in a Sequential it is fused with the Linear before it.

    The derivative is compared with autograd of the reference here, in float64; the device's pair with both at its first
    launch on each device, in float32, where a difference is a RuntimeError that names the point and both numbers.

    Raises ValueError for a name that is taken or no identifier, for a parameter named as an argument of
    functional.linear, and for a derivative that is not the reference's; TypeError for what cannot be called.
    """
    entry = Registered(
        name=_free(name),
        reference=_callable(name, "reference", reference),
        derivative=_callable(name, "derivative", derivative),
        device=_device(name, device),
        module=module,
        defaults=_defaults(name, defaults or {}),
        fused_alone=True,
    )
    _check_derivative(entry)
    if module is not None:
        _check_module(entry)
        _BY_MODULE[module, None] = entry
    ACTIVATIONS[name] = entry


def sample(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Points near 0 and far out, 0 among them, and a gradient for each."""
    generator = torch.Generator("cpu").manual_seed(0)
    near = 4 * torch.randn(103, generator=generator, device="cpu")
    x = torch.cat([torch.linspace(-300, 300, 25, device="cpu"), near])
    return x.to(device, dtype), torch.linspace(0.5, 2, len(x), device=device, dtype=dtype)


def difference(x: Tensor, ours: Tensor, truth: Tensor, tolerance: float) -> str | None:
    """The point of the greatest difference and both numbers, or None where none is beyond the tolerance.

    Relative to 1 or the truth, whichever is greater. A truth that is not finite says nothing.
    """
    error = ((ours - truth).abs() / truth.abs().clamp(min=1)).nan_to_num(torch.inf).where(truth.isfinite(), 0)
    at = error.argmax()
    return f"{ours[at]:.9g} at {x[at]:.9g}, not {truth[at]:.9g}" if error[at] > tolerance else None


def _free(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier() or iskeyword(name):
        raise ValueError(f"the name of an activation must be an identifier, got {name!r}")
    if name in ACTIVATIONS:
        raise ValueError(f"activation {name!r} exists already")
    return name


def _callable(name: str, what: str, function: Any) -> Callable[..., Any]:
    if not callable(function):
        raise TypeError(f"{what} of activation {name!r} must be a function, got {function!r}")
    return function


def _device(name: str, device: Any) -> Any:
    if isinstance(device, tuple) and len(device) == 2:
        return tuple(_callable(name, "device", function) for function in device)
    if isinstance(device, tuple) or not callable(device):
        raise TypeError(f"device of activation {name!r} must be a pair of functions or return one, got {device!r}")
    return device


def _defaults(name: str, defaults: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    for parameter, value in defaults.items():
        if not isinstance(parameter, str) or not parameter.isidentifier() or parameter in _ARGUMENTS:
            raise ValueError(f"activation {name!r} cannot have a parameter named {parameter!r}")
        if not isinstance(value, int | float):
            raise TypeError(f"parameter {parameter!r} of activation {name!r} must be a number, got {value!r}")
    return tuple((parameter, float(value)) for parameter, value in defaults.items())


def _check_derivative(entry: Registered) -> None:
    values = entry.parameters({})
    with torch.inference_mode(False), torch.enable_grad():
        x, dy = sample(torch.float64)
        y = entry.reference(x.requires_grad_(), *values)
        ours = entry.derivative(dy, x.detach(), *values)
        for what, result in (("reference", y), ("derivative", ours)):
            kept = ("shape", "dtype", "device")
            if not isinstance(result, Tensor) or any(getattr(result, part) != getattr(x, part) for part in kept):
                raise ValueError(f"{what} of activation {entry.name!r} must keep its input's shape, dtype and device")
        if not y.requires_grad:
            raise ValueError(f"reference of activation {entry.name!r} has no gradient")
        (truth,) = torch.autograd.grad(y, x, dy, materialize_grads=True)
    both = truth.isfinite() & ours.isfinite()
    if not both.any():
        raise ValueError(f"activation {entry.name!r} has no finite derivative from -300 to 300")
    found = difference(x.detach()[both], ours[both], truth[both], 1e-6)
    if found:
        raise ValueError(f"derivative of activation {entry.name!r} is {found}, autograd's of its reference")


def _check_module(entry: Registered) -> None:
    module = entry.module
    if not isinstance(module, type) or not issubclass(module, nn.Module):
        raise TypeError(f"module of activation {entry.name!r} must be a class of modules, got {module!r}")
    if "_lines" in vars(module) or any(known is module for known, _ in _BY_MODULE):
        raise ValueError(f"{module.__name__} is the module of another activation")
    built = entry.build()
    for name, value in entry.defaults:
        if float(getattr(built, name)) != value:
            raise ValueError(
                f"{module.__name__}({name}={value}) of activation {entry.name!r} has {name} = {getattr(built, name)!r}"
            )
