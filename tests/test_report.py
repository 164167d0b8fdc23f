"""Records into tables and charts: what is written, what is merged, and that whatever is stale is found."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from bench import report
from bench.reporting import pictures, records, rows, suite_tables, timed
from fusedact.profiling import cases, ceilings, choosing, figures, losses, ops, peers

OPS = (  # op, case, {phase: (stock µs, {contender: (ratio, low, high)})}
    ("linear_act", "linear_act relu 64x1x3 float32", {"forward": (10.0, {"fusedact": (1.01, 0.99, 1.03)})}),
    (
        "cross_entropy",
        "cross_entropy 4096x10 float32",
        {"both": (200.0, {"fusedact": (0.8, 0.79, 0.81), "compile": (0.5, 0.4, 0.6)})},
    ),
    (
        "cross_entropy",
        "cross_entropy 4096x1000 float32",
        {"both": (300.0, {"fusedact": (1.25, 1.24, 1.26), "compile": (2.0, 1.9, 2.1)})},
    ),
    (None, "S3 xor", {"step": (400.0, {"fusedact": (1.0, 0.9, 1.1), "fit": (20.0, 19.0, 21.0)})}),
    (None, "S3 xor", {"run": (2.5e6, {"fusedact": (1.0, 0.9, 1.1), "fit": (30.0, 29.0, 31.0)})}),
)

ARGUMENTS = ["bench/test_ops.py", "-k", "a name", "--rounds", "25"]


@pytest.fixture(scope="module", autouse=True)
def table():
    """The suites' cases and trainers are those of OPS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "cases_for", lambda device: [Named(name) for op, name, _ in OPS if op])
        patch.setattr(cases, "STEPS", [Named(name) for op, name, _ in OPS if op is None])
        yield


class Named(NamedTuple):
    name: str


def benchmark(op, case, phase, contender, micros, ratio, low, high):
    info = {"case": case, "op": op, "activation": "", "phase": phase, "contender": contender, "device": "CPU"}
    info |= {"shape": [4096, 10], "dtype": "float32", "threads": 1, "noise": 0.02, "gbps": 1.0, "tflops": 1.0}
    info |= {"ratio": ratio, "ratio_low": low, "ratio_high": high, "memory": None}
    of_op = {"bytes": 10**6, "flops": 2 * 10**6, "share": 0.5, "error": 1e-7 if contender == "stock" else 1.5e-7}
    info |= dict.fromkeys(of_op) if phase in timed.WHOLE else of_op
    return {"group": f"{op} {phase}", "name": case, "stats": {"median": micros * 1e-6}, "extra_info": info}


def suites_record():
    """No measurement: numbers that are easy to follow, of a machine that does not exist."""
    benchmarks = []
    for op, case, phases in OPS:
        for phase, (stock, others) in phases.items():
            benchmarks.append(benchmark(op, case, phase, "stock", stock, 1.0, 1.0, 1.0))
            benchmarks += [benchmark(op, case, phase, name, stock / r[0], *r) for name, r in others.items()]
    benchmarks.append({"group": "attachment", "name": "of another suite", "stats": {"median": 1.0}, "extra_info": {}})
    machine = {"machine": "none", "cores": 2, "threads": 1, "python": "3", "torch": "0.0", "triton": "0.0"}
    machine |= {"device": "SYNTHETIC", "arguments": ARGUMENTS, "ceilings": {"copy, GB/s": 10.0, "fp32, TFLOP/s": 0.05}}
    commit = {"id": "abcdef0123456789", "dirty": False}
    return {
        "machine_info": machine,
        "commit_info": commit,
        "benchmarks": benchmarks,
        "datetime": "2000-01-02T03:04:05+00:00",
        "version": "0",
    }


def gpu_record(date, commit="abc", device="SYNTHETIC", **sections):
    machine = {"device": device, "torch": "0", "triton": "0"}
    return {"kind": "gpu", "dry": False, "date": date, "commit": commit, "machine": machine, "sections": sections}


