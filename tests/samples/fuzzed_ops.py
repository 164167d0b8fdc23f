"""Every op of fusedact.functional: stock's answer for it, and how its arguments are drawn."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from samples import fuzzed_losses as losses
from samples.fuzzed_calls import Array, Op, arrays, shapes, sizes
from torch import Tensor, nn

from fusedact import functional
from fusedact.activations import ACTIVATIONS, Activation

Draw = Callable[[Any], Any]
Arguments = tuple[dict[str, Array | None], dict[str, Any]]
NUMBERS = {
    "negative_slope": [0.01, 0.2, 1.5, 0.0, -0.3],
    "alpha": [1.0, 0.5, 2.5, -1.0, 0.0],
    "threshold": [0.0, 0.5, -1.0, 3.0, 20.0],
    "value": [0.0, 0.5, -2.0, 5.0],
    "beta": [1.0, 0.5, 3.0, -1.0],
    "min_val": [-1.0, 0.1, -3.0, 0.0],
    "max_val": [1.0, 0.3, 6.0, 0.0],
    "lambd": [0.5, 0.0, 2.0, -1.0],
}


def discover() -> list[str]:
    """The names of functional that do not merely fall through to torch."""
    return [name for name in functional.__all__ if getattr(functional, name) is not getattr(F, name, None)]


def reference(act: Activation, formula: bool) -> Callable[..., Tensor]:
    """torch's function; for the truth a formula, where torch's own is none."""
    return FORMULAS.get(act.name, act.reference) if formula else act.reference


def _hardsigmoid(input: Tensor) -> Tensor:
    """Without torch's 1/6, which is float32's in a gradient of float64."""
    return (input + 3).clamp(0, 6) / 6


def _through(act: Activation, slope: float = 1.0) -> Callable[..., Tensor]:
    """With that derivative at NaN, as on a GPU; on a CPU stock's vectors have 0 or NaN there, and what is left this."""

    def formula(input: Tensor, *values: Any, **named: Any) -> Tensor:
        there = input.isnan()
        return torch.where(there, slope * input, act.reference(input.where(~there, 0), *values, **named))

    return formula


FORMULAS = {
    "hardsigmoid": _hardsigmoid,
    "selu": _through(ACTIVATIONS["selu"], 1.0507009873554804934193349852946),
    **{
        name: _through(ACTIVATIONS[name])
        for name in ("hardtanh", "relu6", "hardshrink", "softshrink", "hardswish", "elu", "celu")
    },
}


def activated(
    z: Tensor, activation: Any = None, slope: Tensor | None = None, formula: bool = False, **parameters: float
) -> Tensor:
    if activation is None:
        return z
    if isinstance(activation, tuple):
        name = next(a.name for a in ACTIVATIONS.values() if a.module is getattr(nn, activation[0]))
        return activated(z, name, None, formula, **activation[1]) if name in FORMULAS else module(activation)(z)
    act = ACTIVATIONS[activation]
    values = act.parameters(parameters)
    return reference(act, formula)(z, *([slope] if slope is not None else values))


def module(activation: Any) -> Any:
    """("ELU", {"alpha": 2.0}) as torch's module; a name as it is."""
    return getattr(nn, activation[0])(**activation[1]) if isinstance(activation, tuple) else activation


def _parameters(draw: Any, act: Activation) -> dict[str, float]:
    return {name: draw(st.sampled_from(NUMBERS[name])) for name, _ in act.defaults if draw(st.booleans())}


def activation(draw: Any, channels: int, learned: bool = True) -> Arguments:
    """A name with its parameters and slope, or a module."""
    usual = [a for a in ACTIVATIONS.values() if learned or not a.learned]
    act = draw(st.sampled_from(usual))
    if act.learned:
        slope = draw(arrays(draw(st.sampled_from([(1,), (channels,), ()]))))
        return {"slope": slope}, {"activation": act.name}
    parameters = _parameters(draw, act)
    if act.module is not None and act.approximate is None and draw(st.integers(0, 3)) == 3:
        return {}, {"activation": (act.module.__name__, dict(act.defaults) | parameters)}
    return {}, {"activation": act.name, **parameters}


# Activations alone


