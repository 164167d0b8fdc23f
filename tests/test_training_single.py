"""One linear layer trained in one launch, against autograd and torch.optim in float64; and its grid barrier's code.

The interpreter runs a grid's programs one after the other, so that one waiting for the next would wait for ever. Here
each is a process, over memory that all share: the barrier is then a real one. The tests replace the compiler: run as
a program, this file prints the machine code that they read.
"""

import os
import re
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, bce, training, training_single

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
RULES = {  # ours, torch's and its numbers
    "sgd": (training.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (training.MOMENTUM, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (training.NESTEROV, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "adam": (training.ADAM, torch.optim.Adam, ADAM),
    "adamw": (training.ADAMW, torch.optim.AdamW, ADAM),
}
LOSSES = {  # ours, torch's, the activation before it
    "cross_entropy": (None, F.cross_entropy, "identity"),
    "cross_entropy_of_gelu": (None, F.cross_entropy, "gelu"),
    "logits": (bce.LOGITS, F.binary_cross_entropy_with_logits, "identity"),
    "probabilities": (bce.PROBABILITIES, F.binary_cross_entropy, "sigmoid"),
    "squared_error": (training.SQUARED_ERROR, F.mse_loss, "tanh"),
}


class Run:
    """A layer, its loss and rule, their data; trained by our kernel, or by torch in some dtype."""

    def __init__(self, device, inputs=45, outputs=3, batch=16, steps=5, loss="cross_entropy", rule="adam", bias=True,
                 mean=True, multiprocessors=1):  # fmt: skip
        self.loss, self.rule, self.mean = LOSSES[loss], RULES[rule], mean
        ((self.place,), self.size) = training.places((inputs, outputs), (bias,))
        name = self.loss[2]
        pair = activations.identity, training.identity_grad
        if name != "identity":
            pair = getattr(activations, name), getattr(activations, f"{name}_grad")
        self.layer = training.Layer(inputs, outputs, *self.place, *pair, (), from_output=False)
        warp_size = triton.runtime.driver.active.get_current_target().warp_size if device == "cuda" else 32
        self.config = training_single.tile(inputs, outputs, batch, multiprocessors, warp_size)
        rows = 2 * batch + (batch + 1) // 2  # two batches and a shorter one
        self.x = torch.randn(rows, inputs, device=device)
        labels = torch.randint(outputs, (rows,), device=device)
        self.y = labels if self.loss[0] is None else torch.rand(rows, outputs, device=device)
        self.order = order_of(rows, steps, batch).to(device)
        self.flat = torch.zeros(self.size, device=device)
        for parameter in self.split(self.flat):
            parameter.copy_(torch.randn(parameter.shape) / inputs**0.5)
        self.moments = torch.zeros(self.rule[0].moments, self.size, device=device)
        numbers = self.rule[2]
        betas = numbers.get("betas", (numbers.get("momentum", 0.0), 0.0))
        rates = [numbers["lr"], numbers.get("weight_decay", 0.0), *betas, numbers.get("eps", 0.0), 1.0, 1.0]
        self.rates = torch.tensor(rates, dtype=torch.float64, device=device)
        self.failed = torch.zeros(1, dtype=torch.int32, device=device)

    def split(self, flat):
        """W and b, views."""
        layer = self.layer
        views = [flat[layer.weight :][: layer.inputs * layer.outputs].view(layer.outputs, layer.inputs)]
        return views if layer.bias is None else [*views, flat[layer.bias :][: layer.outputs]]

    def ours(self, order=None):
        """Losses, W and b; what is trained goes on from there at the next call."""
        order = self.order if order is None else order
        losses = torch.full((len(order),), float("nan"), device=self.x.device)
        state = self.flat, self.moments, self.rates
        objective = training.Objective(self.loss[0], self.mean)
        training_single.train(
            self.x,
            self.y,
            order,
            *state,
            losses,
            self.failed,
            (self.layer,),
            objective,
            self.rule[0],
            "ieee",
            self.config,
        )
        return [losses, *self.split(self.flat)]

    def torchs(self, dtype):
        x, y = (t.cpu().to(dtype) if t.is_floating_point() else t.cpu() for t in (self.x, self.y))
        parameters = [p.cpu().to(dtype, copy=True).requires_grad_() for p in self.split(self.flat)]
        optimizer = self.rule[1](parameters, **self.rule[2])
        act = ACTIVATIONS[self.loss[2]].reference if self.loss[2] != "identity" else lambda z: z
        losses = []
        for rows in self.order.cpu().long():
            rows = rows[rows >= 0]
            loss = self.loss[1](act(F.linear(x[rows], *parameters)), y[rows], reduction="mean" if self.mean else "sum")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [torch.stack(losses), *(p.detach() for p in parameters)]

    def check(self, compare):
        truth, stock = self.torchs(torch.float64), self.torchs(torch.float32)
        for own, torchs, true in zip(self.ours(), stock, truth, strict=True):
            compare(own, torchs, true)
        assert not self.failed.item()


def order_of(rows, steps, batch):
    """Rows drawn anew for each pass, whose last batch is shorter where the batch does not divide them."""
    batches = []
    while len(batches) < steps:
        batches += torch.randperm(rows).split(batch)
    order = torch.full((steps, batch), -1, dtype=torch.int32)
    for step, batch in zip(order, batches, strict=False):
        step[: len(batch)] = batch
    return order


@pytest.fixture
def at_once(monkeypatch, device):
    """The programs of a grid run at once: on a GPU they do; in the interpreter each is made a process.

    The first of these dawdles after each barrier, so that the others run ahead of it as far as they may.
    """
    if device == "cuda":
        return
    from triton.runtime.interpreter import GridExecutor, interpreter_builder

    run, atomic = GridExecutor.__call__, interpreter_builder.create_atomic_rmw

    def dawdle(*args):
        seen = atomic(*args)
        time.sleep(0.05)
        return seen

    def run_one(program, executor, args, kwargs):
        programs, executor.grid = executor.grid[0], (1,)
        with (
            mock.patch.multiple(
                interpreter_builder,
                set_grid_dim=lambda *_: setattr(interpreter_builder, "grid_dim", (programs, 1, 1)),
                set_grid_idx=lambda *_: setattr(interpreter_builder, "grid_idx", (program, 0, 0)),
                create_atomic_rmw=atomic if program else dawdle,
            ),
            mock.patch.object(executor, "_restore_args_dev"),
        ):  # it would copy what others still write
            run(executor, *args, **kwargs)

    def run_all(executor, *args, **kwargs):
        for t in args:
            if isinstance(t, torch.Tensor):
                t.share_memory_()
        fork = get_context("fork")
        processes = [fork.Process(target=run_one, args=(p, executor, args, kwargs)) for p in range(executor.grid[0])]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert not any(process.exitcode for process in processes)

    monkeypatch.setattr(GridExecutor, "__call__", run_all)


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(triton_backend):
    pass


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss, bias, device, as_accurate_as_torch):
    Run(device, loss=loss, bias=bias).check(as_accurate_as_torch)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, device, as_accurate_as_torch):
    Run(device, rule=rule, steps=8).check(as_accurate_as_torch)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("loss", ["cross_entropy", "logits"])
def test_mean_and_sum(loss, mean, device, as_accurate_as_torch):
    Run(device, loss=loss, mean=mean, rule="sgd").check(as_accurate_as_torch)


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch"), [(1, 1, 1), (33, 1, 7), (31, 10, 17), (64, 16, 50), (130, 17, 3), (784, 10, 100)]
)
def test_sizes_around_every_block(inputs, outputs, batch, device, as_accurate_as_torch):
    """By a rule that does not divide by gradients, of which a vanishing one among thousands would be all rounding."""
    loss = "logits" if outputs == 1 else "cross_entropy"
    Run(device, inputs, outputs, batch, steps=4, loss=loss, rule="momentum").check(as_accurate_as_torch)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_bitwise_the_same(rule, device):
    whole = Run(device, rule=rule, steps=8)
    torch.manual_seed(0)
    halves = Run(device, rule=rule, steps=8)
    halves.flat.copy_(whole.flat), halves.x.copy_(whole.x), halves.y.copy_(whole.y)
    losses, *parameters = whole.ours()
    first, second = (halves.ours(order)[0] for order in whole.order.split(4))
    assert torch.equal(torch.cat([first, second]), losses)
    assert all(torch.equal(a, b) for a, b in zip(halves.split(halves.flat), parameters, strict=True))
    assert torch.equal(halves.moments, whole.moments) and torch.equal(halves.rates, whole.rates)


