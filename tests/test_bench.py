"""The GPU command without a GPU: its dry run, its survival of broken sections and workers; the README's table."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fusedact.profiling import cases, contenders, measure, ops, peers, timing

ROOT = Path(__file__).parents[1]

SECTIONS = ("tests", "ceilings", "fits", "ops", "peers", "steps", "profiles", "autotuned", "interpreted")
FAKE_WORKER = """
import json, os, sys
job = json.loads(sys.argv[-1])
for name in job["names"]:
    print(json.dumps({"unit": name}), flush=True)
    if name == "deadly":
        sys.exit("no such luck")
    value = {"device": "fake"} if job["kind"] == "facts" else 1.0
    print(json.dumps({"unit": name, "outcome": "results", "value": value}), flush=True)
"""


@pytest.fixture
def bench(monkeypatch):
    """bench's modules by name; `bench` is no installed package."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.mark.slow
@pytest.mark.exhaustive
def test_dry_run_exercises_every_section(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, last = done.stdout.strip().splitlines()
    path = Path(last.removeprefix("DRY RUN record "))
    record = json.loads(path.read_text())
    assert record["dry"] is True
    assert set(record["sections"]) == set(SECTIONS)
    assert record["sections"]["tests"]["collected"] > 100
    assert len(record["sections"]["ops"]["results"]) == len(record["sections"]["interpreted"]["results"]) > 10
    assert path.name.startswith("dry-run-")
    assert path.with_suffix(".md").read_text().startswith("# DRY RUN")
    assert tmp_path in path.parents
    table = "│┃┏┡└"
    assert all(line.strip().startswith("DRY RUN") or line[0] in table for line in lines)


def test_a_broken_section_and_a_dead_worker_leave_the_rest(bench, monkeypatch, tmp_path, capsys):
    gpu = bench("gpu")
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_WORKER)

    def broken(run, deadline):
        raise ZeroDivisionError("as it happens")

    def units(run, deadline):
        return gpu._units(run, "fake", ["first", "deadly", "last"], deadline)

    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(worker)])
    monkeypatch.setattr(gpu, "SECTIONS", (gpu.Section("tests", broken, 0.5), gpu.Section("ceilings", units, 0.5)))
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    assert gpu.main(["--dry-run"]) == 1
    [path] = tmp_path.glob("fusedact-dry-run-*/*.json")
    record = json.loads(path.read_text())
    sections = record["sections"]
    assert len(record["date"]) == len("2000-01-01T00:00:00") and record["date"].replace(":", "") in path.name
    assert sections["tests"]["error"] == "ZeroDivisionError: as it happens"
    assert sections["ceilings"]["results"] == {"first": 1.0, "last": 1.0}
    assert "no such luck" in sections["ceilings"]["errors"]["deadly"]
    assert "2 faults" in capsys.readouterr().out


FAKE_SANITIZER = """#!{python}
import os, subprocess, sys
tool, log = (sys.argv[sys.argv.index(option) + 1] for option in ("--tool", "--log-file"))
first = sys.argv.index({python!r}, 1)
done = subprocess.run(sys.argv[first:])
summary = {{"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: {hazards} hazards displayed"}}
with open(log.replace("%p", str(os.getpid())), "w") as file:
    print("========= COMPUTE-SANITIZER", "========= " + summary[tool], sep="\\n", file=file)
sys.exit(done.returncode)
"""


@pytest.mark.parametrize("hazards", [0, 2])
def test_what_compute_sanitizer_finds(hazards, bench, monkeypatch, tmp_path):
    gpu = bench("gpu")
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE_SANITIZER.format(python=sys.executable, hazards=hazards))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "WORKER", [sys.executable, str(tmp_path / "worker.py")])
    monkeypatch.setattr(gpu.tempfile, "tempdir", str(tmp_path))
    assert gpu.main(["--dry-run", "--only", "sanitized"]) == (1 if hazards else 0)
    [path] = tmp_path.glob("fusedact-dry-run-*/*.json")
    section = json.loads(path.read_text())["sections"]["sanitized"]
    for checker in ("memcheck", "racecheck"):
        assert section["results"][f"{checker}: S1 binary persistent"] == 1.0
        assert len([name for name in section["results"] if name.startswith(checker)]) > 20
    assert section["errors"].keys() == ({"racecheck"} if hazards else set())
    assert not hazards or "2 hazards" in section["errors"]["racecheck"]


def test_a_sanitizer_that_leaves_no_summary(bench, tmp_path):
    sanitizer = bench("sanitizer")
    assert sanitizer.faults(tmp_path) == "no log"
    (tmp_path / "1").write_text("========= ERROR SUMMARY: 0 errors")
    assert sanitizer.faults(tmp_path) is None
    (tmp_path / "2").write_text("========= Error: Device not supported")
    assert sanitizer.faults(tmp_path) == "========= Error: Device not supported"