def measured(stock=100.0, ours=50.0):
    twice = (("stock", stock), ("again", 1.1 * stock))
    times = {name: {"median": t, "p20": 0.9 * t, "p80": 1.25 * t} for name, t in twice}
    times["fusedact"] = {"median": ours, "p20": 0.8 * ours, "p80": 1.25 * ours}
    phase = {"bytes": 10**8, "flops": 10**9, "times": dict.fromkeys(("cold", "launched", "wall"), times)}
    phase |= {"memory": {"stock": 3 * 2**20, "fusedact": 2**20}}
    errors = {"stock": [1e-7, 2e-7], "fusedact": [1e-7, 3e-7]}
    return {"op": "softmax", "dtype": "float32", "threshold": 0.97, "verdict": "accurate", "errors": errors} | {
        "phases": {"both": phase}
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A README, a page and a record of each kind, rendered: copied by whoever changes something."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("docs", "results"):
        (folder / name).mkdir()
    (folder / "README.md").write_text(
        f"before\n{report.OPEN}\n{report.CLOSE}\n<!-- suites-table -->\n<!-- /suites-table -->\nafter\n"
    )
    (folder / "docs" / "measured.md").write_text("before\n<!-- suites-full -->\n<!-- /suites-full -->\nafter\n")
    limits = {"results": {"copy, GB/s": 4000.0, "fp32, TFLOP/s": 50.0}}
    both = measured()
    both["phases"]["forward"] = both["phases"]["both"]
    gpu = gpu_record("2000-01-01T00:00", ops={"results": {"softmax 4x5 float32": both}}, ceilings=limits)
    (folder / "results" / "gpu.json").write_text(json.dumps(gpu))
    (folder / "results" / records.SUITES).write_text(json.dumps(suites_record()))
    shutil.copy(records.RESULTS / "memory.json", folder / "results")
    assert run(folder, "--check") == 1
    assert run(folder) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def run(folder: Path, *options: str) -> int:
    return report.main(["--readme", str(folder / "README.md"), "--results", str(folder / "results"), *options])


def test_a_second_run_changes_nothing(whole):
    written = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert run(whole, "--check") == 0 and run(whole) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == written


def test_charts_are_there_for_each_record(whole):
    kinds = ("speedup", "roofline", "memory", "accuracy")
    expected = {f"{device}-{kind}.png" for device in ("cpu", "gpu") for kind in kinds} | {"cpu-trainers.png"}
    assert {path.name for path in (whole / "docs" / "images").iterdir()} == expected
    for chart in pictures.of_records(whole / "results"):
        path = whole / "docs" / "images" / chart.name
        assert pictures.written(path) == chart.digest and chart.digest.encode() in path.read_bytes()


def test_the_readmes_table_has_a_line_an_op_and_phase(whole):
    text = (whole / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| `cross_entropy` | both | 2 | 1.00 (0.80 to 1.25) | 1.00 (0.50 to 2.00) | 2.0% |" in text
    assert "| `linear_act` | forward | 1 | 1.01 |  | 2.0% |" in text
    assert "| `S3 xor` | step | 400 µs | 1.00 (0.90 to 1.10) | 20.00 (19.00 to 21.00) | 2.0% |" in text
    assert "| `S3 xor` | run | 2.5 s | 1.00 (0.90 to 1.10) | 30.00 (29.00 to 31.00) | 2.0% |" in text
    assert "1 are 1.00 within" in text and "1 are faster and 1 slower" in text
    assert "the slowest is `cross_entropy 4096x10 float32`, both, at 0.80" in text
    assert "| softmax 4x5 float32 | both | 50 | 2000 | 50% | 2.00 |" in text


def test_the_pages_table_has_a_line_a_case_and_phase(whole):
    text = (whole / "docs" / "measured.md").read_text()
    line = next(line for line in text.splitlines() if line.startswith("| cross_entropy 4096x1000"))
    cells = ["both", "300", "240", "1.25 (1.24 to 1.26)", "2.00 (1.90 to 2.10)", "2.0%", "4.17", "0.0083", "50%"]
    assert [cell.strip() for cell in line.split("|")][2:-1] == [*cells, "1.0e-07", "1.5e-07"]
    assert "| `S3 xor` | run | 2.5 s | 1.00 (0.90 to 1.10) | 30.00 (29.00 to 31.00) | 2.0% |" in text
    assert len(re.findall(r"^\| (linear_act|cross_entropy) ", text, re.MULTILINE)) == 3


@pytest.mark.parametrize("file", ["README.md", "docs/measured.md"])
def test_tables_say_where_when_and_how(whole, file):
    command = "`python -m pytest bench/test_ops.py -k 'a name' --rounds 25`"
    text = (whole / file).read_text()
    for said in ("SYNTHETIC", "1 thread", "torch 0.0", "2000-01-02", "abcdef0", records.SUITES, command):
        assert said in text, said
    assert "On a CPU fused layers run stock's own operations" in text and "1.00 within the noise" in text


def change(path: Path, *keys, by=1.01):
    """One number of a record, a little larger."""
    record = json.loads(path.read_text())
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] *= by
    path.write_text(json.dumps(record))


OF_OP = ("benchmarks", 1, "extra_info")
STALE = [
    (records.SUITES, (*OF_OP, "ratio"), {"README.md", "measured.md", "cpu-speedup.png"}),
    (records.SUITES, (*OF_OP, "ratio_low"), {"measured.md", "cpu-speedup.png"}),
    (records.SUITES, (*OF_OP, "error"), {"measured.md", "cpu-accuracy.png"}),
    (records.SUITES, (*OF_OP, "flops"), {"measured.md", "cpu-roofline.png"}),
    (records.SUITES, ("benchmarks", 1, "stats", "median"), {"measured.md", "cpu-roofline.png"}),
    (records.SUITES, ("benchmarks", -2, "extra_info", "ratio"), {"README.md", "measured.md", "cpu-trainers.png"}),
    ("memory.json", ("heads", "fusedact", "bytes"), {"cpu-memory.png"}),
    ("gpu.json", ("sections", "ceilings", "results", "fp32, TFLOP/s"), {"gpu-roofline.png"}),
    (
        "gpu.json",
        ("sections", "ops", "results", "softmax 4x5 float32", "phases", "both", "memory", "stock"),
        {"README.md", "gpu-memory.png"},
    ),
]


@pytest.mark.parametrize(("record", "keys", "stale"), STALE, ids=[f"{row[0]}, {row[1][-1]}" for row in STALE])
def test_one_number_changed_is_found(copied, capsys, record, keys, stale):
    change(copied / "results" / record, *keys, by=1.5)
    assert run(copied, "--check") == 1
    named = {Path(line.split(" differs")[0]).name for line in capsys.readouterr().err.splitlines()}
    assert named == stale


@pytest.mark.parametrize("file", ["README.md", "docs/measured.md"])
def test_a_number_changed_in_a_table_is_found(copied, capsys, file):
    path = copied / file
    path.write_text(path.read_text().replace("1.25", "1.52", 1))
    assert run(copied, "--check") == 1
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda path: path.unlink(), "cpu-speedup.png"),
        (lambda path: shutil.copy(path.with_name("gpu-speedup.png"), path), "cpu-speedup.png"),
        (lambda path: Image.open(path).save(path), "gpu-memory.png"),
        (lambda path: path.write_bytes(b"no picture"), "gpu-accuracy.png"),
    ],
    ids=["missing", "another's", "without its digest", "no PNG"],
)
def test_a_chart_that_is_not_the_records_is_found(copied, capsys, spoil, name):
    spoil(copied / "docs" / "images" / name)
    assert run(copied, "--check") == 1
    assert [Path(line.split(" differs")[0]).name for line in capsys.readouterr().err.splitlines()] == [name]


