"""Tables of a GPU's record: the Markdown beside it, and the README's."""

from pathlib import Path

from bench.reporting.markdown import grid
from bench.reporting.profile_tables import LEGEND as PROFILES_LEGEND
from bench.reporting.profile_tables import profile_table, profiles, totals
from bench.reporting.records import newest
from bench.reporting.rows import Row, failures, fits, rows

NO_RECORD = "No GPU record yet."
DRY = "no GPU, tiny shapes, the fallback instead of kernels. None of these are figures."
CHARTS = """`python bench/report.py` draws speed-up, roofline, memory and accuracy from this record once it is in
bench/results: docs/images/gpu-speedup.png, gpu-roofline.png, gpu-memory.png, gpu-accuracy.png."""


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
        parts += [f"## times\n\n{LEGEND}", _table((*_TIMES, *_others(table, "to {}"), *_RATES), table)]
    if losses := [row for row in table if row.loss]:
        parts += [f"## losses\n\n{LOSSES_LEGEND}", _losses_table(losses)]
    if runs := fits(record):
        parts += ["## whole training runs", _fits_table(runs)]
    if profiled := profiles(record):
        parts += [f"## operations of a step\n\n{PROFILES_LEGEND}", *map(profile_table, profiled.values())]
    parts += [] if record["dry"] else [f"## charts\n\n{CHARTS}"]
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
    if isinstance(result, dict) and "contenders" in result:
        return totals(result)
    if not isinstance(result, dict) or "errors" not in result:
        return str(result["verdict"] if isinstance(result, dict) and "verdict" in result else result)
    errors = [f"{name} {max(each):.1e}" for name, each in result["errors"].items()]
    without = [f"without {name}: {why}" for name, why in result.get("without", {}).items()]
    return "; ".join([f"{result['verdict']}, errors {', '.join(errors)}", *without])


def _first(seconds: dict | None) -> str:
    return "".join(f", {name} first call {s:.1f} s" for name, s in (seconds or {}).items())


LEGEND = """Ratios are stock, compile or others' kernels over fusedact, those in a run of their own: medians of
interleaved rounds, of cold device time where nothing else is said: each call takes other inputs than the last. Noise is
stock against itself. Bytes are the least that the phase can move. The share is of the measured ceilings. Memory is what
a call holds at its peak, MiB."""

LOSSES_LEGEND = """Columns from stock on are their time over fusedact's, others' kernels in a run of their own. Shares
are of the copy's bytes, a head's of its products' FLOP/s. `no_grad` is a value alone; others make gradients with it
where they make any."""

_TIMES = (
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
)
_RATES = (
    ("GB/s", lambda r: _optional(r.gbps, ".0f")),
    ("TFLOP/s", lambda r: _optional(r.tflops, ".1f")),
    ("share", lambda r: _optional(r.share, ".0%")),
    ("memory, stock / ours", lambda r: r.memory),
    ("target", lambda r: _optional(r.target, ".1f")),
    ("threshold", lambda r: r.threshold),
)


def _others(rows: list[Row], heading: str = "{}", form: str = ".3f") -> tuple:
    """A column for each of others' kernels that any of the rows has."""
    names = dict.fromkeys(name for row in rows for name in row.others)
    return tuple((heading.format(name), lambda r, name=name: _optional(r.others.get(name), form)) for name in names)


def _short_table(rows: list[Row]) -> str:
    before = (*_TIMES[:4], ("stock / fusedact", _TIMES[5][1]), ("compile / fusedact", _TIMES[9][1]))
    return _table((*before, *_others(rows, "{} / fusedact"), ("share of the ceiling", _RATES[2][1])), rows)


def _losses_table(rows: list[Row]) -> str:
    before = (
        *_TIMES[:2],
        ("µs", _TIMES[3][1]),
        _RATES[0],
        ("share of the ceiling", _RATES[2][1]),
        ("stock", lambda r: f"{r.ratio:.2f}"),
        ("torch.compile", lambda r: _optional(r.compile, ".2f")),
    )
    return _table((*before, *_others(rows, form=".2f"), _RATES[3]), rows)


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _table(columns: tuple, rows: list[Row]) -> str:
    return grid([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in rows])


def _fits_table(runs: dict[str, dict]) -> str:
    """Seconds of each run, compilation apart, and a step against stock's loop on rows that are on the device."""
    lines = []
    for name, run in runs.items():
        times = [f"{run[key]:.4g}" for key in ("took", "seconds", "step_us", "stock_step_us")]
        lines.append([name, f"{run['steps']:,}", *times, f"{run['stock_step_us'] / run['step_us']:.1f}"])
    return grid(["run", "steps", "seconds", "target", "µs a step", "stock's loop", "stock / fusedact"], lines)


def gpu_table(results: Path) -> str:
    """The README's, of the newest record of a GPU."""
    found = newest(results)
    if found is None:
        return NO_RECORD
    _, record = found
    shown = [row for row in rows(record) if row.phase != "backward"]
    losses = [row for row in shown if row.loss]
    parts = [gpu_source(record), _short_table([row for row in shown if not row.loss])]
    parts += [LOSSES_LEGEND, _losses_table(losses)] if losses else []
    return "\n\n".join([*parts, *([_fits_table(runs)] if (runs := fits(record)) else [])])


def gpu_source(record: dict) -> str:
    machine = record["machine"]
    names = ", ".join(f"`bench/results/{name}`" for name in record["records"])
    return (
        f"{machine['device']}, torch {machine['torch']}, Triton {machine['triton']}, {record['date'][:10]}, commit "
        f"{record['commit']}: `python bench/gpu.py`, {names}. Device time, cold."
    )
