"""Parameters and an optimizer's moments as one tensor, read from torch's own and written back."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fusedact.fitting.recipe import Recipe

Views = Callable[[Tensor], Sequence[Tensor]]


class State:
    """What training changes: numbers (1 + moments, size), the parameters first, and how many steps were taken.

    views: of one row of the numbers, the part of each parameter in the recipe's order, shaped as the parameter.
    """

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer, size: int, views: Views) -> None:
        self.optimizer = optimizer
        self.moments = recipe.rule.moments
        self.parameters = recipe.parameters
        self.numbers = torch.zeros(1 + len(self.moments), size, dtype=recipe.dtype, device=recipe.device)
        self._views = [views(row) for row in self.numbers]
        self.steps = 0
        with torch.no_grad():
            self._read()

    def _read(self) -> None:
        for at, p in enumerate(self.parameters):
            self._views[0][at].copy_(p)
            known = self.optimizer.state.get(p, {})
            self.steps = int(known.get("step", 0))
            for moment, name in enumerate(self.moments, 1):
                if known.get(name) is not None:
                    self._views[moment][at].copy_(known[name])

    @torch.no_grad()
    def write(self) -> None:
        """Into the parameters and the optimizer's state, as if it had taken the steps itself."""
        for at, p in enumerate(self.parameters):
            p.copy_(self._views[0][at])
            if not self.moments or not self.steps:
                continue
            known = self.optimizer.state[p]
            if "exp_avg" in self.moments:
                known.setdefault("step", self._step_counter(p)).fill_(self.steps)
            for moment, name in enumerate(self.moments, 1):
                if known.get(name) is None:
                    known[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                known[name].copy_(self._views[moment][at])

    def _step_counter(self, p: nn.Parameter) -> Tensor:
        """Where the optimizer itself would keep it."""
        group = self.optimizer.param_groups[0]
        on_device = group.get("capturable") or group.get("fused")
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        return torch.zeros((), dtype=dtype, device=p.device if on_device else "cpu")

    def snapshot(self) -> tuple[Tensor, int]:
        return self.numbers.clone(), self.steps

    def restore(self, snapshot: tuple[Tensor, int]) -> None:
        self.numbers.copy_(snapshot[0])
        self.steps = snapshot[1]

    def is_finite(self) -> bool:
        """Of the parameters and the first moment: a gradient that is not finite leaves its mark there for good."""
        return bool(self.numbers[:2].isfinite().all())