def test_a_chart_of_no_record_is_found(copied, capsys):
    (copied / "results" / "gpu.json").unlink()
    assert run(copied) == 1 and run(copied, "--check") == 1
    named = [Path(line.split(" is of no record")[0]).name for line in capsys.readouterr().err.splitlines()]
    assert named == 2 * [f"gpu-{kind}.png" for kind in ("accuracy", "memory", "roofline", "speedup")]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_chart_of_another_resolution_is_stale(whole, monkeypatch, device):
    monkeypatch.setattr(pictures, "DPI", 2 * pictures.DPI)
    stale = {chart.name for chart in pictures.of_records(whole / "results") if not chart.current(whole / "docs/images")}
    assert f"{device}-speedup.png" in stale


def test_the_gpus_memory_is_of_whole_calls(whole):
    [chart] = [chart for chart in pictures.of_records(whole / "results") if chart.name == "gpu-memory.png"]
    assert [(each.contender, each.mib) for each in chart.shown["held"]] == [("stock", 3.0), ("fusedact", 1.0)]


def test_redrawn_charts_are_the_same(copied):
    chart = copied / "docs" / "images" / "cpu-memory.png"
    before, at = chart.read_bytes(), chart.stat().st_mtime_ns
    for other in copied.glob("results/[gs]*.json"):
        other.unlink()
    run(copied, "--redraw")
    assert chart.read_bytes() == before and chart.stat().st_mtime_ns > at


