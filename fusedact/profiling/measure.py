"""Measuring one thing at a time: a case, alone or beside others' kernels, a trainer's step. First right, then timed."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle, islice
from types import MappingProxyType

import torch
import torch._functorch.config
from torch import Tensor

from fusedact.profiling.cases import Case, Step
from fusedact.profiling.contenders import Contender, contenders, output_gradient
from fusedact.profiling.ops import OPS, work
from fusedact.profiling.peers import PEERS, Peer
from fusedact.profiling.timing import FULL, INDUCTOR, Call, Effort, free_memory, seconds_of, timed
from fusedact.trainers import LAYERS, TRAINERS

Sets = list[dict[str, Contender]]  # of inputs, each with who runs on it

# Elements of logits that the truth holds in float64 at once: all of any weighted loss, whose mean is not its pieces'.
PIECE = 2**27
HELD = 7  # times the bytes of a forward: inputs, everyone's saved tensors, stock's temporaries, the truth
WRONG = 8  # times stock's error: such a kernel is not timed


@dataclass(frozen=True)
class Prepared:
    """A case whose contenders are built and compared with the truth; a wrong kernel's is not to be timed.

    peers: the others' kernels that were asked for.
    result: the case's facts, errors and verdict; `without` says why a contender is left out.
    """

    case: Case
    device: torch.device
    effort: Effort
    sets: Sets
    dys: list[Tensor]
    peers: Mapping[str, Peer]
    result: dict

    @torch._functorch.config.patch(donated_buffer=False)  # the backward alone runs many times on one graph
    def timed(self, phase: str) -> dict:
        """Least bytes and FLOPs of the phase, and every contender's times, at the case's precision.

        Raises MemoryError where the phase does not fit the device.
        """
        torch.set_float32_matmul_precision(self.case.precision)
        early = {name for name, peer in self.peers.items() if peer.early}
        names = [name for name in self.sets[0] if phase != "backward" or name not in early]
        waiting = {name for name, peer in self.peers.items() if peer.waits}
        pairs = list(zip(self.sets, self.dys, strict=True))
        with _one_memory_error():
            calls = {name: [runs[name].call(phase, dy) for runs, dy in pairs] for name in names}
            return asdict(work(self.case, phase)) | timed(calls, self.device, self.effort, waiting)


@contextmanager
def _one_memory_error() -> Iterator[None]:
    """What torch raises where a GPU's or the machine's memory does not suffice becomes a MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise MemoryError(str(error).partition("\n")[0]) from None
        raise


@_one_memory_error()
@torch._functorch.config.patch(donated_buffer=False)
def prepare(
    case: Case,
    device: torch.device,
    effort: Effort,
    compiling: str | None = None,
    peers: Mapping[str, Peer] = MappingProxyType({}),
) -> Prepared:
    """The case's contenders; their errors against float64. Who errs as a wrong kernel does is left out.

    compiling: the mode in which torch.compile takes part.
    Raises MemoryError where the case does not fit the device.
    """
    compiled = _compiled(case, compiling, effort.compiler) if compiling else None
    sets, dys = _sets(case, device, effort, compiled, copies=sum(peer.overwrites for peer in peers.values()))
    truth = _truth(case, sets[0]["stock"], dys[0])
    errors = {name: _errors(sets[0][name], dys[0], truth) for name in ("stock", "fusedact")}
    result = _facts(case, sets) | _verdict(case, errors, truth) | {"without": {}}
    prepared = Prepared(case, device, effort, sets, dys, peers, result)
    if result["verdict"] == "wrong":
        return prepared

    def compiled_runs() -> list[Contender]:
        runs = [each.pop("compile") for each in sets]
        result["compile_s"] = seconds_of(runs[0].call("both", dys[0]))
        return runs

    def peers_runs(peer: Peer) -> list[Contender]:
        return [peer.contender(case, runs["stock"]) for runs in sets]

    if compiled is not None:
        _admit(prepared, "compile", compiled_runs, truth)
    for name, peer in peers.items():
        _admit(prepared, name, partial(peers_runs, peer), truth)
    return prepared


