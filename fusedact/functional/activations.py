"""The activations alone, under torch's names and signatures, each made of its line of the table.

Stock's own kernel of one launch is as fast as memory allows, so where the backend is chosen by itself (`auto`) ours
runs only where stock launches several: the table's `fused_alone`, and prelu where its slope learns. It does not under
torch.compile, which fuses stock's operations with their neighbours. A backend that is asked for (`triton`) runs all.
"""

import inspect
from collections.abc import Callable
from inspect import Parameter, Signature
from itertools import chain, combinations
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import activations, autograd, backend
from fusedact.activations import Activation, by_name, lines_of
from fusedact.backend import get_backend
from fusedact.functional import checks, sharded

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def activate(input: Tensor, activation: str, *, slope: Tensor | None = None, **parameters: float) -> Tensor:
    """activation(input), where `activation` is a name of the table or a registered one.

    input (*) -> (*). The activation's parameters go by torch's own names, prelu's tensor as `slope`: one element, or
    one for each of dimension 1.

    Raises ValueError for an unknown name, TypeError for a parameter that the activation does not have, and the errors
    of torch's function.
    """
    act = by_name(activation)
    values = act.parameters(parameters)
    if act.learned != (slope is not None):
        raise TypeError(f"activation {act.name!r} takes {'a' if act.learned else 'no'} slope= tensor")
    return activate_with(act, input, values, slope)


def activate_with(act: Activation, input: Tensor, values: tuple[float, ...], slope: Tensor | None) -> Tensor:
    """act(input) in one launch, or by torch's function."""
    y = _fused(act, input, values, slope)
    if y is not None:
        return y
    return act.reference(input, *values) if slope is None else act.reference(input, slope)


def _fused(act: Activation, input: Tensor, values: tuple[float, ...], slope: Tensor | None) -> Tensor | None:
    """The activation in one launch, or None where torch's function is to answer."""
    if backend.is_sharded(input):
        return _sharded(act, input, values, slope)
    if not (_worth_a_launch(act, slope) and checks.on_triton(input, slope) and act.valid(*values)):
        return None
    low = backend.autocast_dtype(input)
    if low is not None and slope is not None:
        input, slope = checks.cast(input, low), checks.cast(slope, low)
    elif low is not None and not act.low_precision and input.is_cuda:  # not in a CPU's list
        input = checks.cast(input, torch.float32)
    return autograd.activation(input, slope, act.name, values) if _fits(input, slope) else None


def _sharded(act: Activation, input: Tensor, values: tuple[float, ...], slope: Tensor | None) -> Tensor | None:
    y = sharded.activation(lambda x, a: activate_with(act, x, values, a), input, slope)
    return None if y is NotImplemented else y


def _worth_a_launch(act: Activation, slope: Tensor | None) -> bool:
    if get_backend() == "triton":
        return True
    if not act.fused_alone or torch.compiler.is_compiling():
        return False
    return slope is None or (slope.requires_grad and torch.is_grad_enabled())


def _fits(input: Tensor, slope: Tensor | None) -> bool:
    if input.dtype not in backend.KERNEL_DTYPES:
        return False
    if slope is None:
        return True
    channels = input.shape[1] if input.dim() > 1 else 1
    return slope.dtype == input.dtype and slope.dim() <= 1 and slope.numel() in (1, channels)


def _ours(stock: _Function) -> _Function:
    """torch's function, with the kernel before it."""
    lines = lines_of(stock)
    act = next(iter(lines.values()))
    alone = act.fused_alone
    signature = _signature(stock, act)
    positional = [name for name, p in signature.parameters.items() if p.kind is not Parameter.KEYWORD_ONLY]
    calls = _calls(signature, positional)

    def function(input: Any, *args: Any, **kwargs: Any) -> Tensor:
        chosen = get_backend() == "triton" or (alone and isinstance(input, Tensor) and input.is_cuda)
        if not chosen:
            chosen = backend.is_sharded(input)  # torch has no sharded backward for some
        if chosen and (len(args), *sorted(kwargs)) in calls:  # where not, torch's function tells what is wrong
            y = _called(lines, **dict(zip(positional, (input, *args), strict=False), **kwargs))
            if y is not None:
                return y
        return stock(input, *args, **kwargs) if args or kwargs else stock(input)

    function.__name__ = function.__qualname__ = act.name
    function.__doc__ = stock.__doc__
    function.__signature__ = signature  # type: ignore[attr-defined]
    return cast(_Function, function)


def _calls(signature: Signature, positional: list[str]) -> frozenset[tuple]:
    """Every way to call it: the number of arguments after the input, then the names of those given by name."""
    required = {name for name, p in signature.parameters.items() if p.default is Parameter.empty}
    calls = set()
    for count in range(len(positional)):
        first = set(positional[: 1 + count])
        others = sorted(signature.parameters.keys() - first)
        named = chain.from_iterable(combinations(others, n) for n in range(len(others) + 1))
        calls |= {(count, *names) for names in named if required <= first.union(names)}
    return frozenset(calls)


def _called(
    lines: dict[str | None, Activation],
    input: Any,
    weight: Any = None,
    inplace: Any = False,
    **others: Any,
) -> Tensor | None:
    """The line's activation in one launch, or None where torch's function is to answer."""
    approximate = others.pop("approximate", next(iter(lines)))
    act = lines.get(approximate) if approximate is None or isinstance(approximate, str) else None
    if act is None or inplace is not False or act.learned != isinstance(weight, Tensor):
        return None
    if not others:
        return _fused(act, input, act.default_values, weight)
    if not all(isinstance(number, (int, float)) for number in others.values()):
        return None
    return _fused(act, input, act.parameters(others), weight)


def _signature(stock: Callable[..., Tensor], act: Activation) -> Signature:
    """torch's own; where it is written in C++ and tells none, its parameters from the table."""
    try:
        return inspect.signature(stock)
    except ValueError:
        parameters = [Parameter("input", Parameter.POSITIONAL_OR_KEYWORD)]
        if act.learned:
            parameters.append(Parameter("weight", Parameter.POSITIONAL_OR_KEYWORD))
        for name, default in act.defaults:
            parameters.append(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=default))
        if act.approximate is not None:
            parameters.append(Parameter("approximate", Parameter.KEYWORD_ONLY, default=act.approximate))
        return Signature(parameters)


step = _ours(activations.step)
threshold = _ours(F.threshold)
sigmoid = _ours(F.sigmoid)
tanh = _ours(F.tanh)
relu = _ours(F.relu)
leaky_relu = _ours(F.leaky_relu)
prelu = _ours(F.prelu)
elu = _ours(F.elu)
gelu = _ours(F.gelu)
silu = _ours(F.silu)
mish = _ours(F.mish)
hardswish = _ours(F.hardswish)
hardsigmoid = _ours(F.hardsigmoid)
hardtanh = _ours(F.hardtanh)
relu6 = _ours(F.relu6)
softplus = _ours(F.softplus)
softsign = _ours(F.softsign)
selu = _ours(F.selu)
celu = _ours(F.celu)
logsigmoid = _ours(F.logsigmoid)
tanhshrink = _ours(F.tanhshrink)
softshrink = _ours(F.softshrink)
hardshrink = _ours(F.hardshrink)
squared_relu = _ours(activations.squared_relu)
