"""The trainers in several processes: every step is one process's, and the first process alone speaks and writes."""

import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fusedact.__main__ import main
from fusedact.cli import ranks
from fusedact.distributed import processes
from fusedact.trainers import LAYERS, TRAINERS, load_checkpoint
from fusedact.trainers.checkpoint import load_run
from fusedact.trainers.loop import PLAIN
from fusedact.trainers.runs import Run

exhaustive = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def clean_folder(tmp_path, monkeypatch):
    """An empty working folder of this process's own; torch's threads are put back."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def made(name, engine, layers="fused", dtype=torch.float32, **options):
    kind = TRAINERS[name]
    trainer = kind(LAYERS[layers], replace(kind.defaults, engine=engine, **options))
    if dtype != torch.float32:
        trainer.model.to(dtype)
        trainer.x = trainer.x.to(dtype)
        trainer.y = trainer.y.to(dtype) if trainer.y.is_floating_point() else trainer.y
    return trainer


def trained(trainer):
    """The cost of each step of an epoch, and the parameters after it."""
    with trainer._drawing():
        costs = trainer._passes.slice(1)[0]
    return [costs, *(p.detach().clone() for p in trainer.model.parameters())]


@pytest.mark.parametrize(
    ("name", "layers", "options"),
    [
        pytest.param("binary", "stock", {}, id="binary"),
        pytest.param("perceptron", "fused", {"batch_size": 63}, id="perceptron, batches that do not divide"),
        pytest.param("xor", "fused", {"batch_size": 9}, id="xor, batches of 9"),
        pytest.param("worked", "fused", {}, id="worked"),
        pytest.param("mnist-softmax", "fused", {"rows": 500}, id="mnist-softmax"),
        pytest.param("mnist-softmax", "stock", {"rows": 8, "batch_size": 1}, id="mnist-softmax, batches of 1"),
    ],
)
def test_an_epoch_is_one_processs_step_for_step(name, layers, options, world, equal):
    ours = made(name, "ddp", layers, **options)
    assert (ours.engine, ours.reason) == ("ddp", f"processes: {world}")
    truth, stock = (made(name, PLAIN, layers, dtype, **options) for dtype in (torch.float64, torch.float32))
    equal(f"an epoch of {name}", trained(ours), trained(truth), trained(stock))


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        pytest.param("fused", {"rows": 1000}, id="batches of 100"),
        pytest.param("stock", {"rows": 999, "batch_size": 111}, id="batches of 111"),
        pytest.param("fused", {"rows": 4000}, id="an epoch", marks=exhaustive),
    ],
)
def test_a_run_that_multiplies_rounding_is_one_processs(layers, options, equal):
    """S6, whose first ten steps are compared, its parameters end to end, and of a whole epoch the mean cost to 0.1 %.

    Adam's first steps are as long for a gradient that is all rounding, which one process's own is in some biases.
    """
    trainers = [
        made("mnist-mlp", "ddp", layers, **options),
        made("mnist-mlp", PLAIN, layers, torch.float64, **options),
        made("mnist-mlp", PLAIN, layers, **options),
    ]
    (ours, *weights), *others = map(trained, trainers)
    torch.testing.assert_close(ours.mean(), others[1][0].mean(), rtol=1e-3, atol=0)
    if len(ours) <= 10:
        found = [[costs, torch.cat([p.flatten() for p in parameters])] for costs, *parameters in others]
        equal("ten steps of mnist-mlp", [ours, torch.cat([p.flatten() for p in weights])], *found)


@pytest.mark.parametrize("name", ["mnist-softmax", "binary"])
def test_engines_go_on_from_one_another(name, rank, equal, clean_folder):
    """In processes, in one of them, and in processes again; to the numbers of one process all the way."""
    options = {"epochs": 3, "rows": 200} if name == "mnist-softmax" else {"epochs": 3}
    path = clean_folder / "run.pt"
    for done, engine in enumerate(["ddp", PLAIN, "auto"]):
        run = Run(made(name, engine, **options), every=1)
        if done:
            run.resume(path)
        run.advance()
        run.save(path)
    assert len(run.epochs) == 3
    ended = [run.state["model"].values()]
    for dtype in (torch.float64, torch.float32):
        alone = made(name, PLAIN, dtype=dtype, **options)
        list(alone.epochs())
        ended.append(alone.model.state_dict().values())
    equal(f"{name}, an epoch each by ddp, plain and auto", *map(list, ended))


def test_another_engine_does_not_go_on(clean_folder):
    run = Run(made("perceptron", "ddp", epochs=1))
    run.advance()
    run.save(clean_folder / "run.pt")
    with pytest.raises(ValueError, match="is of a run with engine ddp, not tutorial"):
        Run(made("perceptron", "tutorial", epochs=1)).resume(clean_folder / "run.pt")


def test_a_layer_that_is_never_called_has_no_gradient(equal):
    """Nor has the optimizer anything of it: S7's last convolution, by SGD, so that rounding is not multiplied."""
    options = {"rows": 3, "batch_size": 3}
    trainers = [
        made("mnist-cnn", "ddp", **options),
        made("mnist-cnn", PLAIN, dtype=torch.float64, **options),
        made("mnist-cnn", PLAIN, **options),
    ]
    for trainer in trainers:
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9)
    equal("an epoch of mnist-cnn", *map(trained, trainers))
    for trainer in trainers:
        assert trainer.model.conv7.weight.grad is None
        assert trainer.model.conv7.weight not in trainer.optimizer.state


