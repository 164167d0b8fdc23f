"""The command line under torchrun: a run in two processes, what is refused, and a run whose process was killed."""

import csv
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from fusedact.__main__ import main
from fusedact.trainers import load_checkpoint
from fusedact.trainers.checkpoint import load_run

pytestmark = pytest.mark.slow
RANKS = Path(__file__).parent / "ranks"
ENDLESS = ["train", "mnist-softmax", "--rows", "1000", "--epochs", "100000"]
RUN = ["train", "mnist-softmax", "--rows", "1000", "--epochs", "150", "--checkpoint-every", "10"]


@pytest.fixture(autouse=True)
def clean_folder(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(world, *words, options=(), **environment):
    """torchrun, of so many processes of this machine, without Triton's interpreter and what pytest tells children."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "PYTEST"))}
    kept |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*torchrun, *options, "-m", *words], env=kept, **pipes)


def ended(process, code=0):
    """What was printed and what was complained of, once it has ended; one that hangs is killed with its workers."""
    try:
        printed, complaints = process.communicate(timeout=120)
    finally:
        for each in children(process):
            each.kill()
        process.kill()
    assert process.returncode == code, printed + complaints
    return printed, complaints


def children(process):
    return psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []


def costs(path):
    with path.open(newline="") as file:
        return torch.tensor([float(row["cost"]) for row in csv.DictReader(file)], dtype=torch.float64)


def test_a_run_in_two_processes_is_one_processs(clean_folder, capsys):
    """Of batches that do not divide; data made by the first of them."""
    words = ["train", "perceptron", "--epochs", "60", "--batch-size", "333", "--data", "xor.csv", "--out"]
    printed, _ = ended(start(2, "fusedact", *words, "two", "--device", "cpu"))
    assert main([*words, "one", "--engine", "plain", "--device", "cpu"]) == 0
    first, *lines = printed.splitlines()
    assert "engine ddp (processes: 2)" in first
    assert lines == capsys.readouterr().out.replace("one/", "two/").splitlines()[1:]
    assert sorted(path.name for path in (clean_folder / "two").iterdir()) == [
        "perceptron-fused.pt", "perceptron.csv", "perceptron.png"
    ]  # fmt: skip
    torch.testing.assert_close(costs(Path("two/perceptron.csv")), costs(Path("one/perceptron.csv")), rtol=1e-6, atol=0)


def test_no_thread_of_the_group_outlives_it(clean_folder):
    """One that let go of a tensor while the interpreter ended would abort the process."""
    run = ["train", "perceptron", "--epochs", "1", "--data", "xor.csv", "--out", "out", "--device", "cpu"]
    script = f"""
import os
from pathlib import Path
from fusedact.__main__ import main

assert main({run}) == 0
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
Path("threads" + os.environ["RANK"]).write_text("".join(names))
"""
    Path("program.py").write_text(script)
    ended(start(2, "program"))
    for rank in (0, 1):
        assert re.findall(".*gloo.*", Path(f"threads{rank}").read_text()) == []


FAULTS = {
    "bench": "bench runs in one process: start it without torchrun, which is for train and for compare --sweep",
    "train xor --batch-size 1001": "Invalid value: batch size 1001 exceeds the 1000 training rows",
}


@pytest.mark.parametrize(
    ("words", "restarts"),
    [
        pytest.param("bench", 0, id="before there is a group"),
        pytest.param(
            "train xor --batch-size 1001", 1, id="in a group, by the first attempt of two", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_a_fault_ends_all_processes_and_is_said_once(words, restarts):
    options = ["--max-restarts", str(restarts)]
    printed, complaints = ended(start(2, "fusedact", *words.split(), options=options), code=1)
    assert printed == ""
    assert re.findall("fusedact: .*", complaints) == ["fusedact: " + FAULTS[words]]
    assert re.search(r"exitcode +: 2 ", complaints)


def printed_up_to(process, start):
    """What it prints up to and with a line that starts so."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            break
    return "".join(lines)


def killed(process, rank):
    """Kills that worker after a checkpoint of ten epochs, from which all then go on."""
    printed = printed_up_to(process, "Epoch: 0012 ")
    [worker] = [each for each in children(process) if each.environ().get("RANK") == str(rank)]
    worker.kill()
    return printed + ended(process)[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_process_was_killed_ends_with_the_same_weights(clean_folder, rank):
    """torchrun starts both again, and they go on from the last checkpoint, not from the first epoch."""
    path = clean_folder / "killed/mnist-softmax-fused.pt"
    process = start(2, "fusedact", *RUN, "--out", "killed", options=["--max-restarts", "3"])
    printed = killed(process, rank)
    assert printed.count("engine ddp (processes: 2)") == 2
    assert printed.count("Epoch: 0001 ") == 1 and "Epoch: 0150 " in printed
    ended(start(2, "fusedact", *RUN, "--out", "whole"))
    state, unharmed = (load_checkpoint(clean_folder / out / path.name) for out in ("killed", "whole"))
    assert state.keys() == unharmed.keys()
    assert all(torch.equal(state[name], value) for name, value in unharmed.items())
    assert torch.equal(*(costs(clean_folder / out / "mnist-softmax.csv") for out in ("killed", "whole")))


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_torchrun_told_to_stop_leaves_a_checkpoint(clean_folder, number, capsys):
    """From which a single process goes on."""
    process = start(2, "fusedact", *ENDLESS, "--out", "out", "--device", "cpu")
    printed_up_to(process, "Epoch: 0005 ")
    process.send_signal(number)
    ended(process, code=1)
    path = clean_folder / "out/mnist-softmax-fused.pt"
    done = load_run(path)[1]["epochs"]
    assert done >= 5
    assert main([*ENDLESS[:-1], str(done + 2), "--out", "out", "--resume", "--device", "cpu"]) == 0
    assert re.findall(r"Epoch: (\d+)", capsys.readouterr().out) == [f"{done + more:04d}" for more in (1, 2)]
    assert load_run(path)[1]["epochs"] == done + 2


@pytest.mark.exhaustive
def test_trainers_and_sweeps_in_three_processes(tmp_path):
    """The files of tests/ranks that split unevenly; tests/test_distributed.py runs all of them in two and in four."""
    files = [str(RANKS / name) for name in ("trainers.py", "sweeps.py")]
    options = ["--maxfail=1", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ended(start(3, "pytest", *options, *files, EQUALITIES=str(tmp_path / "equalities.json")))
