"""What `fusedact tune` measured: a file for each machine in the user's cache folder, and what `choose` makes of it.

A file is read at the first choice for a GPU, once, and holds for any product whose sizes round up to the same powers of
2. One that is damaged, of another version or of another machine counts as none.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fusedact.tuning.candidates import HEAD, LIBRARY, Chip, Problem, by_rule, candidates, estimates

VERSION = 1
OP = "op"  # the task of a whole layer, forward with backward
FUSED, STOCK = "fused", "stock"  # its candidates
SHOWN = 4  # candidates in a reason
REFERENCE_CHIPS = {  # as their data sheets have them
    "sm_80": Chip("sm_80", shared_memory=163 * 1024, warp_size=32, multiprocessors=108),
    "sm_90": Chip("sm_90", shared_memory=227 * 1024, warp_size=32, multiprocessors=132),
    "sm_100": Chip("sm_100", shared_memory=227 * 1024, warp_size=32, multiprocessors=148),
    "gfx942": Chip("gfx942", shared_memory=64 * 1024, warp_size=64, multiprocessors=304),
}


class Machine(NamedTuple):
    """What a record holds for; versions as the software itself writes them."""

    gpu: str
    driver: str
    triton: str
    torch: str


class Record(NamedTuple):
    """The candidate to take, and the median of each that was timed."""

    choice: str
    microseconds: dict[str, float]


Table = dict[str, Record]  # by bucket

_tables: dict[Machine, Table] = {}
_has_stock: dict[Chip, bool] = {}  # whether stock was better anywhere, once that was looked at


@lru_cache(4096)
def choose(*problem: Any) -> Any:
    """The tile that takes the product of these fields of a Problem, None for the library; of a head, its chunk's rows.

    The measured one if it still exists, else the rule's.
    """
    asked = Problem(*problem)
    return candidates(asked)[_chosen(asked)]


def prefers_stock(*problem: Any) -> bool:
    """Whether stock PyTorch was measured to be better at the whole layer of these fields of a Problem.

    Its task is "op", M, N and K are the forward's, and it is not aligned.
    """
    return _has_stock.get(problem[-1], True) and _prefers_stock(Problem(*problem))


def why(problem: Problem) -> tuple[str, str]:
    """The name of what runs, and the measured or estimated times that say so."""
    name, record = _chosen(problem), _record(problem)
    if record is not None and record.choice == name:
        return name, f"measured, µs: {_times(record.microseconds, {name})}"
    if problem.task in (OP, HEAD):
        reason = "not measured"
    else:
        estimated = {candidate: seconds * 1e6 for candidate, seconds in estimates(problem).items()}
        reason = f"by rule, estimated µs: {_times(estimated, {name, LIBRARY})}"
    return name, reason if record is None else f"{reason}; {record.choice}, once measured, is no candidate any more"


def hold(chip: Chip, found: Mapping[Problem, Record]) -> None:
    """Choose by these from now on, in this process."""
    machine = machine_of(chip)
    if machine is not None:
        _tables[machine] = _table(chip) | {_bucket(problem): record for problem, record in found.items()}
        choose.cache_clear()
        _prefers_stock.cache_clear()
        _has_stock.clear()


def write(chip: Chip, found: Mapping[Problem, Record]) -> Path | None:
    """Choose by these from now on, and add them to the machine's file, whatever others have added to it since.

    Gives the file; None, after a warning, where it cannot be written: then they hold for this process alone.
    """
    hold(chip, found)
    machine = machine_of(chip)
    if machine is None:
        return None
    path = path_of(machine)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            own = {_bucket(problem): record for problem, record in found.items()}
            _replace(path, _text(machine, _read(machine) | own))
    except OSError as error:
        _warn_once(f"what was measured holds for this process alone: {error}")
        return None
    return path


@cache
def machine_of(chip: Chip) -> Machine | None:
    """The chip's GPU, which is the current one, with its software; None for a CPU that plays one, or a data sheet's."""
    if chip.interpreted or chip in REFERENCE_CHIPS.values() or not torch.cuda.is_available():
        return None
    import triton

    return Machine(chip.name or torch.cuda.get_device_name(), _driver(), triton.__version__, str(torch.__version__))


def path_of(machine: Machine) -> Path:
    """In $FUSEDACT_CACHE, else `fusedact` in $XDG_CACHE_HOME or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fusedact")
    name = "_".join(re.sub(r"[^\w.+-]+", "-", part, flags=re.ASCII) for part in machine)
    return Path(os.environ.get("FUSEDACT_CACHE") or default, "tuning", f"{name}.json")


