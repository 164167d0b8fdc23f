"""Timing what can take a layer's products on this GPU, and the whole layer beside stock PyTorch.

A candidate that errs from float64 by more than twice what the library errs by is left out, as is one that does not
compile or launch. The others take turns, round by round, over inputs that no cache holds any more. The library, which
gets a second turn in each round, shows the noise: whoever is chosen in its place is faster by more than that.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.activations import Activation
from fusedact.tuning.candidates import LEAST_ALIGNED, LIBRARY, RULE, Chip, Problem, candidates
from fusedact.tuning.records import FUSED, OP, STOCK, Record, hold

Call = Callable[[], Tensor]
Way = Callable[[Tensor, Tensor, Tensor], Tensor]  # the whole layer: x, W, b -> y; or a head: x, W, target -> loss
Timer = Callable[[Sequence[Call]], float]  # µs a call

ROUNDS = 9
SAMPLE_US = 10_000
QUEUED = 16  # calls in a sample at most: the host is done with them before the device comes to the first
LOOPED = 200  # where the host's time counts too
COLD = 3  # times the L2's size in inputs


class Layer(NamedTuple):
    """act(x Wᵀ + b) of contiguous x (M, K) and W (N, K). precision: as a problem's."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    precision: str
    chip: Chip

    def problems(self) -> dict[str, Problem]:
        """The products that its forward and its backward ask for, and the whole.

        "backward" is dx where a chain of layers takes the derivative of the layer before in the same launch.
        """
        from fusedact.kernels.linear import is_aligned

        M, N, K, dtype, precision, chip = self
        large = M * N * K >= LEAST_ALIGNED
        x, w, dz = (
            large and is_aligned(torch.empty(shape, dtype=dtype, device="meta")) for shape in ((M, K), (N, K), (M, N))
        )
        return {
            "forward": Problem("forward", M, N, K, dtype, precision, x and w, chip),
            "dx": Problem("dx", M, K, N, dtype, precision, dz and w, chip),
            "dw": Problem("dw", N, K, M, dtype, precision, dz and x, chip),
            "backward": Problem("backward", M, K, N, dtype, precision, dz and w, chip),
            "whole": Problem(OP, M, N, K, dtype, precision, False, chip),
        }


class Found(NamedTuple):
    """What was measured of a problem, and why candidates were left out."""

    record: Record
    left_out: dict[str, str]


def tune(
    layer: Layer,
    activation: Activation,
    plan: Any,
    device: torch.device,
    ways: Mapping[str, Way],
    progress: Callable[[str], object],
) -> dict[Problem, Found]:
    """Measures each of the layer's problems on the device, the current one. What is found holds in this process.

    plan: autograd's, of the activation with its default parameters. ways: the whole layer "fused" and "stock".
    progress: is told what is measured next.
    """
    timer = _queued if device.type == "cuda" else _wall
    sets = [_inputs(layer, device) for _ in range(_set_count(layer, device))]
    found = dict[Problem, Found]()
    with _float32_products(layer.precision):
        for label, problem in layer.problems().items():
            progress(label)
            operands = [inputs[label] for inputs in sets]
            if problem.task == OP:
                steps = {name: [partial(_both, way, *tensors) for tensors in operands] for name, way in ways.items()}
                found[problem] = _measured(steps, None, STOCK, FUSED, _wall, LOOPED)
            else:
                truth = _truth(problem, operands[0], activation)
                launches = _launches(problem, operands, activation, plan)
                found[problem] = _measured(launches, truth, LIBRARY, LIBRARY, timer, QUEUED)
            hold(layer.chip, {problem: found[problem].record})
    return found


def tune_head(head: Problem, device: torch.device, ways: Mapping[str, Way]) -> Found:
    """Measures a head's loss with the gradients of x and W, by each way of x, W and the target.

    What is found holds in this process.
    """
    own = _generator(device)
    x, w = (torch.randn(size, head.K, dtype=head.dtype, device=device, generator=own) for size in (head.M, head.N))
    w /= head.K**0.5
    target = torch.randint(head.N, (head.M,), device=device, generator=own)
    tensors = x.requires_grad_(), w.requires_grad_(), target
    steps = {name: [partial(_learned, way, *tensors)] for name, way in ways.items()}
    with _float32_products(head.precision):
        found = _measured(steps, None, RULE, RULE, _wall, LOOPED)
    hold(head.chip, {head: found.record})
    return found


# What is called


def _set_count(layer: Layer, device: torch.device) -> int:
    """As many sets of inputs as exceed the L2, and a sample takes."""
    if device.type != "cuda":
        return 2
    numbers = layer.M * layer.K + layer.N * layer.K
    cold = COLD * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(QUEUED, math.ceil(cold / (numbers * layer.dtype.itemsize))))


def _generator(device: torch.device) -> torch.Generator:
    """Of the tuner's own: nobody's random numbers are others because it ran."""
    return torch.Generator(device).manual_seed(0)


