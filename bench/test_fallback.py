"""pytest bench/test_fallback.py --benchmark-only: what our modules cost on a CPU, where they run stock's operations.

S1's and S6's layers and losses at their batches, one thread, stock and fused in turn. Nothing is asserted; the aim is
a ratio of at most 1.05. `again` is stock once more: what the ratio is where there is nothing to find.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fusedact
from bench.turns import TURNS, reported, timed


@dataclass(frozen=True)
class Layer:
    """A module of S1 or S6, made of torch.nn or of fusedact.nn, its input, and the target of a loss."""

    name: str
    build: Callable[[ModuleType], torch.nn.Module]
    input: Tensor
    target: Tensor | None = None

    def calls(self, phase: str) -> dict[str, Callable[[], object]]:
        """Stock's, ours of the same state, and stock's once more."""
        stock, fused, again = (self.build(nn) for nn in (torch.nn, fusedact.nn, torch.nn))
        for module in (fused, again):
            module.load_state_dict(stock.state_dict())
        return {
            name: self.call(module, phase)
            for name, module in {"stock": stock, "fusedact": fused, "again": again}.items()
        }

    def call(self, module: torch.nn.Module, phase: str) -> Callable[[], object]:
        x = self.input.clone().requires_grad_(phase == "both")
        args = (x,) if self.target is None else (x, self.target)
        if phase == "forward":
            return lambda: module(*args)
        wanted = [x, *module.parameters()]
        dy = torch.ones_like(module(*args))
        return lambda: torch.autograd.grad(module(*args), wanted, dy)


def _mlp(nn: ModuleType) -> torch.nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("S1 Linear(3, 1)", lambda nn: nn.Linear(3, 1), torch.rand(64, 3)),
        Layer("S1 Sigmoid", lambda nn: nn.Sigmoid(), torch.randn(64, 1)),
        Layer("S1 both in Sequential", lambda nn: nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()), torch.rand(64, 3)),
        Layer("S1 BCELoss", lambda nn: nn.BCELoss(), torch.rand(64, 1), torch.rand(64, 1)),
        Layer("S1 BCEWithLogitsLoss", lambda nn: nn.BCEWithLogitsLoss(), torch.randn(64, 1), torch.rand(64, 1)),
        Layer("S6 Linear(784, 256)", lambda nn: nn.Linear(784, 256), torch.rand(100, 784)),
        Layer("S6 ReLU", lambda nn: nn.ReLU(), torch.randn(100, 256)),
        Layer("S6 Linear(256, 10)", lambda nn: nn.Linear(256, 10), torch.rand(100, 256)),
        Layer("S6 all in Sequential", _mlp, torch.rand(100, 784)),
        Layer("S6 CrossEntropyLoss", lambda nn: nn.CrossEntropyLoss(), torch.randn(100, 10), torch.randint(10, (100,))),
    )
}


@pytest.fixture(scope="module")
def rows(request):
    title = f"The fallback, µs of a CPU thread, {TURNS} turns; aim: fusedact / stock at most 1.05"
    with reported(request, title, ("module", "phase")) as found:
        yield found


@pytest.mark.parametrize("phase", ["forward", "both"])
@pytest.mark.parametrize("name", LAYERS, ids=lambda name: name.replace(" ", "-"))
def test_module_call(name, phase, rows, turns, setting, benchmark):
    layer = LAYERS[name]
    calls = layer.calls(phase)
    benchmark.group = f"fallback {phase}"
    with torch.set_grad_enabled(phase == "both"), fusedact.use_backend("auto"):
        timings = timed(calls, turns)
        benchmark.pedantic(calls["fusedact"], rounds=min(turns, 20), iterations=10)
    rows[layer.name, phase] = timings
    benchmark.extra_info |= setting.host_info | {name: asdict(timing) for name, timing in timings.items()}