# What is read


def folder_of(tmp_path, **found) -> Path:
    for name, record in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    return tmp_path


def test_sections_run_apart_are_merged(tmp_path):
    ops, newer = {"results": {"a": measured()}}, {"results": {"a": measured(ours=25.0)}}
    path, record = records.newest(
        folder_of(
            tmp_path,
            first=gpu_record("2000-01-01T00:00", ops=ops, steps={"results": {"s": 1}}),
            second=gpu_record("2000-01-02T00:00", steps={"results": {"s": 2}}, peers={"results": {"p": 1}}),
            third=gpu_record("2000-01-03T00:00", ops=newer, peers={"error": "broke"}),
            other=gpu_record("2000-01-04T00:00", commit="else", peers={"results": {"x": 1}}),
            elsewhere=gpu_record("2000-01-04T00:00", device="else", peers={"results": {"x": 1}}),
            dry=gpu_record("2000-01-05T00:00", ops=ops) | {"dry": True},
        )
    )
    assert "error" not in record["sections"]["peers"]
    assert path.name == "third.json" and record["records"] == ["second.json", "third.json"]
    sections = {name: section["results"] for name, section in record["sections"].items()}
    assert sections == {"ops": newer["results"], "steps": {"s": 2}, "peers": {"p": 1}}
    assert [row.ratio for row in report.rows(record | {"sections": {"ops": newer}})] == [4.0]


def test_a_run_cut_short_takes_no_result_away(tmp_path):
    units = [f"case {i}" for i in range(5)]
    fit = {"took": 0.5, "step_us": 10.0, "stock_step_us": 300.0}
    ops = {"results": dict.fromkeys(units, measured()), "first_calls": dict.fromkeys(units, 1.0)}
    again = {"results": {units[3]: measured(ours=25.0)}, "skipped": dict.fromkeys(units[:3], "no time left")}
    again |= {"errors": {units[4]: "its process ended"}, "first_calls": {units[3]: 2.0}}
    whole = gpu_record("2000-01-01T00:00", ops=ops, fits={"results": {"a run": fit}}, tests={"passed": 9})
    part = gpu_record(
        "2000-01-02T00:00", ops=again, fits={"results": {}, "skipped": {"a run": "no time"}}, tests={"error": "broke"}
    )
    path, record = records.newest(folder_of(tmp_path, one=whole, two=part))
    sections = record["sections"]
    expected = ops["results"] | again["results"]
    assert path.name == "two.json" and sections["ops"]["results"] == expected and list(expected) == units
    assert sections["ops"]["skipped"] == sections["ops"]["errors"] == {}
    assert sections["ops"]["first_calls"] == ops["first_calls"] | {units[3]: 2.0}
    assert sections["fits"] == {"results": {"a run": fit}, "skipped": {}} and sections["tests"] == {"passed": 9}
    assert record["records"] == ["one.json", "two.json"]


def test_a_unit_that_failed_or_was_skipped_may_come_later(tmp_path):
    broken = {"results": {"a": measured()}, "errors": {"b": "broke", "c": "broke"}, "skipped": {"d": "no time"}}
    later = {"results": {"b": measured()}, "errors": {"d": "broke"}, "skipped": {"c": "no time"}}
    one, two = gpu_record("2000-01-01T00:00", ops=broken), gpu_record("2000-01-02T00:00", ops=later)
    _, record = records.newest(folder_of(tmp_path, one=one, two=two))
    section = record["sections"]["ops"]
    assert list(section["results"]) == ["a", "b"] and section["skipped"] == {}
    assert section["errors"] == {"c": "broke", "d": "broke"}


