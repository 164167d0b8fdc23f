"""Processes killed at any instant: what they had written is there, whole, and they go on from it.

A child is forked, since torch is imported here, and killed after a seeded share of the time that a whole run takes.
Checkpoints are, in every run of the tests; training, downloads, tuning and the command line where all is run.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import random
import signal
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from fusedact import data, plotting
from fusedact.__main__ import main
from fusedact.trainers import LAYERS, Xor, load_checkpoint, save_checkpoint
from fusedact.trainers import runs as in_turn
from fusedact.trainers.checkpoint import load_run
from fusedact.tuning import Chip, Problem, records
from fusedact.tuning.records import LIBRARY, Machine, Record

pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # a forked child cannot start torch's threads again
    pytest.mark.skipif(not hasattr(os, "waitid"), reason="there is no fork, or no waitid"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # a child does nothing with threads
]
MOST = 60.0  # seconds that a child may take
FEW, MANY = 4, pytest.param(50, marks=pytest.mark.exhaustive)
many_times = pytest.mark.parametrize("kills", [MANY])
trains = pytest.mark.skipif(torch.cuda.is_available(), reason="a forked child has no backward after CUDA's")


def ran(work, folder, seconds=MOST):
    """A child's run of `work(folder, said)`, killed after so many seconds: the most it said, or 0, and its status."""
    listening, speaking = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), contextlib.redirect_stdout(io.StringIO()):
            work(folder, lambda number: os.write(speaking, struct.pack("q", number)))
            os._exit(0)
        os._exit(1)
    os.close(speaking)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(min(0.001, max(0.0, until - time.monotonic())))
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(listening, "rb") as pipe:
        said = [number for (number,) in struct.iter_unpack("q", pipe.read())]
    return max(said, default=0), status


def killed(work, check, kills, folder):
    """Runs the work once whole, then until it was killed so many times, each within another part of that time.

    Each has a folder of its own within this one, and is checked. One that ended before its kill tells how long a run
    takes at most, and is run again, and killed earlier.
    """
    started = time.monotonic()
    assert ran(work, folder / "whole")[1] == 0
    whole, draw, runs = time.monotonic() - started, random.Random(0), itertools.count()
    for part in draw.sample(range(kills), kills):
        seconds, status = whole * (part + draw.random()) / kills, 0
        while status == 0:
            number = next(runs)
            assert number < 5 * kills, "the work ends before it is killed"
            started = time.monotonic()
            said, status = ran(work, folder / str(number), seconds)
            elapsed = time.monotonic() - started
            assert status in (0, -signal.SIGKILL)
            check(folder / str(number), said)
            seconds = 0.8 * min(seconds, elapsed)
            whole = min(whole, elapsed) if status == 0 else whole
    return kills


def test_a_slow_first_run_is_no_measure(tmp_path):
    """Later ones, ten times as fast, are killed all the same."""
    checked = []

    def work(folder, said):
        time.sleep(0.5 if folder.name == "whole" else 0.05)

    assert killed(work, lambda folder, said: checked.append(folder), 4, tmp_path) == 4
    assert 4 <= len(checked) < 20


def left_over(folder):
    """Files that no writer gave their final name."""
    return [path for path in folder.rglob(".*") if path.is_file()]


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], value) for name, value in other.items())


@pytest.mark.parametrize("kills", [FEW, MANY])
@pytest.mark.contract(67, 84)
def test_a_writer_of_checkpoints(tmp_path, kills):
    path, found = tmp_path / "a.pt", [40]  # the last of the whole run

    def write(_, said):
        for number in range(found[-1] + 1, found[-1] + 41) if path.exists() else range(1, 41):
            save_checkpoint(path, {"w": torch.full((1 << 16,), float(number))}, {"number": number})
            said(number)

    def check(_, said):
        state, run = load_run(path)
        last = max(said, found[-1])
        assert run["number"] in (last, last + 1)
        assert torch.equal(state["w"], torch.full((1 << 16,), float(run["number"])))
        found.append(run["number"])

    count = killed(write, check, kills, tmp_path)
    assert len(left_over(tmp_path)) <= count
    for left in left_over(tmp_path):
        os.utime(left, (0, 0))
    save_checkpoint(path, {})
    assert os.listdir(tmp_path) == ["a.pt"]
    print(f"{count} killed, {len(found) - 1} checkpoints found, 0 broken")


EPOCHS = 12


def begun(engine, out):
    """XOR's trainer under way, from its checkpoint where there is one."""
    run = in_turn.Run(Xor(LAYERS["fused"], replace(Xor.defaults, epochs=EPOCHS, engine=engine)), 1)
    path = in_turn.checkpoint_path(out, "xor", "fused")
    if path.exists():
        run.resume(path)
    return {"fused": run}


@trains
@many_times
@pytest.mark.parametrize("engine", ["steps", "loop", "tutorial", "plain"])
@pytest.mark.contract(84)
def test_training(tmp_path, monkeypatch, engine, kills):
    monkeypatch.setattr(in_turn.plotting, "training_curves", lambda costs, name: None)
    monkeypatch.setattr(in_turn.plotting, "png", lambda figure: b"")  # drawing takes longer than all of the training
    alone, states, found, resumed = begun(engine, tmp_path / "none")["fused"], {}, [], 0
    while alone.unfinished:
        alone.advance()
        states[alone.trainer.done] = alone.state["model"]

    def train(out, said):
        def kept(path, state, run):
            save_checkpoint(path, state, run)
            said(run["epochs"])

        in_turn.save_checkpoint = kept  # of the child
        in_turn.train(begun(engine, out), out, 1, lambda run, some: None)

    def check(out, said):
        nonlocal resumed
        path = in_turn.checkpoint_path(out, "xor", "fused")
        assert path.exists() or not said
        if path.exists():
            state, run = load_run(path)
            assert run["epochs"] in (said, said + 1) and same(state, states[run["epochs"]])
            found.append(run["epochs"])
        if resumed * 5 <= len(found):
            resumed += 1
            in_turn.train(begun(engine, out), out, None, lambda run, some: None)
            assert same(load_checkpoint(path), states[EPOCHS])
            assert path.with_name("xor.csv").read_bytes().count(b"\n") == 1 + EPOCHS

    count = killed(train, check, kills, tmp_path)
    assert found
    print(f"{engine}: {count} killed, {len(found)} checkpoints found, 0 broken, {resumed} resumed")


