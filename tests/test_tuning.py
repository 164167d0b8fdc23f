"""The tuner: what it times, what it leaves out, what it chooses, and its command; on a CPU that plays a Hopper."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import typer

import fusedact
from fusedact import autograd, backend
from fusedact.__main__ import main
from fusedact.activations import TABLE, by_name
from fusedact.autograd.linear import plan_of
from fusedact.cli import tuning
from fusedact.tuning import Chip, Problem, candidates, choose, measure, prefers_stock, records
from fusedact.tuning.candidates import HEAD, LIBRARY, RULE
from fusedact.tuning.measure import Found, Layer, tune, tune_head
from fusedact.tuning.records import FUSED, OP, STOCK, Machine, Record, why

WAYS = {
    STOCK: lambda x, w, b: F.relu(F.linear(x, w, b)),
    FUSED: lambda x, w, b: autograd.linear_act(x, w, b, None, "relu", ()),
}
ERRS, CRASHES = "one that errs", "one that crashes"


def first_tile(asked: Problem):
    return next(iter(candidates(asked).values()))


@pytest.fixture
def chip(tmp_path, monkeypatch) -> Chip:
    """A Hopper that the library too can run on, with records of the test's own."""
    monkeypatch.setenv("FUSEDACT_CACHE", str(tmp_path / "cache"))
    for module in (records, tuning):
        monkeypatch.setattr(module, "machine_of", lambda chip: Machine("GPU", "1", "2", "3"))
    monkeypatch.setattr(records, "_tables", {})
    yield Chip("sm_90", shared_memory=227 * 1024, warp_size=32, multiprocessors=132)
    choose.cache_clear()


@pytest.fixture
def timed(monkeypatch) -> dict:
    """µs by what is called: a tile, None for the library, or a way; 100 for whatever is not in it."""
    times = {}

    def timer(calls) -> float:
        way_or_tile = calls[0].args[0] if calls[0].func is measure._both else calls[0].args[-1]
        return times.get(way_or_tile, 100.0)

    monkeypatch.setattr(measure, "_wall", timer)
    monkeypatch.setattr(measure, "_queued", timer)
    return times


def plan(name: str, dtype=torch.float32):
    return plan_of(name, by_name(name).default_values, torch.empty(0, dtype=dtype))


def tuned(asked: Layer, device, ways=WAYS, progress=lambda what: None) -> dict[Problem, Found]:
    return tune(asked, by_name("relu"), plan("relu", asked.dtype), torch.device(device), ways, progress)


def layer(chip: Chip, M=24, N=16, K=20, dtype=torch.float32, precision="ieee") -> Layer:
    return Layer(M, N, K, dtype, precision, chip)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")]
)
def test_the_fastest_is_chosen_and_held(chip, device, timed, dtype, precision):
    asked = layer(chip, dtype=dtype, precision=precision)
    problems = asked.problems()
    tiles = {label: first_tile(problems[label]) for label in ("forward", "dw", "backward")}
    timed |= dict.fromkeys(tiles.values(), 50.0) | {WAYS[STOCK]: 40.0}
    said = []
    found = tuned(asked, device, progress=said.append)
    assert said == list(problems) == ["forward", "dx", "dw", "backward", "whole"]
    assert not any(one.left_out for one in found.values())
    assert all(set(one.record.microseconds) == set(candidates(p)) for p, one in found.items() if p.task != OP)
    assert all(choose(*problems[label]) == tile for label, tile in tiles.items())
    assert found[problems["whole"]].record == Record(STOCK, {STOCK: 40.0, FUSED: 100.0})
    assert prefers_stock(*problems["whole"])
    assert not records.path_of(records.machine_of(chip)).exists()


def test_what_is_as_fast_as_the_library_or_fused_does_not_replace_it(chip, device, timed):
    found = tuned(layer(chip), device)
    assert [one.record.choice for one in found.values()] == [LIBRARY] * 4 + [FUSED]


@pytest.mark.parametrize(("second", "choice"), [(106.0, "ours"), (110.0, LIBRARY), (90.0, LIBRARY)])
def test_a_win_must_exceed_the_noise(second, choice):
    """Of 8 µs; the library's turns in a round differ by 6 or by 10."""
    turns = []

    def timer(calls) -> float:
        if calls[0] is ours:
            return 92.0
        turns.append(calls)
        return second if len(turns) % 2 == 1 and len(turns) > 1 else 100.0

    def ours() -> torch.Tensor:
        return torch.ones(2)

    calls = {"ours": [ours], LIBRARY: [lambda: torch.ones(2)]}
    found = measure._measured(calls, None, LIBRARY, LIBRARY, timer, most=4)
    assert found.record == Record(choice, {"ours": 92.0, LIBRARY: 100.0})


