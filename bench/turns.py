"""Calls timed in turn on one CPU thread, so that a slow spell of the machine falls on all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console
from rich.table import Table

Call = Callable[[], object]
TURNS, SMOKE_TURNS = 400, 2
BLOCK = 0.5e-3  # seconds that the first contender's block aims at


@dataclass(frozen=True)
class Timing:
    """Of one contender: µs a call, and its blocks over those of the first in the same turn."""

    least: float
    median: float
    ratio: float
    ratio_low: float  # 20 %
    ratio_high: float  # 80 %


Rows = dict[tuple[str, ...], dict[str, Timing]]


def timed(calls: dict[str, Call], turns: int) -> dict[str, Timing]:
    """Thread CPU time of small blocks of each call, A/B/A/B; who goes first changes from turn to turn."""
    for call in calls.values():
        _block(call, 20)
    first = next(iter(calls))
    count = max(1, round(BLOCK / min(_block(calls[first], 20) for _ in range(5))))
    names, blocks = list(calls), {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for turn in range(turns):
            for at in range(len(names)):
                name = names[(turn + at) % len(names)]
                blocks[name].append(_block(calls[name], count))
    finally:
        gc.enable()
    return {name: _timing(blocks[name], blocks[first]) for name in names}


def _block(call: Call, count: int) -> float:
    """Seconds a call."""
    started = time.thread_time()
    for _ in range(count):
        call()
    return (time.thread_time() - started) / count


def _timing(own: list[float], first: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(own, first, strict=True)]
    low, *_, high = statistics.quantiles(ratios, n=5)
    return Timing(min(own) * 1e6, statistics.median(own) * 1e6, statistics.median(ratios), low, high)


@contextmanager
def reported(request: pytest.FixtureRequest, title: str, heads: tuple[str, ...]) -> Iterator[Rows]:
    """What is timed meanwhile, on one thread, and its table at the end."""
    if request.config.option.smoke:
        title = f"SMOKE, no figures. {title}"
    threads, rows = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    yield rows
    torch.set_num_threads(threads)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        if rows:
            _table(title, rows, heads)


def _table(title: str, rows: Rows, heads: tuple[str, ...]) -> None:
    """µs a call of each contender, least and median; and the ratios to the first, the median of turns (20 to 80 %)."""
    shown = Table(*heads, title=title)
    names = list(next(iter(rows.values())))
    for name in names:
        shown.add_column(f"{name}, µs", justify="right")
    for name in names[1:]:
        shown.add_column(f"{name} / {names[0]}", justify="right")
    for row, timings in rows.items():
        times = [f"{t.least:.2f} {t.median:.2f}" for t in timings.values()]
        ratios = [f"{t.ratio:.3f} ({t.ratio_low:.2f} to {t.ratio_high:.2f})" for t in list(timings.values())[1:]]
        shown.add_row(*row, *times, *ratios)
    Console(width=160).print(shown)
