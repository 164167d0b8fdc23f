"""What measured times come to: ratios, rates, shares of what the device can do."""

from collections.abc import Mapping
from typing import Any

from fusedact.profiling.cases import Case, Step
from fusedact.profiling.ceilings import COPY
from fusedact.profiling.timing import ratios

CLOCKS = ("launched", "wall")  # on a GPU, beside the device's time


def described(case: Case, phase: str, contender: str) -> dict[str, Any]:
    """What was measured, of an op."""
    known = {key: getattr(case, key) for key in ("op", "activation", "shape", "dtype")}
    return {"case": case.name, **known, "phase": phase, "contender": contender}


def of_trainer(step: Step, phase: str, contender: str) -> dict[str, Any]:
    """As `described`."""
    unknown = dict.fromkeys(("op", "activation", "shape"))
    return {"case": step.name, **unknown, "dtype": "float32", "phase": phase, "contender": contender}


def figures(result: dict, phase: str, name: str, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Of a contender in one phase of what `measure` found, of an op or a trainer.

    ratio: stock's time over this one's, of each round: the median, and ratio_low and ratio_high, 20 and 80 %
    noise: how far from 1 the ratio's 20 and 80 % of stock beside itself are, the larger of the two
    gbps, tflops: the least bytes and FLOPs over the time; share: the least time, by the measured ceilings, over it
    error: the worst relative error against float64 of value and gradients
    launched, wall: on a GPU, where times are cold device time, medians in µs
    """
    measured = result["phases"][phase]
    times = next(iter(measured["times"].values()))
    microseconds, ratio, itself = times[name]["median"], ratios(times, name), ratios(times, "again")
    moved, flops, floor = measured.get("bytes"), measured.get("flops"), least(measured, result, ceilings)
    errors = result.get("errors", {}).get(name)
    others = {clock: measured["times"][clock][name]["median"] for clock in CLOCKS if clock in measured["times"]}
    return {
        "bytes": moved,
        "flops": flops,
        "gbps": moved / microseconds * 1e-3 if moved is not None else None,
        "tflops": flops / microseconds * 1e-6 if flops is not None else None,
        "share": floor / microseconds if floor else None,
        "ratio": ratio["median"],
        "ratio_low": ratio["p20"],
        "ratio_high": ratio["p80"],
        "noise": max(abs(itself[point] - 1) for point in ("p20", "p80")),
        "error": max(errors) if errors else None,
        "memory": measured.get("memory", {}).get(name),
        **others,
    }


def least(measured: dict, result: dict, ceilings: Mapping[str, float]) -> float | None:
    """The µs that a phase's bytes and FLOPs take at the measured ceilings; None where those were not measured."""
    rate = result.get("matrix_rate")
    if "bytes" not in measured or COPY not in ceilings or (rate and rate not in ceilings):
        return None
    moving = measured["bytes"] / ceilings[COPY] * 1e-3
    return max(moving, measured["flops"] / ceilings[rate] * 1e-6) if rate else moving


def samples(result: dict, phase: str, name: str) -> list[float]:
    """Seconds of each round; on a GPU cold device time."""
    times = next(iter(result["phases"][phase]["times"].values()))
    return [microseconds * 1e-6 for microseconds in times[name]["samples"]]


def contenders_of(result: dict, phase: str) -> list[str]:
    """Who was timed, stock's repetition left out."""
    return [name for name in next(iter(result["phases"][phase]["times"].values())) if name != "again"]