def head(chip: Chip, M=24, N=16, K=20, dtype=torch.float32) -> Problem:
    return Problem(HEAD, M, N, K, dtype, "ieee", False, chip)


@pytest.mark.parametrize(
    ("fastest", "rows"), [("rule", 0), ("2048 rows", 2048), ("torch", None)], ids=["rule", "chunks", "torch's"]
)
def test_the_rows_of_a_heads_chunk_are_chosen_and_held(chip, device, monkeypatch, fastest, rows):
    asked = head(chip)
    assert choose(*asked) == 0 and why(asked) == (RULE, "not measured")
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", object, raising=False)
    ways = {name: lambda x, w, target: F.cross_entropy(F.linear(x, w), target) for name in candidates(asked)}
    monkeypatch.setattr(
        measure, "_wall", lambda calls: 50.0 if fastest != RULE and calls[0].args[0] is ways[fastest] else 100.0
    )
    found = tune_head(asked, torch.device(device), ways)
    assert found.record.choice == fastest and set(found.record.microseconds) == set(candidates(asked))
    assert choose(*asked) == rows and choose(*head(chip, M=64)) == 0


def test_candidates_that_err_or_crash_are_left_out(chip, device, timed, monkeypatch):
    """However fast they are."""
    from fusedact.kernels import chain, linear

    def faulty(launch):
        def launched(*args, **others):
            config = next((arg for arg in args if isinstance(arg, linear.Tile)), None)
            if config == crashes:
                raise RuntimeError("out of resource\nand more of it")
            result, *rest = launch(*args, **others)
            return (result * 1.001 if config == errs else result, *rest)

        return launched

    errs, crashes = (first_tile(layer(chip).problems()["forward"])._replace(block_m=16, num_stages=n) for n in (1, 2))
    monkeypatch.setattr(linear, "forward", faulty(linear.forward))
    monkeypatch.setattr(chain, "backward", faulty(chain.backward))
    monkeypatch.setattr(measure, "candidates", lambda p: candidates(p) | {ERRS: errs, CRASHES: crashes})
    timed |= {errs: 1.0, crashes: 1.0}
    ways = WAYS | {FUSED: lambda x, w, b: linear.forward(x, w, b, None, (), None, crashes, False)[0]}
    found = tuned(layer(chip), device, ways)
    *products, whole = found.values()
    for one in products:
        assert set(one.left_out) == {ERRS, CRASHES} and not set(one.left_out) & set(one.record.microseconds)
        assert one.left_out[ERRS].startswith("errs by ") and one.record.choice == LIBRARY
        assert one.left_out[CRASHES] == "RuntimeError: out of resource"
    assert whole.left_out == {FUSED: "RuntimeError: out of resource"} and whole.record.choice == STOCK


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_no_memory_and_ctrl_c_are_nobodys_fault(chip, device, timed, monkeypatch, error):
    from fusedact.kernels import linear

    def product(a, b, config):
        if config is None:
            return torch.mm(a, b)
        raise error

    monkeypatch.setattr(linear, "product", product)
    before = torch.backends.cuda.matmul.fp32_precision
    asked = layer(chip, precision="tf32")
    with pytest.raises(error):
        tuned(asked, device)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert why(asked.problems()["forward"])[1].startswith("measured")


