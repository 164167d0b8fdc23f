"""The command line: every trainer in a clean folder, both layers compared, faults in one line."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from itertools import islice, product

import pytest
import torch

from fusedact.__main__ import main
from fusedact.cli.training import COMPARED
from fusedact.plotting import training_curves
from fusedact.trainers import LAYERS, TRAINERS, Xor, load_checkpoint, save_checkpoint
from fusedact.tuning.records import REFERENCE_CHIPS

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def clean_folder(tmp_path, monkeypatch):
    """An empty working folder and home; torch's threads are put back."""
    home = tmp_path / "home"
    home.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()
    yield folder
    torch.set_num_threads(threads)


def start(*args, **environment):
    """`python -m fusedact` without Triton's interpreter, heeding Ctrl-C even where the shell ignores it."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "fusedact", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=inherited | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def metrics(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("name", "args", "printed"),
    [
        ("binary", ["--epochs", "2"], "-------------------"),
        ("perceptron", ["--epochs", "2"], "tensor([["),
        ("xor", ["--epochs", "2", "--layers", "stock"], "tensor([["),
        ("worked", [], "known answers, to 6 digits"),
        ("mnist-softmax", ["--epochs", "2"], "Epoch: 0002 cost = "),
        pytest.param(
            "mnist-cnn",
            ["--epochs", "2", "--rows", "16"],
            "engine loop (steps: MyModel is",
            marks=pytest.mark.exhaustive,
        ),
        ("mnist-mlp", ["--epochs", "2"], "the embedded subset of 4,000 + 1,000 images"),
    ],
)
def test_train(clean_folder, capsys, name, args, printed):
    assert main(["train", name, "--device", "cpu", "--out", "out", *args]) == 0
    captured = capsys.readouterr()
    assert printed in captured.out
    assert captured.err == ""
    out = clean_folder / "out"
    layers = "stock" if "stock" in args else "fused"
    assert sorted(path.name for path in out.iterdir()) == [
        f"{name}-{layers}.pt",
        f"{name}.csv",
        f"{name}.png",
    ]
    assert (out / f"{name}.png").read_bytes().startswith(PNG)
    rows = metrics(out / f"{name}.csv")
    assert [row["epoch"] for row in rows] == (["1"] if name == "worked" else ["1", "2"])
    assert all(float(row["cost"]) > 0 and float(row["step_seconds"]) > 0 for row in rows)
    model = TRAINERS[name](LAYERS[layers], TRAINERS[name].defaults).model
    model.load_state_dict(load_checkpoint(out / f"{name}-{layers}.pt"))


def test_train_writes_nothing_unasked(clean_folder):
    assert main(["train", "xor", "--epochs", "1"]) == 0
    assert list(clean_folder.iterdir()) == []


@pytest.mark.parametrize(("name", "epochs", "shown"), [("xor", 40, [1, 4, 8, 40]), ("mnist-mlp", 2, [1, 2])])
def test_compare(clean_folder, capsys, name, epochs, shown):
    assert main(["compare", name, "--epochs", str(epochs)]) == 0
    printed = capsys.readouterr().out
    for number in shown:
        assert re.search(rf"cost, epoch {number} +│ +([\d.]+) │ +\1 │ +\1 │ +[\d.]+ │", printed)
    assert re.search(r"accuracy +│ +([\d.]+) │ +\1 │ +\1 │ +\1 │", printed)
    farthest = re.search(r"farthest from stock +│ +0.0e\+00 │ +0.0e\+00 │ +(\S+) │ +(\S+) │", printed)
    assert max(map(float, farthest.groups())) < 1e-4
    assert re.search(r"tutorial / this +│ +1.00 │( +[\d.]+ │){3}", printed)
    out = clean_folder / "runs" / name
    assert f"runs/{name}/{name}.png" in printed
    assert (out / f"{name}.png").read_bytes().startswith(PNG)
    ways = ["tutorial", "stock", "fused", "fit"]
    assert [row["run"] for row in metrics(out / f"{name}.csv")] == [way for way in ways for _ in range(epochs)]
    stock, *others = (load_checkpoint(out / f"{name}-{way}.pt") for way in ("stock", "tutorial", "fused", "fit"))
    for other, parameter in product(others, stock):
        torch.testing.assert_close(other[parameter], stock[parameter], rtol=1e-3, atol=1e-4)


def test_csv_data_is_made_once_and_read_again(clean_folder, capsys):
    for _ in range(2):
        assert main(["train", "xor", "--epochs", "1", "--data", "xor.csv"]) == 0
    first, second = capsys.readouterr().out.split("xor: fused layers")[1:]
    assert first == second
    assert (clean_folder / "xor.csv").read_text().startswith("x1,x2,y\n")


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        ([], "Missing command"),
        (["fly"], "No such command 'fly'"),
        (["train"], "Missing argument 'NAME'"),
        (
            ["train", "or"],
            "unknown trainer 'or', expected one of binary, perceptron, xor, worked, mnist-softmax",
        ),
        (["compare", "or"], "unknown trainer 'or'"),
        (["train", "xor", "--layer", "stock"], "No such option: --layer"),
        (["train", "xor", "--layers", "slow"], "'slow'"),
        (["compare", "xor", "--layers", "stock"], "No such option: --layers"),
        (["train", "xor", "--epochs", "0"], "greater than or equal to 1"),
        (["train", "xor", "--epochs", "many"], "--epochs"),
        (["train", "xor", "--batch-size", "1001"], "batch size 1001 exceeds the 1000 training rows"),
        (["train", "xor", "--lr", "-1"], "--lr"),
        (["train", "xor", "--seed", "-1"], "--seed"),
        (["train", "xor", "--start", "1,two"], "could not convert string to float: 'two'"),
        (["train", "xor", "--start", "1,2"], "the model starts from 9 numbers, received 2"),
        pytest.param(["train", "xor", "--device", "gpu"], "Expected one of cpu, cuda", marks=pytest.mark.contract(78)),
        (["train", "xor", "--device", "meta"], "meta"),
        (["train", "xor", "--device", "cuda:99"], "cuda:99"),
        (["train", "xor", "--out", "file"], "file: File exists"),
        (["train", "xor", "--out", "file/under"], "file/under: Not a directory"),
        (["train", "xor", "--data", "."], "Is a directory"),
        (["train", "xor", "--data", "file"], "file, line 1, column 1"),
        (["train", "mnist-mlp", "--data", "nowhere"], "nowhere"),
        (["train", "xor", "--engine", "persistent", "--device", "cpu"], "engine 'persistent' needs Triton"),
        (["train", "xor", "--engine", "fast"], "'fast'"),
        (["train", "xor", "--checkpoint-every", "3"], "need --out"),
        (["train", "xor", "--resume"], "need --out"),
        (["tune", "--device", "cpu"], "cpu: choices are measured on a GPU"),
        (["tune", "--device", "cuda:99"], "cuda:99"),
        (["tune", "--shape", "4096x4096"], "'4096x4096', expected MxNxK"),
        (["tune", "--shape", "0x1x1"], "'0x1x1', expected MxNxK"),
        (
            ["tune", "--dtype", "int8"],
            "unknown dtype 'int8', expected one of bfloat16, float16, float32, tf32, float64",
        ),
        (["tune", "--activation", "prelu"], "unknown activation 'prelu', expected one of step"),
        (["tune", "--dry"], "No such option: --dry"),
        (["info", "--linear", "1x1xK", "--chip", "sm_90"], "'1x1xK', expected MxNxK"),
        (["info", "--linear", "1x1x1", "--chip", "sm_70"], "unknown chip 'sm_70', expected one of sm_80"),
        (["info", "--chip", "sm_90"], "--chip needs --linear"),
    ],
)
@pytest.mark.contract(88)
def test_fault_is_one_line(clean_folder, capsys, args, fault):
    (clean_folder / "file").touch()
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("fusedact: ")
    assert captured.err.count("\n") == 1
    assert fault in captured.err


@pytest.mark.parametrize("name", ["none", "triton"])
def test_impossible_backend_is_one_line(name):
    process = start("train", "xor", "--device", "cpu", FUSEDACT_BACKEND=name)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("fusedact: ") and errors.count("\n") == 1


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "fusedact: rich not found: pip install fusedact[cli]\n"


def test_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch      {torch.__version__}" in printed
    assert "fused layers run" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("args", "fault"),
    [(["tune"], "cuda: "), (["info", "--linear", "64x64x64"], "--chip asks about a GPU that is not here")],
)
@pytest.mark.contract(78, 88)
def test_without_a_gpu(capsys, args, fault):
    assert main(args) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("fusedact: ") and errors.count("\n") == 1 and fault in errors


@pytest.mark.parametrize("chip", REFERENCE_CHIPS)
def test_info_says_what_runs_on_a_chip_and_why(capsys, chip):
    assert main(["info", "--linear", "4096x4096x4096", "--dtype", "float32", "--chip", chip]) == 0
    printed = capsys.readouterr().out
    assert f"4096x4096x4096 float32 on {chip}" in printed
    for label in ("forward", "dx", "dw", "backward"):
        assert re.search(rf"│ {label} +│ \w+.*│ by rule, estimated µs:", printed)
    assert re.search(r"│ in a chain +│", printed)
    assert re.search(r"│ whole +│ fused +│ not measured", printed)


def test_impossible_arithmetic_is_one_line():
    process = start("info", "--linear", "1x1x1", "--dtype", "float32", "--chip", "sm_90", FUSEDACT_FLOAT32="fast")
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors.count("\n")) == (2, "", 1)
    assert "unknown float32 arithmetic 'fast'" in errors


@pytest.mark.contract(89)
def test_ctrl_c_keeps_the_whole_epochs(clean_folder, monkeypatch, capsys):
    def interrupted(self, every):
        yield from islice(slices(self, every), 3)
        self.model[0].weight.data.zero_()  # half an epoch more
        raise KeyboardInterrupt

    slices = Xor.slices
    expected = Xor(LAYERS["fused"], Xor.defaults)
    done = [epoch for some in islice(expected.slices(1), 3) for epoch in some]
    monkeypatch.setattr(Xor, "slices", interrupted)
    assert main(["train", "xor", "--out", "out", "--checkpoint-every", "1"]) == 130
    assert len(metrics(clean_folder / "out" / "xor.csv")) == len(done)
    kept = load_checkpoint(clean_folder / "out" / "xor-fused.pt")
    assert torch.equal(kept["0.weight"], expected.model.state_dict()["0.weight"])
    assert "out/xor-fused.pt" in capsys.readouterr().out


@pytest.mark.contract(89)
def test_ctrl_c_while_it_draws(clean_folder, monkeypatch, capsys):
    """The epochs' costs and weights are there already, and the picture is drawn after all."""

    def interrupted(*args):
        monkeypatch.setattr("fusedact.trainers.runs.plotting.training_curves", training_curves)
        assert len(metrics(clean_folder / "out/xor.csv")) == 3
        load_checkpoint(clean_folder / "out/xor-fused.pt")
        raise KeyboardInterrupt

    monkeypatch.setattr("fusedact.trainers.runs.plotting.training_curves", interrupted)
    assert main(["train", "xor", "--epochs", "3", "--out", "out"]) == 130
    assert "out/xor.png" in capsys.readouterr().out and (clean_folder / "out/xor.png").exists()


