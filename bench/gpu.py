"""Everything a CUDA machine can tell, in one command: tests, ceilings, ops, training steps; a record of it all.

python bench/gpu.py [--budget SECONDS] [--only SECTION] [--tests-only] [--dry-run]

The record and its tables go to bench/results, or to $OUT where that is set. Every unit of work is done by a worker
process: what crashes, hangs or loses the device costs that unit alone. Where .git is absent, FUSEDACT_COMMIT names
the commit. --only runs one section, and may recur: a record of its own, whose sections `bench/report.py` takes together
with those that were run at the same commit on the same device. `exhaustive`, the tests that `make test` leaves out, and
`sanitized` run where they are named alone. What pytest printed stands beside the record: `tests.log`, `exhaustive.log`.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from threading import Timer
from typing import IO, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import report, suite  # noqa: E402  (found through the line above)
from bench.worker import GRACE, SILENCE  # noqa: E402

WARMERS = 6  # processes that fill the compilers' caches together
WARM_BYTES = 3e9  # of a forward: larger cases together could fill the device
ON_CPUS = ("bench", "codegen", "distributed", "torchrun")  # nothing to learn here: dry runs, other chips, CPU processes
WORKER = [sys.executable, "-m", "bench.worker"]


@dataclass
class Run:
    """One call of this command: its record so far, and where it is shown."""

    dry: bool
    folder: Path
    console: Console
    progress: Progress
    record: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        line = f"{'DRY RUN ' if self.dry else ''}{text}"
        self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def environment(self) -> dict[str, str]:
        """For a child process: this tree importable, nobody's choice of backend or test options, no GPU if dry."""
        dropped = ("TRITON_INTERPRET", "FUSEDACT_BACKEND", "PYTEST_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        dry = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if self.dry else {}
        # One thread: each of a dozen processes would start a pool of its own.
        return kept | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_COMPILE_THREADS": "1"} | dry


@dataclass(frozen=True)
class Section:
    """A part of the run, and its share of the time that it and those after it have."""

    name: str
    run: Callable[[Run, float], dict]
    share: float
    dry_only: bool = False
    named_only: bool = False

    def chosen(self, names: list[str] | None, dry: bool) -> bool:
        named = self.name in names if names else not self.named_only
        return named and (dry or not self.dry_only)


def tests(run: Run, deadline: float) -> dict:
    """The tests of `make test` on the GPU, not interpreted; a dry run collects them only."""
    return _pytest(run, "tests", "not exhaustive", deadline)


def exhaustive(run: Run, deadline: float) -> dict:
    """The tests of `make test-exhaustive`, likewise."""
    return _pytest(run, "exhaustive", "exhaustive", deadline)


def _pytest(run: Run, name: str, marked: str, deadline: float) -> dict:
    command = [sys.executable, "-m", "pytest", "tests", "-m", marked]
    if run.dry:
        return _collected([*command, "--collect-only"], run)
    junit = Path(tempfile.mkdtemp(), "junit.xml")
    command += ["--tb=short", f"--junitxml={junit}", *(f"--ignore=tests/test_{name}.py" for name in ON_CPUS)]
    if importlib.util.find_spec("xdist"):  # they wait for Triton's compiler, so for cores
        command += ["-n", str(os.cpu_count() or 2), "--dist=worksteal"]
    if importlib.util.find_spec("pytest_timeout"):
        command += [f"--timeout={2 * SILENCE}", "--timeout-method=thread"]
    log = run.folder / f"{name}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=run.environment(), stdout=out, stderr=out)
        stopped = suite.stopped_at(process, deadline)
    found = suite.outcomes(junit) if junit.exists() else {}
    if stopped:
        return found | {"error": "stopped at its time limit, what had finished is counted"}
    if process.returncode and not found.get("failed"):
        return found | {"error": f"pytest ended with {process.returncode}: {_tail(log.read_text())}"}
    return found


def _collected(command: list[str], run: Run) -> dict:
    done = subprocess.run(command, cwd=ROOT, env=run.environment(), capture_output=True, text=True)
    found = re.search(r"(\d+)(?:/\d+)? tests collected", done.stdout)
    if done.returncode or not found:
        return {"error": f"pytest ended with {done.returncode}: {_tail(done.stdout + done.stderr)}"}
    return {"collected": int(found[1])}


def ceilings(run: Run, deadline: float) -> dict:
    from bench.ceilings import CEILINGS  # in here, as below: what does not import costs its own section only

    return _units(run, "ceilings", list(CEILINGS), deadline, _interpreted(run))


def ops(run: Run, deadline: float) -> dict:
    """Every case, right first, then against stock and torch.compile, after a common filling of compile caches."""
    from fusedact.profiling.cases import CASES, by_name
    from fusedact.profiling.ops import work

    cases = by_name(CASES, run.dry)
    small = [name for name, case in cases.items() if work(case, "forward").bytes < WARM_BYTES]
    warmers = min(WARMERS, max(1, (os.cpu_count() or 1) // 2))
    warm_until = time.time() + 0.3 * (deadline - time.time())
    with ThreadPoolExecutor(warmers) as pool:
        parts = pool.map(lambda i: _units(run, "warm", small[i::warmers], warm_until, quiet=True), range(warmers))
        first_calls = {name: result for part in parts for name, result in part["results"].items()}
    run.say(f"first calls of {len(first_calls)} cases compiled")
    return _units(run, "ops", list(cases), deadline, _fallback(run)) | {"first_calls": first_calls}


def interpreted(run: Run, deadline: float) -> dict:
    """In place of a GPU: the kernels' results, interpreted."""
    from fusedact.profiling.cases import CASES, by_name

    names = list(by_name(CASES, run.dry))
    return _units(run, "check", names, deadline, {"FUSEDACT_BACKEND": "triton"} | _interpreted(run))


def peers(run: Run, deadline: float) -> dict:
    """Some of the losses again, beside others' kernels: apart, since one that fails may lose the device."""
    from fusedact.profiling.cases import PEERED, by_name

    return _units(run, "peers", list(by_name(PEERED, run.dry)), deadline, _fallback(run))


def autotuned(run: Run, deadline: float) -> dict:
    """Some of the cases again, with torch.compile's max-autotune as the compiler."""
    from fusedact.profiling.cases import AUTOTUNED, by_name

    return _units(run, "autotuned", list(by_name(AUTOTUNED, run.dry)), deadline, _fallback(run))


def steps(run: Run, deadline: float) -> dict:
    from fusedact.profiling.cases import STEPS

    return _units(run, "steps", [step.name for step in STEPS], deadline)


def profiles(run: Run, deadline: float) -> dict:
    """Each kernel of a training step and of some ops: launches, time, bytes, share of the roofline."""
    from bench.profiles import PROFILED

    return _units(run, "profiles", list(PROFILED), deadline, _fallback(run))


def fits(run: Run, deadline: float) -> dict:
    from bench.fits import FITS

    return _units(run, "fits", [fit.name for fit in FITS], deadline)


def sanitized(run: Run, deadline: float) -> dict:
    """Each kernel once, under both of compute-sanitizer's checkers."""
    from bench import sanitizer

    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"skipped": {"compute-sanitizer": "not on this machine"}}
    names = list(sanitizer.units(run.dry))
    found: dict[str, Any] = {"results": {}, "errors": {}, "skipped": {}}
    for i, checker in enumerate(sanitizer.CHECKERS):
        until = time.time() + (deadline - time.time()) / (len(sanitizer.CHECKERS) - i)
        with tempfile.TemporaryDirectory() as folder:
            before = sanitizer.command(program, checker, Path(folder))
            environment = sanitizer.OWN_ALLOCATIONS | _interpreted(run)
            part = _units(run, "sanitized", names, until, environment, before=before)
            faults = part.get("error") or sanitizer.faults(Path(folder))
        for kind in found:
            found[kind] |= {f"{checker}: {name}": value for name, value in part[kind].items()}
        found["errors"] |= {checker: faults} if faults else {}
    return found


SECTIONS = (
    Section("tests", tests, 0.40),
    Section("ceilings", ceilings, 0.07),
    Section("fits", fits, 0.10),
    Section("ops", ops, 0.43),
    Section("peers", peers, 0.12),
    Section("steps", steps, 0.10),
    Section("profiles", profiles, 0.12),
    Section("autotuned", autotuned, 0.15),
    Section("interpreted", interpreted, 0.10, dry_only=True),
    Section("exhaustive", exhaustive, 0.40, named_only=True),
    Section("sanitized", sanitized, 0.10, named_only=True),
)


def _interpreted(run: Run) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if run.dry else {}


def _fallback(run: Run) -> dict[str, str]:
    return {"FUSEDACT_BACKEND": "torch"} if run.dry else {}


def _units(
    run: Run,
    kind: str,
    names: list[str],
    deadline: float,
    environment: dict[str, str] | None = None,
    quiet: bool = False,
    before: Sequence[str] = (),
) -> dict:
    """What a worker makes of the units; where it dies, another takes what is left. `before`: a command that runs it."""
    found: dict[str, Any] = {"results": {}, "errors": {}, "skipped": {}}
    left = list(names)
    bar = run.progress.add_task(kind, total=len(names), visible=not quiet)
    while left and time.time() < deadline:
        job = {"kind": kind, "names": left, "dry": run.dry, "deadline": deadline}
        begun = None
        with tempfile.TemporaryFile("w+") as log:
            with _worker([*before, *WORKER], job, run.environment() | (environment or {}), log) as process:
                for line in process.stdout:
                    answer = json.loads(line)
                    begun = answer["unit"]
                    if "outcome" in answer:
                        left.remove(begun)
                        found[answer["outcome"]][begun] = answer["value"]
                        run.progress.advance(bar)
                        if not quiet:
                            run.say(f"{kind}: {begun}: {_in_short(answer)}")
            log.seek(0)
            ended = f"its process ended with {process.returncode}: {_tail(log.read())}"
        if begun is None:
            found["error"] = ended
            break
        if begun in left:
            left.remove(begun)
            found["errors"][begun] = ended
    found["skipped"] |= dict.fromkeys(left, "no worker or no time left")
    run.progress.remove_task(bar)
    return found


@contextmanager
def _worker(command: list[str], job: dict, environment: dict[str, str], log: IO[str]) -> Iterator[subprocess.Popen]:
    """A worker at the job. One that does not end itself in time, stuck in the driver perhaps, is killed."""
    command = [*command, json.dumps(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=environment)
    overdue = Timer(max(0, job["deadline"] - time.time()) + 2 * GRACE, process.kill)
    overdue.start()
    try:
        with process:
            yield process
    finally:
        overdue.cancel()


def _in_short(answer: dict) -> str:
    value = answer["value"]
    if isinstance(value, dict) and "contenders" in value:
        return report.totals(value)
    if answer["outcome"] != "results" or not isinstance(value, dict) or "verdict" not in value:
        return f"{'' if answer['outcome'] == 'results' else answer['outcome'] + ' '}{value}"
    ratios = []
    for phase, measured in value.get("phases", {}).items():
        device = next(iter(measured["times"].values()))
        ratios.append(f"{phase} {device['stock']['median'] / device['fusedact']['median']:.2f}")
    return ", ".join([value["verdict"], *ratios, *(f"without {name}" for name in value.get("without", ()))])


def _smi() -> str:
    """Driver, clocks, temperature and power as they are; they are read, never set."""
    query = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"


def _commit() -> str:
    if named := os.environ.get("FUSEDACT_COMMIT"):
        return named
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _tail(text: str, lines: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def _folder(dry: bool) -> Path:
    if dry:
        return Path(tempfile.mkdtemp(prefix="fusedact-dry-run-"))
    folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(record: dict, folder: Path) -> Path:
    """The record and its tables, anew after every section, so that a run cut short leaves what it had."""
    device = re.sub(r"[^a-z0-9]+", "-", record["machine"].get("device", "unknown").lower())
    stem = f"{device}-{record['date'].replace(':', '')}-{record['commit']}"
    path = folder / f"{'dry-run-' if record['dry'] else ''}{stem}.json"
    path.write_text(json.dumps(record, indent=1))
    try:
        text = report.markdown(record)
    except Exception:  # the figures are safe; what they look like must not end the run
        text = traceback.format_exc()
    path.with_suffix(".md").write_text(text)
    return path


def _short_table(record: dict) -> Table:
    """A line a case: the ratios to stock, and of both phases the rest."""
    table = Table()
    headings = ("case", "forward", "backward", "both", "wall", "compile", "share", "threshold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "case" else "right", no_wrap=True)
    by_case: dict[str, list[report.Row]] = {}
    for row in report.rows(record):
        by_case.setdefault(row.case, []).append(row)
    for case, phases in by_case.items():
        last = phases[-1]
        ratios = {row.phase: f"{row.ratio:.2f}" for row in phases}
        first = ratios.get("forward", ratios.get("no_grad", ""))
        compiled = "" if last.compile is None else f"{last.compile:.2f}"
        share = "" if last.share is None else f"{last.share:.0%}"
        judged = next((row.threshold for row in phases if row.missed), last.threshold).partition(":")[0]
        each = (first, ratios.get("backward", ""), f"{last.ratio:.2f}")
        table.add_row(case, *each, f"{last.wall:.2f}", compiled, share, judged)
    return table


def _run(run: Run, chosen: list[Section], budget: float) -> Path | None:
    """The machine, then every section in what time is left for it; None where there is no GPU to measure."""
    end = time.time() + budget
    facts = _units(run, "facts", ["machine"], end, quiet=True)
    machine = facts["results"].get("machine", {"device": "unknown", **facts["errors"]})
    if not run.dry and not machine.get("gpu", True):
        return None
    run.record |= {
        "kind": "gpu",
        "dry": run.dry,
        "date": datetime.now().isoformat(timespec="seconds"),
        "commit": _commit(),
        "budget": budget,
        "machine": machine | {"state": _smi()},
        "sections": {},
    }
    path = _write(run.record, run.folder)
    for i, section in enumerate(chosen):
        started = time.time()
        limit = (end - started) * section.share / sum(later.share for later in chosen[i:])
        run.say(f"{section.name}: {limit:.0f} s")
        try:
            data = section.run(run, started + limit)
        except Exception as error:
            data = {"error": f"{type(error).__name__}: {error}"}
        timed = {"seconds": time.time() - started, "limit": limit, "state": _smi()}
        run.record["sections"][section.name] = data | timed
        path = _write(run.record, run.folder)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=460, metavar="SECONDS", help="for everything [460]")
    parser.add_argument("--only", choices=[s.name for s in SECTIONS], action="append", help="these sections")
    parser.add_argument("--tests-only", action="store_const", const=["tests"], dest="only")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU: all code paths, no figures")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen = [section for section in SECTIONS if section.chosen(args.only, args.dry_run)]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        run = Run(args.dry_run, _folder(args.dry_run), console, progress)
        path = _run(run, chosen, args.budget)
    if path is None:
        print("no CUDA device here; --dry-run exercises everything but the GPU", file=sys.stderr)
        return 2
    run.say(report.DRY if run.dry else f"{run.record['machine'].get('device')}, stock / fusedact:")
    console.print(_short_table(run.record))
    faults = report.failures(run.record)
    for line in [*faults[:40], f"{len(faults)} faults" if faults else "all good", f"record {path}"]:
        run.say(line)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