def _admit(prepared: Prepared, name: str, made: Callable[[], list[Contender]], truth: list[Tensor]) -> None:
    """On every set, or on none, with the reason: not installed, not for this torch or device, no compiler, wrong."""
    errors, without = prepared.result["errors"], prepared.result["without"]
    try:
        runs = made()
        found = _errors(runs[0], prepared.dys[0], truth)
    except Exception as error:
        without[name] = f"{type(error).__name__}: {str(error)[:200]}"
        return
    if not _within(WRONG, found, errors["stock"], prepared.case, truth):
        without[name] = f"wrong, error {max(found):.1e}"
        return
    errors[name] = found
    for each, run in zip(prepared.sets, runs, strict=True):
        each[name] = run


def measure_case(case: Case, device: torch.device, effort: Effort, compiling: str | None) -> dict:
    """Errors against float64, then, unless the kernel is wrong, times and memory of each phase."""
    prepared = prepare(case, device, effort, compiling)
    if prepared.result["verdict"] == "wrong":
        return prepared.result
    return prepared.result | {"phases": {phase: prepared.timed(phase) for phase in OPS[case.op].phases}}


def measure_peers(case: Case, device: torch.device, effort: Effort) -> dict:
    """As measure_case, beside others' kernels in compile's place, and without the backward alone."""
    prepared = prepare(case, device, effort, peers=PEERS[case.op])
    if prepared.result["verdict"] == "wrong":
        return prepared.result
    phases = [phase for phase in OPS[case.op].phases if phase != "backward"]
    return prepared.result | {"phases": {phase: prepared.timed(phase) for phase in phases}}


def _sets(
    case: Case, device: torch.device, effort: Effort, compiled: Callable[..., Tensor] | None = None, copies: int = 0
) -> tuple[Sets, list[Tensor]]:
    """Contenders on enough inputs, and the dy of each; `copies` of the inputs are still to come."""
    needed = (HELD + copies) * max(work(case, "forward").bytes, _logits_bytes(case))
    if device.type == "cuda" and needed > (free := free_memory()):
        raise MemoryError(f"needs {needed / 2**30:.0f} GiB, free are {free / 2**30:.0f}")
    torch.set_float32_matmul_precision(case.precision)
    with torch.device(device):
        sets = [contenders(case, seed, compiled) for seed in range(_set_count(case, device, effort))]
    return sets, [output_gradient(runs["stock"].forward().detach()) for runs in sets]


def _logits_bytes(case: Case) -> int:
    """Of a head's, which stock holds."""
    return case.shape[0] * case.shape[-1] * case.torch_dtype.itemsize if case.op == "linear_cross_entropy" else 0


def _facts(case: Case, sets: Sets) -> dict:
    gradients = sum(t.nbytes for t in sets[0]["stock"].wanted)
    return asdict(case) | {"matrix_rate": case.matrix_rate, "sets": len(sets), "gradient_bytes": gradients}


@torch._functorch.config.patch(donated_buffer=False)  # as `prepare` compiles it
def warm_case(case: Case, device: torch.device) -> dict:
    """Seconds of the first call, forward with backward: what is compiled then, `measure_case` finds on disk."""
    torch.set_float32_matmul_precision(case.precision)
    with torch.device(device):
        runs = contenders(case, 0, _compiled(case, "default", FULL.compiler))
    dy = output_gradient(runs["stock"].forward().detach())
    return {f"{name}_s": seconds_of(runs[name].call("both", dy)) for name in ("fusedact", "compile")}


def check_case(case: Case, device: torch.device) -> dict:
    torch.set_float32_matmul_precision(case.precision)
    with torch.device(device):
        runs = contenders(case, 0)
    return check(case, runs, output_gradient(runs["stock"].forward().detach()))


