"""Measuring one thing at a time: a case, a trainer's step, a ceiling. First right, then by interleaved rounds."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import cycle, islice

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.cases import OPS, PHASES, Case, Contender, Step, contenders, output_gradient
from fusedact.trainers import LAYERS, TRAINERS

Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one sample: µs a call

SHORT = 1e-3  # seconds: from here on a call's launches hide behind its own work
PIECE = 2**26  # elements of logits that the truth holds in float64 at once
HELD = 7  # times the bytes of a forward: inputs, everyone's saved tensors, stock's temporaries, the truth
WRONG = 8  # times stock's error: such a kernel is not timed


@dataclass(frozen=True)
class Effort:
    """Rounds; seconds that a sample aims at; input sets at most; edge and elements of a ceiling's tensors."""

    rounds: int
    seconds: float
    sets: int
    edge: int
    elements: int


FULL = Effort(rounds=5, seconds=0.01, sets=128, edge=8192, elements=2**30)
DRY = Effort(rounds=2, seconds=0.0005, sets=2, edge=64, elements=2**12)


def measure_case(case: Case, device: torch.device, effort: Effort, compiling: str | None) -> dict:
    """Errors against float64, then, unless the kernel is wrong, times and memory of each phase.

    compiling: the mode in which torch.compile takes part.
    Raises MemoryError where the case does not fit the device.
    """
    needed = HELD * case.work("forward").bytes
    if device.type == "cuda" and needed > (free := torch.cuda.mem_get_info()[0]):
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB, free are {free / 2**30:.0f}")
    torch.set_float32_matmul_precision(case.precision)
    compiled = _compiled(case, device, compiling) if compiling else None
    with torch.device(device):
        sets = [contenders(case, seed, compiled) for seed in range(_set_count(case, device, effort))]
    dys = [output_gradient(runs["stock"].forward().detach()) for runs in sets]
    facts = {"matrix_rate": case.matrix_rate, "sets": len(sets)}
    result = asdict(case) | facts | check(case, sets[0], dys[0])
    if result["verdict"] == "wrong":
        return result
    if compiled is not None:
        result["compile_s"] = _seconds(sets[0]["compile"].call("both", dys[0]))
    result["phases"] = {}
    for phase in PHASES:
        calls = {name: [runs[name].call(phase, dy) for runs, dy in zip(sets, dys, strict=True)] for name in sets[0]}
        result["phases"][phase] = asdict(case.work(phase)) | _measure(calls, device, effort)
    return result


def warm_case(case: Case, device: torch.device) -> dict:
    """Seconds of the first call, forward with backward: what is compiled then, `measure_case` finds on disk."""
    torch.set_float32_matmul_precision(case.precision)
    with torch.device(device):
        runs = contenders(case, 0, _compiled(case, device, "default"))
    dy = output_gradient(runs["stock"].forward().detach())
    return {f"{name}_s": _seconds(runs[name].call("both", dy)) for name in ("fusedact", "compile")}


def check_case(case: Case, device: torch.device) -> dict:
    torch.set_float32_matmul_precision(case.precision)
    with torch.device(device):
        runs = contenders(case, 0)
    return check(case, runs, output_gradient(runs["stock"].forward().detach()))


def check(case: Case, runs: dict[str, Contender], dy: Tensor) -> dict:
    """‖error‖ / ‖truth‖ of y and of each gradient.

    accurate: at most twice stock's, plus 1e-6 (for a handful of numbers one rounding more); wrong: far from it.
    """
    truth = _truth(case, runs["stock"], dy)
    errors = {}
    for name in ("stock", "fusedact"):
        y = runs[name].forward()
        outputs = (y.detach(), *runs[name].gradients(y, dy))
        errors[name] = [_error(output, true) for output, true in zip(outputs, truth, strict=True)]
    slack = [1e-6 + (torch.finfo(case.torch_dtype).eps if true.numel() < 32 else 0) for true in truth]

    def within(factor: int) -> bool:
        three = zip(errors["fusedact"], errors["stock"], slack, strict=True)
        return all(ours <= factor * (stock + room) for ours, stock, room in three)

    verdict = "accurate" if within(2) else "inaccurate" if within(WRONG) else "wrong"
    return {"errors": errors, "verdict": verdict}


def measure_step(step: Step, device: torch.device, effort: Effort) -> dict:
    """Twenty steps whose costs must agree, then the time of a step on stock and on fused layers."""
    torch.set_float32_matmul_precision("highest")
    kind = TRAINERS[step.trainer]
    settings = replace(kind.defaults, device=str(device), engine="loop")
    trainers = {
        "stock": kind(LAYERS["stock"], settings),
        "fusedact": kind(LAYERS["fused"], settings),
    }
    x, y = trainers["stock"].x, trainers["stock"].y
    batches = [(x[rows], y[rows]) for rows in trainers["stock"].visited(len(x)).to(device).split(settings.batch_size)]
    costs = {
        name: [trainer.step(*batch).item() for batch in islice(cycle(batches), 20)]
        for name, trainer in trainers.items()
    }
    result = {"system": step.system, "threshold": step.threshold, "costs": costs}
    if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(*costs.values(), strict=True)):
        return result | {"verdict": "wrong"}
    calls = {name: [_in_turn(trainer.step, batches)] for name, trainer in trainers.items()}
    return result | {"verdict": "accurate", "phases": {"step": _measure(calls, device, effort)}}


