"""Rows of a GPU's record: every measured phase, its ratios and rates, and what of its promises it misses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

COPY = "copy, GB/s"
CHUNKS = "torch's chunks"  # as fusedact.profiling.peers names them
LAYERS = ("linear_act", "linear_chain", "convolution_act", "gated", "fused_block", "prelu", "activation")


@dataclass(frozen=True)
class Row:
    """One phase of one case: µs, ratios to fusedact's median (above 1: fusedact is faster), rates of fusedact's.

    others: such ratios of others' kernels, from a run of their own; loss: whether the case is of the losses' table.
    """

    case: str
    phase: str
    stock: float
    fusedact: float
    spread: str
    ratio: float
    noise: float
    launched: float
    wall: float
    compile: float | None
    gbps: float | None
    tflops: float | None
    share: float | None
    memory: str
    target: float | None
    threshold: str
    others: dict[str, float]
    loss: bool

    @property
    def missed(self) -> bool:
        return self.threshold.startswith("missed")


def rows(record: dict) -> Iterator[Row]:
    """Every measured phase of the record's ops and training steps, in their order."""
    sections = {name: section.get("results", {}) for name, section in record["sections"].items()}
    ops, peers = sections.get("ops", {}), sections.get("peers", {})
    alone = {case: result for case, result in peers.items() if case not in ops}
    for section, results in (sections | {"peers": alone}).items():
        if section not in ("ops", "peers", "steps", "autotuned"):
            continue
        for case, result in results.items():
            name = f"{case}, max-autotune" if section == "autotuned" else case
            for phase, measured in result.get("phases", {}).items():
                beside = peers.get(name, {}).get("phases", {}).get(phase, {})
                row = _row(name, phase, result, measured, sections.get("ceilings", {}), _others(beside))
                yield replace(row, threshold="not judged") if record["dry"] else row


def _others(measured: dict) -> dict[str, float]:
    """The ratios of all but ours, stock and its repetition."""
    device = next(iter(measured.get("times", {}).values()), {})
    return {name: _ratio(device, name) for name in device if name not in ("stock", "again", "fusedact", "compile")}


def _row(case: str, phase: str, result: dict, measured: dict, ceilings: dict, others: dict[str, float]) -> Row:
    times = measured["times"]
    device = next(iter(times.values()))  # on a GPU cold device time, on a CPU the thread's
    ours = device["fusedact"]
    ratio, launched, wall = (_ratio(times.get(kind, device)) for kind in ("cold", "launched", "wall"))
    floor = _floor(result, measured, ceilings)
    memory = measured.get("memory", {})
    row = Row(
        case=case,
        phase=phase,
        stock=device["stock"]["median"],
        fusedact=ours["median"],
        spread=f"{ours['p20']:.4g} to {ours['p80']:.4g}",
        ratio=ratio,
        noise=abs(device["again"]["median"] / device["stock"]["median"] - 1),
        launched=launched,
        wall=wall,
        compile=_ratio(device, "compile") if "compile" in device else None,
        gbps=measured["bytes"] / ours["median"] * 1e-3 if "bytes" in measured else None,
        tflops=measured["flops"] / ours["median"] * 1e-6 if "flops" in measured else None,
        share=floor / ours["median"] if floor else None,
        memory=" / ".join(f"{memory[name] / 2**20:.0f}" for name in ("stock", "fusedact")) if memory else "",
        target=result.get("target") if phase == "both" else None,
        threshold="",
        others=others,
        loss="op" in result and not result["op"].startswith(LAYERS),
    )
    return replace(row, threshold=_judged(row, result, memory))


def _ratio(times: dict, other: str = "stock") -> float:
    return times[other]["median"] / times["fusedact"]["median"]


def _judged(row: Row, result: dict, memory: dict) -> str:
    """What of the case's promises is missed: the wall and the bounds count for a whole call, forward with backward."""
    least = result["threshold"]
    missed = [f"device {row.ratio:.3f}"] if row.ratio < least else []
    if row.phase in ("both", "step"):
        missed += [f"wall {row.wall:.3f}"] if row.wall < least else []
        missed += [f"{CHUNKS} {row.others[CHUNKS]:.3f}"] if row.others.get(CHUNKS, least) < least else []
        missed += [f"target {row.ratio:.3f}"] if row.ratio < (row.target or 0) else []
        milliseconds, most_ms = row.fusedact * 1e-3, result.get("most_ms") or math.inf
        missed += [f"{milliseconds:.2f} ms"] if milliseconds > most_ms else []
        gib, most_gib = _beyond(result, memory) / 2**30, result.get("most_gib") or math.inf
        missed += [f"{gib:.2f} GiB"] if gib > most_gib else []
    elif row.phase != "backward" and row.share is not None and row.share < (result.get("least_share") or 0):
        missed.append(f"share {row.share:.3f}")
    return f"missed: {', '.join(missed)}" if missed else "met"


def _beyond(result: dict, memory: dict) -> int:
    """Bytes that a call holds at its peak beyond its gradients; 0 where nobody looked."""
    return memory["fusedact"] - result.get("gradient_bytes", 0) if memory else 0


def _floor(result: dict, measured: dict, ceilings: dict) -> float | None:
    """The µs that bytes and FLOPs take at the measured ceilings, or None where those were not measured."""
    rate = result.get("matrix_rate")
    if "bytes" not in measured or COPY not in ceilings or (rate and rate not in ceilings):
        return None
    moving = measured["bytes"] / ceilings[COPY] * 1e-3
    return max(moving, measured["flops"] / ceilings[rate] * 1e-6) if rate else moving


def failures(record: dict) -> list[str]:
    """What keeps a record from being good, in words; a dry run's times are not judged."""
    found = []
    for name, section in record["sections"].items():
        found += [f"{name}: {section['error']}"] if "error" in section else []
        faults = section.get("failures", {}) | section.get("errors", {})
        found += [f"{name}: {unit}: {fault}" for unit, fault in faults.items()]
        for case, result in section.get("results", {}).items():
            if isinstance(result, dict) and result.get("verdict", "accurate") != "accurate":
                found.append(f"{name}: {case}: {result['verdict']}, {result.get('errors') or result['costs']}")
    if not record["dry"]:
        slow = {name: run for name, run in fits(record).items() if run["took"] > run["seconds"]}
        found += [f"{name}: missed: took {run['took']:.3g} s of {run['seconds']:g}" for name, run in slow.items()]
    return found + [f"{row.case}, {row.phase}: {row.threshold}" for row in rows(record) if row.missed]


def fits(record: dict) -> dict[str, dict]:
    """The whole training runs that were timed, by name."""
    results = record["sections"].get("fits", {}).get("results", {})
    return {name: result for name, result in results.items() if "took" in result}