def test_the_date_is_of_what_contributed(tmp_path):
    ops = gpu_record("2000-01-01T00:00", ops={"results": {"a": measured()}})
    steps = gpu_record("2000-01-02T00:00", steps={"results": {"s": 1}})
    empty = gpu_record("2000-01-03T00:00", steps={"results": {}, "skipped": {"s": "no time"}}, peers={"error": "broke"})
    _, record = records.newest(folder_of(tmp_path, one=ops, two=steps, three=empty))
    assert record["date"] == "2000-01-02T00:00" and record["records"] == ["one.json", "two.json"]


@pytest.mark.parametrize("key", ["device", "torch", "triton"])
def test_another_machine_or_version_is_not_merged(tmp_path, key):
    ops = gpu_record("2000-01-01T00:00", ops={"results": {"a": measured()}})
    other = gpu_record("2000-01-02T00:00", steps={"results": {"s": 1}})
    other["machine"][key] = "else"
    _, record = records.newest(folder_of(tmp_path, one=ops, two=other))
    assert record["records"] == ["one.json"] and set(record["sections"]) == {"ops"}


@pytest.mark.parametrize("commit", ["abc-dirty", "unknown"])
def test_what_is_of_no_known_commit_stands_alone(tmp_path, commit):
    ops = {"results": {"a": measured()}}
    one, other = (gpu_record(f"2000-01-0{day}T00:00", commit=commit, ops=ops) for day in (1, 2))
    _, record = records.newest(folder_of(tmp_path, one=one | {"sections": {"steps": {}}}, other=other))
    assert record["records"] == ["other.json"] and set(record["sections"]) == {"ops"}


def test_without_records_texts_say_so(tmp_path):
    text = f"{report.OPEN}\n{report.CLOSE}"
    assert report.NO_RECORD in report.rendered(text, tmp_path) and "suites" not in report.rendered(text, tmp_path)
    suites = "<!-- suites-table -->\n<!-- /suites-table -->"
    assert suite_tables.NO_RECORD in report.rendered(f"{text}\n{suites}", tmp_path)
    assert pictures.of_records(tmp_path) == []


def test_a_record_without_its_markers_is_refused(tmp_path):
    (tmp_path / records.SUITES).write_text(json.dumps(suites_record()))
    with pytest.raises(ValueError, match=r"expected <!-- suites-table --> .* in the README"):
        report.rendered(f"{report.OPEN}\n{report.CLOSE}", tmp_path)
    with pytest.raises(ValueError, match=r"expected <!-- suites-full --> .* in docs/measured.md"):
        report.rendered_docs("none", tmp_path)


def suites_with(change) -> str:
    record = suites_record()
    change(record)
    return json.dumps(record)


def gpu_without(key: str) -> str:
    record = gpu_record("2000-01-01T00:00")
    del record["machine"][key]
    return json.dumps(record)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            records.SUITES,
            suites_with(lambda r: r["machine_info"].update(smoke=True)),
            "expected measured suites, got a smoke run's",
        ),
        (records.SUITES, "{}", "suites-cpu.json: expected the key datetime, got none"),
        (records.SUITES, "[]", "suites-cpu.json: expected a record, an object of JSON, got a list"),
        (records.SUITES, '{"machine_info": {"ceilings": {}}}', "suites-cpu.json: expected the key"),
        (
            records.SUITES,
            suites_with(lambda r: r["machine_info"].pop("arguments")),
            "suites-cpu.json: expected the key machine_info.arguments, got none",
        ),
        (
            records.SUITES,
            suites_with(lambda r: r["benchmarks"][1]["extra_info"].pop("op")),
            "suites-cpu.json: expected the key benchmarks.1.extra_info.op, got none",
        ),
        (
            records.SUITES,
            suites_with(lambda r: r["benchmarks"][2]["stats"].update(median="1")),
            "suites-cpu.json: expected benchmarks.2.stats.median as Number, got str",
        ),
        (
            records.SUITES,
            suites_with(lambda r: r.update(benchmarks=r["benchmarks"][2:])),
            "expected all cases of the table, got none of linear_act relu 64x1x3 float32; 1 are missing",
        ),
        (
            records.SUITES,
            suites_with(lambda r: r.update(benchmarks=r["benchmarks"][:8])),
            "expected all cases of the table, got none of S3 xor; ",
        ),
        ("memory.json", "{}", "memory.json: expected the key machine, got none"),
        ("memory.json", "[]", "memory.json: expected a record, an object of JSON, got a list"),
        ("x.json", "[]", "x.json: expected a record, an object of JSON, got a list"),
        ("x.json", '{"kind": "gpu"}', "x.json: expected the key date, got none"),
        ("gpu.json", gpu_without("torch"), "gpu.json: expected the key machine.torch, got none"),
        ("gpu.json", "{", "gpu.json: expected JSON"),
        ("../README.md", "no markers", "expected <!-- gpu-table -->"),
    ],
)
def test_what_cannot_be_read_is_one_line(copied, capsys, name, content, said):
    (copied / "results" / name).write_text(content)
    assert run(copied) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("file", ["README.md", "docs/measured.md"])
