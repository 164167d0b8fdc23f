"""The model of a head's step on many GPUs: its limits, its arithmetic, and what several processes of a CPU measured."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import scale, scale_worker
from fusedact.autograd import head_shards
from fusedact.autograd.linear_cross_entropy import chunk_rows
from fusedact.distributed import scaling
from fusedact.distributed.scaling import H200, INFINIBAND, NVLINK, WAYS, Collective, Group, head_step
from tools import pages

HEAD = {"hidden": 4096, "classes": 128256}
FACTOR = 1.6  # between predicted and measured, either way: what a sharded head waits for doubles with the GPUs
MEDIAN_FACTOR = 1.3  # of all together

each_way = pytest.mark.parametrize("way", WAYS)


def step(gpus=8, tokens=4096 * 8, way="sharded", **given):
    return head_step(tokens, gpus=gpus, way=way, **(HEAD | given))


# Limits


@each_way
def test_one_gpu_sends_nothing(way):
    cost = step(gpus=1, tokens=4096, way=way)
    assert (cost.sent, cost.exchange, cost.inputs, cost.weights) == (0, 0, 0, 0)
    assert cost.exposed == pytest.approx(0, abs=1e-12)
    assert cost.memory.logits == 2048 * 128256 * 2


def test_one_gpu_takes_what_the_head_does():
    """Three products of 4096 x 4096 x 128256 at 790 TFLOP/s; two passes over the logits and dW's rounding besides."""
    cost = step(gpus=1, tokens=4096, way="replicated")
    assert cost.products == pytest.approx(6 * 4096 * 4096 * 128256 / 790e12)
    assert cost.passes == pytest.approx((2 * 2 * 4096 * 128256 + 6 * 4096 * 128256) / 4.3e12)
    assert cost.flops == 6 * 4096 * 4096 * 128256


def test_a_slice_of_one_class_waits_for_memory():
    """x is read twice, dx written in float32; W, the logits and dW beside it."""
    cost = step(gpus=8, tokens=2048, classes=8)
    x, w, z = 2048 * 4096, 4096, 2048
    bytes_moved = 2 * (x + w + z) + (2 * (w + z) + 4 * x) + 2 * (x + z + w)
    assert cost.products == pytest.approx(bytes_moved / 4.3e12)


@pytest.mark.parametrize(
    ("way", "part"), [("replicated", "weights"), ("sharded", "inputs"), ("sharded", "exchange"), ("both", "weights")]
)
def test_twice_the_rate_halves_what_bytes_take(way, part):
    """Of links without latency."""
    slow, fast = (replace(NVLINK, latency_seconds=0, start_seconds=0, bytes_per_second=rate) for rate in (1e9, 2e9))
    one, other = (step(gpus=16, way=way, link=link, inter_node_link=link) for link in (slow, fast))
    assert getattr(one, part) == pytest.approx(2 * getattr(other, part)) and getattr(one, part) > 0


@pytest.mark.parametrize(("way", "part"), [("replicated", "weights"), ("sharded", "inputs"), ("sharded", "exchange")])
def test_twice_the_latency_doubles_what_steps_take(way, part):
    """Of links that take no time for bytes."""
    given = {"bytes_per_second": float("inf"), "start_seconds": 0}
    one, other = (
        step(gpus=8, way=way, link=replace(NVLINK, latency_seconds=latency, **given)) for latency in (2e-6, 1e-6)
    )
    assert getattr(one, part) == pytest.approx(2 * getattr(other, part)) and getattr(one, part) > 0


def test_nothing_hides_without_overlap():
    cost = step(overlap=False)
    parts = cost.products + cost.passes + cost.exchange + cost.inputs + cost.weights
    assert cost.total == pytest.approx(parts) and cost.exposed == pytest.approx(cost.exchange + cost.inputs)
    assert step().total < cost.total


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_hiding_takes_nothing_away(gpus):
    """Whatever hides, neither the chip's work nor the network's gets shorter."""
    cost = step(gpus=gpus, tokens=4096 * gpus)
    assert max(cost.products + cost.passes, cost.exchange + cost.inputs) <= cost.total * (1 + 1e-12)
    assert cost.total <= step(gpus=gpus, tokens=4096 * gpus, overlap=False).total * (1 + 1e-12)