def _in_turn(step: Callable[..., Tensor], batches: list[tuple[Tensor, Tensor]]) -> Call:
    endless = cycle(batches)
    return lambda: step(*next(endless))


def _compiled(case: Case, device: torch.device, mode: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # else the second shape would be compiled as a dynamic one
    torch._functorch.config.donated_buffer = False  # the backward alone runs many times on one graph
    if device.type == "cpu":
        return torch.compile(OPS[case.op].formula(case), backend="aot_eager")
    return torch.compile(OPS[case.op].formula(case), mode=mode)


def _set_count(case: Case, device: torch.device, effort: Effort) -> int:
    """Enough sets of inputs to exceed the L2 three times."""
    if device.type == "cpu":
        return effort.sets
    cold = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(effort.sets, math.ceil(cold / case.work("both").bytes)))


def _truth(case: Case, stock: Contender, dy: Tensor) -> list[Tensor]:
    """The value and every gradient in float64; a loss in pieces of rows, since its logits may fill the device."""
    formula = OPS[case.op].formula(case)
    if dy.dim():
        doubles = [arg.detach().double().requires_grad_() for arg in stock.wanted]
        y = formula(*doubles)
        return [y.detach(), *torch.autograd.grad(y, doubles, dy.double())]
    logits, target = (arg.detach() for arg in stock.args)
    rows = max(1, PIECE // logits[0].numel())
    loss, gradients = torch.zeros((), dtype=torch.float64, device=logits.device), []
    for x, t in zip(logits.split(rows), target.split(rows), strict=True):
        x = x.double().requires_grad_()
        t = t.double() if t.is_floating_point() else t
        share = formula(x, t) * (len(x) / len(logits))
        gradients.append(torch.autograd.grad(share, x)[0].float())
        loss += share.detach()
    return [loss, torch.cat(gradients)]


def _error(x: Tensor, truth: Tensor) -> float:
    difference = torch.linalg.vector_norm(x.to(truth.dtype) - truth, dtype=torch.float64)
    value = (difference / torch.linalg.vector_norm(truth, dtype=torch.float64)).item()
    return value if math.isfinite(value) else math.inf


def _measure(calls: dict[str, list[Call]], device: torch.device, effort: Effort) -> dict:
    """Every kind of time of every contender, each of whose calls takes another set of inputs.

    On a CPU the thread's time. On a GPU the device's from a cold L2, a launch's between events, the wall's, and
    the memory that a call takes.
    """
    first = {name: each[0] for name, each in calls.items()}
    seconds = {name: _estimate(call) for name, call in first.items()}

    def samplers(sample: Callable[..., float], most: int) -> dict[str, Sampler]:
        counts = {name: max(1, min(most, int(effort.seconds / s))) for name, s in seconds.items()}
        return {name: partial(sample, call, counts[name]) for name, call in first.items()}

    if device.type == "cpu":
        return {"times": {"cpu": _interleaved(samplers(_thread, 1000), effort.rounds)}}
    method, cold = _cold(calls, max(seconds.values()), effort)
    return {
        "cold_by": method,
        "times": {
            "cold": _interleaved(cold, effort.rounds),
            "launched": _interleaved(samplers(_launched, 50), effort.rounds),
            "wall": _interleaved(samplers(_wall, 1000), effort.rounds),
        },
        "memory": {name: _memory(call) for name, call in first.items()},
    }


def _interleaved(samplers: dict[str, Sampler], rounds: int) -> dict[str, dict[str, float]]:
    """Median, 20 and 80 % points in µs. Each round gives everyone a turn, and stock, for the noise, another."""
    samplers = samplers | {"again": samplers["stock"]}
    samples = [{name: sample() for name, sample in samplers.items()} for _ in range(rounds)]
    return {name: _spread([each[name] for each in samples]) for name in samplers}


def _spread(samples: list[float]) -> dict[str, float]:
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "p20": low, "p80": high}


def _thread(call: Call, count: int) -> float:
    return _loop(call, count, time.thread_time)


def _wall(call: Call, count: int) -> float:
    return _loop(call, count, time.perf_counter)


def _loop(call: Call, count: int, clock: Callable[[], float]) -> float:
    _wait()
    started = clock()
    for _ in range(count):
        call()
    _wait()
    return (clock() - started) / count * 1e6


