"""pytest bench/test_ops.py: every op, phase and contender of the cases table; on a CPU of the cases of its size.

A case is first compared with float64, and fails where it is wrong; then all contenders are timed in turn, once for
each phase. What pytest-benchmark shows are those samples. extra_info: what the case is, and its `figures`.
"""

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch

from bench.replay import by_replay, replay
from bench.setting import THREADS, Setting
from fusedact.profiling.cases import Case, by_name
from fusedact.profiling.choosing import cases_for
from fusedact.profiling.figures import contenders_of, described, figures, samples
from fusedact.profiling.measure import Prepared, prepare
from fusedact.profiling.ops import OPS
from fusedact.profiling.peers import PEERS
from fusedact.profiling.timing import undisturbed

OURS = ("stock", "compile", "fusedact")
T = TypeVar("T")
CASES = cases_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Measured:
    """A case is prepared once for its phases, a phase timed once for its contenders; the last case alone is kept.

    What failed is not tried again: its exception is raised for each phase or contender that asks.
    """

    def __init__(self, setting: Setting, announce) -> None:
        self.setting, self.announce = setting, announce
        self.case: Case | None = None
        self.prepared: Prepared | Exception | None = None
        self.phases: dict[str, dict | Exception] = {}

    def of(self, case: Case, phase: str) -> dict:
        """As measure_case has it, of this phase."""
        device, effort = self.setting.device, self.setting.effort
        if self.case is not case:
            self.case, self.prepared, self.phases = case, None, {}
            self.announce(case.name)
            self.prepared = self._tried(lambda: prepare(case, device, effort, "default", PEERS.get(case.op, {})))
        prepared = _given(self.prepared)
        if prepared.result["verdict"] == "wrong":
            return prepared.result
        if phase not in self.phases:
            self.phases[phase] = self._tried(lambda: prepared.timed(phase))
        return prepared.result | {"phases": {phase: _given(self.phases[phase])}}

    def _tried(self, measuring: Callable[[], T]) -> T | Exception:
        try:
            with undisturbed(self.setting.device, THREADS):
                return measuring()
        except MemoryError as error:
            return MemoryError(str(error))  # without the frames, whose tensors would stay
        except Exception as error:
            return error


def _given(found: T | Exception) -> T:
    if isinstance(found, Exception):
        raise found
    return found


def chosen(smoke: bool) -> dict[str, Case]:
    """By name; in a smoke run the last of each op, tiny."""
    return by_name({case.op: case for case in CASES}.values() if smoke else CASES, smoke)


@pytest.fixture(scope="module")
def cases(setting) -> dict[str, Case]:
    return chosen(setting.smoke)


@pytest.fixture(scope="module")
def measured(setting, announce) -> Measured:
    return Measured(setting, announce)


def pytest_generate_tests(metafunc):
    rows = [
        pytest.param(name, phase, contender, id=f"{name}-{phase}-{contender}".replace(" ", "-"))
        for name, case in chosen(metafunc.config.option.smoke).items()
        for phase in OPS[case.op].phases
        for contender in (*OURS, *PEERS.get(case.op, ()))
    ]
    metafunc.parametrize(("name", "phase", "contender"), rows)


@by_replay
def test_op(name, phase, contender, cases, measured, setting, benchmark):
    case = cases[name]
    limits = setting.ceilings_with(case.matrix_rate)
    try:
        result = measured.of(case, phase)
    except MemoryError as error:
        pytest.skip(str(error))
    if result["verdict"] == "wrong":
        pytest.fail(f"wrong, errors {result['errors']}")
    if contender in result["without"]:
        pytest.skip(result["without"][contender])
    if contender not in contenders_of(result, phase):
        pytest.skip("it makes gradients in forward, so that a backward alone says nothing")
    info = described(case, phase, contender) | setting.info | figures(result, phase, contender, limits)
    replay(benchmark, f"{case.op} {phase}", samples(result, phase, contender), info)
