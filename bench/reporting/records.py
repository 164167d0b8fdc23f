"""The records of bench/results that tables and charts are made from."""

import json
from collections.abc import Iterable
from numbers import Number
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SUITES = "suites-cpu.json"  # pytest-benchmark's, of the suites on a CPU

Found = tuple[Path, dict]
Key = tuple[str | int, ...]  # of what stands within what

OF_GPU: dict[Key, type] = {("date",): str, ("commit",): str, ("dry",): bool, ("machine",): dict, ("sections",): dict}
OF_GPU |= {("machine", name): str for name in ("device", "torch", "triton")}
OF_SUITES: dict[Key, type] = {("datetime",): str, ("commit_info",): dict, ("benchmarks", 0): dict}
OF_SUITES |= {("machine_info", name): object for name in ("device", "cores", "threads", "torch")}
OF_SUITES |= {("machine_info", "ceilings"): dict, ("machine_info", "arguments"): list}
OF_TIMED: dict[Key, type] = {("stats", "median"): Number} | {("extra_info", name): str for name in ("case", "phase")}
OF_TIMED |= {("extra_info", name): Number for name in ("ratio", "ratio_low", "ratio_high", "noise")}
OF_TIMED |= {("extra_info", "op"): object, ("extra_info", "contender"): str}
OF_MEMORY: dict[Key, type] = {("machine",): str, ("date",): str, ("commit",): str, ("shape",): list, ("heads",): dict}
BY_UNIT = ("results", "errors", "skipped", "first_calls")  # of a section


def newest(results: Path) -> Found | None:
    """The latest record of a GPU with ops in it, and in it the latest result of each unit that was run apart.

    Apart is what `bench/gpu.py --only` ran at the same commit on the same device with the same torch and Triton.
    "records" names the files that contributed. A dry run is none; ValueError where one is of another format.
    """
    records = [(path, _read(path)) for path in sorted(results.glob("*.json"))]
    gpu = [each for each in records if each[1].get("kind") == "gpu"]
    for path, record in gpu:
        _demand(path, record, OF_GPU)
    gpu = sorted((each for each in gpu if not each[1]["dry"]), key=lambda each: each[1]["date"])
    with_ops = [each for each in gpu if each[1]["sections"].get("ops", {}).get("results")]
    if not with_ops:
        return None
    path, record = with_ops[-1]
    return path, _merged(record, [each for each in gpu if each[0] == path or _belong(record, each[1])])


def _belong(record: dict, other: dict) -> bool:
    """Of the same commit, where it says what ran, and of the same device, torch and Triton."""
    commit = record["commit"]
    named = commit != "unknown" and not commit.endswith("-dirty")
    same = all(record["machine"][key] == other["machine"][key] for key in ("device", "torch", "triton"))
    return named and same and commit == other["commit"]


def _merged(record: dict, parts: list[Found]) -> dict:
    """The record with each unit's result from the last of the parts, oldest first, that has one."""
    sections: dict[str, dict] = {}
    sources: dict[tuple[str, str], int] = {}  # which part a unit's result is from; of the tests, all there is
    for at, (_, part) in enumerate(parts):
        for name, section in part["sections"].items():
            whole = () if "error" in section else ("",)
            sources |= {(name, unit): at for unit in section.get("results", whole)}
            sections[name] = _joined(sections[name], section) if name in sections else section
    used = sorted(set(sources.values()))
    names, date = [parts[at][0].name for at in used], parts[used[-1]][1]["date"]
    ordered = {name: sections[name] for name in (*record["sections"], *sections)}
    return record | {"sections": ordered, "records": names, "date": date}


def _joined(older: dict, newer: dict) -> dict:
    """A section run twice: of a unit the newer result, where that has one; of the rest the newer, unless it broke.

    What was skipped or failed replaces no result, what was skipped no failure.
    """
    units = {key: older.get(key, {}) | newer.get(key, {}) for key in BY_UNIT if key in older or key in newer}
    known: set[str] = set()
    for key in ("results", "errors", "skipped"):
        if key in units:
            units[key] = {unit: value for unit, value in units[key].items() if unit not in known}
            known |= set(units[key])
    return (older if "error" in newer else newer) | units


def suites(results: Path) -> Found | None:
    """The record of the CPU suites, where there is one; ValueError where it is another's, a part or of a smoke run."""
    path = results / SUITES
    if not path.exists():
        return None
    record = _read(path)
    _demand(path, record, OF_SUITES)
    if record["machine_info"].get("smoke"):
        raise ValueError(f"{path}: expected measured suites, got a smoke run's")
    found = set()
    for at, benchmark in enumerate(record["benchmarks"]):
        _demand(path, record, {("benchmarks", at, "extra_info"): dict})
        if "contender" in benchmark["extra_info"]:
            _demand(path, record, {("benchmarks", at, *key): kind for key, kind in OF_TIMED.items()})
            found.add(benchmark["extra_info"]["case"])
    if missing := [name for name in _measured_on_a_cpu() if name not in found]:
        raise ValueError(
            f"{path}: expected all cases of the table, got none of {missing[0]}; {len(missing)} are missing"
        )
    return path, record


def _measured_on_a_cpu() -> Iterable[str]:
    """The cases and the trainers of the suites."""
    import torch  # which bench/gpu.py, who imports this file, leaves to its workers

    from fusedact.profiling import cases, choosing

    return [each.name for each in (*choosing.cases_for(torch.device("cpu")), *cases.STEPS)]


def memory(results: Path) -> Found | None:
    """What heads hold resident on a CPU, by bench/memory.py; ValueError where it is of another format."""
    path = results / "memory.json"
    if not path.exists():
        return None
    record = _read(path)
    _demand(path, record, OF_MEMORY)
    _demand(path, record, {("heads", name, "bytes"): Number for name in record["heads"]})
    return path, record


def _read(path: Path) -> dict:
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{path}: expected a record, an object of JSON, got a {type(record).__name__}")
    return record


def _demand(path: Path, record: dict, keys: dict[Key, type]) -> None:
    """ValueError that names the first of the keys that the record lacks, or has as another type."""
    for key, kind in keys.items():
        inner: Any = record
        try:
            for part in key:
                inner = inner[part]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{path}: expected the key {'.'.join(map(str, key))}, got none") from None
        if not isinstance(inner, kind):
            name = ".".join(map(str, key))
            raise ValueError(f"{path}: expected {name} as {kind.__name__}, got {type(inner).__name__}")
