"""Records of what was measured: what they decide, every fault of their file, and two processes at one file."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedact import backend
from fusedact.tuning import Chip, Problem, by_rule, candidates, choose, prefers_stock, records
from fusedact.tuning.candidates import LIBRARY
from fusedact.tuning.measure import Layer
from fusedact.tuning.records import FUSED, OP, REFERENCE_CHIPS, STOCK, Machine, Record, hold, path_of, why, write

MACHINE = Machine("NVIDIA H200", "12080", "3.7.1", "2.13.0+cu128")


def forget() -> None:
    """As in a process that has just begun."""
    for held in (records._tables, records._has_stock):
        held.clear()
    for cached in (choose, records._prefers_stock, records._warn_once):
        cached.cache_clear()


@pytest.fixture
def chip(tmp_path, monkeypatch) -> Chip:
    """A Hopper whose records are in a folder of the test's own."""
    monkeypatch.setenv("FUSEDACT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "machine_of", lambda chip: None if chip.interpreted else MACHINE)
    forget()
    yield Chip("sm_90", shared_memory=227 * 1024, warp_size=32, multiprocessors=132)
    forget()


def problem(chip: Chip, M=4096, N=4096, K=4096, task="forward", **others) -> Problem:
    given = {"dtype": torch.bfloat16, "precision": "ieee", "aligned": True} | others
    return Problem(task, M, N, K, chip=chip, **given)


def another(asked: Problem) -> str:
    """A candidate that the rule does not take."""
    return next(name for name in candidates(asked) if name not in (by_rule(asked), LIBRARY))


def file() -> Path:
    path = path_of(MACHINE)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# What a record decides


def test_without_a_record_the_rule_decides(chip):
    asked = problem(chip)
    assert choose(*asked) == candidates(asked)[by_rule(asked)]
    name, reason = why(asked)
    assert name == by_rule(asked) and reason.startswith("by rule, estimated µs: ") and "library " in reason
    assert why(problem(chip, task=OP)) == (FUSED, "not measured")


def test_a_record_decides_after_a_restart_too(chip):
    asked = problem(chip)
    name = another(asked)
    assert write(chip, {asked: Record(name, {name: 171.25, LIBRARY: 180.0})}) == path_of(MACHINE)
    for _ in range(2):
        assert choose(*asked) == candidates(asked)[name]
        assert why(asked) == (name, f"measured, µs: {name} 171.2, library 180.0")
        forget()
    write(chip, {asked: Record(LIBRARY, {LIBRARY: 180.0})})
    assert choose(*asked) is None


@pytest.mark.parametrize("others", [{"M": 2049, "N": 3000, "K": 4095}, {"M": 4096}])
def test_a_record_holds_up_to_the_next_power_of_2(chip, others):
    asked = problem(chip)
    name = another(asked)
    hold(chip, {asked: Record(name, {name: 1.0})})
    near = problem(chip, **others)
    assert choose(*near) == candidates(near)[name]


@pytest.mark.parametrize(
    "others",
    [
        {"M": 2048},
        {"N": 4097},
        {"K": 100},
        {"task": "dx"},
        {"dtype": torch.float16},
        {"aligned": False},
        {"precision": "tf32"},
        {"chip": REFERENCE_CHIPS["sm_90"]},
    ],
)
def test_a_record_holds_for_nothing_else(chip, monkeypatch, others):
    monkeypatch.setattr(records, "machine_of", lambda asked: MACHINE if asked is chip else None)
    asked = problem(chip)
    hold(chip, {asked: Record(another(asked), {})})
    far = asked._replace(**others)
    assert choose(*far) == candidates(far)[by_rule(far)]


def test_a_candidate_that_is_gone_leaves_it_to_the_rule(chip):
    asked = problem(chip)
    write(chip, {asked: Record("levers 1x1x1", {"levers 1x1x1": 1.0})})
    assert choose(*asked) == candidates(asked)[by_rule(asked)]
    assert "levers 1x1x1, once measured, is no candidate any more" in why(asked)[1]
    whole = problem(chip, task=OP)
    write(chip, {whole: Record("levers", {})})
    assert why(whole) == (FUSED, "not measured; levers, once measured, is no candidate any more")


def test_stock_is_preferred_where_it_was_measured_better(chip, monkeypatch):
    whole, other = problem(chip, task=OP, aligned=False), problem(chip, M=64, task=OP, aligned=False)
    assert not prefers_stock(*whole)
    write(chip, {whole: Record(STOCK, {STOCK: 90.0, FUSED: 100.0}), other: Record(FUSED, {FUSED: 1.0})})
    for _ in range(2):
        assert prefers_stock(*whole) and not prefers_stock(*other)
        assert why(whole) == (STOCK, "measured, µs: stock 90.0, fused 100.0")
        forget()


def test_where_stock_is_nowhere_better_nobody_looks_twice(chip, monkeypatch):
    hold(chip, {problem(chip, task=OP): Record(FUSED, {})})
    assert not prefers_stock(*problem(chip, task=OP))
    monkeypatch.setattr(records, "_table", None)
    assert not prefers_stock(*problem(chip, M=1, task=OP))


def test_only_a_gpu_has_records(tmp_path):
    """Not the interpreter's chip, nor a data sheet's; and importing, and running on a CPU, opens nothing there."""
    (tmp_path / "tuning").mkdir()
    code = """
import os, sys
seen = []
sys.addaudithook(lambda event, args: event in ("open", "os.listdir", "os.mkdir") and seen.append(str(args[0])))
import torch, fusedact
from fusedact import functional as F
from fusedact.tuning import Problem, choose, prefers_stock, records
fusedact.set_backend("triton")
F.linear(torch.ones(2, 3), torch.ones(4, 3), activation="relu")
for chip in records.REFERENCE_CHIPS.values():
    asked = Problem("forward", 64, 64, 64, torch.float32, "ieee", False, chip)
    choose(*asked), prefers_stock(*asked)
print([path for path in seen if os.environ["FUSEDACT_CACHE"] in path])
"""
    environment = os.environ | {"FUSEDACT_CACHE": str(tmp_path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to name")
def test_this_machine_is_named():
    machine = records.machine_of(backend.chip(torch.device("cuda", torch.cuda.current_device())))
    assert machine.gpu == torch.cuda.get_device_name() and machine.driver != "unknown" and all(machine)


@pytest.mark.parametrize("name", REFERENCE_CHIPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_data_sheet_gives_an_answer(name, dtype):
    for asked in Layer(4096, 4096, 1024, dtype, "ieee", REFERENCE_CHIPS[name]).problems().values():
        assert asked.aligned == (asked.task != OP)
        assert why(asked)[0] in ([FUSED] if asked.task == OP else candidates(asked))


def test_an_amd_warp_is_of_64_threads_and_an_nvidia_one_of_32():
    sizes = {name: chip.warp_size for name, chip in REFERENCE_CHIPS.items()}
    assert sizes == {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 64}


# The file


def entry(choice="library", microseconds=None) -> dict:
    return {"choice": choice, "microseconds": {"library": 1.5} if microseconds is None else microseconds}


def content(**changes) -> bytes:
    whole = {"version": 1, "machine": MACHINE._asdict(), "records": {"forward bfloat16 ieee 1x1x1": entry()}}
    return json.dumps(whole | changes).encode()


def with_entry(changed) -> bytes:
    return content(records={"forward bfloat16 ieee aligned 4096x4096x4096": changed})


DAMAGED = {
    "empty": b"",
    "cut off": content()[:-3],
    "zeros": bytes(100),
    "no text": b"\xff\xfe\x00\xd8",
    "nested": b"[" * 100_000,
    "a list": b"[]",
    "nothing": b"null",
    "of another version": content(version=2),
    "of no version": b"{}",
    "of another machine": content(machine=MACHINE._replace(driver="13000")._asdict()),
    "of no machine": content(machine=None),
    "a list of records": content(records=[entry()]),
    "a name as record": with_entry("library"),
    "a list as record": with_entry(["library", {}]),
    "an empty record": with_entry({}),
    "a number as name": with_entry(entry(choice=7)),
    "nothing as name": with_entry({"choice": None, "microseconds": {}}),
    "times in a list": with_entry(entry(microseconds=[1.5])),
    "a time in words": with_entry(entry(microseconds={"library": "fast"})),
    "true as time": with_entry(entry(microseconds={"library": True})),
    "NaN as time": with_entry(entry(microseconds={"library": float("nan")})),
    "an endless time": with_entry(entry(microseconds={"library": float("inf")})),
    "a time below 0": with_entry(entry(microseconds={"library": -1.0})),
    "a time too long": with_entry(entry(microseconds={"library": 10**400})),
    "a number too long": content().replace(b"1.5", b"1" * 5000),
}


@pytest.mark.contract(77, 81)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning_and_then_replaced(chip, name):
    file().write_bytes(DAMAGED[name])
    asked = problem(chip)
    with pytest.warns(RuntimeWarning) as warned:
        assert choose(*asked) == candidates(asked)[by_rule(asked)]
        assert not prefers_stock(*problem(chip, task=OP))
        choose(*problem(chip, M=1))
    assert len(warned) == 1 and str(file()) in str(warned[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(chip, {asked: Record(another(asked), {})})
        forget()
        assert choose(*asked) == candidates(asked)[another(asked)]


@pytest.mark.parametrize("time", [0, 0.0, 1e11])
def test_a_time_may_be_0(time):
    (record,) = records._parsed(with_entry(entry(microseconds={"library": time})), MACHINE).values()
    assert record.microseconds == {"library": time}


@pytest.mark.contract(81)
def test_what_cannot_be_read_is_ignored_with_one_warning(chip):
    file().mkdir()
    with pytest.warns(RuntimeWarning, match="are not read") as warned:
        for M in range(1, 4):
            asked = problem(chip, M=M)
            assert choose(*asked) == candidates(asked)[by_rule(asked)]
    assert len(warned) == 1


def test_what_cannot_be_written_holds_for_this_process(chip, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDACT_CACHE", str(tmp_path / "file"))
    records._tables[MACHINE] = {}
    asked, other = problem(chip), problem(chip, M=64)
    with pytest.warns(RuntimeWarning, match="for this process alone") as warned:
        for one in (asked, other):
            assert write(chip, {one: Record(another(one), {})}) is None
    assert len(warned) == 1
    for one in (asked, other):
        assert choose(*one) == candidates(one)[another(one)]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into any folder")
@pytest.mark.contract(81)
def test_a_read_only_folder(chip):
    file().parent.chmod(0o500)
    with pytest.warns(RuntimeWarning, match="for this process alone"):
        assert write(chip, {problem(chip): Record(LIBRARY, {})}) is None
    assert choose(*problem(chip)) is None


@pytest.mark.contract(81)
def test_a_disk_that_is_full_leaves_the_old_file(chip, monkeypatch):
    asked = problem(chip)
    write(chip, {asked: Record(LIBRARY, {})})
    before = file().read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        write(chip, {asked: Record(another(asked), {})})
    assert file().read_bytes() == before
    assert sorted(path.suffix for path in file().parent.iterdir()) == [".json", ".lock"]
    assert choose(*asked) == candidates(asked)[another(asked)]


def test_where_the_folder_is(monkeypatch, tmp_path):
    monkeypatch.delenv("FUSEDACT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    name = "NVIDIA-H200_12080_3.7.1_2.13.0+cu128.json"
    assert path_of(MACHINE) == tmp_path / ".cache/fusedact/tuning" / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert path_of(MACHINE) == tmp_path / "xdg/fusedact/tuning" / name
    monkeypatch.setenv("FUSEDACT_CACHE", str(tmp_path / "own"))
    assert path_of(MACHINE) == tmp_path / "own/tuning" / name
    odd = MACHINE._replace(gpu="../Größe:\0 ™/")
    assert path_of(odd).parent == tmp_path / "own/tuning" and path_of(odd).name.startswith("..-Gr-e-_")


names = st.text(max_size=8)
tables = st.dictionaries(
    names,
    st.builds(Record, names, st.dictionaries(names, st.floats(0, 1e12, exclude_max=True), max_size=3)),
    max_size=5,
)


@given(tables, st.builds(Machine, names, names, names, names))
def test_records_come_back_as_they_were(table, machine):
    assert records._parsed(records._text(machine, table).encode(), machine) == table


@given(st.recursive(st.none() | st.booleans() | st.floats() | names, lambda inner: st.lists(inner) | st.dictionaries(names, inner)))  # fmt: skip  # noqa: E501
def test_whatever_stands_in_a_file_is_a_record_or_a_value_error(anything):
    for damaged in (json.dumps(anything).encode(), content(records=anything), with_entry(anything)):
        try:
            table = records._parsed(damaged, MACHINE)
        except ValueError:
            continue
        assert all(isinstance(record, Record) for record in table.values())


def write_many(first: int, chip: Chip) -> None:
    for power in range(20):
        asked = problem(chip, M=2**power, N=first)
        write(chip, {asked: Record("library", {"library": float(power)})})


@pytest.mark.contract(82)
def test_two_processes_lose_nothing_and_the_file_is_always_whole(chip):
    """The other process's records too are chosen by from the next restart on."""
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write_many, args=(2**n, chip)) for n in range(2)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path_of(MACHINE).exists():
            records._parsed(path_of(MACHINE).read_bytes(), MACHINE)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(records._read(MACHINE)) == 40
    assert choose(*problem(chip, M=2**19, N=2)) is None and choose(*problem(chip, M=2**19, N=1)) is None


def test_killed_while_writing_leaves_the_old_file_and_no_lock(chip):
    asked = problem(chip)
    write(chip, {asked: Record(LIBRARY, {})})
    before = file().read_bytes()
    child = os.fork()
    if not child:
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write(chip, {asked: Record(another(asked), {})})
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert file().read_bytes() == before
    write(chip, {problem(chip, M=1): Record(LIBRARY, {})})
    assert len(records._read(MACHINE)) == 2