def test_auto_is_ddp_where_there_is_a_group(world):
    assert made("perceptron", "auto").engine == "ddp"


def test_the_first_process_makes_files_before_the_others_look(rank):
    """Where the first one is slow."""
    shared = Path(tempfile.gettempdir()) / f"in-turn-{os.environ['MASTER_PORT']}-{os.getppid()}"

    def make():
        if rank == 0:
            time.sleep(0.2)
            shared.touch()
        return shared.exists()

    try:
        assert processes.in_turn(make)
        dist.barrier()
    finally:
        shared.unlink(missing_ok=True)


def commanded(words, rank, capsys, **expected):
    """The command's exit code, and what it printed, which is nothing but in the first process."""
    code = main(words)
    printed = capsys.readouterr()
    assert rank == 0 or printed == ("", "")
    return code, *printed


def test_the_first_process_alone_prints_and_writes(rank, world, capsys, clean_folder):
    words = ["train", "mnist-softmax", "--rows", "300", "--device", "cpu", "--epochs", "2"]
    code, out, _ = commanded([*words, "--out", "out", "--checkpoint-every", "1"], rank, capsys)
    assert code == 0
    files = sorted(path.name for path in clean_folder.rglob("*.*"))
    assert files == ([] if rank else ["mnist-softmax-fused.pt", "mnist-softmax.csv", "mnist-softmax.png"])
    if rank == 0:
        first, *lines = out.splitlines()
        assert f"engine ddp (processes: {world})" in first
        assert [line[:11] for line in lines[:3]] == ["Epoch: 0001", "Epoch: 0002", "Learning fi"]


def test_a_run_goes_on_in_every_process(rank, capsys, clean_folder):
    """From the first one's checkpoint, that the others have not; to the very weights of a run that never stopped."""
    words = ["train", "mnist-softmax", "--rows", "300", "--out"]
    for out, epochs, more in (("parts", 1, []), ("parts", 3, ["--resume"]), ("whole", 3, [])):
        assert commanded([*words, out, "--epochs", str(epochs), *more], rank, capsys)[0] == 0
    if rank == 0:
        parts, whole = (load_checkpoint(clean_folder / out / "mnist-softmax-fused.pt") for out in ("parts", "whole"))
        assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_a_sweep_is_shared(rank, capsys, clean_folder, monkeypatch):
    monkeypatch.setattr("fusedact.cli.training.SWEPT", 1)
    monkeypatch.setattr("fusedact.trainers.sweep.LRS", (0.1,))
    code, out, _ = commanded(["compare", "xor", "--sweep", "--epochs", "3", "--out", "out"], rank, capsys)
    assert code == 0 and (rank > 0 or "have learned XOR" in out)
    files = sorted(path.name for path in clean_folder.rglob("*.*"))
    assert files == ([] if rank else ["xor-sweep.csv", "xor-sweep.png"])


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("bench", "bench runs in one process: start it without torchrun"),
        ("plot xor", "plot runs in one process"),
        ("compare xor", "compare runs in one process, but for its --sweep"),
        ("train xor --engine plain", "--engine plain trains in one process; under torchrun there is ddp"),
        ("train xor --batch-size 1001", "batch size 1001 exceeds the 1000 training rows"),
        ("train xor --epochs 0", "--epochs"),
        ("train xor --out none --resume", "no checkpoint to go on from"),
        ("compare binary --sweep", "--sweep is xor's"),
        ("train", "Missing argument 'NAME'"),
    ],
)
def test_a_fault_is_said_once(words, fault, rank, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "WAIT", 0.5)
    code, _, err = commanded(words.split(), rank, capsys)
    assert code == 2
    if rank == 0:
        assert err.startswith("fusedact: ") and fault in err and err.count("\n") == 1