def test_without_compute_sanitizer_nothing_is_said_to_be_clean(bench, monkeypatch, tmp_path):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    assert gpu.sanitized(gpu.Run(True, tmp_path, None, None), time.time() + 60) == {
        "skipped": {"compute-sanitizer": "not on this machine"}
    }


def test_pytest_outcomes_are_read(bench, tmp_path):
    suite = tmp_path / "test_some.py"
    suite.write_text(
        "import pytest\ndef test_right(): pass\ndef test_wrong(): assert 1 == 2, 'so\\nmuch'\n"
        "def test_skipped(): pytest.skip()\n@pytest.fixture\ndef broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n"
    )
    options = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), f"--junitxml={tmp_path}/junit.xml"]
    process = subprocess.Popen([sys.executable, "-m", "pytest", str(suite), *options], stdout=subprocess.DEVNULL)
    suite = bench("suite")
    assert suite.stopped_at(process, time.time() + 60) is False
    found = suite.outcomes(tmp_path / "junit.xml")
    assert {name: found[name] for name in ("passed", "failed", "skipped_tests")} == {
        "passed": 1,
        "failed": 2,
        "skipped_tests": 1,
    }
    assert found["failures"]["test_some.test_wrong"] == "AssertionError: so"
    assert "gone" in found["failures"]["test_some.test_error"]


def synthetic_record(date="2000-01-01T00:00", dry=False, fused=50.0, **promises):
    """No measurement: round numbers, of a device that does not exist."""

    def times(stock, fusedact):
        spread = {"stock": stock, "again": stock, "fusedact": fusedact}
        return {name: {"median": t, "p20": t, "p80": t} for name, t in spread.items()}

    phases = {
        phase: {
            "bytes": 10**8,
            "flops": 0,
            "times": {kind: times(100.0, fused) for kind in ("cold", "launched", "wall")},
            "memory": {"stock": 2**21, "fusedact": 2**20},
        }
        for phase in ("forward", "backward", "both")
    }
    errors = {"stock": [1e-7], "fusedact": [1e-7]}
    result = {"threshold": 0.97, "verdict": "accurate", "errors": errors, "phases": phases} | promises
    timing = {"seconds": 1.0, "limit": 2.0, "state": ""}
    fit = {"verdict": "accurate", "steps": 1000, "took": fused / 100, "seconds": 1.0, "step_us": 500.0}
    fit |= {"stock_step_us": 1000.0, "costs": {}}
    return {
        "kind": "gpu",
        "dry": dry,
        "date": date,
        "commit": "synthetic",
        "machine": {"device": "SYNTHETIC", "torch": "0", "triton": "0"},
        "sections": {
            "ceilings": {"results": {"copy, GB/s": 4000.0}} | timing,
            "fits": {"results": {"synthetic run": fit}} | timing,
            "ops": {"results": {"synthetic op": result}} | timing,
        },
    }


def test_thresholds_are_judged(bench):
    report = bench("report")
    assert report.failures(synthetic_record()) == []
    slow = synthetic_record(fused=200.0)
    assert "synthetic op, both: missed: device 0.500, wall 0.500" in report.failures(slow)
    assert "synthetic run: missed: took 2 s of 1" in report.failures(slow)
    assert report.failures(slow | {"dry": True}) == []
    assert "missed: device 0.500" in report.markdown(slow)
    slow["sections"]["ops"]["results"]["synthetic op"]["verdict"] = "wrong"
    assert any("synthetic op: wrong" in fault for fault in report.failures(slow))


@pytest.mark.parametrize(
    ("promises", "missed"),
    [
        ({"target": 2.0}, []),
        ({"target": 2.1}, ["both: missed: target 2.000"]),
        ({"least_share": 0.5}, []),
        ({"least_share": 0.6}, ["forward: missed: share 0.500"]),
        ({"most_ms": 0.05}, []),
        ({"most_ms": 0.04}, ["both: missed: 0.05 ms"]),
        ({"most_gib": 0.5 * 2**-10, "gradient_bytes": 2**19}, []),
        ({"most_gib": 0.4 * 2**-10, "gradient_bytes": 2**19}, ["both: missed: 0.00 GiB"]),
    ],
)
def test_a_case_is_held_to_what_it_promises(bench, promises, missed):
    found = bench("report").failures(synthetic_record(**promises))
    assert found == [f"synthetic op, {fault}" for fault in missed]