def _inputs(layer: Layer, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """What each problem is given, by its label."""
    shapes = ((layer.M, layer.K), (layer.N, layer.K), (layer.N,), (layer.M, layer.N))
    own = _generator(device)
    x, w, b, dz = (torch.randn(shape, dtype=layer.dtype, device=device, generator=own) for shape in shapes)
    w /= layer.K**0.5
    recorded = (t.detach().requires_grad_() for t in (x, w, b))
    return {
        "forward": (x, w, b),
        "dx": (dz, w),
        "dw": (dz.t(), x),
        "backward": (dz, w, x),  # x as the z of the layer before
        "whole": (*recorded, dz),
    }


def _launches(
    problem: Problem, operands: Sequence[tuple[Tensor, ...]], activation: Activation, plan: Any
) -> dict[str, list[Call]]:
    """Each candidate's, one for each tuple of operands."""
    parameters = activation.default_values
    pass_tile = plan.bias_activation.tile(problem.M, problem.N, problem.dtype.itemsize)

    def forward(x: Tensor, w: Tensor, b: Tensor, tile: Any) -> Tensor:
        return plan.linear.forward(x, w, b, plan.value, parameters, None, tile, not plan.from_output)[0]

    def backward(dz: Tensor, w: Tensor, saved: Tensor, tile: Any) -> Tensor:
        return plan.chain.backward(
            dz, w, saved, plan.value, plan.gradient, parameters, None, plan.from_output, True, False, tile, pass_tile
        )[0]

    launch: Callable[..., Tensor] = {"forward": forward, "backward": backward}.get(problem.task, plan.linear.product)
    if problem.task == "backward" and plan.from_output:
        operands = [(dz, w, activation.reference(z, *parameters)) for dz, w, z in operands]
    return {
        name: [partial(launch, *tensors, tile) for tensors in operands] for name, tile in candidates(problem).items()
    }


def _truth(problem: Problem, operands: Sequence[Tensor], activation: Activation) -> Tensor:
    doubles = [t.double() for t in operands]
    if problem.task == "forward":
        return activation.reference(F.linear(*doubles), *activation.default_values)
    if problem.task == "backward":
        dz, w, z = doubles
        z = z.detach().requires_grad_()
        return torch.autograd.grad(activation.reference(z, *activation.default_values), z, torch.mm(dz, w))[0]
    return torch.mm(*doubles)


def _both(way: Way, x: Tensor, w: Tensor, b: Tensor, dy: Tensor) -> Tensor:
    return torch.autograd.grad(way(x, w, b), (x, w, b), dy)[0]


def _learned(way: Way, x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(way(x, w, target), (x, w))[0]


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Has the library take them at the problem's precision."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


# What is measured


def _measured(
    calls: Mapping[str, Sequence[Call]],
    truth: Tensor | None,
    reference: str,
    default: str,
    timer: Timer,
    most: int,
) -> Found:
    """Medians of the candidates that are right; the default is chosen unless another is faster by more than the noise.

    truth: of the first calls, None where they are not judged. The reference must be among the candidates and raises
    what it raises.
    """
    allowed = 2 * _error(calls[reference][0](), truth) + 1e-6
    faults = {name: _fault(each[0], truth, allowed) for name, each in calls.items() if name != reference}
    left_out = {name: fault for name, fault in faults.items() if fault is not None}
    turns = {name: _turns(each, timer, most) for name, each in calls.items() if name not in left_out}
    medians, noise = _medians(turns, reference, timer)
    fastest = min(medians, key=medians.__getitem__)
    stays = default in medians and medians[fastest] >= medians[default] - noise
    return Found(Record(default if stays else fastest, medians), left_out)


def _medians(turns: Mapping[str, Sequence[Call]], reference: str, timer: Timer) -> tuple[dict[str, float], float]:
    """The median µs a call of each, and the noise: by how much the reference's two turns in a round differ."""
    samples: dict[str, list[float]] = {name: [] for name in turns}
    differences = []
    for _ in range(ROUNDS):
        for name, calls in turns.items():
            samples[name].append(timer(calls))
        differences.append(abs(samples[reference][-1] - timer(turns[reference])))
    return {name: statistics.median(times) for name, times in samples.items()}, statistics.median(differences)


def _fault(call: Call, truth: Tensor | None, allowed: float) -> str | None:
    """Why a candidate cannot be taken, None where it can."""
    try:
        error = _error(call(), truth)
        _wait()
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # whatever a compiler or a driver raises
        return f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
    return None if error <= allowed else f"errs by {error:.1e}, at most {allowed:.1e} is right"


def _error(result: Tensor, truth: Tensor | None) -> float:
    """‖error‖ / ‖truth‖, infinite where that is no number; 0 without a truth."""
    if truth is None:
        return 0.0
    error = (torch.linalg.vector_norm(result.double() - truth) / torch.linalg.vector_norm(truth)).item()
    return error if math.isfinite(error) else math.inf


def _turns(calls: Sequence[Call], timer: Timer, most: int) -> list[Call]:
    """A sample's calls: so many as it has time for."""
    count = min(most, int(SAMPLE_US / max(timer(calls), 1e-3)))
    return list(islice(cycle(calls), max(1, count)))


def _queued(calls: Sequence[Call]) -> float:
    """Device µs a call, queued behind memory traffic that empties the L2 and gives the host a lead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    traffic = torch.empty(2**28, dtype=torch.int8, device="cuda")  # more than any L2 in view
    for _ in range(16):
        traffic.zero_()
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / len(calls) * 1e3


def _wall(calls: Sequence[Call]) -> float:
    """µs a call on the clock, launches and all."""
    _wait()
    started = time.perf_counter()
    for call in calls:
        call()
    _wait()
    return (time.perf_counter() - started) / len(calls) * 1e6


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