def test_the_library_is_asked_at_the_precision_that_is_measured(chip, device, timed):
    seen = []
    ways = WAYS | {STOCK: lambda x, w, b: seen.append(backend.dot_precision(x.dtype)) or WAYS[STOCK](x, w, b)}
    for precision in ("tf32", "ieee"):
        tuned(layer(chip, precision=precision), device, ways)
    assert set(seen[: len(seen) // 2]) == {"tf32"} and set(seen[len(seen) // 2 :]) == {"ieee"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [activation.name for activation in TABLE if not activation.learned])
def test_the_backward_of_a_chain_is_judged_by_the_derivative(chip, device, name, dtype):
    asked, activation = layer(chip, dtype=dtype), by_name(name)
    problem, operands = asked.problems()["backward"], measure._inputs(asked, torch.device(device))["backward"]
    dz, w, z = (t.detach().requires_grad_() for t in operands)
    stock = torch.autograd.grad(activation.reference(z, *activation.default_values), z, dz @ w)[0]
    truth = measure._truth(problem, operands, activation)
    allowed = 2 * measure._error(stock, truth) + 1e-6
    for (call,) in measure._launches(problem, [operands], activation, plan(name, dtype)).values():
        assert measure._error(call(), truth) <= allowed


def test_layers_ask_for_the_problems_that_are_tuned(device, monkeypatch):
    """One alone, and as the second of a chain."""
    asked, chip = [], backend.chip(torch.empty(0, device=device).device, False)
    monkeypatch.setattr(
        "fusedact.autograd.linear.choose", lambda *problem: asked.append(Problem(*problem)) or choose(*problem)
    )
    shapes = ((24, 20), (16, 20), (16,), (24, 8), (20, 8))
    x, w, b, x_before, w_before = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    problems = layer(chip, precision=backend.dot_precision(x.dtype)).problems()
    with fusedact.use_backend("triton"):
        WAYS[FUSED](x, w, b).sum().backward()
        assert asked == [problems[label] for label in ("forward", "dx", "dw")]
        asked.clear()
        autograd.linear_chain(x_before, (("relu", ()),) * 2, [w_before, None, None, w, b, None]).sum().backward()
    assert [problem for problem in asked if problem in problems.values()] == [
        problems[label] for label in ("forward", "backward", "dw")
    ]


@pytest.mark.parametrize("timer", ["_wall", "_queued"])
def test_times_are_of_one_call(timer, device):
    if timer == "_queued" and device == "cpu":
        pytest.skip("events are a GPU's")
    x = torch.ones(64, device=device)
    few, many = (getattr(measure, timer)([x.sum] * count) for count in (10, 100))
    assert 0 < few < 1e5 and 0 < many < 1e5


# The command


@pytest.fixture
def command(chip, tmp_path, monkeypatch):
    """The folder of its records. A call takes as many µs as it has arguments."""
    here = SimpleNamespace(chip=lambda device: chip, dot_precision=backend.dot_precision)
    monkeypatch.setattr(tuning, "backend", here)  # not the layers' own, whose plans would keep the chip
    monkeypatch.setattr(tuning, "_chip_here", lambda: chip)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(measure, "_wall", lambda calls: float(len(calls[0].args)))
    return tmp_path / "cache/tuning/GPU_1_2_3.json"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU takes the place of a GPU")
def test_tune_shows_and_keeps_what_is_fastest(command, capsys):
    def tune(dry_run):
        tuning.tune(shape=[(24, 16, 20)], dtype=["tf32"], device=torch.device("cpu"), dry_run=dry_run)
        return capsys.readouterr().out

    assert str(command) not in tune(dry_run=True) and not command.exists()
    printed = tune(dry_run=False)
    assert "24x16x20 tf32" in printed and printed.splitlines()[-1] == str(command)
    assert re.search(r"│ dx +│ pointers 32x32x16 4 warps tf32 +│ +3.0 │ +1.00 │", printed)
    assert re.search(r"│ backward +│ pointers 32x32x16 4 warps tf32 +│ +4.0 │ +1.00 │", printed)
    assert re.search(r"│ +│ library +│ +3.0 │ +1.00 │ chosen │", printed)
    assert re.search(r"│ whole +│ stock +│ +5.0 │ +1.00 │ +│\n│ +│ fused +│ +5.0 │ +1.00 │ chosen │", printed)
    records._tables.clear()
    assert main(["info", "--linear", "24x16x20", "--dtype", "tf32"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ dw +│ library │ measured, µs: pointers 32x32x32 4 warps tf32", printed)
    assert re.search(r"│ whole +│ fused +│ measured, µs: stock 5.0, fused 5.0", printed)
    assert printed.splitlines()[-1] == str(command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU takes the place of a GPU")
def test_tune_of_a_head_alone(command, capsys):
    tuning.tune(head=[(24, 30, 20)], dtype=["float32"], device=torch.device("cpu"))
    printed = capsys.readouterr().out
    assert "head 24x30x20 float32" in printed and printed.splitlines()[-1] == str(command)
    assert re.search(r"│ head +│ rule +│ +4.0 │ +1.00 │ chosen │", printed)
    assert "head float32 ieee 32x32x32" in command.read_text() and "op " not in command.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU takes the place of a GPU")
@pytest.mark.parametrize(
    ("error", "end"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), typer.BadParameter),
        (KeyboardInterrupt(), typer.Exit),
    ],
)
def test_what_was_tuned_before_a_fault_is_kept(command, capsys, monkeypatch, error, end):
    def tune_layer(layer, *others):
        if layer.M == 2:
            raise error
        record = Record(LIBRARY, {LIBRARY: 1.0, STOCK: 1.0})
        return {problem: Found(record, {}) for problem in layer.problems().values()}

    monkeypatch.setattr(tuning, "tune_layer", tune_layer)
    with pytest.raises(end) as raised:
        tuning.tune(shape=[(1, 1, 1), (2, 1, 1)], dtype=["bfloat16"], device=torch.device("cpu"))
    assert "1x1x1" in command.read_text() and "2x1x1" not in command.read_text()
    if end is typer.BadParameter:
        assert str(raised.value) == "2x1x1 bfloat16: CUDA out of memory"
    else:
        assert raised.value.exit_code == 130
