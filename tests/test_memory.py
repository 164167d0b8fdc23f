"""What losses hold in memory: README's formulas are what is counted, and the head on a CPU keeps its promise."""

import json

import pytest
import torch

import fusedact
from bench import memory
from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import contenders, output_gradient
from fusedact.profiling.peers import PEERS

SMALL = {2: (64, 500), 3: (512, 32, 650)}
A_ROW = 16  # bytes that a formula leaves out


def small(case: Case) -> Case:
    return Case(case.op, SMALL[len(case.shape)], "float32", chunk=case.chunk and 128)


@pytest.mark.parametrize(
    ("loss", "way"),
    [
        pytest.param(loss, way, id=f"{loss.case.op}, {way}")
        for loss in memory.LOSSES
        for way in loss.held
        if way == "stock" or (way == "torch's chunks") or (way == "fusedact" and "linear" not in loss.case.op)
    ],
)
def test_formulas_are_what_is_counted(loss, way):
    if way == "torch's chunks" and not torch.__version__.startswith("2.13."):
        pytest.skip("the formula is of torch 2.13's chunks")
    case = small(loss.case)
    with fusedact.use_backend("triton"):
        runs = contenders(case, seed=0)
        if way not in runs:
            runs[way] = PEERS[case.op][way].contender(case, runs["stock"])
        found = memory.counted(runs[way], output_gradient(runs["stock"].forward().detach()))
    for bytes_, amount in zip(found, loss.held[way], strict=True):
        assert 0 <= bytes_ - amount.bytes(memory.units(case)) <= A_ROW * case.shape[0]


def test_amounts_are_said_and_summed():
    assert str(memory.Amount()) == "0"
    assert str(memory.Amount(u=3)) == "3u"
    assert str(memory.Amount(x=1, w=2, c=1)) == "x + 2w + c"
    units = memory.units(Case("linear_cross_entropy", (8, 3, 5), "bfloat16", chunk=4))
    assert units == memory.Amount(u=80, x=48, w=30, c=40)
    assert memory.Amount(x=1, w=2, c=1).bytes(units) == 48 + 60 + 40


@pytest.mark.slow
def test_the_head_on_a_cpu_takes_less_than_half_of_stocks():
    stock, ours = (
        memory.resident(name, 4096, 64, 16000)["bytes"] for name in ("`F.linear`, `F.cross_entropy`", "fusedact")
    )
    assert ours < stock / 2


def test_the_readme_shows_formulas_and_records(tmp_path, monkeypatch):
    heads = {"stock": {"bytes": 3 * 2**30, "seconds": 20.2}, "fusedact": {"bytes": 2**29, "seconds": 10.1}}
    record = {"kind": "memory", "date": "2000-01-01", "commit": "synthetic", "machine": "SYNTHETIC"}
    monkeypatch.setattr(memory, "RECORD", tmp_path / "memory.json")
    memory.RECORD.write_text(json.dumps(record | {"shape": [8192, 512, 64000], "heads": heads}))
    readme = f"before\n{memory.OPEN}\n{memory.CLOSE}\nafter"
    text = memory.rendered(readme)
    assert (
        "| `cross_entropy` | 4,096 x 128,256 bfloat16 | u; 3u (2.94 GiB) | 0; u (0.98 GiB) | 0; 0 (0.00 GiB) |" in text
    )
    assert "no record yet" in text and "| stock | 3.00 | 20 |" in text
    result = {"op": "softmax", "phases": {"both": {"memory": {"stock": 2**31, "fusedact": 2**30}}}}
    beside = {"op": "softmax", "phases": {"both": {"memory": {"stock": 2**31, "fusedact": 2**30, "Liger": 2**29}}}}
    sections = {"ops": {"results": {"softmax 2x3": result}}, "peers": {"results": {"softmax 2x3": beside}}}
    machine = {"device": "SYNTHETIC", "torch": "0", "triton": "0"}
    gpu = {"kind": "gpu", "dry": False, "date": "2000-01-01T00:00", "commit": "synthetic", "machine": machine}
    (tmp_path / "gpu.json").write_text(json.dumps(gpu | {"sections": sections}))
    assert "| softmax 2x3 | 2.00 | 1.00 | 0.50 |" in memory.rendered(readme)