def test_chunks_in_a_pipeline_by_hand():
    """Two chunks: logits 1 s and gradients 1 + 1 s each, an exchange of 3 s, a sum of dx of 10 s.

    0 to 1 logits, 1 to 4 their exchange; 1 to 2 the next logits, 4 to 7 theirs; 4 to 5 dx, 7 to 17 its sum; 5 to 6 dW;
    7 to 8 dx, 17 to 27 its sum, before which that of the first is waited for; 17 to 18 dW.
    """
    chunk = scaling._Chunk(logits=1, statistics=0, exchange=3, gradient=0, dx=1, inputs=10, dw=1)
    assert scaling._finished([chunk, chunk], overlap=True) == 27
    assert scaling._finished([chunk, chunk], overlap=False) == 32
    assert scaling._finished([chunk, chunk, chunk._replace(dw=20)], overlap=True) == 50  # 30 to 50 the last dW
    assert scaling._finished([chunk._replace(exchange=0, inputs=0)] * 2, overlap=True) == 6
    assert scaling._finished([chunk._replace(exchange=50, inputs=0)], overlap=True) == 53


def test_work_behind_the_head_hides_dw():
    shown, hidden = (step(way="replicated", behind=behind) for behind in (0.0, 1.0))
    assert shown.exposed == pytest.approx(shown.weights) and hidden.exposed == pytest.approx(0, abs=1e-12)
    assert step(way="replicated", behind=shown.weights / 2).exposed == pytest.approx(shown.weights / 2)
    assert step(way="replicated", behind=1.0, overlap=False).total == pytest.approx(shown.total)


# Bytes and memory


@pytest.mark.parametrize(
    ("collective", "sent"),
    [
        (Collective("all_reduce", 1000, 1), 0),
        (Collective("all_reduce", 1000, 2), 1000),
        (Collective("all_reduce", 1000, 4), 1500),
        (Collective("all_gather", 1000, 1), 0),
        (Collective("all_gather", 1000, 4), 3000),
    ],
    ids=str,
)
def test_what_a_ring_sends(collective, sent):
    assert collective.sent == sent


def test_ways_hand_in_what_the_issue_says():
    whole = step(way="replicated")
    assert whole.collectives == (Collective("all_reduce", 4096 * 128256 * 2, 8),)
    shared = step(tokens=5000, chunk_rows=2048)
    rows = (2048, 2048, 904)
    gathered, summed = (
        [Collective(kind, n * each * 4, 8) for n in rows] for kind, each in (("all_gather", 3), ("all_reduce", 4096))
    )
    in_turn = gathered[0], gathered[1], summed[0], gathered[2], summed[1], summed[2]
    assert shared.collectives == in_turn
    both = step(gpus=64, tokens=4096 * 64, way="both")
    assert both.collectives[-1] == Collective("all_reduce", 4096 * 16032 * 2, 8) and both.rows == 4096 * 8
    assert {each.gpus for each in both.collectives} == {8}
    assert step(numbers=5).collectives[0].bytes == 5 * 4096 * 4
    assert step(itemsize=8, numbers=5, chunk_rows=2048).collectives[0].bytes == 5 * 2048 * 8


def test_both_is_each_of_the_others_at_its_ends():
    same = ("rows", "collectives", "memory", "total")
    for given, way in (({"gpus": 8}, "sharded"), ({"gpus": 8, "per_node": 1}, "replicated")):
        both, other = (step(way=each, **given) for each in ("both", way))
        assert [getattr(both, name) for name in same] == [getattr(other, name) for name in same]


def test_shards_share_the_memory_of_the_head():
    one, eight = step(way="replicated").memory, step().memory
    assert 8 * eight.weights == one.weights and 8 * eight.optimizer == one.optimizer
    assert 2 * eight.logits == one.logits  # two chunks, of twice the rows, of an eighth of the classes
    assert eight.rows == 4096 * 8 * 4096 * (2 + 2)
    assert eight.sums == 4 * (16032 * 4096 + 2 * 4096 * 4096) and one.sums == 4 * 128256 * 4096