def check(case: Case, runs: dict[str, Contender], dy: Tensor) -> dict:
    truth = _truth(case, runs["stock"], dy)
    return _verdict(case, {name: _errors(runs[name], dy, truth) for name in ("stock", "fusedact")}, truth)


def _errors(run: Contender, dy: Tensor, truth: list[Tensor]) -> list[float]:
    """‖error‖ / ‖truth‖ of y and of each gradient."""
    y = run.forward()
    outputs = (y.detach(), *run.gradients(y, dy))
    return [_error(output, true) for output, true in zip(outputs, truth, strict=True)]


def _verdict(case: Case, errors: dict[str, list[float]], truth: list[Tensor]) -> dict:
    """accurate: at most twice stock's, plus 1e-6; wrong: far from it."""

    def within(factor: int) -> bool:
        return _within(factor, errors["fusedact"], errors["stock"], case, truth)

    verdict = "accurate" if within(2) else "inaccurate" if within(WRONG) else "wrong"
    return {"errors": errors, "verdict": verdict}


def _within(factor: int, errors: list[float], stocks: list[float], case: Case, truth: list[Tensor]) -> bool:
    """At most so many times stock's, plus 1e-6, for a handful of numbers one rounding more."""
    slack = [1e-6 + (torch.finfo(case.torch_dtype).eps if true.numel() < 32 else 0) for true in truth]
    return all(own <= factor * (stock + room) for own, stock, room in zip(errors, stocks, slack, strict=True))


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
    return result | {"verdict": "accurate", "phases": {"step": timed(calls, device, effort)}}


def _in_turn(step: Callable[..., Tensor], batches: list[tuple[Tensor, Tensor]]) -> Call:
    endless = cycle(batches)
    return lambda: step(*next(endless))


def _compiled(case: Case, mode: str, compiler: str) -> Callable[..., Tensor]:
    torch._dynamo.reset()  # else the second shape would be compiled as a dynamic one
    return torch.compile(OPS[case.op].formula(case), backend=compiler, mode=mode if compiler == INDUCTOR else None)


def _set_count(case: Case, device: torch.device, effort: Effort) -> int:
    """Enough sets of inputs to exceed the L2 three times."""
    if device.type == "cpu":
        return effort.sets
    cold = 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(effort.sets, math.ceil(cold / work(case, "both").bytes)))


def _truth(case: Case, stock: Contender, dy: Tensor) -> list[Tensor]:
    """The value and every gradient in float64; a loss in pieces of rows, since its logits may fill the device."""
    formula = OPS[case.op].formula(case)
    if dy.dim():
        doubles = [arg.detach().double().requires_grad_() for arg in stock.wanted]
        y = formula(*doubles)
        return [y.detach(), *torch.autograd.grad(y, doubles, dy.double())]
    x, target = (arg.detach() for arg in stock.args)
    parameters = [arg.detach().double().requires_grad_() for arg in stock.wanted if arg is not stock.args[0]]
    rows = max(1, PIECE // max(x[0].numel(), *map(len, parameters), 1))  # a head's parameters have a row a class
    loss, pieces = torch.zeros((), dtype=torch.float64, device=x.device), []
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for piece, t in zip(x.split(rows), target.split(rows), strict=True):
        piece = piece.double().requires_grad_()
        t = t.double() if t.is_floating_point() else t
        share = formula(piece, t, *parameters) * (len(piece) / len(x))
        gradient, *others = torch.autograd.grad(share, (piece, *parameters))
        pieces.append(gradient.float())
        for total, other in zip(sums, others, strict=True):
            total += other
        loss += share.detach()
    return [loss, torch.cat(pieces), *sums] if stock.args[0].requires_grad else [loss, *sums]


def _error(x: Tensor, truth: Tensor) -> float:
    difference = torch.linalg.vector_norm(x.to(truth.dtype) - truth, dtype=torch.float64).item()
    value = difference / (torch.linalg.vector_norm(truth, dtype=torch.float64).item() or 1.0)
    return value if math.isfinite(value) else math.inf
