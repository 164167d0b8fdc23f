"""NVIDIA's compute-sanitizer over a worker's units: its command, and what its logs found."""

import re
from pathlib import Path

from bench.fits import FITS, Fit
from fusedact.profiling.cases import CASES, Case

LARGE = 4096  # of a dimension: products by descriptors, rows that take several steps, many programs
CHECKERS = ("memcheck", "racecheck")
OWN_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else what lies beyond a tensor is still torch's memory
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")
TOLD = 40  # lines of a log


def units(dry: bool) -> dict[str, Case | Fit]:
    """What is run, by name: each case at dimensions that no block divides and at large ones; persistent kernels."""
    small = [case.tiny() for case in CASES]
    large = [] if dry else [case.tiny(LARGE) for case in CASES]
    fits = [fit for fit in FITS if fit.engine == "persistent"]
    return {unit.name: unit for unit in (*fits, *small, *large)}


def command(program: str, checker: str, folder: Path) -> list[str]:
    """What to put before a command; each of its processes leaves a log in the folder.

    Errors of the driver's interface are not reported: torch asks it for what may not be there.
    """
    return [program, "--tool", checker, "--report-api-errors", "no", "--log-file", f"{folder}/%p"]


def faults(folder: Path) -> str | None:
    """What the logs there report, None where every process ended without a fault."""
    logs = [path.read_text() for path in sorted(folder.iterdir())]
    faulty = [log for log in logs if not (counts := SUMMARY.findall(log)) or any(int(count) for count in counts)]
    if not logs:
        return "no log"
    return "\n".join("\n".join(log.splitlines()[:TOLD]) for log in faulty) or None
