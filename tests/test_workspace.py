"""The counters: zero when handed out, one block per stream, a captured launch's own for all its replays."""

from itertools import pairwise

import torch

from fusedact.kernels import workspace


def test_a_stream_keeps_its_block_until_a_launch_needs_a_larger_one(device):
    device = torch.zeros((), device=device).device
    first = workspace.tickets(device, 3)
    assert workspace.tickets(device, 1024).data_ptr() == first.data_ptr()
    grown = workspace.tickets(device, 5000)
    assert grown.numel() == 5000 and not grown.any()
    assert workspace.tickets(device, 1).data_ptr() == grown.data_ptr()


def test_captured_launches_share_no_counter(monkeypatch, device):
    device = torch.zeros((), device=device).device
    monkeypatch.setitem(workspace._SPARE, device, torch.zeros(16, dtype=torch.int32, device=device))
    taken = [workspace._for_replays(device, count) for count in (1, 5, 4, 9)]
    assert all(t.numel() >= count and not t.any() for t, count in zip(taken, (1, 5, 4, 9), strict=True))
    spans = [(t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in taken]
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans[:3]))
