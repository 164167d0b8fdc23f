"""torch.nn.functional with the fused ops in it. Every other name of torch's falls through.

What a kernel does not take (another dtype, a broadcast bias, a sparse tensor) goes to torch's own operations, which
answer, or raise torch's own error, before anything is launched.
"""

import torch.nn.functional

from fusedact.functional.binary_losses import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from fusedact.functional.losses import cross_entropy as cross_entropy
from fusedact.functional.products import linear as linear

_TORCH = [name for name in dir(torch.nn.functional) if not name.startswith("__")]
__all__ = sorted(name for name in _TORCH if not name.startswith("_"))


def __getattr__(name: str):
    if name.startswith("__") or not hasattr(torch.nn.functional, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TORCH})
