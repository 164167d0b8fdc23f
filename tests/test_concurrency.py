"""Threads, processes, forks: the same numbers as alone, from whatever thread and in whatever process."""

import io
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn

FORKS = Path(__file__).with_name("forks.py")
THREADS = 4
SWITCH = 1e-5  # seconds after which Python looks for another thread


def at_once(run, count=THREADS):
    """run(i) of `count` threads that start together; what each gave."""
    barrier = threading.Barrier(count)

    def started(i):
        barrier.wait(60)
        return run(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(started, range(count)))


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture
def switching():
    """Python changes threads often, amid whatever it does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    yield
    sys.setswitchinterval(before)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 4, activation="prelu"))


def graph_of(model, x):
    """A graph of the model's parameters, to be kept alive while threads make theirs.

    Two threads that make the first one of a parameter can wait for each other in torch 2.13: a Function's call for a
    mutex with the GIL, an operation's for the GIL with that mutex.
    """
    return model(x).grad_fn


# ---- threads


@pytest.mark.contract(56)
def test_every_op_in_threads(every_op, switching):
    alone = every_op.gradients(every_op.inputs())
    assert all(equal(found, alone) for found in at_once(lambda i: every_op.gradients(every_op.inputs())))


@pytest.mark.contract(56)
def test_one_module_in_threads(either_backend, device, switching):
    """Each on a batch of its own, of a size of its own."""
    model = network().to(device)
    batches = [torch.randn(3 + i, 7, device=device) for i in range(THREADS)]

    def gradients(i):
        loss = F.cross_entropy(model(batches[i]), torch.zeros(3 + i, dtype=torch.int64, device=device))
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    alone = [gradients(i) for i in range(THREADS)]
    assert all(map(equal, at_once(gradients), alone))


@pytest.mark.contract(56)
def test_threads_add_to_the_same_gradients(either_backend, device, switching):
    model, x = network().to(device), torch.randn(5, 7, device=device)
    model(x).sum().backward()
    alone = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    kept = graph_of(model, x)
    at_once(lambda i: model(x).sum().backward())
    assert kept is not None
    for p, once in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(p.grad, THREADS * once)


@pytest.mark.contract(56)
def test_backward_from_another_thread(every_op):
    inputs = every_op.inputs()
    y = every_op.run(*inputs)
    with ThreadPoolExecutor(1) as other:
        found = other.submit(torch.autograd.grad, y, inputs, every_op.dy(y)).result(60)
    assert equal(found, every_op.gradients(inputs))


@pytest.mark.contract(56)
@pytest.mark.parametrize("loss", [F.linear_binary_cross_entropy_with_logits, F.linear_cross_entropy])
def test_threads_through_one_retained_graph(loss, triton_backend, device, switching):
    """Gradients made with the value are handed to one of them, in place multiplied; each has its own."""
    x = torch.randn(6, 5, device=device)
    w = torch.randn(1, 5, device=device, requires_grad=True)
    target = torch.rand(6, 1, device=device) if loss is not F.linear_cross_entropy else torch.zeros(6).long().to(device)
    for _ in range(3):
        y = loss(x, w, target)
        dy = torch.tensor(0.37, device=device)
        found = at_once(lambda i, y=y, dy=dy: torch.autograd.grad(y, w, dy, retain_graph=True)[0])
        assert len({g.data_ptr() for g in found}) == THREADS
        assert all(torch.equal(g, found[0]) for g in found)
        torch.testing.assert_close(found[0], torch.autograd.grad(loss(x, w, target), w)[0] * dy)


def test_grad_mode_and_autocast_are_each_threads_own(either_backend, device):
    model, x = network().to(device), torch.randn(5, 7, device=device)

    def run(i):
        with torch.set_grad_enabled(i % 2 == 0), torch.autocast(device, torch.bfloat16, enabled=i >= 2):
            y = model(x)
        return y.requires_grad, y.dtype

    expected = [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)]
    kept = graph_of(model, x)
    assert at_once(run) == expected and kept is not None


@pytest.mark.contract(56)
def test_each_thread_fits_its_own_model(device):
    """As `fit_many` would be by hand: the engines share nothing."""

    def fitted(i):
        generator = torch.Generator().manual_seed(i)
        model = torch.nn.Linear(3, 1)
        with torch.no_grad():
            model.weight.fill_(0.1), model.bias.zero_()
        x = torch.randn(12, 3, generator=generator)
        y = (x[:, :1] > 0).float()
        options = {"loss": torch.nn.BCEWithLogitsLoss(), "optimizer": torch.optim.SGD, "lr": 0.1, "batch_size": 4}
        fusedact.fit(model, x, y, epochs=2, generator=generator, **options)
        return [model.weight.detach(), model.bias.detach()]

    alone = [fitted(i) for i in range(THREADS)]
    assert all(map(equal, at_once(fitted), alone))


# ---- copies


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_whole_module_travels(kind, either_backend, device):
    model, x, held = network().to(device), torch.randn(5, 7, device=device), io.BytesIO()
    model(x).sum().backward()
    if kind == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, held)
        held.seek(0)
        twin = torch.load(held, weights_only=False)
    assert torch.equal(twin(x), model(x))


# ---- processes


@pytest.mark.contract(56)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.parametrize(
    "methods",
    [pytest.param([], id="in short"), pytest.param(["fork", "spawn"], id="whole", marks=pytest.mark.exhaustive)],
)
def test_first_calls_at_once_and_forks(methods):
    """In a process of its own, tests/forks.py; with queues, and forks amid launches, where there are methods."""
    command = [sys.executable, FORKS, *methods]
    without_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # with one, a forked child has no backward
    done = subprocess.run(command, env=without_gpu, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "whole\n", done.stderr[-3000:]
