"""`fusedact profile` as a user runs it: its tables, its traces, and what it says to bad input."""

import json

import pytest

from fusedact import cli
from fusedact.cli import options, profiling
from fusedact.profiling import timing, tracing

PARTS = {"forward", "loss", "backward", "optimizer"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings of small tensors."""
    monkeypatch.setattr(tracing, "ON_CPU", timing.DRY)
    monkeypatch.setattr(options.console, "_width", 160)


def run(capsys, *args):
    code = cli.run(["profile", "--device", "cpu", *args])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def events_of(path):
    """The complete events of a Chrome trace, by name."""
    found: dict[str, list] = {}
    for event in json.loads(path.read_text())["traceEvents"]:
        if event["ph"] == "X":
            found.setdefault(event["name"], []).append(event)
    return found


def within(inner, outers):
    return any(
        outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] for outer in outers
    )


def test_a_trainer(capsys, tmp_path):
    code, out, err = run(capsys, "xor", "--steps", "2", "--out", str(tmp_path))
    assert (code, err) == (0, "")
    for layers in ("stock", "fused"):
        events = events_of(tmp_path / f"xor-{layers}.json")
        assert len(events["step"]) == len(events["forward"]) == len(events["loss"]) == len(events["backward"]) == 2
        assert all(within(event, events["step"]) for part in PARTS for event in events[part])
        assert all(within(event, events["forward"]) for event in events["aten::linear"])
        assert "Input Dims" in events["aten::addmm"][0]["args"]
        assert str(tmp_path / f"xor-{layers}.json") in out.splitlines()
    for said in ("aten::addmm", "ATen calls", "µs without a profiler", "torch's own operations"):
        assert said in out


def test_a_trainer_on_kernels(capsys, tmp_path, triton_backend):
    code, out, err = run(capsys, "binary", "--steps", "1", "--out", str(tmp_path))
    assert (code, err) == (0, "")
    events = events_of(tmp_path / "binary-fused.json")
    ours = {name for name in events if name.startswith("fusedact::")}
    assert {"fusedact::linear_act", "fusedact::linear_act_backward"} <= ours
    for name in ours:
        phases = events["backward"] if name.endswith("_backward") else events["forward"] + events["loss"]
        assert all(within(event, phases) for event in events[name]), name
    assert not {name for name in events_of(tmp_path / "binary-stock.json") if name.startswith("fusedact::")}
    assert "interpreted" in out and "fusedact::linear_act" in out


@pytest.mark.parametrize(
    "args, said",
    [
        (["softmax", "--shape", "8x10"], "softmax 8x10 float32, forward and backward, stock"),
        (["softmax", "--shape", "8x10", "--phase", "forward"], "softmax 8x10 float32, forward, fused"),
        (
            ["linear_act", "--shape", "8x16x4", "--activation", "gelu", "--dtype", "bfloat16"],
            "linear_act gelu 8x16x4 bfloat16",
        ),
        (["softmax", "--shape", "8x10", "--phase", "no_grad"], "softmax 8x10 float32, inference, fused"),
        (["cross_entropy", "--shape", "4x10x3x5"], "cross_entropy 4x10x3x5 float32, forward and backward, fused"),
        (["linear_bce", "--shape", "8x4", "--phase", "no_grad"], "linear_bce 8x4 float32, inference"),
        (["linear_act sigmoid 64x1x3 float32"], "linear_act sigmoid 64x1x3 float32"),
    ],
)
def test_an_op(args, said, capsys, tmp_path):
    code, out, err = run(capsys, *args, "--steps", "1", "--out", str(tmp_path))
    assert (code, err) == (0, "")
    assert said in out
    events = events_of(next(tmp_path.glob("*-fused.json")))
    inference = args[-1] in ("forward", "no_grad")
    assert ("backward" in events) != inference


def test_traces_of_other_cases_and_phases_stay(capsys, tmp_path):
    for args in (["--shape", "8x8"], ["--shape", "8x9"], ["--shape", "8x9", "--phase", "forward"]):
        assert run(capsys, "softmax", *args, "--steps", "1", "--out", str(tmp_path))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"softmax-{case}-{contender}.json"
        for case in ("8x8-float32-both", "8x9-float32-both", "8x9-float32-forward")
        for contender in ("stock", "fused")
    }


def row(name, **values):
    empty = {"kernels": [], "bytes": None, "flops": {}, "share": None}
    return {"name": name, "calls": 1.0, "us": 12.5} | empty | values


@pytest.mark.parametrize("proton", ["rows", "error"])
def test_what_a_gpu_gives(proton, capsys):
    """Of which none is here: its rows, made by hand."""
    kernel = row("softmax.forward 8x10", kernels=["_forward_kernel"], bytes=1_230_000, flops={32: 4e9}, share=0.907)
    many = [row(f"aten::operation_{n}", kernels=["a_kernel"]) for n in range(30)]
    found = {
        "name": "softmax", "title": "softmax 8x10 float32, forward", "device": "cuda", "steps": 10, "kernels": True,
        "triton": True, "ceilings": {"copy, GB/s": 4000.0},
        "contenders": {
            layers: {"rows": rows, "calls": len(rows), "us": 12.5 * len(rows), "trace": f"{layers}.json"}
            | {"time_us": {"median": 40.0}}
            for layers, rows in (("stock", many), ("fused", [kernel]))
        },
        "proton": {
            "rows": [{"name": "softmax.forward 8x10", "count": 1, "time (ns)": 2000.0, "bytes": 4e6, "flops32": 8e6}],
            "file": "softmax-proton.hatchet",
        } if proton == "rows" else {"error": "RuntimeError: [no] CUPTI"},
    }  # fmt: skip
    profiling._show(found, "fused layers run Triton kernels")
    out = capsys.readouterr().out
    assert "three TF32 products" in " ".join(out.split())  # not a cache, above 100 %
    for said in ("_forward_kernel", "1.23 M", "4 G", "91%", "10 more", "launches", "30.00", "stock.json"):
        assert said in out
    assert ("2,000.0" in out and "4.0" in out) if proton == "rows" else "Proton: RuntimeError: [no] CUPTI" in out


@pytest.mark.parametrize(
    "args, said",
    [
        (["nonsense"], "unknown name 'nonsense', expected one of binary, perceptron, xor"),
        (["softmax", "--shape", "8"], "shape 8: softmax takes one as "),
        (["softmax", "--shape", "8y"], "'8y', expected sizes as 4096x1000"),
        (["softmax", "--activation", "relu"], "activation 'relu': softmax takes none"),
        (["softmax", "--dtype", "int8"], "unknown dtype 'int8', expected one of float32"),
        (["linear_act", "--activation", "nope"], "unknown activation 'nope', expected one of "),
        (["linear_bce", "--phase", "backward"], "phase 'backward': linear_bce has no_grad, both"),
        (["xor", "--shape", "3x4"], "shape: of an op; xor is a trainer, expected none"),
        (["xor", "--nvtx"], "expected a CUDA device, received cpu"),
        (["softmax", "--steps", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_input_is_a_line(args, said, capsys, tmp_path):
    code, out, err = run(capsys, *args, "--out", str(tmp_path / "traces"))
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1
    assert not (tmp_path / "traces").exists()
