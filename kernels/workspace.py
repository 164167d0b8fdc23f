"""Counters that a launch leaves as it found them, at 0: one block of them per device and stream."""

import torch

_HELD: dict[tuple[torch.device, int], torch.Tensor] = {}
_SPARE: dict[torch.device, torch.Tensor] = {}  # zeros for the launches of CUDA graphs, 256 KB


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros (at least count,). Each launch resets what it took, so no launch is spent on zeroing."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _for_replays(device, count)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    held = _HELD.get((device, stream))
    if held is None or held.numel() < count:
        held = _HELD[device, stream] = _zeros(max(count, 1024), device)
        _SPARE.setdefault(device, _zeros(2**16, device))
    return held


def _for_replays(device: torch.device, count: int) -> torch.Tensor:
    """Counters of this one captured launch's own, whatever stream the graph is replayed on.

    They come from zeros made before the capture; zeros made inside it would be one more node in the graph.
    """
    spare = _SPARE.get(device)
    if spare is None or spare.numel() < count:
        return _zeros(count, device)
    taken = (count + 3) // 4 * 4  # 16 bytes: a pointer less aligned would be another specialization
    _SPARE[device] = spare[taken:]
    return spare[:taken]


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)
