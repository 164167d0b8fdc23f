"""softmax, log-softmax and softmin."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import autograd, backend
from fusedact.functional import sharded
from fusedact.functional.checks import on_triton

MOST_CLASSES = 2**31 - 2**16  # the kernels count them in steps, in 32 bits


def softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """exp(input) / Σ exp(input) along `dim`, in one launch where Triton runs.

    input (*) of a floating dtype -> (*) of `dtype`, to which the input is converted first, or of its own. Read in
    place, whatever its strides. Without `dim`: torch's warning and torch's choice.

    Raises torch.nn.functional.softmax's errors. Source: torch.nn.functional.softmax.
    """
    if on_triton(input):
        return _along("softmax", input, dim, _stacklevel + 1, dtype)
    if backend.is_sharded(input) and type(dim) is int:
        return _sharded(softmax, input, dim, dtype)
    return F.softmax(input, dim, _stacklevel + 1, dtype)


def log_softmax(
    input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor:
    """input - log Σ exp(input) along `dim`, in one launch where Triton runs; arguments and result as softmax's.

    Raises torch.nn.functional.log_softmax's errors. Source: torch.nn.functional.log_softmax.
    """
    if on_triton(input):
        return _along("log_softmax", input, dim, _stacklevel + 1, dtype)
    if backend.is_sharded(input) and type(dim) is int:
        return _sharded(log_softmax, input, dim, dtype)
    return F.log_softmax(input, dim, _stacklevel + 1, dtype)


def softmin(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """softmax(-input) along `dim`, in one launch where Triton runs; arguments and result as softmax's.

    Raises torch.nn.functional.softmin's errors. Source: torch.nn.functional.softmin.
    """
    if on_triton(input):
        return _along("softmin", input, dim, _stacklevel + 1, dtype)
    if backend.is_sharded(input) and type(dim) is int:
        return _sharded(softmin, input, dim, dtype)
    return F.softmin(input, dim, _stacklevel + 1, dtype)


def _sharded(ours: Callable[..., Tensor], input: Tensor, dim: int, dtype: torch.dtype | None) -> Tensor:
    if -input.dim() <= dim < input.dim():
        y = sharded.softmax(lambda x: ours(x, dim, dtype=dtype), input, dim)
        if y is not NotImplemented:
            return y
    return getattr(F, ours.__name__)(input, dim, dtype=dtype)


def _along(kind: str, input: Tensor, dim: int | None, stacklevel: int, dtype: torch.dtype | None) -> Tensor:
    if dim is None and torch.compiler.is_compiling():
        return getattr(F, kind)(input, dtype=dtype)  # Dynamo traces no warning, but takes torch's function whole
    if dim is None:
        dim = F._get_softmax_dim(kind, input.dim(), stacklevel)  # type: ignore[attr-defined]
    to = _result_dtype(input) if dtype is None else dtype
    if _fits(input, dim, to):
        return autograd.softmax(input, kind, dim % max(input.dim(), 1), to)
    return getattr(F, kind)(input, dim, dtype=dtype)


def _result_dtype(input: Tensor) -> torch.dtype:
    """The input's own; under CUDA's autocast, not a CPU's, float32 of the narrower ones."""
    low = input.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if low and input.is_cuda and backend.autocast_dtype(input) is not None else input.dtype


def _fits(input: Tensor, dim: int, to: torch.dtype) -> bool:
    shape = input.shape or (1,)
    return (
        type(dim) is int
        and -len(shape) <= dim < len(shape)
        and shape[dim] <= MOST_CLASSES
        and isinstance(to, torch.dtype)
        and {input.dtype, to} <= backend.KERNEL_DTYPES
    )
