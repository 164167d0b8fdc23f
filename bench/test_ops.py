"""pytest bench/test_ops.py: every op, phase and contender of the cases table; on a CPU of the cases of its size.

A case is first compared with float64, and fails where it is wrong; then all contenders are timed in turn, once for
each phase. What pytest-benchmark shows are those samples. extra_info: what the case is, and its `figures`.
"""

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
CASES = cases_for(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Measured:
    """A case is prepared once for its phases, a phase timed once for its contenders; the last case alone is kept."""

    def __init__(self, setting: Setting, announce) -> None:
        self.setting, self.announce = setting, announce
        self.prepared: Prepared | None = None
        self.phases: dict[str, dict] = {}

    def of(self, case: Case, phase: str) -> dict:
        """As measure_case has it, of this phase."""
        if self.prepared is None or self.prepared.case is not case:
            self.prepared, self.phases = None, {}
            self.announce(case.name)
            with undisturbed(self.setting.device, THREADS):
                self.prepared = prepare(
                    case, self.setting.device, self.setting.effort, "default", PEERS.get(case.op, {})
                )
        if self.prepared.result["verdict"] != "wrong" and phase not in self.phases:
            with undisturbed(self.setting.device, THREADS):
                self.phases[phase] = self.prepared.timed(phase)
        return self.prepared.result | {"phases": self.phases}


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
