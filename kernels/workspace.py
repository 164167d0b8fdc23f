"""What launchers share on the host: counters, of which each device and stream has a block, and their arithmetic.

A launch leaves its counters as it found them, at 0.
"""

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch

_HELD: dict[tuple[torch.device, int], torch.Tensor] = {}
_SPARE: dict[torch.device, torch.Tensor] = {}  # zeros for the launches of CUDA graphs, 256 KB
_LOCK = Lock()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; triton.cdiv takes the host microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros (at least count,). Each launch resets what it took, so no launch is spent on zeroing."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _for_replays(device, count)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _HELD.get((device, stream))
    if held is None or held.numel() < count:
        held = _HELD[device, stream] = _zeros(max(count, 1024), device)
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
