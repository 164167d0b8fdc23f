"""Records as tables: the Markdown beside a record, and the README's table from the newest record of a GPU.

python bench/report.py [--check]
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPEN, CLOSE = "<!-- gpu-table -->", "<!-- /gpu-table -->"
COPY = "copy, GB/s"
CHUNKS = "torch's chunks"  # as fusedact.profiling.peers names them
LAYERS = ("linear_act", "linear_chain", "convolution_act", "gated", "fused_block", "prelu")
NO_RECORD = "No GPU record yet."
DRY = "no GPU, tiny shapes, the fallback instead of kernels. None of these are figures."


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


def markdown(record: dict) -> str:
    """The whole record for a reader."""
    machine = record["machine"]
    title = f"{machine.get('device', 'unknown machine')}, {record['date']}, commit {record['commit']}"
    parts = [f"# {'DRY RUN, ' if record['dry'] else ''}{title}"]
    parts += [f"DRY RUN: {DRY}"] if record["dry"] else []
    parts.append("\n".join(f"- {name}: {value}" for name, value in machine.items()))
    for name, section in record["sections"].items():
        parts.append(f"## {name}\n\n{_summary(section)}")
    if table := list(rows(record)):
        parts += [f"## times\n\n{LEGEND}", _table(_FULL, table)]
    if losses := [row for row in table if row.loss]:
        parts += [f"## losses\n\n{LOSSES_LEGEND}", _table(_LOSSES, losses)]
    if runs := fits(record):
        parts += ["## whole training runs", _fits_table(runs)]
    parts.append("## not good\n\n" + ("\n".join(f"- {line}" for line in failures(record)) or "Nothing."))
    return "\n\n".join(parts) + "\n"


def _summary(section: dict) -> str:
    lines = [f"{section['seconds']:.0f} s of {section['limit']:.0f} s, then {section['state']}"]
    lines += [f"error: {section['error']}"] if "error" in section else []
    counts = ("passed", "failed", "skipped_tests", "collected")
    lines += [f"{name}: {section[name]}" for name in counts if name in section]
    lines += [f"failed: `{test}`: {text}" for test, text in section.get("failures", {}).items()]
    lines += [f"{unit}: {error}" for unit, error in section.get("errors", {}).items()]
    lines += [f"not run: {unit}: {why}" for unit, why in section.get("skipped", {}).items()]
    first_calls = section.get("first_calls", {})
    lines += [f"{u}: {_result(r)}{_first(first_calls.get(u))}" for u, r in section.get("results", {}).items()]
    return "\n".join(f"- {line}" for line in lines)


def _result(result: object) -> str:
    if isinstance(result, float):
        return f"{result:.4g}"
    if not isinstance(result, dict) or "errors" not in result:
        return str(result["verdict"] if isinstance(result, dict) and "verdict" in result else result)
    errors = [f"{name} {max(each):.1e}" for name, each in result["errors"].items()]
    without = [f"without {name}: {why}" for name, why in result.get("without", {}).items()]
    return "; ".join([f"{result['verdict']}, errors {', '.join(errors)}", *without])


def _first(seconds: dict | None) -> str:
    return "".join(f", {name} first call {s:.1f} s" for name, s in (seconds or {}).items())


LEGEND = """Ratios are stock or compile over fusedact, medians of interleaved rounds, of cold device time where
nothing else is said: each call takes other inputs than the last. Noise is stock against itself. Bytes are the least
that the phase can move. The share is of the measured ceilings. Memory is what a call holds at its peak, MiB."""

LOSSES_LEGEND = """Columns from stock on are their time over fusedact's, others' kernels in a run of their own. Shares
are of the copy's bytes, a head's of its products' FLOP/s. `no_grad` is a value alone; others make gradients with it
where they make any."""

_FULL = (
    ("case", lambda r: r.case),
    ("phase", lambda r: r.phase),
    ("stock µs", lambda r: f"{r.stock:.4g}"),
    ("fusedact µs", lambda r: f"{r.fusedact:.4g}"),
    ("20 to 80 %", lambda r: r.spread),
    ("ratio", lambda r: f"{r.ratio:.3f}"),
    ("noise", lambda r: f"{r.noise:.1%}"),
    ("launched ratio", lambda r: f"{r.launched:.3f}"),
    ("wall ratio", lambda r: f"{r.wall:.3f}"),
    ("to compile", lambda r: _optional(r.compile, ".3f")),
    ("GB/s", lambda r: _optional(r.gbps, ".0f")),
    ("TFLOP/s", lambda r: _optional(r.tflops, ".1f")),
    ("share", lambda r: _optional(r.share, ".0%")),
    ("memory, stock / ours", lambda r: r.memory),
    ("target", lambda r: _optional(r.target, ".1f")),
    ("threshold", lambda r: r.threshold),
)
_SHORT = (
    *_FULL[:4],
    ("stock / fusedact", _FULL[5][1]),
    ("compile / fusedact", _FULL[9][1]),
    ("share of the ceiling", _FULL[12][1]),
)


_LOSSES = (
    *_FULL[:2],
    ("µs", _FULL[3][1]),
    ("GB/s", lambda r: _optional(r.gbps, ".0f")),
    ("share of the ceiling", lambda r: _optional(r.share, ".0%")),
    ("stock", lambda r: f"{r.ratio:.2f}"),
    ("torch.compile", lambda r: _optional(r.compile, ".2f")),
    *(
        (name, lambda r, name=name: _optional(r.others.get(name), ".2f"))
        for name in ("Liger", "cut-cross-entropy", CHUNKS)
    ),
    ("memory, stock / ours", lambda r: r.memory),
)


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(columns: tuple, table: list[Row]) -> str:
    lines = [[name for name, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fits_table(runs: dict[str, dict]) -> str:
    """Seconds of each run, compilation apart, and a step against stock's loop on rows that are on the device."""
    lines = [["run", "steps", "seconds", "target", "µs a step", "stock's loop", "stock / fusedact"]]
    lines.append(["---"] * len(lines[0]))
    for name, run in runs.items():
        times = [f"{run[key]:.4g}" for key in ("took", "seconds", "step_us", "stock_step_us")]
        lines.append([name, f"{run['steps']:,}", *times, f"{run['stock_step_us'] / run['step_us']:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def newest(results: Path) -> tuple[Path, dict] | None:
    """The latest record of a GPU with ops in it; a dry run is none."""
    records = [(path, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    fit = [
        (path, record)
        for path, record in records
        if record.get("kind") == "gpu" and not record["dry"] and record["sections"].get("ops", {}).get("results")
    ]
    return max(fit, key=lambda each: each[1]["date"], default=None)


def rendered(readme: str, results: Path) -> str:
    """The README with its table of a GPU made anew; ValueError where the markers are missing."""
    return between(readme, OPEN, CLOSE, _readme_table(results))


def between(readme: str, opening: str, closing: str, text: str) -> str:
    """The README with that text between two markers; ValueError where they are missing."""
    before, opened, rest = readme.partition(opening)
    _, closed, after = rest.partition(closing)
    if not opened or not closed:
        raise ValueError(f"expected {opening} and {closing} in the README")
    return f"{before}{opening}\n{text}\n{closing}{after}"


def _readme_table(results: Path) -> str:
    found = newest(results)
    if found is None:
        return NO_RECORD
    path, record = found
    machine = record["machine"]
    where = f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, {record['date'][:10]}"
    source = f"{where}: `python bench/gpu.py`, record `bench/results/{path.name}`. Device time, cold."
    shown = [row for row in rows(record) if row.phase != "backward"]
    losses = [row for row in shown if row.loss]
    table = _table(_SHORT, [row for row in shown if not row.loss])
    table += f"\n\n{LOSSES_LEGEND}\n\n{_table(_LOSSES, losses)}" if losses else ""
    return "\n\n".join([source, table, *([_fits_table(runs)] if (runs := fits(record)) else [])])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the README differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    text = args.readme.read_text()
    expected = rendered(text, args.results)
    if args.check and text != expected:
        print(f"{args.readme} differs from the records: run python bench/report.py", file=sys.stderr)
        return 1
    if not args.check:
        args.readme.write_text(expected)
    return 0


if __name__ == "__main__":
    sys.exit(main())
