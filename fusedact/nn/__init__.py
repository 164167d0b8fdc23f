"""torch.nn with the fused modules in it. Every other name of torch's falls through; dunder names never."""

import sys

import torch.nn

from fusedact.nn import functional as functional
from fusedact.nn.container import Sequential as Sequential
from fusedact.nn.linear import Linear as Linear
from fusedact.nn.loss import BCEWithLogitsLoss as BCEWithLogitsLoss
from fusedact.nn.loss import CrossEntropyLoss as CrossEntropyLoss

# `import fusedact.nn.init`, `from fusedact.nn.utils import clip_grad_norm_`: torch's own modules, under our name too.
sys.modules.update(
    {
        __name__ + name.removeprefix("torch.nn"): module
        for name, module in list(sys.modules.items())
        if name.startswith("torch.nn.") and name != "torch.nn.functional"
    }
)

_TORCH = [name for name in dir(torch.nn) if not name.startswith("_")]
__all__ = sorted({*_TORCH, "BCEWithLogitsLoss", "CrossEntropyLoss", "Linear", "Sequential", "functional"})


def __getattr__(name: str):
    if name.startswith("__") or not hasattr(torch.nn, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TORCH})
