"""Counters that a launch leaves as it found them, at 0: one block of them per device and stream."""

import torch

_TICKETS: dict[tuple[torch.device, int], torch.Tensor] = {}


def tickets(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros (at least count,). Each launch resets what it took, so no launch is spent on zeroing.

    While a CUDA graph is being captured the zeros are the graph's own, since a first allocation inside the
    capture would be zeroed only when the graph is replayed.
    """
    if device.type != "cuda":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    held = _TICKETS.get((device, stream))
    if held is None or held.numel() < count:
        held = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        _TICKETS[device, stream] = held
    return held
