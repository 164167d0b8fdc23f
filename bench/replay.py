"""pytest-benchmark's timer for what was timed already: contenders in turn, which its own rounds cannot do."""

from collections.abc import Iterable, Iterator
from itertools import chain

import pytest


class Replay:
    """A clock of which each second look comes a sample's seconds after the first."""

    __name__ = "interleaved"  # of the timer in pytest-benchmark's JSON

    def __init__(self) -> None:
        self._looks: Iterator[float] = iter(())

    def load(self, samples: Iterable[float]) -> None:
        self._looks = chain.from_iterable((0.0, sample) for sample in samples)

    def __call__(self) -> float:
        return next(self._looks)


replayed = Replay()
by_replay = pytest.mark.benchmark(timer=replayed)


def replay(benchmark, group: str, samples: list[float], info: dict) -> None:
    """Hands the samples to pytest-benchmark; the test is marked `by_replay`."""
    benchmark.group = group
    benchmark.extra_info |= info
    replayed.load(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples))
