"""Draws calls, networks and files of tests/samples/fuzzing.py for as long as asked, and prints what is found wrong.

`make fuzz SECONDS=60` or `make fuzz HOURS=8`: a process for each core, random seeds, hypothesis's examples kept in
runs/fuzz, where failures.txt gets a line for REGRESSIONS for each failure. What parses files goes to atheris (see
tools/fuzz_parsers.py) where it imports. The exit status is 1 after a failure; a worker that dies or hangs is one.
"""

import argparse
import importlib.util
import os
import random
import sys
import time
import traceback
from collections import Counter
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "runs/fuzz"
EXAMPLES = 40  # of a target, before the next one's turn
PARSER_SECONDS = 60  # of atheris on a parser, before the next one's turn
GRACE = 300  # seconds after the time is up, in which a worker ends what it does


def work(number: int, names: list[str], seed: int, until: float, told: Queue) -> None:
    """In a process of its own: targets in random order until it is time."""
    fuzz = prepared()
    chosen = random.Random(seed)
    while time.time() < until:
        name = chosen.choice(names)
        if name in fuzz.OF_FILES and importlib.util.find_spec("atheris"):
            told.put((name, *guided(name, min(PARSER_SECONDS, until - time.time()))))
        else:
            told.put((name, *drawn(fuzz, name, chosen.getrandbits(64), until)))
    told.put((number, None, None))


def prepared() -> Any:
    """The samples, kernels interpreted and counted, memory NaN until it is written."""
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which reads it
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch

    torch.set_num_threads(1)
    torch.set_warn_always(True)  # else only the first of two calls warns
    torch.use_deterministic_algorithms(True, warn_only=True)
    from samples import fuzzing, outcomes

    outcomes.Launches.counted()
    return fuzzing


def drawn(fuzz: Any, name: str, seed: int, until: float) -> tuple[int, str]:
    """How many examples were looked at, and a line for the least one that failed, if any did."""
    import hypothesis
    from hypothesis.database import DirectoryBasedExampleDatabase

    count, found = 0, ""

    def look(example: Any) -> None:
        nonlocal count, found
        if time.time() > until:
            return
        count += 1
        try:
            problem = fuzz.problem(example)
        except Exception as error:  # of the samples themselves
            where = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{error!r} at {where.filename}:{where.lineno}"
        if problem:
            found = f'    "{name}": {example!r},  # {problem}'
            raise AssertionError(problem)

    usual = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=DirectoryBasedExampleDatabase(OUT / "examples"),
        phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    look.__qualname__ = name  # the database's key
    try:
        hypothesis.seed(seed)(usual(hypothesis.given(fuzz.TARGETS[name])(look)))()
    except Exception as error:  # a failure; one that does not fail again is told as well
        found = found or f'    "{name}": {error!r}'
    return count, found


def guided(name: str, seconds: float) -> tuple[int, str]:
    from tools.fuzz_parsers import run

    return run(name, max(int(seconds), 1))


def main() -> int:
    parser = argument_parser()
    options = parser.parse_args()
    fuzz = prepared()
    names = options.only.split(",") if options.only else [*fuzz.TARGETS]
    if unknown := [name for name in names if name not in fuzz.TARGETS]:
        parser.error(f"no target {', '.join(unknown)}; there are {', '.join(fuzz.TARGETS)}")
    OUT.mkdir(parents=True, exist_ok=True)
    seconds = options.hours * 3600 if options.hours else options.seconds
    context, until, seed = get_context("spawn"), time.time() + seconds, options.seed or random.getrandbits(32)
    told = context.Queue()
    workers = [
        context.Process(target=work, args=(number, names, seed + number, until, told)) for number in range(options.jobs)
    ]
    for worker in workers:
        worker.start()
    try:
        failures = watched(workers, told, names, until)
    finally:
        for worker in workers:
            worker.terminate()
    print(f"seed {seed}: {len(failures)} failures" + (f", in {OUT / 'failures.txt'}" if failures else ""))
    return int(bool(failures))


def watched(workers: list[Any], told: Queue, names: list[str], until: float) -> list[str]:
    """Shows how far it is; gives the failures, each once."""
    from queue import Empty

    from rich.live import Live

    counts: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    failures: dict[str, str] = {}
    running = set(range(len(workers)))

    def one(name: str | int, count: int | None, failure: str | None) -> None:
        if count is None:
            running.discard(name)
            return
        counts[name] += count
        if failure:
            failed[name] += 1
            if failure not in failures:
                failures[failure] = name
                live.console.print(failure, markup=False, highlight=False)
                with (OUT / "failures.txt").open("a") as file:
                    file.write(failure + "\n")

    with Live(table(names, counts, failed, until), refresh_per_second=1) as live:
        while running and time.time() < until + GRACE:
            ended = [number for number in sorted(running) if not workers[number].is_alive()]  # what they told is there
            try:
                one(*told.get(timeout=1))
            except Empty:
                for number in ended:
                    one("workers", 0, f"# worker {number} ended with {workers[number].exitcode}")
                    running.discard(number)
            live.update(table(names, counts, failed, until))
        for number in sorted(running):
            one("workers", 0, f"# worker {number} did not end")
    return list(failures)


def table(names: list[str], counts: Counter[str], failed: Counter[str], until: float) -> Any:
    from rich.table import Table

    shown = Table("target", "examples", "failed", title=f"{max(until - time.time(), 0):,.0f} s left")
    for name in (*names, "workers"):
        if counts[name] or failed[name]:
            shown.add_row(name, f"{counts[name]:,}", str(failed[name] or ""))
    shown.add_row("all", f"{counts.total():,}", str(failed.total() or ""))
    return shown


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="0: a random one, which is told")
    parser.add_argument("--only", default="", help="names of targets, with commas between")
    return parser


if __name__ == "__main__":
    sys.exit(main())