def test_an_epsilon_of_0_stays_among_the_weights(device, as_accurate_as_torch):
    """Beyond the layer's edge Adam would divide 0 by 0."""
    run = Run(device)
    run.rates[4] = 0.0
    run.rule = (*run.rule[:2], {**run.rule[2], "eps": 0.0})
    run.check(as_accurate_as_torch)


@pytest.mark.parametrize(
    ("inputs", "outputs", "batch", "loss"),
    [(70, 10, 16, "cross_entropy"), (96, 1, 9, "logits"), (75, 3, 50, "probabilities")],
)
def test_programs_that_wait_for_each_other(inputs, outputs, batch, loss, device, at_once, as_accurate_as_torch):
    run = Run(device, inputs, outputs, batch, steps=6, loss=loss, multiprocessors=8)
    assert run.config.block_k < inputs
    run.check(as_accurate_as_torch)


@pytest.mark.parametrize("programs", [1, 2, 4, 7, 16, 32, 128])
def test_programs_that_wait_for_each_other_are_bitwise_repeatable(programs, device, at_once):
    if device != "cuda" and programs > 4:
        pytest.skip("each would be a process")
    run = Run(device, 32 * programs - 28, 4, steps=5, multiprocessors=128)
    start = [t.clone() for t in (run.flat, run.moments, run.rates)]
    first = [t.clone() for t in run.ours()]
    for _ in range(100 if device == "cuda" else 1):
        for t, before in zip((run.flat, run.moments, run.rates), start, strict=True):
            t.copy_(before)
        assert all(torch.equal(a, b) for a, b in zip(first, run.ours(), strict=True))
    assert not run.failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU no program stays away")
