"""torch's parallel styles of linear layers, for layers that have their activation with them.

Beside the package's other names, since they need torch.distributed.tensor, which takes 0.7 s to import.
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor
from torch.distributed.tensor import parallel as torchs


class _WithActivation:
    """torch's styles place the parameters of a layer's children as if these were linear layers."""

    src_data_rank: int | None = 0

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        activation: Any = getattr(module, "activation", None)
        apart = isinstance(module, nn.Linear) and isinstance(activation, nn.Module)
        if not apart:
            return super()._apply(module, device_mesh)  # type: ignore[misc]
        module.activation = None
        try:
            placed = super()._apply(module, device_mesh)  # type: ignore[misc]
        finally:
            module.activation = activation
        for part in activation.modules():
            for name, parameter in part.named_parameters(recurse=False):
                whole = self._replicated(parameter, device_mesh)
                part.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        return placed

    def _replicated(self, parameter: nn.Parameter, device_mesh: DeviceMesh) -> torch.Tensor:
        return distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=self.src_data_rank)


class ColwiseParallel(_WithActivation, torchs.ColwiseParallel):
    """torch's ColwiseParallel, of Linear(activation=...) too: each rank activates the outputs that it has."""


class RowwiseParallel(_WithActivation, torchs.RowwiseParallel):
    """torch's RowwiseParallel, of Linear(activation=...) too: what the ranks have is added up, then activated."""
