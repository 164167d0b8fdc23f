"""What either kind of record says of each contender: of a GPU's, by bench/gpu.py, and of the CPU suites'."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.reporting.rows import fits

WHOLE = ("step", "run")  # a trainer's phases


@dataclass(frozen=True)
class Timed:
    """One contender in one phase of a case.

    ratio: stock's time over its own, above 1 where it is faster; low, high: the 20 and 80 % points of that.
    noise: of stock against itself. errors: against float64, each over its truth's norm.
    """

    op: str
    case: str
    phase: str
    contender: str
    micros: float
    ratio: float
    low: float
    high: float
    noise: float
    dtype: str = ""
    bytes: int = 0
    flops: int = 0
    share: float | None = None
    errors: tuple[float, ...] = ()
    memory: int | None = None

    @property
    def label(self) -> str:
        """The case without its op, which stands above it."""
        return self.case.removeprefix(self.op).strip() or self.case

    @property
    def of_trainer(self) -> bool:
        return self.phase in WHOLE


def of_suites(record: dict) -> Iterator[Timed]:
    """Of pytest-benchmark's record, in its order; what compares no contenders is left out."""
    for benchmark in record["benchmarks"]:
        info = benchmark["extra_info"]
        if "contender" not in info:
            continue
        error = info.get("error")
        yield Timed(
            op=info["op"] or "trainer",
            case=info["case"],
            phase=info["phase"],
            contender=info["contender"],
            micros=benchmark["stats"]["median"] * 1e6,
            ratio=info["ratio"],
            low=info["ratio_low"],
            high=info["ratio_high"],
            noise=info["noise"],
            dtype=info.get("dtype") or "",
            bytes=info.get("bytes") or 0,
            flops=info.get("flops") or 0,
            share=info.get("share"),
            errors=() if error is None else (error,),
        )


def of_gpu(record: dict) -> Iterator[Timed]:
    """Of ops, of others' kernels beside them, of trainers' steps and of their whole runs.

    Beside others stock and fusedact were timed again: that counts where the ops say nothing of them.
    """
    sections = {name: section.get("results", {}) for name, section in record["sections"].items()}
    for section in ("ops", "peers", "steps"):
        for case, result in sections.get(section, {}).items():
            for phase, measured in result.get("phases", {}).items():
                known = section == "peers" and phase in sections.get("ops", {}).get(case, {}).get("phases", {})
                for timed in _contenders(case, phase, result, measured):
                    if not known or timed.contender not in ("stock", "fusedact"):
                        yield timed
    for name, run in fits(record).items():
        ratio = run["stock_step_us"] / run["step_us"]
        yield Timed("fit", name, "run", "fusedact", run["took"] * 1e6, ratio, ratio, ratio, 0.0)


def _contenders(case: str, phase: str, result: dict, measured: dict) -> Iterator[Timed]:
    device = next(iter(measured["times"].values()))  # on a GPU cold device time
    stock, memory = device["stock"]["median"], measured.get("memory", {})
    for name, times in device.items():
        if name == "again":
            continue
        yield Timed(
            op=result.get("op") or ("trainer" if phase in WHOLE else case),
            case=case,
            phase=phase,
            contender=name,
            micros=times["median"],
            ratio=stock / times["median"],
            low=stock / times["p80"],
            high=stock / times["p20"],
            noise=abs(device["again"]["median"] / stock - 1),
            dtype=result.get("dtype", ""),
            bytes=measured.get("bytes", 0),
            flops=measured.get("flops", 0),
            errors=tuple(result.get("errors", {}).get(name, ())),
            memory=memory.get(name),
        )
