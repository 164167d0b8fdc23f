"""Tables of the CPU suites' record: a line per op and phase for the README, a line per case and phase for the docs."""

import shlex
from statistics import geometric_mean

from bench.reporting.markdown import grid
from bench.reporting.records import SUITES
from bench.reporting.timed import Timed, of_suites

NO_RECORD = "No record of the suites yet."
ON_A_CPU = """On a CPU fused layers run stock's own operations, so that their aim is 1.00 within the noise; what differs
are whole runs, which `fit` takes without the loop's overhead, and heads, which take their logits in chunks. Ratios are
stock's time over the contender's, medians of interleaved rounds: above 1 it is faster than stock. Noise is how
far the 20 and 80 % points of stock's ratio to itself, by round, are from 1, the larger of the two."""
LEGEND = """In brackets the 20 and 80 % points of the rounds. GB/s and TFLOP/s are of the least bytes and FLOPs; what
lies in a cache is faster than the copy, whose ceiling is memory's. Errors are against float64, the worst of value and
gradients."""

Group = dict[str, Timed]  # one phase of one case by contender


def short(record: dict) -> str:
    """The README's: of each op and phase the geometric mean over its cases and their range; then the trainers."""
    ops, trainers = _groups(record)
    parts = [suite_source(record), ON_A_CPU]
    parts += [_within(ops), _by_op(ops)] if ops else []
    return "\n\n".join([*parts, *_trainers(trainers)])


def full(record: dict) -> str:
    """The docs': every case and phase; then the trainers."""
    ops, trainers = _groups(record)
    return "\n\n".join([suite_source(record), ON_A_CPU, LEGEND, _by_case(ops), *_trainers(trainers)])


def suite_source(record: dict) -> str:
    """Where, with what, when and by which command."""
    machine, ceilings = record["machine_info"], record["machine_info"]["ceilings"]
    commit, threads = record["commit_info"], machine["threads"]
    name = f"{(commit.get('id') or 'unknown')[:7]}{'-dirty' if commit.get('dirty') else ''}"
    measured = ", ".join(name.replace(",", f" {rate:.3g}") for name, rate in ceilings.items())
    command = f"python -m pytest {shlex.join(machine['arguments'])}"
    return (
        f"{machine['device']}, {machine['cores']} cores, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {machine['torch']}, {record['datetime'][:10]}, commit {name}:\n`{command}`,\n"
        f"record `bench/results/{SUITES}`. Measured ceilings: {measured}."
    )


def _groups(record: dict) -> tuple[list[Group], list[Group]]:
    """Of ops and of trainers by case and phase, in the record's order; ValueError where one lacks stock or fusedact."""
    found: dict[tuple[str, str], Group] = {}
    for each in of_suites(record):
        found.setdefault((each.case, each.phase), {})[each.contender] = each
    for (case, phase), group in found.items():
        if not {"stock", "fusedact"} <= set(group):
            raise ValueError(f"{case}, {phase}: expected stock and fusedact, got {', '.join(group)}")
    groups = list(found.values())
    trainers = [group for group in groups if group["stock"].of_trainer]
    return [group for group in groups if not group["stock"].of_trainer], trainers


def _others(groups: list[Group]) -> list[str]:
    names = dict.fromkeys(name for group in groups for name in group)
    return [name for name in names if name not in ("stock", "fusedact")]


def _by_case(groups: list[Group]) -> str:
    others = _others(groups)
    headings = ["case", "phase", "stock µs", "fusedact µs", *(f"stock / {name}" for name in ("fusedact", *others))]
    headings += ["noise", "GB/s", "TFLOP/s", "share of the ceiling", "error: stock", "ours"]
    lines = []
    for group in groups:
        stock, ours = group["stock"], group["fusedact"]
        lines.append([
            ours.case, ours.phase, f"{stock.micros:.4g}", f"{ours.micros:.4g}",
            *(_spread(group.get(name)) for name in ("fusedact", *others)), f"{ours.noise:.1%}",
            f"{ours.bytes / ours.micros * 1e-3:.3g}", f"{ours.flops / ours.micros * 1e-6:.2g}",
            "" if ours.share is None else f"{ours.share:.0%}", _error(stock), _error(ours),
        ])  # fmt: skip
    return grid(headings, lines)


def _by_op(groups: list[Group]) -> str:
    others = _others(groups)
    by_op: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        ours = group["fusedact"]
        by_op.setdefault((ours.op, ours.phase), []).append(group)
    lines = []
    for (op, phase), cases in by_op.items():
        cells = [_range([group[name].ratio for group in cases if name in group]) for name in ("fusedact", *others)]
        noise = max(group["fusedact"].noise for group in cases)
        lines.append([f"`{op}`", phase, str(len(cases)), *cells, f"{noise:.1%}"])
    ratios = [f"stock / {name}" for name in ("fusedact", *others)]
    return grid(["op", "phase", "cases", *ratios, "most noise"], lines)


def _within(groups: list[Group]) -> str:
    """How many meet the aim, and who misses it most."""
    ours = [group["fusedact"] for group in groups]
    others = [each for each in ours if not _is_one(each)]
    faster, slowest = sum(each.ratio > 1 for each in others), min(ours, key=lambda each: each.ratio)
    return (
        f"Of {len(ours)} cases and phases {len(ours) - len(others)} are 1.00 within their rounds' 20 to 80 % or their "
        f"noise,\n{faster} are faster and {len(others) - faster} slower; the slowest is `{slowest.case}`, "
        f"{slowest.phase}, at {slowest.ratio:.2f}."
    )


def _is_one(each: Timed) -> bool:
    return each.low <= 1 <= each.high or abs(each.ratio - 1) <= each.noise


def _trainers(groups: list[Group]) -> list[str]:
    if not groups:
        return []
    names = ["fusedact", *_others(groups)]
    lines = []
    for group in groups:
        stock, ratios = group["stock"], [_spread(group.get(name)) for name in names]
        lines.append([f"`{stock.case}`", stock.phase, _time(stock.micros), *ratios, f"{stock.noise:.1%}"])
    return [grid(["trainer", "", "stock", *(f"stock / {name}" for name in names), "noise"], lines)]


def _time(micros: float) -> str:
    unit, name = (1e6, "s") if micros >= 1e6 else (1e3, "ms") if micros >= 1e3 else (1, "µs")
    return f"{micros / unit:.3g} {name}"


def _range(ratios: list[float]) -> str:
    if not ratios:
        return ""
    mean = f"{geometric_mean(ratios):.2f}"
    return f"{mean} ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else mean


def _spread(each: Timed | None) -> str:
    return "" if each is None else f"{each.ratio:.2f} ({each.low:.2f} to {each.high:.2f})"


def _error(each: Timed) -> str:
    return f"{max(each.errors):.1e}" if each.errors else ""