def _alone(name: str) -> Op:
    act = ACTIVATIONS[name]

    def arguments(draw: Any) -> Arguments:
        shape = draw(shapes())
        tensors: dict[str, Array | None] = {"input": draw(arrays(shape))}
        options: dict[str, Any] = {}
        if act.learned:
            tensors["weight"] = draw(arrays(draw(st.sampled_from([(1,), shape[1:2] or (1,), (), (2,)]))))
        elif name == "threshold":
            options = {key: draw(st.sampled_from(NUMBERS[key])) for key in ("threshold", "value")}
        elif name == "gelu":
            options = draw(
                st.sampled_from([{}, {"approximate": "tanh"}, {"approximate": "none"}, {"approximate": "x"}])
            )
        else:
            options = _parameters(draw, act)
        return tensors, options

    stock = getattr(F, name, act.reference)
    return Op(getattr(functional, name), stock, arguments, FORMULAS.get(name))


def _activate(draw: Any) -> Arguments:
    shape = draw(shapes())
    tensors, options = activation(draw, shape[1] if len(shape) > 1 else 1)
    if isinstance(options["activation"], tuple):
        options = {"activation": "squared_relu"}
    return {"input": draw(arrays(shape)), **tensors}, options


def _stock_activate(input: Tensor, activation: str, formula: bool = False, **others: Any) -> Tensor:
    return activated(input, activation, formula=formula, **others)


# Products with an activation


def with_activation(ours: Callable, stock: Callable, arguments: Callable[[Any], Arguments]) -> Op:
    def run(*, activation: Any = None, **others: Any) -> Tensor:
        return ours(activation=module(activation), **others)

    def composed(
        *, activation: Any = None, slope: Tensor | None = None, formula: bool = False, **others: Any
    ) -> Tensor:
        parameters = {name: others.pop(name) for name in list(others) if name in NUMBERS}
        return activated(stock(**others), activation, slope, formula, **parameters)

    return Op(run, composed, arguments, partial(composed, formula=True))


def _linear(draw: Any) -> Arguments:
    features, channels = draw(sizes(70)), draw(sizes(70))
    rows = draw(st.sampled_from([(), (5,), (2, 3), (0,)]) | sizes(70).map(lambda n: (n,)))
    tensors, options = activation(draw, channels)
    bias = draw(st.none() | arrays((channels,)) | arrays(draw(st.sampled_from([(1,), (channels,)]))))
    input, weight = draw(arrays((*rows, features))), draw(arrays((channels, features)))
    return {"input": input, "weight": weight, "bias": bias, **tensors}, options