def test_a_barrier_gives_up(device, monkeypatch):
    """One program after the other, so that the first waits in vain."""
    monkeypatch.setattr(training_single, "POLLS", 3)
    run = Run(device, inputs=70, multiprocessors=8)
    before = run.flat.clone(), run.moments.clone(), run.rates.clone()
    run.ours()
    assert run.failed.item()
    assert all(torch.equal(a, b) for a, b in zip((run.flat, run.moments, run.rates), before, strict=True))


# Machine code

# S store, B barrier of the program, R release and A acquire at the GPU's scope, C load past the first cache, X other.
EVENTS = re.compile(
    r"""(?P<S>\bst\.global) | (?P<B>\bbar\.sync) | (?P<R>\b(?:atom|red)\.global\.gpu\.release\.add\.u32)
    | (?P<A>\bld\.global\.gpu\.acquire) | (?P<C>\bld\.global\.cg) | (?P<X>\b(?:atom|red|ld\.volatile)\b)""",
    re.VERBOSE,
)


@pytest.mark.slow
def test_the_barrier_in_ptx():
    """Stores of every warp before the release, and no load of a product before the acquire."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    printed = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert printed.stdout, printed.stderr
    events = "".join(match.lastgroup for match in EVENTS.finditer(printed.stdout))
    assert events.count("R") == 1 and "X" not in events
    before, after = events.split("R")
    assert re.search("S+B+$", before), "the barrier of the program stands between the stores and the release"
    assert "C" not in before and "A" not in before
    assert re.match("AB+ABB+S?C", after), "polls, each seen by all warps, then the loads"


def print_ptx():
    from bench import codegen
    from bench.codegen_cases import CASES
    from bench.codegen_launchers import training_single_train

    case = next(case for case in CASES if case.launcher is training_single_train)
    (launch,) = codegen.launches(codegen.CHIPS["sm_90"], case)[1]
    print(launch.kernel.asm["ptx"])


if __name__ == "__main__":
    print_ptx()
