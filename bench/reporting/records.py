"""The records of bench/results that tables and charts are made from."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SUITES = "suites-cpu.json"  # pytest-benchmark's, of the suites on a CPU

Found = tuple[Path, dict]


def newest(results: Path) -> Found | None:
    """The latest record of a GPU with ops in it, and in it the latest of each section that was run apart.

    Apart is what `bench/gpu.py --only` ran at the same commit on the same device. "records" names the files that
    contributed. A dry run is none.
    """
    records = [(path, _read(path)) for path in sorted(results.glob("*.json"))]
    gpu = [each for each in records if each[1].get("kind") == "gpu" and not each[1]["dry"]]
    gpu.sort(key=lambda each: each[1]["date"])
    with_ops = [each for each in gpu if each[1]["sections"].get("ops", {}).get("results")]
    if not with_ops:
        return None
    path, record = with_ops[-1]
    return path, _merged(record, [each for each in gpu if each[0] == path or _belong(record, each[1])])


def _belong(record: dict, other: dict) -> bool:
    """Of the same commit, where it says what ran, and of the same device."""
    commit, device = record["commit"], record["machine"]["device"]
    named = commit != "unknown" and not commit.endswith("-dirty")
    return named and (commit, device) == (other["commit"], other["machine"]["device"])


def _merged(record: dict, parts: list[Found]) -> dict:
    """The record with each section from the last of the parts, oldest first; one that broke replaces none."""
    sections, sources = dict(record["sections"]), {}
    for path, part in parts:
        for name, section in part["sections"].items():
            if name not in sources or "error" not in section:
                sections[name], sources[name] = section, path.name
    names = [path.name for path, _ in parts if path.name in sources.values()]
    return record | {"sections": sections, "records": names, "date": parts[-1][1]["date"]}


def suites(results: Path) -> Found | None:
    """The record of the CPU suites, where there is one; ValueError where it is another's or of a smoke run."""
    path = results / SUITES
    if not path.exists():
        return None
    record = _read(path)
    machine = record.get("machine_info", {})
    if "ceilings" not in machine:
        raise ValueError(f"{path}: expected what pytest bench --benchmark-json writes, got no ceilings of a machine")
    if machine.get("smoke"):
        raise ValueError(f"{path}: expected measured suites, got a smoke run's")
    return path, record


def memory(results: Path) -> Found | None:
    """What heads hold resident on a CPU, by bench/memory.py."""
    path = results / "memory.json"
    return (path, _read(path)) if path.exists() else None


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, {error}") from None
