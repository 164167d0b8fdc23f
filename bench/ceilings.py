"""What the device can do at most, and a few facts of it that decide how kernels are written, as Triton sees them."""

import statistics
import time
from functools import partial

import torch
import triton
import triton.language as tl

from fusedact.kernels.tiles import grid_barrier
from fusedact.profiling import ceilings
from fusedact.profiling.timing import Call, Effort, captured, queued, wait


@triton.jit
def _nothing_kernel(x_ptr):
    pass


@triton.jit
def _tf32_kernel(x_ptr, eye_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    rows, cols = tl.arange(0, M)[:, None], tl.arange(0, K)[None, :]
    x = tl.load(x_ptr + rows * K + cols)  # (M, K)
    eye = tl.load(eye_ptr + tl.arange(0, K)[:, None] * K + cols)  # (K, K)
    tl.store(y_ptr + rows * K + cols, tl.dot(x, eye, input_precision="tf32"))


def triton_launch_us(device: torch.device, effort: Effort) -> float:
    return _host_us(partial(_nothing_kernel[(1,)], torch.empty(16, device=device)), effort)


def torch_launch_us(device: torch.device, effort: Effort) -> float:
    return _host_us(torch.empty(16, device=device).zero_, effort)


def _host_us(launch: Call, effort: Effort) -> float:
    """µs that the host spends on a launch; few enough of them that the queue never makes it wait."""

    def sample() -> float:
        wait()
        started = time.perf_counter()
        for _ in range(100):
            launch()
        return (time.perf_counter() - started) * 1e4

    launch()
    return statistics.median(sample() for _ in range(effort.rounds))


def graph_node_us(device: torch.device, effort: Effort) -> float | str:
    """Device µs of one empty kernel among a thousand in a graph."""
    if device.type == "cpu":
        return "needs a GPU"
    launch = partial(_nothing_kernel[(1,)], torch.empty(16, device=device))
    launch()
    replay = captured([launch] * 1000).replay
    return statistics.median(queued([replay], 1000) for _ in range(effort.rounds))


@triton.jit
def _barriers_kernel(counter_ptr, failed_ptr, times, POLLS: tl.constexpr):
    programs = tl.num_programs(0)
    target = programs.to(tl.int64)
    alive = grid_barrier(counter_ptr, target, tl.full((), POLLS, tl.int32))
    for _ in range(times - 1):
        target += programs
        alive &= grid_barrier(counter_ptr, target, tl.where(alive, POLLS, 0))
    if not alive:
        tl.store(failed_ptr, 1)


def grid_barrier_us(device: torch.device, effort: Effort) -> float | str:
    """Device µs of a barrier among a thousand, with a program on each multiprocessor."""
    gpu = device.type == "cuda"
    programs, times = (torch.cuda.get_device_properties(device).multi_processor_count, 1000) if gpu else (1, 10)
    counter, failed = torch.zeros(2, 1, dtype=torch.int32, device=device)

    def barriers() -> None:
        counter.zero_()
        _barriers_kernel[(programs,)](counter, failed, times, POLLS=2**24, num_warps=8)

    barriers()
    us = statistics.median(queued([barriers], times) for _ in range(effort.rounds)) if gpu else "needs a GPU"
    return "a program waited in vain" if failed.item() else us


def tf32_operands(device: torch.device, effort: Effort) -> dict[str, str]:
    """What becomes of float32 operands in a tf32 product: it decides whether 3xTF32 may split by masking bits.

    64 rows are a Hopper warp group's product, 16 rows the older instruction.
    """
    x = 1 + 2**-11 + 2**-12  # between the tf32 numbers 1 and 1 + 2⁻¹⁰, nearer to the second
    names = {1.0: "truncated", 1 + 2**-10: "rounded", x: "exact"}
    eye = torch.eye(32, device=device)
    found = {}
    for rows in (64, 16):
        y = torch.empty(rows, 32, device=device)
        _tf32_kernel[(1,)](torch.full_like(y, x), eye, y, M=rows, K=32, num_warps=4)
        found[f"tl.dot, {rows} rows"] = names.get(y[0, 0].item(), repr(y[0, 0].item()))
    torch.set_float32_matmul_precision("high")
    y = torch.full((64, 32), x, device=device) @ eye
    found["torch.mm"] = names.get(y[0, 0].item(), repr(y[0, 0].item()))
    return found


@triton.jit
def _sum_kernel(x_ptr, w_ptr, z_ptr, M: tl.constexpr, K: tl.constexpr):
    rows, k = tl.arange(0, M), tl.arange(0, K)
    x = tl.load(x_ptr + rows[:, None] * K + k[None, :])  # (M, K)
    w = tl.load(w_ptr + k[:, None] * K + k[None, :])  # (K, K)
    z_ptrs = z_ptr + rows[:, None] * K + k[None, :]
    tl.store(z_ptrs, tl.dot(x, w, tl.load(z_ptrs), input_precision="tf32"))


def tensor_core_sums(device: torch.device, effort: Effort) -> dict[str, str]:
    """Whether a tensor core rounds what it adds: it decides how many products may share an accumulator in tf32x3."""
    names = {1.0: "cut off", 1 + 2**-23: "rounded"}
    found = {}
    for rows in (64, 16):
        x = torch.zeros(rows, 32, device=device)
        x[:, 0] = 1.5 * 2**-24  # three quarters of the last digit of 1
        z = torch.ones(rows, 32, device=device)
        _sum_kernel[(1,)](x, torch.eye(32, device=device)[:1].expand(32, 32).contiguous(), z, M=rows, K=32, num_warps=4)
        found[f"tl.dot, {rows} rows"] = names.get(z[0, 0].item(), repr(z[0, 0].item()))
    return found


CEILINGS = {
    **ceilings.CEILINGS,
    "launch by Triton, µs of host": triton_launch_us,
    "launch by torch, µs of host": torch_launch_us,
    "empty kernel in a graph, µs": graph_node_us,
    "barrier of a grid, µs": grid_barrier_us,
    "float32 in a tf32 product": tf32_operands,
    "sums of a tensor core": tensor_core_sums,
}
