"""Linear layers in a row: backward goes from one layer's dz to the next one's, without the dy in between.

Saves x and each W, b and slope by reference, and of each activated layer one of y (from which the next layer's dW is
taken) and z (beside which y is then made anew); two layers' y and z are never both kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.activations import by_name
from fusedact.autograd.doors import differentiate
from fusedact.autograd.given_up import GIVEN_UP, give_up, guarded, is_given_up, kind_of
from fusedact.autograd.linear import Plan, bare, in_rows, plan_of, product, tile_for

Activations = tuple[tuple[str, tuple[float, ...]] | None, ...]  # name and parameters of each layer, None for none
_NAME = "linear_chain"
TENSORS = 3  # of a layer: weight, bias, slope


def linear_chain(x: Tensor, activations: Activations, tensors: Sequence[Tensor | None]) -> Tensor:
    """x through all the layers, recorded as one op."""
    if GIVEN_UP and is_given_up(kind_of(_NAME, (x, activations, tensors))):
        return _composite(activations, x, *tensors)
    try:
        with backend.on_device(x):
            return _apply(x, activations, *tensors)
    except backend.launch_error() as error:
        give_up(kind_of(_NAME, (x, activations, tensors)), error)
        return _composite(activations, x, *tensors)


def can_be_chained(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Eager, a gradient is wanted, and nothing but autograd looks on: else each layer finds its own door."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or backend.dispatching() or backend.transforming():
        return False
    given = [x, *(t for t in tensors if t is not None)]
    plain = all(type(t) in backend.PLAIN and not t.is_neg() for t in given)
    return plain and any(t.requires_grad for t in given)


def _as_rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 1 else t[None]


def _layers(tensors: Sequence[Any]) -> list[Sequence[Any]]:
    return [tensors[at : at + TENSORS] for at in range(0, len(tensors), TENSORS)]


class LinearChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activations: Activations, *tensors: Tensor | None) -> Tensor:
        y, kept = (_named_launch if backend.profiling() else _launch)(x, activations, tensors)
        ctx.activations = activations
        ctx.save_for_backward(x, *tensors, *kept)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        count = TENSORS * len(ctx.activations)
        tensors, kept = saved[:count], saved[count:]
        want_x, _, *wanted = ctx.needs_input_grad
        if dy is None:
            return (None,) * (2 + count)
        dy = dy.resolve_neg()
        if torch.is_grad_enabled() or backend.transforming() or backend.unreadable(dy):
            dx, grads = _differentiated(dy, x, ctx.activations, tensors, kept, want_x, wanted)
        else:
            run = _named_gradients if backend.profiling() else _gradients_or_formula
            dx, grads = run(dy, x, ctx.activations, tensors, kept, want_x, wanted)
        return dx, None, *grads


_apply = backend.apply_of(LinearChain)


def _launch(
    x: Tensor, activations: Activations, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """y, and of each layer what backward needs of it."""
    y = x
    kept: list[Tensor | None] = []
    for activation, (weight, bias, slope) in zip(activations, _layers(tensors), strict=True):
        if activation is None:
            y = bare(y, weight, bias)  # type: ignore[arg-type]
            kept.append(None)
            continue
        plan = plan_of(*activation, x)
        rows, shape = in_rows(y, weight)  # type: ignore[arg-type]
        tile, save_z = tile_for("forward", rows, weight), not plan.from_output  # type: ignore[arg-type]
        y, z = plan.linear.forward(rows, weight, bias, plan.value, activation[1], slope, tile, save_z, shape)
        kept.append(z if save_z else y)
    return y, kept


def _composite(activations: Activations, x: Tensor, *tensors: Tensor | None) -> Tensor:
    for activation, (weight, bias, slope) in zip(activations, _layers(tensors), strict=True):
        x = F.linear(x, weight, bias)  # type: ignore[arg-type]
        if activation is not None:
            name, parameters = activation
            x = by_name(name).reference(x, *(parameters if slope is None else (slope,)))
    return x


class _Kept(NamedTuple):
    """An activated layer as backward needs it. saved: y where the derivative is taken from it, else z."""

    plan: Plan
    parameters: tuple[float, ...]
    slope: Tensor | None
    saved: Tensor

    def output(self) -> Tensor:
        if self.plan.from_output:
            return self.saved
        y = torch.empty_like(self.saved)
        self.plan.bias_activation.activated(self.saved, self.plan.value, self.parameters, self.slope, into=y)
        return y

    def through_activation(self, dy: Tensor, want_bias: bool, want_slope: bool) -> list[Tensor | None]:
        """dz, db and the slope's gradient."""
        tile = self.plan.bias_activation.tile(*self.saved.shape, self.saved.element_size())
        return self.plan.bias_activation.backward(
            dy, self.saved, self.plan.gradient, self.parameters, self.slope, want_bias, want_slope, tile
        )

    def through_layer(
        self, dz: Tensor, weight: Tensor, want_y: bool, want_bias: bool, want_slope: bool
    ) -> list[Tensor | None]:
        """From the dz of the layer after it: dz, y or what is in its place, db and the slope's gradient."""
        tile = tile_for("backward", dz, weight.t())
        pass_tile = self.plan.bias_activation.tile(*self.saved.shape, self.saved.element_size())
        return self.plan.chain.backward(
            dz, weight, self.saved, self.plan.value, self.plan.gradient, self.parameters, self.slope,
            self.plan.from_output or not want_y, want_bias, want_slope, tile, pass_tile,
        )  # fmt: skip


def _gradients(
    dy: Tensor,
    x: Tensor,
    activations: Activations,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Any],
    want_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and a gradient for each tensor, None where none is wanted."""
    layers, wants = _layers(tensors), _layers(wanted)
    kept: list[Any] = [
        _Kept(plan_of(*activation, x), activation[1], slope, _as_rows(t.contiguous())) if activation else None
        for activation, (_, _, slope), t in zip(activations, layers, saved, strict=True)
    ]
    dz: Any = _as_rows(dy)
    if kept[-1] is None:
        sums = [dz.sum(0) if wants[-1][1] else None, None]
    else:
        dz, *sums = kept[-1].through_activation(dz, *wants[-1][1:])
    grads: list[Tensor | None] = []
    for at in reversed(range(1, len(layers))):
        weight, (want_weight, *_) = layers[at][0], wants[at]
        after, of_layer = dz, sums
        if want_x or any(wanted[: TENSORS * at]):
            dz, y, *sums = kept[at - 1].through_layer(after, weight, want_weight, *wants[at - 1][1:])
        else:
            y, sums = kept[at - 1].output() if want_weight else None, [None, None]
        grads = [product("dw", after.t(), y) if want_weight else None, *of_layer, *grads]
    dw = product("dw", dz.t(), _as_rows(x)) if wants[0][0] else None
    dx = product("dx", dz, layers[0][0]) if want_x else None
    if dx is not None and dx.shape != x.shape:
        dx = dx.view(x.shape)
    return dx, [dw, *sums, *grads]


def _differentiated(
    dy: Tensor,
    x: Tensor,
    activations: Activations,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Any],
    want_x: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The same in torch's own operations."""
    inputs = x, *tensors
    dx, *grads = differentiate(lambda *ts: _composite(activations, *ts), inputs, (want_x, *wanted), (dy,))
    return dx, grads


_gradients_or_formula = guarded(_gradients, _differentiated, lambda *args: kind_of(f"{_NAME}_backward", args))
_named_launch = backend.named(f"fusedact::{_NAME}", _launch)
_named_gradients = backend.named(f"fusedact::{_NAME}_backward", _gradients_or_formula)
