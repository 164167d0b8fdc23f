"""Trains for a long time through every engine and looks for what grows: memory, handles, threads, caches, files.

`make soak MINUTES=30` runs each entry of soak_runs.RUNS in a process of its own, all at once, on a CPU. Every few
seconds a process tells its resident memory and what else it holds. The first half is warm-up and is not judged.
How much memory and how many Python objects the rest adds in a cycle, the median of all slopes (Theil and Sen's) tells.
An object in every second cycle is a fault, but for those of new entries in caches that have a bound; and so is memory
that grows by 20 kB in a cycle and a MB in all, or by a hundredth of what there is. Open files, threads, temporary files
and caches without a bound of their own may not grow at all from the first half of it to the second. A run of fewer than
50 cycles in that time is not judged, which is a fault too. A record and a picture go to --out.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np

WARM_UP = 1 / 2  # of the run
LEAST = {"samples": 4, "cycles": 50}  # that are judged
MEGABYTES = {"share": 0.01, "cycle": 0.02, "step": 1.0}  # allocators grow by steps, which are none of a cycle's
OBJECTS = {"cycle": 0.5, "entry": 3.0}  # an entry is a key, a value and what holds them
RULE = {"warm_up": WARM_UP, "least": LEAST, "megabytes": MEGABYTES, "objects": OBJECTS}
STEADY = ("files", "threads", "left behind")
PRIMITIVES = "16"  # that oneDNN keeps; of its own 1,024 each new shape adds one, stock or not, for the whole run
CONTAINERS = (dict, list, set, WeakKeyDictionary, WeakValueDictionary)


def caches() -> Iterator[tuple[str, int, int | None]]:
    """Name, size and bound (None: none) of each cache and container that a loaded module of the package holds."""
    for module_name, module in sorted(sys.modules.items()):
        if module_name.partition(".")[0] == "fusedact":
            yield from held(module_name, module)


def held(module_name: str, module: ModuleType) -> Iterator[tuple[str, int, int | None]]:
    """Those of one module, with those of its classes."""
    classes = {f".{name}": vars(kind) for name, kind in vars(module).items() if isinstance(kind, type)}
    own = {name: space for name, space in classes.items() if space.get("__module__") == module_name}
    for inside, space in {"": vars(module), **own}.items():
        for name, value in [*space.items()]:
            if hasattr(value, "cache_info") and value.__module__ == module_name:
                yield f"{module_name}{inside}.{name}", value.cache_info().currsize, value.cache_info().maxsize
            elif type(value) in CONTAINERS and not name.startswith("__"):
                yield f"{module_name}{inside}.{name}", len(value), None


def sample(seconds: float, cycles: int, process: Any) -> dict[str, Any]:
    """What this process holds now."""
    import gc

    gc.collect()
    with process.oneshot():
        return {
            "seconds": round(seconds, 1),
            "cycles": cycles,
            "megabytes": process.memory_info().rss / 1e6,
            "objects": len(gc.get_objects()),
            "files": process.num_fds(),
            "threads": process.num_threads(),
            "left behind": len(os.listdir(tempfile.gettempdir())),
            "caches": {name: size for name, size, bound in caches() if bound is None},
            "bounded": sum(size for _, size, bound in caches() if bound is not None),
        }


def soak(name: str, seconds: float, every: float, path: Path) -> None:
    """Repeats one of RUNS for so long; a line of JSON for each sample."""
    import psutil
    import torch
    from soak_runs import RUNS

    import fusedact

    torch.set_num_threads(1)
    backend, run = RUNS[name]
    draw, process, cycles = random.Random(0), psutil.Process(), 0
    torch.manual_seed(0)
    started = told = time.monotonic()
    with fusedact.use_backend(backend), path.open("w") as file:
        while time.monotonic() < started + seconds:
            run(draw)
            cycles += 1
            if (now := time.monotonic()) >= told:
                file.write(json.dumps(sample(now - started, cycles, process)) + "\n")
                file.flush()
                told = now + every


def start(name: str, out: Path, arguments: argparse.Namespace) -> tuple[subprocess.Popen, Path]:
    """A process that soaks, with a folder for temporary files of its own, under `out` as its samples are."""
    from soak_runs import RUNS

    place = out / name.replace(", ", "-").replace(" ", "-")
    temporary = place.with_suffix(".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    interpreted = {"TRITON_INTERPRET": "1"} if RUNS[name][0] == "triton" else {}
    own = {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": PRIMITIVES}
    environment = os.environ | own | interpreted
    samples = place.with_suffix(".jsonl")
    words = ["--only", name, "--samples", str(samples), "--minutes", str(arguments.minutes)]
    command = [sys.executable, __file__, *words, "--every", str(arguments.every)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), samples


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """The median slope between two points, Theil and Sen's."""
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def judged(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What grew by how much after the warm-up, and `faults`: what grew by more than the rule allows."""
    kept = samples[round(len(samples) * WARM_UP) :]
    if len(kept) < LEAST["samples"]:
        done = samples[-1]["cycles"] if samples else 0
        return {"cycles": done, "faults": [f"{len(samples)} samples are too few to judge"]}
    cycles = np.array([each["cycles"] for each in kept])
    passed = int(cycles[-1] - cycles[0])
    found: dict[str, Any] = {"cycles": kept[-1]["cycles"], "judged": passed, "seconds": kept[-1]["seconds"]}
    found["faults"] = [f"{passed} cycles are too few to judge"] if passed < LEAST["cycles"] else []
    grown = {}
    for what in ("megabytes", "objects", "bounded"):
        values = np.array([each[what] for each in kept])
        grown[what] = slope(cycles, values) * passed
        found[what] = {"median": round(float(np.median(values)), 2), "grown": round(grown[what], 3)}
    for what, most in _most(passed, found["megabytes"]["median"], grown["bounded"]).items():
        if grown[what] > most:
            found["faults"].append(f"{what} grew by {grown[what]:.3g}, where {most:.3g} may be")
    for what, before, after in _steady(kept):
        found[what] = after
        if after > before:
            found["faults"].append(f"{what} grew from {before} to {after}")
    return found


def _most(cycles: int, megabytes: float, entries: float) -> dict[str, float]:
    """What so many cycles may add, of so many megabytes and with so many new entries in caches that have a bound."""
    return {
        "megabytes": min(MEGABYTES["share"] * megabytes, MEGABYTES["step"] + MEGABYTES["cycle"] * cycles),
        "objects": OBJECTS["cycle"] * cycles + OBJECTS["entry"] * entries,
    }


def _steady(kept: list[dict[str, Any]]) -> Iterator[tuple[str, int, int]]:
    """Of what may not grow: its most in the first half and in the second."""
    flat: list[Mapping[str, int]] = [{what: each[what] for what in STEADY} | each["caches"] for each in kept]
    middle = len(flat) // 2
    for what in flat[-1]:
        before, after = (max(each.get(what, 0) for each in half) for half in (flat[:middle], flat[middle:]))
        if what in STEADY or after > before:
            yield what, before, after


def report(paths: Mapping[str, Path], out: Path) -> bool:
    """Judges, draws and tables the samples that lie there; whether nothing grew."""
    import torch
    from rich.console import Console
    from rich.table import Table

    samples = {name: _told(path) for name, path in paths.items()}
    found = {name: judged(each) for name, each in samples.items()}
    table = Table("run", "cycles", "MB", "grown, MB", "objects", "grown", "open files", "threads", "faults")
    for name, each in found.items():
        table.add_row(name, *(_numbers(each) if "seconds" in each else [""] * 7), "; ".join(each["faults"]))
    Console(width=160).print(table)
    machine = {"machine": "CPU", "cores": os.cpu_count(), "torch": str(torch.__version__)}
    record = {"setting": machine, "rule": RULE, "runs": found}
    (out / "soak.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "soak.png").write_bytes(picture(samples))
    return not any(each["faults"] for each in found.values())


def _told(path: Path) -> list[dict[str, Any]]:
    """The samples of a run, also of one that died, before the first or in the middle of a line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _numbers(each: Mapping[str, Any]) -> list[str]:
    memory, objects = each["megabytes"], each["objects"]
    numbers = [f"{each['judged']:,} of {each['cycles']:,}", f"{memory['median']:.0f}", f"{memory['grown']:+.2f}"]
    numbers += [f"{objects['median']:,.0f}", f"{objects['grown']:+,.0f}"]
    return [*numbers, f"{each['files']}", f"{each['threads']}"]


def picture(samples: Mapping[str, list[dict[str, Any]]]) -> bytes:
    """Resident memory over time, a small chart for each run."""
    from fusedact.plotting import png, style

    samples = {name: each for name, each in samples.items() if each}
    rows = -(-len(samples) // 3)
    figure = style.page(1.6 * rows + 0.6, "Resident memory of a process that trains, megabytes by minutes")
    parts = figure.subplots(rows, 3, squeeze=False).ravel()
    for axes in parts[len(samples) :]:
        axes.set_visible(False)
    for axes, (name, each) in zip(parts, samples.items(), strict=False):
        style.tidy(axes)
        minutes, megabytes = zip(*((one["seconds"] / 60, one["megabytes"]) for one in each), strict=True)
        axes.plot(minutes, megabytes, color=style.GREY if name.startswith("stock") else style.BLUE, linewidth=1.2)
        axes.axvline(minutes[-1] * WARM_UP, color=style.GRID, linewidth=1.2)
        axes.set_title(name, loc="left", fontsize=style.SMALL)
        axes.set_ylim(0, 1.2 * max(megabytes))
    return png(figure, dpi=80)


def watch(minutes: float, started: Mapping[str, tuple[subprocess.Popen, Path]]) -> bool:
    """Shows the time until all are done; whether all ended well."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as progress:
        bar = progress.add_task(f"{len(started)} processes", total=60 * minutes)
        begun = time.monotonic()
        while any(process.poll() is None for process, _ in started.values()):
            progress.update(bar, completed=time.monotonic() - begun)
            time.sleep(0.5)
    failed = [name for name, (process, _) in started.items() if process.returncode]
    for name in failed:
        print(f"{name} ended with {started[name][0].returncode}", file=sys.stderr)
    return not failed


def main() -> int:
    from soak_runs import RUNS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, metavar="SECONDS", help="between samples; 120 a run if not given")
    parser.add_argument("--only", choices=RUNS, action="append", help="one of the runs; may be given again")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--again", action="store_true", help="judge and draw what an earlier run left in --out")
    parser.add_argument("--samples", type=Path, help=argparse.SUPPRESS)  # this process is one of those
    arguments = parser.parse_args()
    arguments.every = arguments.every or arguments.minutes / 2
    if arguments.samples:
        soak(arguments.only[0], 60 * arguments.minutes, arguments.every, arguments.samples)
        return 0
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    names = arguments.only or [*RUNS]
    if arguments.again:
        paths = {name: out / f"{name.replace(', ', '-').replace(' ', '-')}.jsonl" for name in names}
        return not report(paths, out)
    started = {name: start(name, out, arguments) for name in names}
    try:
        well = watch(arguments.minutes, started)
    finally:
        for process, _ in started.values():
            process.kill()
    flat = report({name: path for name, (_, path) in started.items()}, out)
    return not (well and flat)


if __name__ == "__main__":
    sys.exit(main())
