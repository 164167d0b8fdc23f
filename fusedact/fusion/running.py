"""What the nodes of a rewritten forward run, on the layers and activations as they are at that call.

One that somebody watches, or that was replaced by another kind, runs as stock runs it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedact import functional
from fusedact import nn as fnn
from fusedact.activations import of_module
from fusedact.nn.convolution import convolved
from fusedact.nn.hooks import is_plain

Module = Any  # of any class
_EVERY = frozenset(vars(nn.Module()))
SOFTMAXES = {kind: getattr(fnn, kind.__name__) for kind in (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d)}
PRODUCT_FUNCTIONS = {F.linear, F.conv1d, F.conv2d, F.conv3d}


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return functional.softmax(input, dim, dtype=dtype)


def _log_softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return functional.log_softmax(input, dim, dtype=dtype)


SOFTMAX_FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    **{getattr(F, name): getattr(functional, name) for name in ("softmax", "log_softmax", "softmin")},
    **dict.fromkeys((torch.softmax, "softmax"), _softmax),
    **dict.fromkeys((torch.log_softmax, "log_softmax"), _log_softmax),
}


class Act(NamedTuple):
    """An activation as a node applies it, to what `live`, its module now, is given; None where it is a function.

    made: what functional.linear takes for it, or None where that is the live module itself.
    known: the module of another class than torch's that was found to compute it, and its own_attributes then.
    apply: what the node does to the pre-activation where it is a function.
    """

    made: str | nn.Module | None = None
    known: tuple[nn.Module, tuple[dict[str, Any], dict[str, Any]]] | None = None
    apply: Callable[[Tensor], Tensor] | None = None

    def now(self, live: Module, into_product: bool = False) -> str | nn.Module | None:
        """The name or module to fuse; None where the module must be called.

        Under autocast torch's operations that a module is composed of may widen its result, which a product narrows
        again.
        """
        if self.apply is not None:
            return self.made
        if not is_plain(live):
            return None
        if self.known is None or live is not self.known[0]:
            return None if of_module(live) is None else live
        own, members = self.known[1]
        if not (_own(live) == own and unchanged(type(live), members)):
            return None
        return None if torch._C._is_any_autocast_enabled() and not into_product else self.made

    def __call__(self, z: Tensor, live: Module) -> Tensor:
        return live(z) if self.apply is None else self.apply(z)


def own_attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """What it has beyond every module's, and what its classes have, what stands behind the former included."""
    own, kind = _own(module), type(module)
    members = {name: getattr(kind, name, None) for name in own}
    for base in reversed(kind.__mro__):
        if base not in (nn.Module, object):
            members.update((name, value) for name, value in vars(base).items() if not name.startswith("__"))
    return own, members


def unchanged(kind: type, members: dict[str, Any]) -> bool:
    """Whether a module of that class still finds these members in it."""
    return all(getattr(kind, name, None) is value for name, value in members.items())


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _EVERY}


def linear(kinds: Sequence[type[nn.Module]], acts: Sequence[Act | None]) -> Callable[..., Tensor]:
    """Linear layers in a row, each of its class and with its activation: f(x, layer, live, layer, live, ...)."""
    parts = list(zip(kinds, acts, strict=True))

    def fused_linear(x: Tensor, *modules: Module) -> Tensor:
        here = list(zip(modules[::2], modules[1::2], strict=True))
        layers = [
            _layer(kind, act, *now, into_product=at < len(parts))
            for at, ((kind, act), now) in enumerate(zip(parts, here, strict=True), 1)
        ]
        if len(layers) > 1 and None not in layers:
            return functional.linear_chain(x, layers)  # type: ignore[arg-type]
        for found, (_, act), (layer, live) in zip(layers, parts, here, strict=True):
            if found is not None:
                x = functional.linear(x, found[0], found[1], activation=found[2])
            else:
                x = layer(x) if act is None else act(layer(x), live)
        return x

    return fused_linear


def _layer(
    kind: type[nn.Module], act: Act | None, layer: Module, live: Module, into_product: bool
) -> tuple[Tensor, Tensor | None, str | nn.Module | None] | None:
    """Weight (N, K), bias and activation; None where the two must be called."""
    if type(layer) is not kind or not is_plain(layer) or getattr(layer, "activation", None) is not None:
        return None
    now = None if act is None else act.now(live, into_product)
    if act is not None and now is None:
        return None
    weight: Any = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.t(), layer.bias, now  # type: ignore[return-value]


def convolution(kind: type[nn.Module], act: Act) -> Callable[..., Tensor]:
    def fused_convolution(x: Tensor, layer: Module, live: Module) -> Tensor:
        now = act.now(live)
        own = getattr(layer, "activation", None)
        if now is None or type(layer) is not kind or own is not None or not is_plain(layer):
            return act(layer(x), live)
        return convolved(layer, x, now)

    return fused_convolution


def gated(act: Act) -> Callable[..., Tensor]:
    def fused_gated(gate: Tensor, up: Tensor, live: Module) -> Tensor:
        now = act.now(live)
        return act(gate, live) * up if now is None else functional.gated(gate, up, now)

    return fused_gated


def activation(act: Act) -> Callable[..., Tensor]:
    def fused_activation(x: Tensor, live: Module) -> Tensor:
        now = act.now(live)
        if isinstance(now, str):
            return functional.activate(x, now)
        found = of_module(now)
        if found is None:
            return act(x, live)
        entry, values, slope = found
        named = dict(zip((name for name, _ in entry.defaults), values, strict=True))
        return functional.activate(x, entry.name, slope=slope, **named)

    return fused_activation


def softmax(x: Tensor, live: Module) -> Tensor:
    if type(live) not in SOFTMAXES or not is_plain(live):
        return live(x)
    return SOFTMAXES[type(live)].forward(live, x)
