"""Tables of what profilers saw of a step, stock and fused, in a GPU's record."""

from bench.reporting.markdown import grid

SHOWN = 8  # operations of a step, the longest first
WIDEST = 60  # characters of a kernel's name, which C++ makes hundreds of
LEGEND = """A step under torch's profiler, by operation: its launches, their time on the device, the least bytes that it
can move, and its share of what the measured ceilings allow. Proton's are Triton's own profiler's."""


def totals(found: dict) -> str:
    """A line: of each contender what a step launches, and its time without a profiler."""
    each = {name: f"{run['calls']:g} launches, {run['time_us']['median']:.4g} µs" for name, run in _runs(found)}
    stock, fused = (run["time_us"]["median"] for _, run in _runs(found))
    return "; ".join([*(f"{name} {text}" for name, text in each.items()), f"stock / fused {stock / fused:.2f}"])


def profiles(record: dict) -> dict[str, dict]:
    """What was profiled, by name."""
    return record["sections"].get("profiles", {}).get("results", {})


def profile_table(found: dict) -> str:
    """One unit: each contender's longest operations, and Proton's kernels, or why there are none."""
    lines = []
    for name, run in _runs(found):
        for row in run["rows"][:SHOWN]:
            share = "" if row["share"] is None else f"{row['share']:.0%}"
            moved = "" if row["bytes"] is None else f"{row['bytes']:,}"
            kernels = ", ".join(f"`{kernel[:WIDEST]}`" for kernel in row["kernels"])
            lines.append([name, f"`{row['name']}`", kernels, f"{row['calls']:g}", f"{row['us']:,.1f}", moved, share])
    text = grid(["", "operation", "kernels", "launches", "µs", "bytes", "share"], lines)
    return f"### {found['title']}\n\n{totals(found)}\n\n{text}{_proton(found.get('proton'))}"


def _proton(found: dict | None) -> str:
    if found is None:
        return ""
    if "error" in found:
        return f"\n\nProton: {found['error']}"
    lines = [
        [f"`{row['name']}`", f"{row.get('count', 0):g}", f"{row.get('time (ns)', 0) * 1e-3:,.1f}"]
        for row in found["rows"][:SHOWN]
    ]
    return f"\n\n{grid(['Proton: kernel', 'launches', 'µs'], lines)}"


def _runs(found: dict) -> list[tuple[str, dict]]:
    return list(found["contenders"].items())
