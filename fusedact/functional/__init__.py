"""torch.nn.functional with the fused ops in it. Every other name of torch's falls through.

What a kernel does not take (another dtype, a broadcast bias, a sparse tensor) goes to torch's own operations, which
answer, or raise torch's own error, before anything is launched.
"""

import torch.nn.functional

from fusedact.functional.activations import activate as activate
from fusedact.functional.activations import celu as celu
from fusedact.functional.activations import elu as elu
from fusedact.functional.activations import gelu as gelu
from fusedact.functional.activations import hardshrink as hardshrink
from fusedact.functional.activations import hardsigmoid as hardsigmoid
from fusedact.functional.activations import hardswish as hardswish
from fusedact.functional.activations import hardtanh as hardtanh
from fusedact.functional.activations import leaky_relu as leaky_relu
from fusedact.functional.activations import logsigmoid as logsigmoid
from fusedact.functional.activations import mish as mish
from fusedact.functional.activations import prelu as prelu
from fusedact.functional.activations import relu as relu
from fusedact.functional.activations import relu6 as relu6
from fusedact.functional.activations import selu as selu
from fusedact.functional.activations import sigmoid as sigmoid
from fusedact.functional.activations import silu as silu
from fusedact.functional.activations import softplus as softplus
from fusedact.functional.activations import softshrink as softshrink
from fusedact.functional.activations import softsign as softsign
from fusedact.functional.activations import squared_relu as squared_relu
from fusedact.functional.activations import step as step
from fusedact.functional.activations import tanh as tanh
from fusedact.functional.activations import tanhshrink as tanhshrink
from fusedact.functional.activations import threshold as threshold
from fusedact.functional.binary_heads import (
    linear_binary_cross_entropy_with_logits as linear_binary_cross_entropy_with_logits,
)
from fusedact.functional.binary_losses import binary_cross_entropy as binary_cross_entropy
from fusedact.functional.binary_losses import binary_cross_entropy_with_logits as binary_cross_entropy_with_logits
from fusedact.functional.binary_losses import multilabel_soft_margin_loss as multilabel_soft_margin_loss
from fusedact.functional.convolutions import conv1d as conv1d
from fusedact.functional.convolutions import conv2d as conv2d
from fusedact.functional.convolutions import conv3d as conv3d
from fusedact.functional.convolutions import conv_transpose1d as conv_transpose1d
from fusedact.functional.convolutions import conv_transpose2d as conv_transpose2d
from fusedact.functional.convolutions import conv_transpose3d as conv_transpose3d
from fusedact.functional.gated import gated as gated
from fusedact.functional.heads import linear_cross_entropy as linear_cross_entropy
from fusedact.functional.losses import cross_entropy as cross_entropy
from fusedact.functional.losses import nll_loss as nll_loss
from fusedact.functional.products import linear as linear
from fusedact.functional.products import linear_chain as linear_chain
from fusedact.functional.softmaxes import log_softmax as log_softmax
from fusedact.functional.softmaxes import softmax as softmax
from fusedact.functional.softmaxes import softmin as softmin

_TORCH = [name for name in dir(torch.nn.functional) if not name.startswith("__")]
_BEYOND = {  # torch has none of that name, or not in 2.11
    f.__name__
    for f in (
        activate,
        gated,
        linear_binary_cross_entropy_with_logits,
        linear_chain,
        linear_cross_entropy,
        squared_relu,
        step,
    )
}
__all__ = sorted({*_BEYOND, *(name for name in _TORCH if not name.startswith("_"))})


def __getattr__(name: str):
    if name.startswith("__") or not hasattr(torch.nn.functional, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn.functional, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TORCH})
