"""Any call, network or file that hypothesis draws: what tests/samples/fuzzing.py has, in a fixed few examples.

`make fuzz` draws for as long as one likes; what it found is among the regressions here.
"""

import math
import mmap
import queue
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from samples import fuzzed_files, fuzzing, outcomes
from samples.fuzzed_calls import Array, Call
from samples.fuzzed_files import File, Parser
from samples.fuzzed_networks import Network
from samples.fuzzed_ops import OPS, discover
from samples.losses import TORCH_HAS_THE_HEAD

from tools import fuzz


@pytest.fixture(autouse=True)
def watched(launches, monkeypatch):
    """Launches are counted, every warning is told, memory is NaN until somebody writes it."""
    monkeypatch.setattr(outcomes, "Launches", launches)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    always = torch.is_warn_always_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(always)
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def look(name, examples):
    if name == "linear_cross_entropy" and not TORCH_HAS_THE_HEAD:
        pytest.skip("this torch has no such loss")

    def check(example):
        assert not (problem := fuzzing.problem(example)), f'"{name}": {example!r},  # {problem}'

    check.__qualname__ = name
    chosen = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(fuzzing.TARGETS[name])(check))()


@pytest.mark.parametrize("name", fuzzing.OF_OPS)
def test_a_few_calls(name):
    look(name, 3)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", fuzzing.OF_OPS)
def test_more_calls(name):
    look(name, 11)


@pytest.mark.parametrize("examples", [2, pytest.param(7, marks=pytest.mark.exhaustive)])
def test_training_steps_of_networks(examples):
    look("networks", examples)


@pytest.mark.contract(85, 86, 87)
@pytest.mark.parametrize("name", fuzzing.OF_FILES)
def test_damaged_files(name):
    look(name, 40)


@pytest.mark.parametrize("name", fuzzing.REGRESSIONS)
def test_what_was_once_wrong(name):
    assert not fuzzing.problem(fuzzing.REGRESSIONS[name])


def test_every_op_is_drawn():
    assert sorted(OPS) == sorted(discover())


# The oracle can fail


GELU = Call("gelu", {"input": Array((3, 17))})
RELU = Call("relu", {"input": Array((3, 17), odd=(float("nan"),), scale=3.0)})
WRONG = {
    "less accurate": (GELU, lambda input: torch.nn.functional.gelu(input, approximate="tanh")),
    "a NaN lost": (RELU, lambda input: input.nan_to_num().relu()),
    "another gradient": (RELU, lambda input: input.detach().relu() + 0 * input),
    "another dtype": (RELU, lambda input: input.double().relu()),
    "an argument written to": (RELU, lambda input: input.detach().zero_() + input.relu()),
    "raises": (RELU, lambda input: input[5]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(name, monkeypatch):
    call, function = WRONG[name]
    assert not fuzzing.problem(call)
    op = OPS[call.op]
    monkeypatch.setitem(OPS, call.op, op.__class__(function, op.stock, op.calls, op.truth, own=True))
    assert fuzzing.problem(call)


@pytest.mark.parametrize(
    "read",
    [lambda path: None, lambda path: [][0], lambda path: int("x")],
    ids=["nothing", "another error", "no name"],
)
def test_a_reader_that_is_wrong_is_told(read, monkeypatch):
    parser = Parser(read, lambda value: value == 1, list)
    monkeypatch.setitem(fuzzing.PARSERS, "csv", parser)
    assert File("csv", b"").problem()


@pytest.mark.parametrize(("limits", "size", "problem"), [
    ({"MOST_BYTES": 32 << 20}, 8 << 20, None),
    ({"MOST_BYTES": 32 << 20}, 64 << 20, "MiB more than before"),
    ({"MOST_SECONDS": 0.0}, 64 << 20, " s"),
], ids=["little", "memory", "time"])  # fmt: skip
def test_a_reader_that_takes_too_much_is_told(limits, size, problem, monkeypatch):
    """Also in a process that once took more."""

    def read(path):
        with mmap.mmap(-1, size) as taken:  # not from what the process has freed and kept
            taken[::4096] = bytes(size // 4096)
        raise ValueError(path)

    bytearray(128 << 20)
    for name, limit in limits.items():
        monkeypatch.setattr(fuzzed_files, name, limit)
    monkeypatch.setitem(fuzzing.PARSERS, "csv", Parser(read, bool, list))
    found = File("csv", b"").problem()
    assert found is None if problem is None else found.endswith(problem)


def test_a_network_that_is_wrong_is_told(monkeypatch):
    network = Network((3, 4, 2), ("GELU",), "CrossEntropyLoss", way="nn")
    assert not network.problem()
    model, loss = network._built(torch.nn)
    model[0].weight.data *= 1.001
    monkeypatch.setattr(Network, "_ours", lambda self: (model, loss))
    assert network.problem()


@pytest.mark.parametrize("example", [GELU, RELU, Network((3, 2), (), "MSELoss"), File("csv", b"x,\xff")], ids=repr)
def test_an_example_is_told_as_it_is_written(example):
    assert repr(eval(repr(example), vars(fuzzing))) == repr(example)


def test_a_failure_is_told_as_a_line_to_paste(monkeypatch, tmp_path):
    """By `make fuzz`: an example that fails again where it is pasted."""
    monkeypatch.setattr(fuzz, "OUT", tmp_path)
    assert fuzz.drawn(fuzzing, "csv", 1, math.inf) == (fuzz.EXAMPLES, "")
    monkeypatch.setitem(
        fuzzing.PARSERS, "csv", Parser(lambda path: len(path.read_bytes()), lambda n: n < 3, lambda: [b""])
    )
    count, line = fuzz.drawn(fuzzing, "csv", 1, math.inf)
    found = eval(f"{{{line}\n}}", vars(fuzzing))["csv"]
    assert count and found.problem()


LINES = [("csv", 3, "a line"), ("csv", 2, "a line")]
ENDS = (0, None, None)


@pytest.mark.parametrize(("alive", "told", "until", "failures"), [
    (True, [*LINES, ENDS], math.inf, ["a line"]),
    (False, [*LINES, ENDS], math.inf, ["a line"]),
    (False, LINES, math.inf, ["a line", "# worker 0 ended with -9"]),
    (True, [], -math.inf, ["# worker 0 did not end"]),
], ids=["well", "told before it ended", "killed", "hangs"])  # fmt: skip
def test_counts_and_failures_are_told(alive, told, until, failures, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "OUT", tmp_path)
    asked = queue.Queue()
    for each in told:
        asked.put(each)
    worker = SimpleNamespace(is_alive=lambda: alive, exitcode=-9)
    assert fuzz.watched([worker], asked, ["csv"], until) == failures
    assert not told or "5" in capsys.readouterr().out


def test_a_target_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(fuzz, "prepared", lambda: fuzzing)
    monkeypatch.setattr("sys.argv", ["fuzz.py", "--only", "csv,sofmax"])
    with pytest.raises(SystemExit, match="2"):
        fuzz.main()
    assert "no target sofmax" in capsys.readouterr().err