class Slow(BaseHTTPRequestHandler):
    """Each file in a hundred pieces."""

    protocol_version, files = "HTTP/1.0", {}

    def do_GET(self):
        body = self.files[self.path[1:]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked was killed
            for start in range(0, len(body), 1 + len(body) // 100):
                self.wfile.write(body[start : start + 1 + len(body) // 100])
                time.sleep(0.0002)

    def log_message(self, *args):
        pass


@many_times
@pytest.mark.contract(84)
def test_a_download(tmp_path, monkeypatch, kills):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    contents = {name: random.Random(name).randbytes(1 << 16) for name in data.SHA256}
    monkeypatch.setattr(Slow, "files", {f"{name}.gz": gzip.compress(content) for name, content in contents.items()})
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(c).hexdigest() for name, c in contents.items()})
    found = 0

    def fill(folder, said):
        def written(path, content):
            whole(path, content)
            said(len(os.listdir(folder)))

        whole, data.write_whole = data.write_whole, written  # of the child
        data._fill(folder)

    def check(folder, said):
        nonlocal found
        files = list(folder.glob("[!.]*"))
        assert len(files) in (said, said + 1)
        assert all(path.read_bytes() == Slow.files[path.name] for path in files)
        found += len(files)

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(data, "MIRRORS", (f"http://127.0.0.1:{server.server_port}",))
        count = killed(fill, check, kills, tmp_path)
        data._fill(tmp_path / "0")  # what is there stays, the rest is fetched
        server.shutdown()
    assert sorted(path.name for path in (tmp_path / "0").glob("[!.]*")) == sorted(Slow.files)
    print(f"{count} killed, {found} files found, 0 broken")


@many_times
@pytest.mark.contract(81, 84)
def test_a_tuner(tmp_path, monkeypatch, kills):
    machine = Machine("NVIDIA H200", "12080", "3.7.1", "2.13.0")
    monkeypatch.setenv("FUSEDACT_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "machine_of", lambda chip: machine)
    monkeypatch.setattr(records, "_tables", {})
    chip = Chip("sm_90", shared_memory=227 * 1024, warp_size=32, multiprocessors=132)
    path, last = records.path_of(machine), 0
    sizes = [(1 << m, 1 << n) for m in range(50) for n in range(50)]

    def tune(_, said):
        for number, (m, n) in enumerate(sizes[last : last + 10], last + 1):
            problem = Problem("forward", m, n, 64, torch.bfloat16, "ieee", True, chip)
            records.write(chip, {problem: Record(LIBRARY, {LIBRARY: 1.0})})
            said(number)

    def check(_, said):
        nonlocal last
        found = records._parsed(path.read_bytes(), machine)
        least = max(said, last, 10 * (last == 0))  # at first it writes what the whole run wrote
        assert len(found) in (least, least + 1)
        last = len(found)

    count = killed(tune, check, kills, tmp_path)
    print(f"{count} killed, {last} records found, 0 broken")


RUN = ["train", "xor", "--device", "cpu", "--epochs", "40", "--checkpoint-every", "4", "--out"]


@trains
@many_times
@pytest.mark.contract(84)
def test_the_command_line(tmp_path, kills):
    plotting.png(plotting.training_curves({"": [1.0]}, ""))  # what it imports, a child need not
    found = []

    def check(out, said):
        for path in out.glob("[!.]*"):
            whole = (tmp_path / "whole" / path.name).read_bytes()
            if path.suffix == ".pt":
                found.append(path)
                assert load_run(path)[1]["epochs"] % 4 == 0
            elif path.suffix == ".csv":  # whose times differ
                assert path.read_bytes().count(b"\n") == whole.count(b"\n")
            else:
                assert path.read_bytes() == whole

    count = killed(lambda out, said: main([*RUN, str(out)]), check, kills, tmp_path)
    for path in found[:: max(1, len(found) // 2)]:
        assert main([*RUN, str(path.parent), "--resume"]) == 0
        assert same(load_checkpoint(path), load_checkpoint(tmp_path / "whole/xor-fused.pt"))
    print(f"{count} killed, {len(found)} checkpoints found, 0 broken")


@trains
@pytest.mark.exhaustive
def test_two_at_one_folder(tmp_path):
    """Both end, and what they leave is whole."""

    def train(folder, said):
        assert main([*RUN, str(folder)]) == 0

    with ThreadPoolExecutor() as pool:
        assert [status for _, status in pool.map(lambda _: ran(train, tmp_path), range(2))] == [0, 0]
    assert sorted(os.listdir(tmp_path)) == ["xor-fused.pt", "xor.csv", "xor.png"]
    assert load_run(tmp_path / "xor-fused.pt")[1]["epochs"] == 40


def test_a_folder_deleted_while_training(tmp_path):
    out, runs = tmp_path / "out", begun("steps", tmp_path / "none")

    def delete(run, some):
        if run.trainer.done == EPOCHS // 2:
            for path in out.iterdir():
                path.unlink()
            out.rmdir()

    in_turn.train(runs, out, 1, delete)
    assert load_run(Path(out, "xor-fused.pt"))[1]["epochs"] == EPOCHS