def test_what_draws_is_imported_before_the_first_epoch(clean_folder, monkeypatch):
    """Broken off by Ctrl-C at the end, matplotlib could not be imported again for what is then saved."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib\.figure"):
        main(["train", "xor", "--epochs", "3", "--out", "out"])
    assert list((clean_folder / "out").iterdir()) == []


@pytest.mark.contract(89)
def test_interrupted_process(clean_folder):
    process = start("compare", "binary", "--device", "cpu", "--out", "out")
    assert process.stdout.readline().startswith("binary: tutorial, stock, fused, fit; cpu, torch threads: 1;")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""
    assert printed.splitlines() == [
        f"out/binary{end}" for end in (".png", ".csv", *(f"-{way}.pt" for way in (*COMPARED, "fit")))
    ]
    assert len(metrics(clean_folder / "out" / "binary.csv")) > 2
    load_checkpoint(clean_folder / "out" / "binary-fused.pt")


# Nothing is lost

RUN = ["train", "mnist-softmax", "--device", "cpu", "--epochs", "6", "--checkpoint-every", "1"]


@pytest.mark.parametrize("engine", ["steps", "loop", "tutorial"])
@pytest.mark.parametrize("name", ["xor", "mnist-softmax"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(clean_folder, name, engine):
    run = ["train", name, "--device", "cpu", "--engine", engine, "--checkpoint-every", "2"]
    assert main([*run, "--epochs", "5", "--out", "whole"]) == 0
    assert main([*run, "--epochs", "3", "--out", "parts"]) == 0
    assert main([*run, "--epochs", "5", "--out", "parts", "--resume"]) == 0
    whole, parts = (load_checkpoint(clean_folder / out / f"{name}-fused.pt") for out in ("whole", "parts"))
    assert all(torch.equal(whole[parameter], parts[parameter]) for parameter in whole)
    curves = [[row["cost"] for row in metrics(clean_folder / out / f"{name}.csv")] for out in ("whole", "parts")]
    assert curves[0] == curves[1] and len(curves[0]) == 5


@pytest.mark.contract(84)
def test_a_killed_run_resumes_from_its_last_whole_checkpoint(clean_folder):
    process = start(*RUN, "--out", "killed")
    path = clean_folder / "killed/mnist-softmax-fused.pt"
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    load_checkpoint(path)
    for out in ("killed", "whole"):
        assert main([*RUN, "--out", out, *(["--resume"] if out == "killed" else [])]) == 0
    killed, whole = (load_checkpoint(clean_folder / out / path.name) for out in ("killed", "whole"))
    assert all(torch.equal(killed[parameter], whole[parameter]) for parameter in whole)


@pytest.mark.contract(85)
def test_another_runs_checkpoint_is_refused(clean_folder, capsys):
    assert main(["train", "xor", "--epochs", "1", "--out", "out"]) == 0
    assert main(["train", "xor", "--epochs", "2", "--out", "out", "--resume", "--lr", "3"]) == 2
    assert "xor-fused.pt: is of a run with lr 0.1, not 3.0" in capsys.readouterr().err
    assert main(["train", "xor", "--out", "elsewhere", "--resume"]) == 2
    assert "elsewhere/xor-fused.pt: no checkpoint to go on from" in capsys.readouterr().err
    assert main(["train", "xor", "--epochs", "1", "--out", "out", "--resume"]) == 0
    assert main(["train", "xor", "--epochs", "3", "--out", "out"]) == 0
    assert main(["train", "xor", "--epochs", "2", "--out", "out", "--resume"]) == 2
    assert "has 3 epochs, more than the 2 asked for" in capsys.readouterr().err
    save_checkpoint(
        clean_folder / "out/xor-fused.pt", TRAINERS["xor"](LAYERS["fused"], Xor.defaults).model.state_dict()
    )
    assert main(["train", "xor", "--epochs", "3", "--out", "out", "--resume"]) == 2
    assert "holds no run to go on from" in capsys.readouterr().err


def test_a_comparison_stopped_early_goes_on(clean_folder):
    """Where some of its runs have a checkpoint and some have none yet."""
    assert main(["compare", "xor", "--epochs", "2", "--out", "out"]) == 0
    for way in ("fused", "fit"):
        (clean_folder / f"out/xor-{way}.pt").unlink()
    assert main(["compare", "xor", "--epochs", "4", "--out", "out", "--resume"]) == 0
    assert len(metrics(clean_folder / "out/xor.csv")) == 16


def test_a_cost_that_is_not_finite_is_one_line(clean_folder, capsys):
    assert main(["train", "mnist-softmax", "--lr", "1e38", "--out", "out", "--epochs", "3"]) == 2
    assert re.fullmatch(r"fusedact: .* at epoch \d, step \d+; .*\n", capsys.readouterr().err)


def test_what_fusing_the_loss_does(capsys):
    assert main(["compare", "binary", "--epochs", "20"]) == 0
    printed = capsys.readouterr().out
    costs = [
        float(re.search(rf"{label}.*?│ +([\d.]+) +│", printed)[1])
        for label in ("Sigmoid, BCELoss", "BCE on logits", "standardized inputs")
    ]
    assert costs[0] > 10 > costs[1] > costs[2]


def test_sweep(clean_folder, capsys, monkeypatch):
    monkeypatch.setattr("fusedact.cli.training.SWEPT", 3)
    assert main(["compare", "xor", "--sweep", "--epochs", "20", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    assert "share of 3 initializations" in printed and "by epoch 20" in printed
    assert (clean_folder / "out/xor-sweep.png").read_bytes().startswith(PNG)
    rows = metrics(clean_folder / "out/xor-sweep.csv")
    assert len(rows) == 15 and set(rows[0]) == {"lr", "seed", "solved_by", "cost"}
    assert main(["compare", "xor", "--sweep", "--lr", "3"]) == 2
    assert "--sweep takes --epochs, --device, --threads and --out, not --lr" in capsys.readouterr().err
    assert main(["compare", "binary", "--sweep"]) == 2
    assert capsys.readouterr().err == "fusedact: Invalid value: --sweep is xor's, not binary's\n"
