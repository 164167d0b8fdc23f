"""pytest bench/test_trainers.py: the trainers' steps and short runs, by each way to train, timed in turn."""

import pytest

from bench.replay import by_replay, replay
from bench.setting import THREADS
from fusedact.profiling.cases import STEPS
from fusedact.profiling.figures import figures, of_trainer, samples
from fusedact.profiling.timing import undisturbed
from fusedact.profiling.training import PHASES, measure_trainer

TRAINERS = {step.name: step for step in STEPS}


@pytest.fixture(scope="module")
def measured(setting, announce):
    """measured(name): the trainer's, once."""
    results: dict[str, dict] = {}

    def measured(name: str) -> dict:
        if name not in results:
            announce(name)
            with undisturbed(setting.device, THREADS):
                results[name] = measure_trainer(TRAINERS[name], setting.device, setting.effort)
        return results[name]

    return measured


@by_replay
@pytest.mark.parametrize(("phase", "contender"), [(phase, name) for phase, names in PHASES.items() for name in names])
@pytest.mark.parametrize("name", TRAINERS, ids=lambda name: name.replace(" ", "-"))
def test_trainer(name, phase, contender, measured, setting, benchmark):
    result = measured(name)
    if result["verdict"] == "wrong":
        pytest.fail(f"wrong, costs {result['costs']}")
    if contender in result["without"]:
        pytest.skip(result["without"][contender])
    info = of_trainer(TRAINERS[name], phase, contender) | setting.info | figures(result, phase, contender, {})
    replay(benchmark, f"{TRAINERS[name].trainer} {phase}", samples(result, phase, contender), info)