def test_a_folder_that_the_first_process_cannot_write_is_everyones_fault(rank, capsys, clean_folder):
    if rank == 0:
        (clean_folder / "out").touch()
    code, _, err = commanded(["train", "xor", "--out", "out/deeper"], rank, capsys)
    assert code == 2 and (rank > 0 or "out/deeper: Not a directory" in err)


@pytest.mark.parametrize(
    ("restarts", "resume", "there", "code", "epochs"),
    [
        pytest.param(0, False, True, 0, [1, 2], id="begun, over an earlier run's file"),
        pytest.param(1, False, True, 0, [2], id="a restart"),
        pytest.param(1, False, False, 0, [1, 2], id="a restart before there is a file"),
        pytest.param(0, True, True, 0, [2], id="resumed"),
        pytest.param(0, True, False, 2, [], id="resumed from nothing"),
        pytest.param(1, True, False, 2, [], id="resumed from nothing, a restart"),
    ],
)
def test_what_a_run_begins_from(restarts, resume, there, code, epochs, rank, world, capsys, monkeypatch):
    """As the first process finds; of several machines one counts the restart."""
    words = ["train", "mnist-softmax", "--rows", "200", "--device", "cpu", "--out", "out"]
    if there:
        assert commanded([*words, "--epochs", "1"], rank, capsys)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts if rank == world - 1 else 0))
    found = commanded([*words, "--epochs", "2", *["--resume"] * resume], rank, capsys)
    assert found[0] == code
    assert rank > 0 or [int(number) for number in re.findall(r"Epoch: (\d+)", found[1])] == epochs


def test_a_run_of_processes_leaves_a_checkpoint_before_its_first_epoch(rank, capsys, clean_folder, monkeypatch):
    """So that a restart does not go on from an earlier run's."""
    words = ["train", "mnist-softmax", "--rows", "200", "--device", "cpu", "--out", "out", "--epochs", "2"]
    assert commanded(words, rank, capsys)[0] == 0
    monkeypatch.setattr(Run, "advance", lambda run: 1 / 0)
    assert main(words) == 1
    capsys.readouterr()
    path = clean_folder / "out/mnist-softmax-fused.pt"
    assert load_run(path)[1]["epochs"] == 0 if rank == 0 else not path.exists()
    monkeypatch.undo()
    monkeypatch.chdir(clean_folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, out, _ = commanded(words, rank, capsys)
    assert code == 0 and (rank > 0 or re.findall(r"Epoch: (\d+)", out) == ["0001", "0002"])


def test_a_damaged_checkpoint_of_the_first_process_is_everyones(rank, capsys, clean_folder):
    (clean_folder / "out").mkdir()
    if rank == 0:
        (clean_folder / "out/xor-fused.pt").write_bytes(b"PK")
    code, _, err = commanded(["train", "xor", "--out", "out", "--resume"], rank, capsys)
    assert code == 2 and (rank > 0 or "xor-fused.pt: not a whole checkpoint" in err)


@pytest.mark.parametrize(
    ("result", "code", "told"),
    [
        pytest.param(lambda: "no space left", 2, r"no space left", id="what cannot be done"),
        pytest.param(lambda: 1 / 0, 1, r"Traceback(.*\n)+ZeroDivisionError: .*", id="an exception"),
    ],
)
def test_a_fault_of_another_process_names_it(result, code, told, rank, world, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "WAIT", 0.2)
    at_fault = rank == world - 1
    monkeypatch.setattr("fusedact.cli._command", lambda words: result() if at_fault else 0)
    assert main(["train", "xor"]) == (code if at_fault else 0)
    assert re.fullmatch(rf"fusedact: rank {rank}: {told}\n" if at_fault else "", capsys.readouterr().err)