def _launched(call: Call, count: int) -> float:
    """As triton.testing.do_bench, its median: events around a call, the L2 flushed before, which hides the host."""
    pairs = [_events() for _ in range(count)]
    for start, end in pairs:
        _scratch().zero_()
        start.record()
        call()
        end.record()
    _wait()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e3


def _cold(calls: dict[str, list[Call]], longest: float, effort: Effort) -> tuple[str, dict[str, Sampler]]:
    """Device time over all sets in turn: short calls from a graph where they can be captured, else from a queue."""
    sets = len(calls["stock"])
    turns = max(1, math.ceil(min(20, effort.seconds / longest) / sets))
    many = {name: each * turns for name, each in calls.items()}
    method = "queue"
    if longest < SHORT:
        try:
            graphs = {name: _captured(each) for name, each in many.items()}
            return "graph", {name: partial(_queued, [graph.replay], sets * turns) for name, graph in graphs.items()}
        except RuntimeError as error:
            method = f"queue, since the graph failed: {error}"
    return method, {name: partial(_queued, each, sets * turns) for name, each in many.items()}


def _captured(calls: list[Call]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()  # whatever it compiles or allocates once must not happen inside the capture
    graph = torch.cuda.CUDAGraph()
    _wait()
    graph.capture_begin()
    try:
        for call in calls:
            call()
    finally:
        graph.capture_end()
    return graph


def _queued(runs: list[Call], calls: int) -> float:
    """Device µs for each of the `calls` in `runs`, queued behind memory traffic that gives the host a lead."""
    start, end = _events()
    for _ in range(5):
        _scratch().zero_()
    start.record()
    for run in runs:
        run()
    end.record()
    _wait()
    return start.elapsed_time(end) / calls * 1e3


def _memory(call: Call) -> int:
    """Bytes that a call holds at its peak, beyond what was there before it."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


@cache
def _scratch() -> Tensor:
    """Larger than any L2 in view."""
    return torch.empty(2**28, dtype=torch.int8, device="cuda")


def _estimate(call: Call) -> float:
    call()
    return _seconds(call)


def _seconds(call: Call) -> float:
    return _wall(call, 1) * 1e-6


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@triton.jit
def _nothing_kernel(x_ptr):
    pass


@triton.jit
def _tf32_kernel(x_ptr, eye_ptr, y_ptr, M: tl.constexpr, K: tl.constexpr):
    rows, cols = tl.arange(0, M)[:, None], tl.arange(0, K)[None, :]
    x = tl.load(x_ptr + rows * K + cols)  # (M, K)
    eye = tl.load(eye_ptr + tl.arange(0, K)[:, None] * K + cols)  # (K, K)
    tl.store(y_ptr + rows * K + cols, tl.dot(x, eye, input_precision="tf32"))


def copy_gbps(device: torch.device, effort: Effort) -> float:
    """GB/s of a large copy on the device, read and written bytes both counted."""
    x = torch.randn(effort.elements, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _best(lambda: y.copy_(x), device, effort) * 1e-3


def _matmul_tflops(dtype: torch.dtype, precision: str, device: torch.device, effort: Effort) -> float:
    torch.set_float32_matmul_precision(precision)
    a, b = (torch.randn(effort.edge, effort.edge, device=device, dtype=dtype) for _ in range(2))
    return 2 * effort.edge**3 / _best(lambda: a @ b, device, effort) * 1e-6


def _best(call: Call, device: torch.device, effort: Effort) -> float:
    """The median of the rounds, µs."""
    call()
    sample = partial(_thread, call, 3) if device.type == "cpu" else partial(_queued, [call] * 3, 3)
    return statistics.median(sample() for _ in range(effort.rounds))


def triton_launch_us(device: torch.device, effort: Effort) -> float:
    return _host_us(partial(_nothing_kernel[(1,)], torch.empty(16, device=device)), effort)


def torch_launch_us(device: torch.device, effort: Effort) -> float:
    return _host_us(torch.empty(16, device=device).zero_, effort)


def _host_us(launch: Call, effort: Effort) -> float:
    """µs that the host spends on a launch; few enough of them that the queue never makes it wait."""

    def sample() -> float:
        _wait()
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
    replay = _captured([launch] * 1000).replay
    return statistics.median(_queued([replay], 1000) for _ in range(effort.rounds))


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
    "copy, GB/s": copy_gbps,
    "bf16, TFLOP/s": partial(_matmul_tflops, torch.bfloat16, "highest"),
    "tf32, TFLOP/s": partial(_matmul_tflops, torch.float32, "high"),
    "fp32, TFLOP/s": partial(_matmul_tflops, torch.float32, "highest"),
    "launch by Triton, µs of host": triton_launch_us,
    "launch by torch, µs of host": torch_launch_us,
    "empty kernel in a graph, µs": graph_node_us,
    "float32 in a tf32 product": tf32_operands,
    "sums of a tensor core": tensor_core_sums,
}