def test_others_stand_beside_ours(bench):
    report, record = bench("report"), synthetic_record(op="cross_entropy")
    beside = {name: {"median": time} for name, time in (("stock", 100.0), ("again", 100.0), ("fusedact", 50.0))}
    phases = {"both": {"times": {"cold": beside | {"Liger": {"median": 75.0}, "torch's chunks": {"median": 40.0}}}}}
    record["sections"]["peers"] = {"results": {"synthetic op": {"phases": phases}}}
    record["sections"]["peers"] |= {"seconds": 1.0, "limit": 2.0, "state": ""}
    assert "| synthetic op | both | 50 | 2000 | 50% | 2.00 |  | 1.50 | 0.80 | 2 / 1 |" in report.markdown(record)
    assert report.failures(record) == ["synthetic op, both: missed: torch's chunks 0.800"]


def test_what_is_not_there_or_fails_is_left_out(monkeypatch):
    def absent(case):
        raise ImportError("no such package")

    def overwriting(case):
        def loss(x, target):
            value = torch.nn.functional.cross_entropy(x, target)
            x.data.zero_()
            return value

        return loss

    found = {"absent": peers.Peer(absent), "there": peers.Peer(overwriting, overwrites=True)}
    monkeypatch.setitem(peers.PEERS, "cross_entropy", found)
    result = measure.measure_peers(cases.Case("cross_entropy", (4, 5), "float32"), torch.device("cpu"), timing.DRY)
    assert result["verdict"] == "accurate"
    assert result["without"] == {"absent": "ImportError: no such package"}
    assert set(result["phases"]) == {"forward", "both"}
    assert {"stock", "fusedact", "there"} < set(result["phases"]["both"]["times"]["cpu"])


@pytest.mark.parametrize(
    ("op", "shape"), [("cross_entropy", (7, 5)), ("linear_cross_entropy", (7, 3, 5)), ("linear_bce", (7, 3))]
)
def test_the_truth_of_a_loss_is_its_pieces(monkeypatch, op, shape):
    case, table = cases.Case(op, shape, "float32"), ops.OPS[op]
    x, target = table.inputs(case)
    stock = table.module(torch.nn, case)
    x.requires_grad_(table.input_gradient)
    wanted = tuple(t for t in (x, *stock.parameters()) if t.requires_grad)
    run = contenders.Contender(stock, (x, target), wanted)
    whole = measure._truth(case, run, torch.ones(()))
    monkeypatch.setattr(measure, "PIECE", 10)
    pieces = measure._truth(case, run, torch.ones(()))
    assert len(whole) == 1 + len(wanted)
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)
    assert max(measure._errors(run, torch.ones(()), pieces)) < 1e-5


def test_readme_table_comes_from_the_newest_record(bench, tmp_path):
    report = bench("report")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    arguments = ["--readme", str(readme), "--results", str(results)]
    readme.write_text(f"before\n{report.OPEN}\n{report.CLOSE}\nafter\n")
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.NO_RECORD in readme.read_text()

    dates = {"old": "2000-01-01T00:00", "new": "2000-01-03T00:00", "mid": "2000-01-02T00:00"}
    for name, date in dates.items():
        (results / f"{name}.json").write_text(json.dumps(synthetic_record(date)))
    (results / "dry.json").write_text(json.dumps(synthetic_record("2000-01-04T00:00", dry=True)))
    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "new.json" in text and "SYNTHETIC" in text
    assert "| synthetic op | both | 100 | 50 | 2.000 |  | 50% |" in text
    assert "| synthetic run | 1,000 | 0.5 | 1 | 500 | 1000 | 2.0 |" in text

    readme.write_text(text.replace("2.000", "3.000", 1))
    assert report.main([*arguments, "--check"]) == 1


def test_the_repositorys_own_tables_and_charts_are_the_records(bench):
    assert bench("report").main(["--check"]) == 0


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("bench/test_ops.py", "bench/test_ops.py"),
        (f"{ROOT}/bench/test_ops.py", "bench/test_ops.py"),
        (f"--benchmark-json={ROOT}/bench/results/a.json", "--benchmark-json=bench/results/a.json"),
        ("--benchmark-json=/home/someone/a.json", "--benchmark-json=a.json"),
        ("/home/someone/a.json", "a.json"),
        ("--rounds=25", "--rounds=25"),
        ("cross_entropy and not 32000", "cross_entropy and not 32000"),
    ],
)
def test_a_command_names_no_place_of_this_machine(bench, argument, kept):
    config = SimpleNamespace(invocation_params=SimpleNamespace(args=[argument]), stash={})
    conftest = bench("conftest")
    config.stash[conftest.SETTING] = SimpleNamespace(machine={}, ceilings={"copy, GB/s": 1.0})
    found = conftest.pytest_benchmark_generate_machine_info(config)
    assert found == {"arguments": [kept], "ceilings": {"copy, GB/s": 1.0}}


def test_a_readme_without_markers_is_refused(bench, tmp_path):
    with pytest.raises(ValueError, match="gpu-table"):
        bench("report").rendered("no markers", tmp_path)
