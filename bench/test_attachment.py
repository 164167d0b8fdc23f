"""pytest bench/test_attachment.py --benchmark-only: what it costs an op to attach to PyTorch, its launches excluded.

Triton is asked for by name, and the launchers are replaced by functions that hand out tensors made before: the doors,
the Function, autograd and what chooses a launch are left, and with them the checks of functional but for the line
`doors alone`, which is what contract.md's table measures. Stock beside it computes as well, on a CPU. Nothing is
asserted; the aims are 1.15 times stock in inference and 1.3 times forward with backward. `again` is stock once more.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as stock
from torch import Tensor

import fusedact
from bench.turns import TURNS, reported, timed
from fusedact import autograd, backend, functional
from fusedact.kernels import bce, bias_activation, cross_entropy, elementwise, linear, softmax

AHEAD = 64  # results handed out before the first comes again
PHASES = ("inference", "forward", "both")

x, weight, bias, dz = torch.rand(64, 3), torch.rand(1, 3), torch.rand(1), torch.rand(64, 1)
logits, classes, stats, count = torch.randn(64, 10), torch.randint(10, (64,)), torch.rand(2, 64), torch.rand(1)
yes, likely, loss = torch.randn(64, 1), torch.rand(64, 1), torch.rand(())
y, slope = torch.randn(64, 10), torch.full((1,), 0.25)


def ahead(*results: Tensor | None) -> Iterator[Any]:
    """These results again and again, each time tensors that autograd has long forgotten."""
    copies = [tuple(t if t is None else t.clone() for t in results) for _ in range(AHEAD)]
    return itertools.cycle(copies if len(results) > 1 else [copy[0] for copy in copies])


def made(*results: Tensor | None) -> Callable[..., Any]:
    """A launcher that hands these out."""
    prepared = ahead(*results)
    return lambda *args, **kwargs: next(prepared)


_dx, _dw = ahead(x), ahead(weight)


def _product(a: Tensor, b: Tensor, *config: object) -> Tensor:
    return next(_dx if len(a) == len(x) else _dw)


@dataclass(frozen=True)
class Case:
    """Stock's call and ours on the same tensors, and the launchers of ours."""

    name: str
    stock: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    args: tuple[Tensor, ...]
    wanted: int  # of them, from the first on, want a gradient
    launchers: tuple[tuple[object, str, Callable], ...]


LINEAR = (
    (linear, "forward", made(dz, None)),
    (bias_activation, "backward", made(dz, bias, None)),
    (linear, "product", _product),
)
CASES = {
    case.name: case
    for case in (
        Case(
            "linear + relu, 64 x 3 by 3 x 1, doors alone",
            lambda *args: torch.relu(stock.linear(*args)),
            lambda *args: autograd.linear_act(*args, None, "relu", ()),
            (x, weight, bias),
            3,
            LINEAR,
        ),
        Case(
            "linear + relu, 64 x 3 by 3 x 1",
            lambda *args: torch.relu(stock.linear(*args)),
            lambda *args: functional.linear(*args, activation="relu"),
            (x, weight, bias),
            3,
            LINEAR,
        ),
        Case(
            "cross_entropy, 64 x 10",
            stock.cross_entropy,
            functional.cross_entropy,
            (logits, classes),
            1,
            (
                (cross_entropy, "forward", made(loss, None, stats, count)),
                (cross_entropy, "backward", made(logits, None)),
            ),
        ),
        Case(
            "bce with logits, 64 x 1",
            stock.binary_cross_entropy_with_logits,
            functional.binary_cross_entropy_with_logits,
            (yes, likely),
            1,
            ((bce, "forward", made(loss)), (bce, "backward", made(yes, None))),
        ),
        Case(
            "softmax, 64 x 10",
            lambda *args: stock.softmax(*args, dim=-1),
            lambda *args: functional.softmax(*args, dim=-1),
            (logits,),
            1,
            ((softmax, "forward", made(y)), (softmax, "backward", made(y))),
        ),
        Case(
            "gelu, 64 x 10",
            stock.gelu,
            functional.gelu,
            (logits,),
            1,
            ((elementwise, "forward", made(y)), (elementwise, "backward", made(y, None))),
        ),
        Case(
            "prelu, 64 x 10",
            stock.prelu,
            functional.prelu,
            (logits, slope),
            2,
            ((elementwise, "forward", made(y)), (elementwise, "backward", made(y, slope))),
        ),
    )
}


@pytest.fixture(scope="module")
def rows(request):
    title = f"Attachment without launches, µs of a CPU thread, {TURNS} turns; aims: 1.15 in inference, 1.3 for both"
    with reported(request, title, ("op", "phase")) as found:
        yield found


def call(function: Callable[..., Tensor], case: Case, phase: str) -> Callable[[], object]:
    wanted = [t.clone().requires_grad_(phase != "inference") for t in case.args[: case.wanted]]
    args = *wanted, *case.args[case.wanted :]
    if phase != "both":
        return lambda: function(*args)
    dy = torch.ones_like(function(*args))
    return lambda: torch.autograd.grad(function(*args), wanted, dy)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", CASES, ids=lambda name: name.replace(" ", "-"))
def test_attachment(name, phase, rows, turns, setting, benchmark, monkeypatch):
    case = CASES[name]
    for module, name, launcher in case.launchers:
        monkeypatch.setattr(module, name, launcher)
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    monkeypatch.setattr(backend, "looks_at_values", lambda t: False)  # as on a GPU
    benchmark.group = f"attachment {phase}"
    with torch.set_grad_enabled(phase != "inference"), fusedact.use_backend("triton"):
        functions = {"stock": case.stock, "fusedact": case.ours, "again": case.stock}
        calls = {name: call(function, case, phase) for name, function in functions.items()}
        timings = timed(calls, turns)
        benchmark.pedantic(calls["fusedact"], rounds=min(turns, 20), iterations=10)
    rows[case.name, phase] = timings
    benchmark.extra_info |= setting.host_info | {name: asdict(timing) for name, timing in timings.items()}
