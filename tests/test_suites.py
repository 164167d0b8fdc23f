"""The suites and `fusedact bench`: who is timed and when, what samples come to, what is written, what is refused."""

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedact import backend
from fusedact.__main__ import main
from fusedact.cli import benchmarks
from fusedact.profiling import ceilings, measure, timing
from fusedact.profiling.cases import CASES, SMALL, STEPS, Case, by_name
from fusedact.profiling.choosing import cases_for
from fusedact.profiling.figures import contenders_of, figures, samples
from fusedact.profiling.machine import processor
from fusedact.profiling.ops import OPS
from fusedact.profiling.peers import PEERS, Peer
from fusedact.profiling.training import measure_trainer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TINY = Case("linear_act", (64, 1, 3), "float32", "sigmoid")
HIGH = Case("linear_act", (8, 8, 8), "float32", "relu", "high")
SOFTMAX = Case("softmax", (8, 10), "float32")
PLAIN = Peer(lambda case: lambda x: torch.softmax(x, 1))
KEYS = {
    *("case", "op", "activation", "phase", "contender", "shape", "dtype", "device", "threads", "bytes", "flops"),
    *("gbps", "tflops", "share", "ratio", "ratio_low", "ratio_high", "noise", "error", "memory", "smoke"),
}


@pytest.fixture
def quick(monkeypatch):
    """`fusedact bench` with a dry run's effort, and torch as it was."""
    monkeypatch.setattr(timing, "ON_CPU", timing.DRY)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> dict:
    """pytest-benchmark's JSON of an op and a trainer, as someone who looks at two of them makes it."""
    path = tmp_path_factory.mktemp("smoke") / "a.json"
    chosen = "linear_act-tanh or S3-xor"
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "bench/test_trainers.py", "-k", chosen, "--smoke"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--benchmark-json={path}"],
        cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measuring S3 xor" in done.stdout
    return json.loads(path.read_text())


# Samples


def test_everyone_has_a_turn_in_each_round_and_stock_two():
    order = []
    times = timing.interleaved({name: lambda name=name: order.append(name) or 1.0 for name in ("stock", "ours")}, 3)
    assert {name: len(each["samples"]) for name, each in times.items()} == {"stock": 3, "ours": 3, "again": 3}
    assert order == ["stock", "ours", "stock", "ours", "stock", "stock", "stock", "stock", "ours"]


def test_ratios_are_of_each_round():
    """In a slow spell both are slow: the ratio of the medians would be 1.5."""
    times = {"stock": {"samples": [1.0, 3.0, 20.0]}, "ours": {"samples": [0.5, 2.0, 10.0]}}
    assert timing.ratios(times, "ours")["median"] == 2.0
    assert timing.ratios(times, "ours")["p20"] < 2.0 == timing.ratios(times, "ours")["p80"]


def test_a_replay_is_the_samples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    clock = importlib.import_module("bench.replay").Replay()
    seconds = [1e-7, 0.3, 1 / 3]
    clock.load(seconds)
    assert [-(clock() - clock()) for _ in seconds] == seconds


class Asked:
    """What was called, and with what."""

    def __init__(self, answer):
        self.calls, self.answer = [], answer

    def __call__(self, *args, **kwargs):
        self.calls.append(args)
        return self.answer(*args, **kwargs)


@pytest.fixture
def measured(monkeypatch):
    """What `bench/test_ops.py` asks for a case and phase."""
    monkeypatch.setattr(measure, "_compiled", lambda *args: None)  # which takes its time
    monkeypatch.syspath_prepend(ROOT)
    ops, setting = (importlib.import_module(f"bench.{name}") for name in ("test_ops", "setting"))
    return ops.Measured(setting.Setting(CPU, timing.DRY, True), lambda name: None)


def test_a_phase_is_timed_at_the_precision_of_its_case(measured, monkeypatch):
    precisions = []
    real = measure.timed
    monkeypatch.setattr(
        measure, "timed", lambda *args: precisions.append(torch.get_float32_matmul_precision()) or real(*args)
    )
    for phase in ("forward", "both"):
        measured.of(HIGH, phase)
    assert precisions == ["high", "high"]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("function", ["_sets", "timed"])
@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError),
        (RuntimeError("no such kernel"), RuntimeError),
    ],
)
def test_what_failed_is_not_tried_again(measured, monkeypatch, function, error, raised):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(measure, function, asked := Asked(failing))
    for _ in range(3):
        with pytest.raises(raised, match=re.escape(str(error))):
            measured.of(TINY, "both")
    assert len(asked.calls) == 1


