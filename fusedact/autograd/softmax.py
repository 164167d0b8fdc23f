"""softmax, log-softmax and softmin along a dimension. Saves the output alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd.doors import Op

LOG_SOFTMAX, SOFTMIN = "log_softmax", "softmin"


@dataclass(frozen=True)
class _FromOutput(Op):
    """An op of one result, which its backward reads and not its input."""

    def _save(self, ctx: Any, args: tuple, output: Any) -> None:
        ctx.options = args[self.tensors :]
        ctx.dtype = args[0].dtype
        ctx.save_for_backward(output[0])

    def _gradients(
        self, ctx: Any, dys: tuple[Tensor | None, ...], backward: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        dy, (kind, dim, _) = dys[0], ctx.options
        dx = None
        if dy is not None:
            differentiable = torch.is_grad_enabled() or backend.transforming() or backend.unreadable(dy)
            dx = (_gradient if differentiable else backward)(dy, y, kind, dim, ctx.dtype)
        return dx, *(None for _ in ctx.options)


def _widest(*dtypes: torch.dtype) -> int:
    """Bytes of the widest element, accumulators included."""
    return 8 if torch.float64 in dtypes else 4


def _launch(x: Tensor, kind: str, dim: int, dtype: torch.dtype, save: bool) -> tuple[Tensor, None]:
    from fusedact.kernels import softmax

    config = softmax.tile(x.shape, x.stride(), dim, _widest(x.dtype, dtype), 1, backend.chip(x.device).warp_size)
    return softmax.forward(x, dim, dtype, kind == LOG_SOFTMAX, kind == SOFTMIN, config), None


def _fake(x, kind, dim, dtype, save):
    return x.new_empty(x.shape, dtype=dtype), None


def _backward(dy: Tensor, y: Tensor, kind: str, dim: int, dtype: torch.dtype) -> Any:
    from fusedact.kernels import softmax

    config = softmax.tile(y.shape, y.stride(), dim, _widest(y.dtype, dtype), 2, backend.chip(y.device).warp_size)
    return softmax.backward(dy, y, dim, dtype, kind == LOG_SOFTMAX, kind == SOFTMIN, config)


def _backward_fake(dy, y, kind, dim, dtype):
    return y.new_empty(y.shape, dtype=dtype)


def _gradient(dy: Tensor, y: Tensor, kind: str, dim: int, dtype: torch.dtype) -> Tensor:
    """The backward in torch's own operations; from the output too, through which a second derivative flows."""
    formula = torch._log_softmax_backward_data if kind == LOG_SOFTMAX else torch._softmax_backward_data
    dx = formula(dy, y, dim, y.dtype).to(dtype)
    return -dx if kind == SOFTMIN else dx


def _composite(x, kind, dim, dtype):
    return getattr(F, kind)(x, dim, dtype=dtype)


softmax = _FromOutput(
    name="softmax",
    tensors=1,
    schema="(Tensor x, str kind, int dim, ScalarType dtype, bool save) -> (Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: (),
    backward_schema="(Tensor dy, Tensor y, str kind, int dim, ScalarType dtype) -> Tensor",
    backward=_backward,
    backward_fake=_backward_fake,
    backward_formula=_gradient,
    composite=_composite,
).register()