# Chunks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("gpus", [2, 8, 64, 1024])
def test_a_sharded_heads_chunks_are_the_heads(gpus, dtype, monkeypatch):
    monkeypatch.setattr(head_shards, "_ranks", lambda group: gpus)
    with FakeTensorMode():
        x = torch.empty(4096 * gpus, 4096, dtype=dtype, device="cuda")
        parts = head_shards._Head(x, *[None] * 9, 0, "", 0, 128256).parts()
    cost = step(gpus, len(x), itemsize=dtype.itemsize)
    assert (cost.chunk_rows, cost.chunks) == (parts[0].stop, len(parts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [100, 4096, 5000])
@pytest.mark.parametrize("classes", [1000, 128256])
def test_a_whole_heads_chunks_are_the_heads(classes, tokens, dtype):
    with FakeTensorMode():
        rows = chunk_rows(torch.empty(tokens, 4096, dtype=dtype, device="cuda"), classes, 0)
    given = {"way": "replicated", "classes": classes, "itemsize": dtype.itemsize}
    assert step(1, tokens, **given).chunk_rows == min(rows, tokens)
    assert step(1, tokens, chunk_rows=300, **given).chunk_rows == min(300, tokens)


# Links


def test_a_ring_through_nodes_has_a_link_of_each_gpu():
    of_all, of_one = Group(64, 8, NVLINK, INFINIBAND), Group(8, 1, NVLINK, INFINIBAND)
    assert of_all.bytes_per_second == 8 * 50e9 and of_one.bytes_per_second == 50e9
    assert (of_all.nodes, of_one.nodes, Group(8, 8, NVLINK, INFINIBAND).bytes_per_second) == (8, 8, 450e9)


@pytest.mark.parametrize(
    ("kind", "gpus", "seconds"),
    [
        ("all_gather", 8, 8e-6 + 7 * 2e-6 + 7e8 / 450e9),
        ("all_gather", 16, 8e-6 + 14 * 2e-6 + 5e-6 + 15e8 / 400e9),
        ("all_reduce", 8, 8e-6 + 14 * 2e-6 + 2 * 7 / 8 * 1e8 / 450e9),
        ("all_reduce", 16, 8e-6 + 28 * 2e-6 + 2 * 5e-6 + 2 * 15 / 16 * 1e8 / 400e9),
    ],
    ids=["all_gather in a node", "all_gather of two", "all_reduce in a node", "all_reduce of two"],
)
def test_what_a_collective_takes(kind, gpus, seconds):
    """Steps inside a node, one to each next node, and bytes at the slower of NVLink and the node's eight links."""
    taken = Collective(kind, 10**8, gpus).seconds(Group(gpus, 8, NVLINK, INFINIBAND))
    assert taken == pytest.approx(seconds, rel=1e-12)


def test_few_bytes_of_many_gpus_go_by_a_tree():
    """Whose steps grow as the logarithm of the nodes, where a ring's grow as the GPUs."""
    few = [Collective("all_reduce", 1000, n).seconds(Group(n, 8, NVLINK, INFINIBAND)) for n in (64, 1024)]
    assert few[1] < 2 * few[0]
    around = [Collective("all_gather", 1000, n).seconds(Group(n, 8, NVLINK, INFINIBAND)) for n in (64, 1024)]
    assert around[1] > 8 * around[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"way": "split"}, "expected way as one of replicated, sharded, both, got 'split'"),
        ({"gpus": 0}, "expected gpus of 1 or more, got 0"),
        ({"tokens": 0}, "expected tokens of 1 or more, got 0"),
        ({"chunk_rows": -1}, "expected chunk_rows of 1 or more, got -1"),
        ({"gpus": 12, "way": "both"}, "expected gpus as a multiple of the 8 of a node, got 12"),
    ],
    ids=["way", "gpus", "tokens", "chunk_rows", "nodes"],
)
def test_what_is_no_head_is_refused(given, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        step(**given)


def test_the_chips_rates_are_those_of_tuning():
    assert (H200.flops, H200.copy_bytes_per_second) == (790e12, 4.3e12)


# Against measurements


def test_what_is_fitted():
    """A sum, and a maximum as of FLOPs and bytes, from starts that are far away."""
    points = [(1, 100.0), (5, 100.0), (30, 2.0), (100, 1.0)]

    def predict(start, per_n, per_m):
        return [start + max(per_n * n, per_m * m) for n, m in points]

    truth = (2.0, 0.5, 0.25)
    assert scale.fitted(predict, predict(*truth), (1.0, 5.0, 0.01), (1.0, 1.0, 1.0)) == pytest.approx(truth, rel=0.01)


@pytest.fixture(scope="module")
def record():
    return json.loads(scale.RECORD.read_text())


@pytest.fixture(scope="module")
def fits(record):
    """By the rates that the record's calibration gives now."""
    return scale.all_fits(record)


def test_the_record_is_whole(record, fits):
    assert [each.world for each in fits] == list(scale.WORLDS)
    found = [(each.fits.world, each.way, each.shape) for each in scale.compared(record, fits)]
    assert set(found) == {
        (world, way, shape) for world in scale.WORLDS for way in scale.WAYS for shape in scale_worker.shared(way)
    } and len(found) == len(set(found))
    alone = {tuple(case) for calls in record["worlds"].values() for kind, case, _ in calls if kind.startswith("alone")}
    assert alone == set(scale_worker.ALONE)
    assert not alone & {shape for way in scale.WAYS for shape in scale_worker.shared(way)}


def holds(compared):
    logs = torch.tensor([each.ratio for each in compared]).log().abs()
    return bool(logs.max().exp() <= FACTOR and logs.median().exp() <= MEDIAN_FACTOR)


def test_what_was_predicted_is_what_was_measured(record, fits):
    compared = scale.compared(record, fits)
    assert holds(compared), [(each.fits.world, each.way, each.shape, each.ratio) for each in compared]


@pytest.mark.parametrize("way", scale.WAYS)
@pytest.mark.parametrize("world", scale.WORLDS)
@pytest.mark.parametrize("faster", [float("inf"), 10.0], ids=["no network", "ten times as fast"])
def test_another_network_is_not_what_was_measured(record, fits, faster, world, way):
    """Of either number of processes, either way."""
    [fit] = [each for each in fits if each.world == world]
    link = fit.link
    other = replace(
        link,
        bytes_per_second=link.bytes_per_second * faster,
        latency_seconds=link.latency_seconds / faster,
        start_seconds=link.start_seconds / faster,
    )
    compared = [each for each in scale.compared(record, [fit._replace(link=other)]) if each.way == way]
    assert len(compared) == len(scale_worker.shared(way)) and not holds(compared)


def test_the_network_has_about_half_of_some_steps(record, fits):
    shares = [each.sent_share for each in scale.compared(record, fits) if each.mostly_sent]
    assert len(shares) == 8 and min(shares) > 0.4 and sorted(shares)[4] > 0.5


@pytest.mark.parametrize(
    ("options", "load", "runs"),
    [((), 2.5, False), ((), 1.5, True), (("--loaded",), 2.5, True), (("--smoke",), 2.5, True)],
    ids=["beside other work", "alone", "loaded", "smoke"],
)
def test_beside_other_work_nothing_is_measured(options, load, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(scale.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(scale, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(scale, "_started", lambda *given: [])
    monkeypatch.setattr(scale, "_write", lambda record: None)
    monkeypatch.setattr(sys, "argv", ["scale", *options])
    if runs:
        scale.main()
    else:
        with pytest.raises(SystemExit, match=r"^nothing measured: a load average of 2.5 on 2 cores; .*--loaded$"):
            scale.main()
    assert scale.RECORD.exists() == (runs and "--smoke" not in options)
    if scale.RECORD.exists():
        assert json.loads(scale.RECORD.read_text())["load"] == load


@pytest.mark.parametrize(("load", "said"), [(0.3, "cores were free"), (9.2, "other work took all cores")])
def test_the_page_says_what_ran_beside(record, fits, load, said):
    assert f"{said}, at a load average of {load} on 2" in scale.shown(record | {"load": load, "cores": 2}, fits)


# The page


def test_the_picture_is_the_models():
    assert scale.picture().current(scale.PICTURE.parent), "stale: python -m bench.scale --picture"


def test_the_page_has_the_record(record, fits):
    page = scale.PAGE.read_text()
    assert scale.rendered(page, record, fits) == page, "stale: python -m bench.scale --page"


def test_the_page_says_what_the_model_does():
    """Each sentence of docs/scale.md that names a number of GPUs or of rows."""
    costs = {(gpus, way): step(gpus, 4096 * gpus, way) for gpus in (8, 16, 32, 64, 1024) for way in WAYS}
    assert costs[8, "sharded"].total < costs[8, "replicated"].total
    assert costs[8, "sharded"].exposed < 1e-4
    assert costs[16, "sharded"].sent == pytest.approx(costs[16, "replicated"].sent, rel=0.05)
    assert costs[32, "sharded"].total < min(costs[32, way].total for way in ("both", "replicated"))
    for gpus in (64, 1024):
        both, replicated, sharded = (costs[gpus, way] for way in ("both", "replicated", "sharded"))
        assert both.total < replicated.total < sharded.total
        assert sharded.exchange + sharded.inputs > sharded.products + sharded.passes
        assert sum(both.memory) == pytest.approx(sum(replicated.memory) / 5, rel=0.1)
    behind = step(64, 4096 * 64, "both", behind=1.0)
    assert behind.total == pytest.approx(behind.products + behind.passes, rel=0.01)
    fixed = [step(gpus, 4096 * 64, "both") for gpus in (128, 256)]
    assert [cost.weights > cost.products for cost in fixed] == [False, True]
    products = [step(chunk_rows=rows).products for rows in (512, 1024, 4096)]
    assert products[0] > 1.1 * products[1] and products[1] == pytest.approx(products[2])
    by_rows = [step(64, 4096 * 64, chunk_rows=32768 * n // 2).total for n in (1, 2, 4)]
    assert costs[64, "sharded"].total == by_rows[1] == min(by_rows)
    memory = costs[1024, "sharded"].memory
    assert memory.sums / 2**30 == pytest.approx(16, rel=0.01) and memory.logits // 2**20 == 252


def test_tables_are_the_models():
    cells = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in pages.scale("ways").splitlines()[2:]]
    assert [(row[0], row[1]) for row in cells] == [(f"{n:,}", way) for n in (8, 64, 1024) for way in WAYS]
    cost = step()
    [sharded] = [row for row in cells if row[:2] == ["8", "sharded"]]
    assert sharded[2:4] == ["4,096", f"{cost.sent / 1e9:.2f}"] and sharded[-3] == f"{1e3 * cost.total:.1f}"
    chunks = pages.scale("chunks")
    assert len(chunks.splitlines()) == 2 + 3 * 5
    assert "| 64 | **32,768** |" in chunks and "| 1,024 | **524,288** |" in chunks


def test_a_chart_of_steps_has_a_panel_each():
    figure = scale.picture().draw(**scale.picture().shown)
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 2 * len(WAYS)
    drawn, page = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 >= -0.01 and drawn.y0 >= -0.01 and drawn.x1 <= page.x1 + 0.01 and drawn.y1 <= page.y1 + 0.01
    [whole] = [line for line in panels[0].lines if line.get_label() == "step"]
    assert whole.get_ydata()[0] == pytest.approx(1e3 * step(way="replicated").total)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_measuring_runs():
    command = [sys.executable, "-m", "bench.scale", "--smoke", "--rounds", "1"]
    done = subprocess.run(command, cwd=scale.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "12 calls ran" in done.stdout, done.stdout + done.stderr