def test_what_a_host_does_is_not_a_gpus(measured):
    measured.setting.machine["device"] = "a GPU"
    assert measured.setting.info["device"] == "a GPU"
    assert measured.setting.host_info == measured.setting.info | {"device": processor()}


def test_the_statistic_of_a_launch_is_that_of_all(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    launch_cost = importlib.import_module("bench.test_launch_cost")
    monkeypatch.setattr(launch_cost.launch, "launch", asked := Asked(lambda *args: None))
    made = {name: launch_cost.Launch(name, (1,), (), {}) for name in ("forward", "backward")}
    launch_cost.by_launch(made.values())
    assert [kernel for kernel, *_ in asked.calls] == ["forward", "backward"]


def test_what_pytest_benchmark_writes_are_the_rounds(smoke):
    data = {(b["extra_info"]["case"], b["group"], b["extra_info"]["contender"]): b for b in smoke["benchmarks"]}
    for (case, group, _), one in data.items():
        stock = data[case, group, "stock"]["stats"]["data"]
        ratios = [a / b for a, b in zip(stock, one["stats"]["data"], strict=True)]
        assert one["stats"]["rounds"] == timing.DRY.rounds == len(ratios)
        assert one["extra_info"]["ratio"] == pytest.approx(statistics.median(ratios))


def test_a_benchmark_says_what_it_is(smoke):
    assert smoke["machine_info"]["smoke"] is True
    assert {"machine", "cores", "threads", "python", "torch", "triton", "device", "ceilings"} < set(
        smoke["machine_info"]
    )
    assert not {"node", "processor", "cpu"} & set(smoke["machine_info"])
    groups = {}
    for one in smoke["benchmarks"]:
        groups.setdefault(one["group"], set()).add(one["extra_info"]["contender"])
        assert set(one["extra_info"]) == KEYS
        assert one["extra_info"]["smoke"] is True
        assert one["options"]["timer"] == "interleaved"
    ours = {"stock", "compile", "fusedact"}
    assert groups == {
        **{f"linear_act {phase}": ours for phase in ("forward", "backward", "both")},
        "xor step": ours | {"fit"},
        "xor run": ours | {"fit", "tutorial"},
    }
    one = next(b for b in smoke["benchmarks"] if b["extra_info"]["op"])["extra_info"]
    assert one["share"] > 0 and 0 <= one["error"] < 1e-5


# Measuring


@pytest.fixture
def gpu(monkeypatch):
    """`timing.timed` as on a GPU, of calls that say how many µs they take; those named "waits" fail to be captured."""

    def captured(calls):
        if calls[0]() == "waits":
            raise RuntimeError("operation not permitted when stream is capturing")
        return SimpleNamespace(replay=calls[0])

    answers = {"captured": Asked(captured), "queued": lambda runs, calls: 1.0, "_launched": lambda call, count: 1.0}
    for name, answer in (answers | {"_memory": lambda call: 0}).items():
        monkeypatch.setattr(timing, name, answer)
    return answers["captured"]


def test_one_whom_no_graph_captures_changes_nothing_for_the_others(gpu):
    def slow():
        time.sleep(2 * timing.SHORT)

    calls = {"stock": [lambda: None], "fails": [lambda: "waits"], "told": [lambda: None], "slow": [slow]}
    found = timing.timed(calls, torch.device("cuda"), timing.DRY, waiting={"told"})
    assert found["cold_by"] == {
        "stock": "graph",
        "fails": "queue, since the graph failed: operation not permitted when stream is capturing",
        "told": "queue",
        "slow": "queue",
    }
    assert set(found["times"]["cold"]) == {*calls, "again"}
    assert [many[0] for (many,) in gpu.calls] == [calls["stock"][0], calls["fails"][0]]


def test_peers_that_look_at_values_are_never_captured(gpu, monkeypatch):
    monkeypatch.setattr(measure, "timed", asked := Asked(lambda *args: {}))
    found = {"waits": Peer(PLAIN.build, waits=True), "plain": PLAIN}
    measure.prepare(SOFTMAX, CPU, timing.DRY, peers=found).timed("both")
    assert asked.calls[0][3] == {"waits"}
    assert all(PEERS[op]["Liger"].waits for op in ("cross_entropy", "linear_cross_entropy"))


def test_a_case_may_take_what_torch_keeps_and_does_not_use(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("emptied"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: order.append("asked") or (1, 2))
    with pytest.raises(MemoryError, match="needs 0 GiB, free are 0"):
        measure.prepare(TINY, torch.device("cuda"), timing.DRY)
    assert order == ["emptied", "asked"]


def test_the_copy_fits_what_is_free(monkeypatch):
    monkeypatch.setattr(ceilings, "free_memory", lambda: 160)
    monkeypatch.setattr(ceilings, "_best", lambda call, device, effort: call().numel() * 8e-3)
    monkeypatch.setattr(torch, "randn", asked := Asked(lambda n, device: torch.zeros(n)))
    assert ceilings.copy_gbps(torch.device("cuda"), timing.DRY) == pytest.approx(1.0)
    assert asked.calls == [(10,)]


def test_who_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "_compiled", lambda *args: torch.zeros_like)
    wrong = Peer(lambda case: lambda x: torch.zeros_like(x) * x)
    prepared = measure.prepare(SOFTMAX, CPU, timing.DRY, "default", {"wrong": wrong, "plain": PLAIN})
    assert prepared.result["without"].keys() == {"compile", "wrong"}
    assert prepared.result["without"]["wrong"] == "wrong, error 1.0e+00"
    assert set(prepared.result["errors"]) == set(prepared.sets[0]) == {"stock", "fusedact", "plain"}


def test_who_fails_on_a_later_set_is_left_out_of_all(monkeypatch):
    def build(case):
        if len(asked.calls) == 2:
            raise RuntimeError("CUDA out of memory")
        return PLAIN.build(case)

    asked = Asked(build)
    monkeypatch.setattr(measure, "_set_count", lambda *args: 2)
    prepared = measure.prepare(SOFTMAX, CPU, timing.DRY, peers={"late": Peer(asked)})
    assert prepared.result["without"] == {"late": "RuntimeError: CUDA out of memory"}
    assert contenders_of({"phases": {"both": prepared.timed("both")}}, "both") == ["stock", "fusedact"]
    assert set(prepared.result["errors"]) == {"stock", "fusedact"}


def test_a_compilers_settings_are_as_they_were():
    before = torch._functorch.config.donated_buffer
    prepared = measure.prepare(TINY, CPU, timing.DRY, "default")
    assert "compile" in prepared.timed("backward")["times"]["cpu"]
    assert torch._functorch.config.donated_buffer is before is True


def test_every_op_has_a_case_for_a_cpu_and_no_name_twice():
    assert {case.op for case in cases_for(CPU)} == set(OPS)
    assert len(by_name((*CASES, *SMALL), dry=False)) == len(CASES) + len(SMALL)


@pytest.mark.parametrize("case", by_name(SMALL, dry=True).values(), ids=lambda case: case.name.replace(" ", "-"))
def test_small_cases_are_right(case):
    assert measure.check_case(case, CPU)["verdict"] == "accurate"


def test_a_gradient_of_zeros_has_an_error():
    result = measure.check_case(Case("activation", (40,), "float32", "step"), CPU)
    assert result["errors"] == {"stock": [0.0, 0.0], "fusedact": [0.0, 0.0]}


def test_without_a_compiler_the_rest_is_timed(monkeypatch):
    def broken(*inputs):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    result = measure.measure_case(TINY, CPU, timing.DRY, "default")
    assert result["without"] == {"compile": "RuntimeError: no g++"}
    assert contenders_of(result, "both") == ["stock", "fusedact"]
    assert len(samples(result, "both", "fusedact")) == timing.DRY.rounds


class Transposed(torch.nn.Linear):
    """A linear layer with an activation as attorch has it, whose weight is Wᵀ."""

    def __init__(self, features, outputs, act_func):
        super().__init__(features, outputs)
        self.weight = torch.nn.Parameter(self.weight.T.contiguous())
        self.act_func = getattr(torch, act_func)

    def forward(self, x):
        return self.act_func(x @ self.weight + self.bias)


@pytest.mark.parametrize(
    ("op", "shape", "activation"),
    [
        ("linear_act", (7, 5, 3), "sigmoid"),
        ("activation", (40,), "hardtanh"),
        *((op, (7, 5), "") for op in ("cross_entropy", "nll_loss", "softmax", "log_softmax")),
    ],
)
def test_attorch_stands_beside_ours_where_it_is_installed(monkeypatch, op, shape, activation):
    attorch = SimpleNamespace(**vars(torch.nn) | {"Linear": Transposed})
    monkeypatch.setitem(sys.modules, "attorch", attorch)
    prepared = measure.prepare(Case(op, shape, "float32", activation), CPU, timing.DRY, peers=PEERS[op])
    assert max(prepared.result["errors"]["attorch"]) < 1e-6
    assert "attorch" in prepared.timed("backward")["times"]["cpu"]


def test_a_backward_alone_leaves_out_who_has_made_its_gradients(monkeypatch):
    early = Peer(lambda case: torch.nn.functional.cross_entropy, early=True)
    prepared = measure.prepare(Case("cross_entropy", (7, 5), "float32"), CPU, timing.DRY, peers={"early": early})
    assert "early" in prepared.timed("both")["times"]["cpu"]
    assert "early" not in prepared.timed("backward")["times"]["cpu"]


def test_noise_is_how_far_stock_is_from_itself():
    """Of which the median ratio, here 1, says nothing."""
    stock = {"median": 10.0, "samples": [10.0] * 5}
    again = {"median": 10.0, "samples": [8.0, 8.0, 10.0, 12.5, 12.5]}
    result = {"phases": {"both": {"times": {"cpu": {"stock": stock, "again": again}}}}}
    assert figures(result, "both", "again", {})["noise"] == pytest.approx(0.25)


def test_figures_are_those_of_the_times():
    times = {name: {"median": 10.0, "samples": [10.0, 10.0]} for name in ("stock", "again")}
    times["fusedact"] = {"median": 5.0, "samples": [4.0, 5.0]}
    phase = {"bytes": 10**6, "flops": 10**7, "times": {"cold": times, "wall": times}, "memory": {"fusedact": 3}}
    result = {"matrix_rate": "fp32, TFLOP/s", "errors": {"fusedact": [1e-7, 3e-7]}, "phases": {"both": phase}}
    found = figures(result, "both", "fusedact", {"copy, GB/s": 400.0, "fp32, TFLOP/s": 8.0})
    assert (found["gbps"], found["tflops"]) == (pytest.approx(200.0), pytest.approx(2.0))
    assert found["share"] == pytest.approx(0.5)  # 2.5 µs of bytes, 1.25 of FLOPs
    assert (found["ratio"], found["noise"], found["memory"], found["wall"]) == (2.25, 0.0, 3, 5.0)
    assert (found["error"], figures(result, "both", "stock", {})["share"]) == (3e-7, None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.trainer)
def test_every_way_to_train_is_timed(step):
    result = measure_trainer(step, CPU, timing.DRY)
    assert (result["verdict"], result["without"]) == ("accurate", {})
    assert contenders_of(result, "run") == ["stock", "compile", "fusedact", "fit", "tutorial"]


# fusedact bench


def test_bench_prints_a_line_for_each_phase(quick, capsys, tmp_path):
    path = tmp_path / "found.json"
    assert main(["bench", "--case", TINY.name, "--no-compile", "--peers", "--json", str(path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["µs", "stock", "fusedact", "stock", "/", "fused", "noise", "GB/s", "TFLOP/s", "share"]
    assert lines[1] == TINY.name
    assert [line.split()[0] for line in lines[2:5]] == ["forward", "backward", "both"]
    assert max(map(len, lines[:5])) <= 80
    for part in ("threads: 1", f"torch {torch.__version__}", "run torch's own operations", "without attorch"):
        assert part in printed
    record = json.loads(path.read_text())
    assert {one["group"] for one in record["benchmarks"]} == {
        f"linear_act {p}" for p in ("forward", "backward", "both")
    }
    assert set(record["benchmarks"][0]["extra_info"]) == KEYS - {"smoke"}
    microseconds = 1e6 * record["benchmarks"][-2]["stats"]["median"]
    assert re.search(rf"both +{microseconds:,.{microseconds < 100:d}f} ", printed)


def test_bench_fails_where_a_result_is_wrong_or_none(quick, capsys, monkeypatch):
    def module(nn, case):
        return torch.nn.Softmax(1 if nn is torch.nn else 0)

    def broken(nn, case):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(OPS, "softmax", replace(OPS["softmax"], module=module))
    monkeypatch.setitem(OPS, "prelu", replace(OPS["prelu"], module=broken))
    args = ["--op", "softmax", "--op", "prelu", "--shape", "7x5", "--no-compile", "--device", "cpu"]
    assert main(["bench", *args]) == 1
    *_, reason, wrong, failed = capsys.readouterr().out.splitlines()
    assert reason == "prelu 7x5 float32: without all: no such kernel"
    assert (wrong, failed) == ("wrong: softmax 7x5 float32", "failed: prelu 7x5 float32")


def test_bench_measures_without_ceilings_where_there_is_no_room_for_them(quick, capsys, monkeypatch):
    def failing(device, effort):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setitem(ceilings.CEILINGS, ceilings.COPY, failing)
    assert main(["bench", "--op", "softmax", "--shape", "7x5", "--no-compile", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"\n    both .*%[^%]*\n", printed)
    assert "no shares, since what the device can do was not measured: CUDA out of memory" in printed


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("x: can't allocate memory: y")])
def test_what_does_not_fit_is_no_fault(quick, capsys, monkeypatch, error):
    def full(nn, case):
        raise error

    monkeypatch.setitem(OPS, "prelu", replace(OPS["prelu"], module=full))
    assert main(["bench", "--op", "prelu", "--shape", "7x5", "--no-compile", "--device", "cpu"]) == 0
    assert f"prelu 7x5 float32: without all: {error}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"), [("nope", "unknown backend 'nope'"), ("triton", "backend 'triton' was asked for, but cannot")]
)
def test_bench_says_at_once_what_no_backend_can(capsys, monkeypatch, asked, said):
    monkeypatch.setattr(backend, "_chosen", None)
    monkeypatch.setattr(backend, "triton_problem", lambda device: "it is elsewhere")
    monkeypatch.setenv("FUSEDACT_BACKEND", asked)
    assert main(["bench", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and (printed.err.count("\n"), printed.out) == (1, "")


@pytest.mark.parametrize(
    ("there", "said"),
    [(False, "expected a file in a folder that exists and can be written"), (True, "is not writable")],
)
def test_bench_says_at_once_what_it_cannot_write(capsys, monkeypatch, tmp_path, there, said):
    path = tmp_path / "a.json"
    path.write_text("") if there else None
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # for root, whom nothing stops
    assert main(["bench", "--json", str(path), "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and (printed.err.count("\n"), printed.out) == (1, "")


def test_bench_lists_what_it_would_measure(capsys):
    assert main(["bench", "--list", "--op", "prelu", "--op", "bce", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines() == ["bce 1048576 float32", "prelu 1024x1024 float32"]


@pytest.mark.exhaustive
def test_bench_shows_every_op(quick, capsys, monkeypatch):
    tiny = by_name({case.op: case for case in SMALL}.values(), dry=True)
    monkeypatch.setattr(benchmarks, "cases_for", lambda device: tuple(tiny.values()))
    assert main(["bench", "--no-compile", "--device", "cpu"]) == 0
    assert set(tiny) <= set(capsys.readouterr().out.splitlines())
    assert {case.op for case in tiny.values()} == set(OPS)


def test_bench_takes_a_shape(quick, capsys):
    named = ["--op", "linear_act", "--shape", "7x5x3", "--shape", "4x2x2", "--activation", "elu", "--dtype", "bfloat16"]
    assert main(["bench", *named, "--phase", "both", "--no-compile", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [lines[1], lines[3]] == ["linear_act elu 7x5x3 bfloat16", "linear_act elu 4x2x2 bfloat16"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--op", "softmx"], "unknown op 'softmx', expected one of linear_act, "),
        (["--dtype", "int8"], "unknown dtype 'int8', expected one of float32, bfloat16, float16"),
        (["--phase", "all"], "unknown phase 'all', expected one of forward, backward, both, no_grad"),
        (["--case", "nothing like it"], "--case nothing like it: no case is of these"),
        (["--op", "softmax", "--phase", "no_grad"], "--op softmax --phase no_grad: no case is of these"),
        (["--shape", "7x5", "--op", "linear_act"], "shape 7x5: linear_act takes one as "),
        (["--shape", "7y5", "--op", "softmax"], "'7y5', expected sizes as 4096x1000"),
        (["--shape", "7x5"], "expected --op and --shape, and no --case"),
        (["--activation", "gelu", "--shape", "7x5", "--op", "softmax"], "activation 'gelu': softmax takes none"),
        (["--rounds", "1"], "'--rounds': Input should be greater than or equal to 2"),
        (["--threads", "0"], "'--threads': Input should be greater than or equal to 1"),
        (["--threads", "1025"], "'--threads': Input should be less than or equal to 1024"),
        (["--device", "gpu"], "gpu: "),
        (["--json", str(ROOT)], "'--json': "),
        (
            ["--json", "/no/such/folder/a.json"],
            "--json /no/such/folder/a.json: expected a file in a folder that exists",
        ),
    ],
)
def test_bench_says_in_a_line_what_it_cannot(args, said, capsys):
    assert main(["bench", "--device", "cpu", *args]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
