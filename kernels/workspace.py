"""What launchers share on the host: arithmetic, views, and counters, of which each device and stream has a block.

A launch leaves its counters as it found them, at 0.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
import triton.language as tl

GRADIENT_BLOCK = 4096  # elements

_HELD: dict[tuple[torch.device, int], torch.Tensor] = {}
_SPARE: dict[torch.device, torch.Tensor] = {}  # zeros for the launches of CUDA graphs, 256 KB
_LOCK = Lock()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes the host microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def as_arguments(params, dtype):
    """Triton passes a float as float32: a float64 kernel is compiled for its parameters instead."""
    return tuple(map(tl.constexpr, params)) if dtype == torch.float64 else tuple(params)


def slope_stride(slope: torch.Tensor | None) -> int:
    """The stride of a number per channel, 0 where one serves every channel."""
    return 0 if slope is None or slope.numel() == 1 else slope.stride(0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What numbers of that dtype are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The same, as a kernel names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def gradient_block(C: int, after: int) -> tuple[int, int]:
    """Rows and classes that a program writes the gradient of; after: how many rows follow each other in memory.

    Classes are the grid's second dimension, which ends at 65,535.
    """
    most = max(1, GRADIENT_BLOCK // power_of_2(cdiv(C, 2**16 - 1)))
    rows = min(64, power_of_2(after), most) if after > 1 else max(1, GRADIENT_BLOCK // power_of_2(C))
    return rows, min(power_of_2(C), GRADIENT_BLOCK // rows)


def around(x: torch.Tensor, dim: int) -> torch.Tensor:
    """x as (before, classes, after) around that dimension, a view where the strides allow one.

    Where nothing comes after, what comes before takes its place, (1, classes, before): rows that follow each other
    are then always along the last dimension.
    """
    x = x.reshape(x.shape[:dim].numel(), x.shape[dim], x.shape[dim + 1 :].numel())
    return x.permute(2, 1, 0) if x.shape[2] == 1 else x


def around_classes(x: torch.Tensor) -> torch.Tensor:
    """Logits (C), (N, C) or (N, C, d1, ...) as (A, C, B)."""
    return around(x, min(1, x.dim() - 1))


def row_strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of (A, C, B): the strides along A, B and C; 0 along one row, which a kernel knows to be aligned."""
    a, c, b = x.stride()
    return 0 if x.shape[0] == 1 else a, 0 if x.shape[2] == 1 else b, c


def by_row(t: torch.Tensor | None, A: int, B: int) -> tuple[torch.Tensor | None, tuple[int, int]]:
    """A number for each row as (A, B), or one number as it is, and the strides along A and B."""
    if t is None or t.dim() == 0:
        return t, (0, 0)
    t = t.reshape(A, B)
    return t, (0 if A == 1 else t.stride(0), t.stride(1))


def collapse(*tensors: torch.Tensor) -> tuple[list[int], list[list[int]]]:
    """The fewest dimensions in which all of these tensors, of one shape, can be walked: sizes, and strides of each.

    Dimensions of size 1 go, and two that follow each other in every tensor's memory become one.
    """
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for dim, size in enumerate(tensors[0].shape):
        if size == 1:
            continue
        own = [t.stride(dim) for t in tensors]
        if sizes and all(steps[-1] == size * step for steps, step in zip(strides, own, strict=True)):
            sizes[-1] *= size
        else:
            sizes.append(size)
            for steps in strides:
                steps.append(0)
        for steps, step in zip(strides, own, strict=True):
            steps[-1] = step
    return sizes, strides


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros (at least count,). Each launch resets what it took, so no launch is spent on zeroing."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _for_replays(device, count)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _HELD.get((device, stream))
    if held is None or held.numel() < count:
        held = _HELD[device, stream] = _zeros(max(count, 1024), device)
        if device.type == "cuda":  # once more are needed: not given away before the last launch that counts in these
            held.record_stream(torch.cuda.current_stream(device))
        if device not in _SPARE:
            _SPARE[device] = _zeros(2**16, device)
    return held


def _for_replays(device: torch.device, count: int) -> torch.Tensor:
    """Counters of this one captured launch's own, whatever stream the graph is replayed on.

    They come from zeros made before the capture; zeros made inside it would be one more node in the graph.
    """
    with _LOCK:
        spare = _SPARE.get(device)
        if spare is None or spare.numel() < count:
            return torch.zeros(count, dtype=torch.int32, device=device)
        taken = (count + 3) // 4 * 4  # 16 bytes: a pointer less aligned would be another specialization
        _SPARE[device] = spare[taken:]
        return spare[:taken]


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    """Made in a thread of its own: a memory pool that the caller allocates into, a graph's say, must not own them."""

    def make() -> torch.Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # that thread's stream is not the caller's
        return zeros

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