def _convolution(dims: int, transposed: bool, draw: Any) -> Arguments:
    groups, each, out, batch = (draw(st.integers(1, n)) for n in (2, 3, 3, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    size = tuple(draw(st.integers(n, 7 if dims < 3 else 4)) for n in kernel)
    options: dict[str, Any] = {"groups": groups}
    for name, numbers in (("stride", (1, 1, 2)), ("padding", (0, 0, 1)), ("dilation", (1, 1, 2))):
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from(numbers))
    if not transposed and draw(st.integers(0, 5)) == 5:
        options["padding"] = draw(st.sampled_from(["same", "valid"]))
    if transposed and draw(st.booleans()):
        options["output_padding"] = draw(st.sampled_from([0, 1]))
    first, second = (each * groups, out) if transposed else (out * groups, each)
    channels = out * groups
    tensors, extra = activation(draw, channels)
    input = draw(arrays((batch, each * groups, *size)))
    weight, bias = draw(arrays((first, second, *kernel))), draw(st.none() | arrays((channels,)))
    return {"input": input, "weight": weight, "bias": bias, **tensors}, {**options, **extra}


def _linear_chain(draw: Any) -> Arguments:
    widths = [draw(sizes(40)) for _ in range(draw(st.integers(2, 4)))]
    tensors: dict[str, Array | None] = {"input": draw(arrays((draw(sizes(40)), widths[0])))}
    found = []
    for at, (features, channels) in enumerate(pairwise(widths)):
        tensors[f"weight{at}"] = draw(arrays((channels, features)))
        tensors[f"bias{at}"] = draw(st.none() | arrays((channels,)))
        last = at == len(widths) - 2
        found.append(None if last and draw(st.booleans()) else activation(draw, channels, learned=False)[1])
    return tensors, {"activations": found}


def _chain(**tensors: Any) -> Tensor:
    layers = []
    for at, options in enumerate(tensors["activations"]):
        act = None
        if options is not None:
            name, parameters = options["activation"], {k: v for k, v in options.items() if k != "activation"}
            entry = ACTIVATIONS.get(name) if isinstance(name, str) else None
            act = module(name) if entry is None or not parameters else entry.module(**dict(entry.defaults) | parameters)
        layers.append((tensors[f"weight{at}"], tensors[f"bias{at}"], act))
    return functional.linear_chain(tensors["input"], layers)


def _stock_chain(*, formula: bool = False, **tensors: Any) -> Tensor:
    x = tensors["input"]
    for at, options in enumerate(tensors["activations"]):
        x = activated(F.linear(x, tensors[f"weight{at}"], tensors[f"bias{at}"]), formula=formula, **(options or {}))
    return x


def _gated(draw: Any) -> Arguments:
    shape = draw(shapes())
    tensors, options = activation(draw, shape[1] if len(shape) > 1 else 1)
    if not draw(st.booleans()) and not tensors:
        options = {}
    other = draw(st.sampled_from([shape, shape, shape, shape[1:]]))
    return {"gate": draw(arrays(shape)), "up": draw(arrays(other)), **tensors}, options


def _stock_gated(gate: Tensor, up: Tensor, activation: Any = "silu", **others: Any) -> Tensor:
    return activated(gate, activation, **others) * up


def _ours_gated(gate: Tensor, up: Tensor, activation: Any = "silu", **others: Any) -> Tensor:
    return functional.gated(gate, up, module(activation), **others)


def _softmax(draw: Any) -> Arguments:
    shape = draw(shapes())
    options: dict[str, Any] = {"dim": draw(st.integers(-len(shape) - 1, len(shape)) | st.none())}
    if draw(st.integers(0, 3)) == 3:
        options["dtype"] = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    return {"input": draw(arrays(shape))}, options


def _wide_softmax(stock: Callable[..., Tensor], input: Tensor, dim: int | None, dtype: Any = None) -> Tensor:
    return stock(input, dim)


OPS: dict[str, Op] = {
    **{name: _alone(name) for name in ACTIVATIONS if name != "gelu_tanh"},
    "activate": Op(functional.activate, _stock_activate, _activate, partial(_stock_activate, formula=True)),
    "linear": with_activation(functional.linear, F.linear, _linear),
    "linear_chain": Op(_chain, _stock_chain, _linear_chain, partial(_stock_chain, formula=True), several=True),
    **{
        name: with_activation(getattr(functional, name), getattr(F, name), partial(_convolution, dims, transposed))
        for transposed, dims in ((t, d) for t in (False, True) for d in (1, 2, 3))
        for name in [f"conv{'_transpose' * transposed}{dims}d"]
    },
    "gated": Op(_ours_gated, _stock_gated, _gated, partial(_stock_gated, formula=True)),
    **{
        name: Op(getattr(functional, name), getattr(F, name), _softmax, partial(_wide_softmax, getattr(F, name)))
        for name in ("softmax", "log_softmax", "softmin")
    },
    "cross_entropy": Op(functional.cross_entropy, losses.extended_cross_entropy, losses.cross_entropy, own=True),
    "nll_loss": Op(functional.nll_loss, F.nll_loss, losses.nll_loss),
    "binary_cross_entropy": Op(
        functional.binary_cross_entropy, F.binary_cross_entropy, partial(losses.binary, kind="uniform")
    ),
    "binary_cross_entropy_with_logits": Op(
        functional.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, losses.with_logits
    ),
    "multilabel_soft_margin_loss": Op(
        functional.multilabel_soft_margin_loss,
        F.multilabel_soft_margin_loss,
        losses.multilabel,
        losses.exact_multilabel,
    ),
    "linear_binary_cross_entropy_with_logits": Op(
        functional.linear_binary_cross_entropy_with_logits, losses.stock_bce_head, losses.bce_head
    ),
    "linear_cross_entropy": Op(losses.ours_head, losses.stock_head, losses.head, losses.true_head, own=True),
}
