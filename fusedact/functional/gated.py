"""The gated pair of a transformer's feed-forward block: SwiGLU with silu, GEGLU with gelu, GLU with sigmoid."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedact import autograd, backend
from fusedact.activations import Activation, lines_of
from fusedact.functional import sharded
from fusedact.functional.checks import on_triton, resolved

_USUAL = lines_of(F.silu)[None].name


def gated(
    gate: Tensor,
    up: Tensor,
    activation: str | nn.Module = _USUAL,
    *,
    slope: Tensor | None = None,
    **parameters: float,
) -> Tensor:
    """activation(gate) * up, in one launch where Triton runs.

    gate (*), up (*) -> (*), of one floating dtype; `gate, up = x.chunk(2, -1)` are read where they stand in x. Shapes
    that broadcast go to torch's own operations, as does prelu. `activation` and its parameters as in `linear`.

    Raises ValueError for an unknown name, TypeError for a parameter that the activation does not have, and the errors
    of torch's operations.
    """
    found = resolved("gated", activation, slope, parameters)
    if isinstance(activation, nn.Module) and getattr(activation, "inplace", False):
        return activation(gate) * up  # into gate, which is the caller's
    if isinstance(found, nn.Module):
        return found(gate) * up
    act, values, learned = found
    if learned is not None:
        return act.reference(gate, learned) * up
    if up is not None and on_triton(gate, up) and _fits(gate, up, act, values):
        return autograd.gated(gate, up, act.name, values)
    if backend.is_sharded(gate):
        y = sharded.gated(lambda gate, up: gated(gate, up, activation, slope=None, **parameters), gate, up)
        if y is not NotImplemented:
            return y
    return act.reference(gate, *values) * up


def _fits(gate: Tensor, up: Tensor, act: Activation, values: tuple[float, ...]) -> bool:
    """Whether one kernel gives what torch's two operations give."""
    if gate.dtype not in backend.KERNEL_DTYPES or up.dtype is not gate.dtype or up.shape != gate.shape:
        return False
    if torch.compiler.is_compiling() and backend.get_backend() != "triton":  # it fuses stock's with their neighbours
        return False
    in_float32 = not act.low_precision and gate.is_cuda and backend.autocast_dtype(gate) is not None
    return not in_float32 and (not values or act.valid(*values))