def test_a_missing_text_is_one_line(copied, capsys, file):
    (copied / file).unlink()
    assert run(copied) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert file in line


def test_a_phase_without_stock_is_refused():
    record = suites_record()
    del record["benchmarks"][0]
    with pytest.raises(ValueError, match="64x1x3 float32, forward: expected stock and fusedact, got fusedact"):
        suite_tables.short(record)


def test_of_a_gpu_others_stand_against_their_own_runs_stock():
    beside = measured(stock=80.0)
    beside["phases"]["both"]["times"]["cold"]["Liger"] = {"median": 40.0, "p20": 20.0, "p80": 80.0}
    fit = {"took": 0.5, "step_us": 10.0, "stock_step_us": 300.0}
    record = gpu_record(
        "2000-01-01T00:00",
        ops={"results": {"softmax 4x5 float32": measured()}},
        peers={"results": {"softmax 4x5 float32": beside}},
        fits={"results": {"a run": fit}},
    )
    found = {each.contender: each for each in timed.of_gpu(record) if not each.of_trainer}
    assert [(name, each.ratio, each.low, each.high) for name, each in found.items()] == [
        ("stock", 1.0, 0.8, pytest.approx(1 / 0.9)),
        ("fusedact", 2.0, 1.6, 2.5),
        ("Liger", 2.0, 1.0, 4.0),
    ]
    assert [each.noise for each in found.values()] == [pytest.approx(0.1)] * 3
    assert [row.noise for row in report.rows(record)] == [pytest.approx(0.1)]
    assert found["fusedact"].label == "4x5 float32" and found["fusedact"].errors == (1e-7, 3e-7)
    [run] = [each for each in timed.of_gpu(record) if each.of_trainer]
    assert (run.case, run.phase, run.ratio) == ("a run", "run", 30.0)


def test_who_stands_beside_others_alone_keeps_stock_and_fusedact():
    beside = measured(stock=80.0)
    beside["phases"]["both"]["times"]["cold"]["attorch"] = {"median": 20.0, "p20": 20.0, "p80": 20.0}
    record = gpu_record("2000-01-01T00:00", ops={"results": {}}, peers={"results": {"nll_loss 4x5 float32": beside}})
    assert [each.contender for each in timed.of_gpu(record)] == ["stock", "fusedact", "attorch"]