def _driver() -> str:
    """The CUDA release of the driver; ROCm's own release, whose driver is not asked."""
    asked = getattr(torch._C, "_cuda_getDriverVersion", None)
    return str(torch.version.hip or (asked() if asked else "unknown"))


# Choosing


def _chosen(problem: Problem) -> str:
    record = _record(problem)
    if problem.task == OP:
        return record.choice if record is not None and record.choice in (FUSED, STOCK) else FUSED
    return record.choice if record is not None and record.choice in candidates(problem) else by_rule(problem)


@lru_cache(4096)
def _prefers_stock(problem: Problem) -> bool:
    _has_stock[problem.chip] = any(record.choice == STOCK for record in _table(problem.chip).values())
    return _has_stock[problem.chip] and _chosen(problem) == STOCK


def _record(problem: Problem) -> Record | None:
    return _table(problem.chip).get(_bucket(problem))


def _bucket(problem: Problem) -> str:
    from fusedact.kernels.workspace import power_of_2

    dtype = str(problem.dtype).removeprefix("torch.")
    sizes = "x".join(str(power_of_2(size)) for size in (problem.M, problem.N, problem.K))
    return f"{problem.task} {dtype} {problem.precision} {'aligned ' if problem.aligned else ''}{sizes}"


def _table(chip: Chip) -> Table:
    machine = machine_of(chip)
    if machine is None:
        return {}
    if machine not in _tables:
        _tables[machine] = _read(machine)
    return _tables[machine]


def _times(microseconds: Mapping[str, float], always: Iterable[str]) -> str:
    """The least of them, and those of the names that are always shown."""
    ordered = sorted(microseconds, key=microseconds.__getitem__)
    shown = [name for name in ordered if name in {*ordered[:SHOWN], *always}]
    return ", ".join(f"{name} {microseconds[name]:,.1f}" for name in shown)


# The file


def _read(machine: Machine) -> Table:
    """What the machine's file holds; nothing, and one warning, where it is not a whole one."""
    path = path_of(machine)
    try:
        return _parsed(path.read_bytes(), machine)
    except FileNotFoundError:
        return {}
    except OSError as error:
        _warn_once(f"measured choices are not read: {error}")
    except (ValueError, RecursionError) as error:
        _warn_once(f"measured choices are not read: {path}: {error}")
    return {}


def _parsed(content: bytes, machine: Machine) -> Table:
    match json.loads(content):
        case {"version": version} if version != VERSION:
            raise ValueError(f"is of version {version!r}, expected {VERSION}")
        case {"version": _, "machine": other, "records": dict(entries)}:
            if other != machine._asdict():
                raise ValueError(f"is of another machine: {other!r}")
            return {bucket: _parsed_record(bucket, entry) for bucket, entry in entries.items()}
    raise ValueError("holds no records")


def _parsed_record(bucket: str, entry: object) -> Record:
    match entry:
        case {"choice": str(choice), "microseconds": dict(times)} if all(map(_is_time, times.values())):
            return Record(choice, {name: float(time) for name, time in times.items()})
    raise ValueError(f"{bucket}: is no record: {str(entry)[:80]}")


def _is_time(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12  # type: ignore[operator]


def _text(machine: Machine, table: Table) -> str:
    records = {bucket: record._asdict() for bucket, record in sorted(table.items())}
    return json.dumps({"version": VERSION, "machine": machine._asdict(), "records": records}, indent=1)


def _replace(path: Path, text: str) -> None:
    """The whole file or, killed at any instant, the old one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes that write there, where the system has such locks; the file stays whole without."""
    with path.with_suffix(".lock").open("w") as file:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fusedact: {reason}", RuntimeWarning, stacklevel=2)
