"""The counters: zero when handed out, one block per stream, a captured launch's own for all its replays. Blocks."""

from itertools import pairwise

import pytest
import torch

from fusedact import functional as F
from fusedact.kernels import workspace


def test_a_stream_keeps_its_block_until_a_launch_needs_a_larger_one(device):
    device = torch.zeros((), device=device).device
    first = workspace.tickets(device, 3)
    assert workspace.tickets(device, 1024).data_ptr() == first.data_ptr()
    grown = workspace.tickets(device, 5000)
    assert grown.numel() == 5000 and not grown.any()
    assert workspace.tickets(device, 1).data_ptr() == grown.data_ptr()


@pytest.mark.parametrize("after", [1, 3, 64, 4096, 2**20])
@pytest.mark.parametrize("C", [1, 2, 10, 1000, 70_000, 128_256, 256_000, 2**22 - 1, 2**27])
def test_a_gradients_grid_is_one_that_cuda_takes(C, after):
    rows, lanes = workspace.gradient_block(C, after)
    assert rows * lanes <= workspace.GRADIENT_BLOCK
    assert workspace.cdiv(C, lanes) < 2**16  # the grid's second dimension


def test_captured_launches_share_no_counter(monkeypatch, device):
    device = torch.zeros((), device=device).device
    monkeypatch.setitem(workspace._SPARE, device, torch.zeros(16, dtype=torch.int32, device=device))
    taken = [workspace._for_replays(device, count) for count in (1, 5, 4, 9)]
    assert all(t.numel() >= count and not t.any() for t, count in zip(taken, (1, 5, 4, 9), strict=True))
    spans = [(t.data_ptr(), t.data_ptr() + 4 * t.numel()) for t in taken]
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans[:3]))


def loss_and_gradients(x, weight, bias, target):
    loss = F.cross_entropy(F.linear(x, weight, bias, activation="relu"), target)
    return loss, *torch.autograd.grad(loss, (x, weight, bias))


@pytest.fixture
def problem(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in ((300, 40), (50, 40), (50,))]
    return *tensors, torch.randint(0, 50, (300,), device=device)


def test_a_graph_replays_on_any_stream(problem):
    """Ten replays on two streams, each with new data, as the same calls made one by one."""
    loss_and_gradients(*problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(*problem)
    streams = [torch.cuda.Stream() for _ in range(2)]
    for replay in range(10):
        with torch.no_grad():
            problem[0].copy_(torch.randn_like(problem[0]))
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[replay % 2]):
            graph.replay()
        torch.cuda.synchronize()
        for ours, eager in zip(captured, loss_and_gradients(*problem), strict=True):
            assert torch.equal(ours, eager)


def test_compiled_with_cuda_graphs(problem):
    """Whose pool must not own the counters: torch checks that it holds nothing but the graph's results."""
    torch._dynamo.reset()
    *inputs, target = problem

    def loss(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias, activation="relu"), target)

    compiled = torch.compile(loss, mode="reduce-overhead")
    for _ in range(4):  # warm-up, capture, replays
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(*inputs)
        results = [t.clone() for t in (value, *torch.autograd.grad(value, inputs))]
    for ours, eager in zip(results, loss_and_gradients(*problem), strict=True):
        torch.testing.assert_close(ours, eager)