@pytest.mark.parametrize("op", ["softmax", "linear_act"])
def test_every_table_has_whoever_stands_beside(tmp_path, op):
    beside = measured()
    for name, time in (("attorch", 20.0), ("a newcomer", 40.0)):
        beside["phases"]["both"]["times"]["cold"][name] = {"median": time, "p20": time, "p80": time}
    timing = {"seconds": 1.0, "limit": 2.0, "state": ""}
    sections = {
        name: {"results": {"a case": result | {"op": op}}} | timing
        for name, result in (("ops", measured()), ("peers", beside))
    }
    record = gpu_record("2000-01-01T00:00", **sections)
    lines = [line for line in report.markdown(record).splitlines() if line.startswith("| a case | both")]
    short = report.rendered(f"{report.OPEN}\n{report.CLOSE}", folder_of(tmp_path, gpu=record))
    assert "to attorch | to a newcomer | GB/s" in report.markdown(record) and " | 0.400 | 0.800 | " in lines[0]
    if op == "softmax":
        assert (
            "| attorch | a newcomer | memory" in short and " | 0.40 | 0.80 | " in short and short.count("a case") == 1
        )
        assert " | 0.40 | 0.80 | " in lines[1]
    else:
        assert "| attorch / fusedact | a newcomer / fusedact |" in short and " | 0.400 | 0.800 | " in short


def test_layers_and_losses_are_the_ops():
    assert {op for op in ops.OPS if not op.startswith(rows.LAYERS)} == set(losses.LOSSES)
    assert {case.op for case in (*cases.CASES, *cases.SMALL)} <= set(ops.OPS)
    assert rows.CHUNKS in peers.PEERS["linear_cross_entropy"] and rows.COPY == ceilings.COPY


@pytest.mark.parametrize("rate", [None, "fp32, TFLOP/s", "bf16, TFLOP/s"])
@pytest.mark.parametrize("flops", [0, 10**9, 10**12])
@pytest.mark.parametrize("limits", [{}, {"copy, GB/s": 4000.0}, {"copy, GB/s": 4000.0, "fp32, TFLOP/s": 50.0}], ids=len)
def test_a_gpus_shares_are_the_suites(rate, flops, limits):
    result = measured() | {"matrix_rate": rate}
    result["phases"]["both"] |= {"flops": flops}
    record = gpu_record("", ops={"results": {"a case": result}}, ceilings={"results": limits})
    [row] = report.rows(record)
    least = figures.least(result["phases"]["both"], result, limits)
    assert row.share == (None if least is None else pytest.approx(least / row.fusedact))
    assert figures.least({}, result, limits) is None


def test_an_error_that_is_no_number_is_drawn(tmp_path):
    result = measured() | {"errors": {"stock": [1e-7], "fusedact": [math.nan]}}
    record = gpu_record("2000-01-01T00:00", ops={"results": {"a case": result}})
    [chart] = [c for c in pictures.of_records(folder_of(tmp_path, gpu=record)) if c.name == "gpu-accuracy.png"]
    chart.write(tmp_path)
    assert chart.current(tmp_path)


def test_profiles_are_a_line_each_and_a_table():
    row = {"name": "fusedact::linear", "kernels": ["_forward_kernel"], "calls": 3.0, "us": 1234.5, "whole_us": 1300.0}
    row |= {"bytes": 4096, "flops": {"32": 8}, "share": 0.5}
    unknown = {"name": "copy", "kernels": [], "calls": 1.0, "us": 1.0, "whole_us": 1.0, "bytes": None, "share": None}
    times = {"stock": 300.0, "fused": 200.0}
    found = {
        "title": "a step",
        "contenders": {},
        "proton": {"rows": [{"name": "_forward_kernel", "time (ns)": 2000.0}]},
    }
    for name, time in times.items():
        found["contenders"][name] = {"calls": 7.0, "us": 9.0, "time_us": {"median": time}, "rows": [row, unknown]}
    line = "stock 7 launches, 300 µs; fused 7 launches, 200 µs; stock / fused 1.50"
    assert report.totals(found) == line
    section = {"results": {"mnist-mlp": found}, "seconds": 1.0, "limit": 2.0, "state": ""}
    text = report.markdown(gpu_record("2000-01-01T00:00", profiles=section))
    assert f"- mnist-mlp: {line}" in text and "### a step" in text
    assert "| fused | `fusedact::linear` | `_forward_kernel` | 3 | 1,234.5 | 4,096 | 50% |" in text
    assert "| fused | `copy` |  | 1 | 1.0 |  |  |" in text
    assert "| `_forward_kernel` | 0 | 2.0 |" in text
    found["proton"] = {"error": "no such driver"}
    assert "Proton: no such driver" in report.markdown(gpu_record("2000-01-01T00:00", profiles=section))
