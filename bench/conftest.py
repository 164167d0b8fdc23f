"""The suites' options and setting, a line for each measurement, the machine in pytest-benchmark's JSON."""

from pathlib import Path

import pytest
import torch

from bench.setting import SETTING, Setting
from bench.turns import SMOKE_TURNS, TURNS
from fusedact.profiling.timing import DRY, FULL, ON_CPU, effort_on

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    group = parser.getgroup("fusedact's suites")
    group.addoption("--smoke", action="store_true", help="every path in tiny shapes and two rounds, which is no figure")
    group.addoption("--rounds", type=int, help=f"of a measurement [{FULL.rounds}, on a CPU {ON_CPU.rounds}]")


def pytest_configure(config):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = config.option.rounds
    if rounds is not None and rounds < 2:
        raise pytest.UsageError(f"--rounds: expected 2 or more, got {rounds}")
    effort = DRY if config.option.smoke else effort_on(device, rounds)
    config.stash[SETTING] = Setting(device, effort, config.option.smoke)


@pytest.fixture(scope="session")
def setting(request) -> Setting:
    return request.config.stash[SETTING]


@pytest.fixture(scope="session")
def turns(setting) -> int:
    """Of what `bench.turns` times."""
    return SMOKE_TURNS if setting.smoke else TURNS


@pytest.fixture(scope="session")
def announce(request):
    """announce(name) writes a line as soon as it is begun."""
    reporter, capture = map(request.config.pluginmanager.getplugin, ("terminalreporter", "capturemanager"))

    def announce(name: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(f"measuring {name}")

    return announce


def pytest_benchmark_generate_machine_info(config):
    setting = config.stash[SETTING]
    arguments = [_without_place(str(argument)) for argument in config.invocation_params.args]
    return setting.machine | {"arguments": arguments, "ceilings": setting.ceilings}


def _without_place(argument: str) -> str:
    """A path of this machine, alone or after an option's =, within the repository or as its last name."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return option + equals + value


def pytest_benchmark_compare_machine_info(machine_info, compared_benchmark):
    """Ceilings are measured anew each time; for pytest-benchmark, which looks next, they make no other machine."""
    compared_benchmark["machine_info"]["ceilings"] = machine_info["ceilings"]
