"""torch.nn with the fused modules in it. Every other name of torch's falls through; dunder names never."""

import sys

import torch.nn

from fusedact.nn import functional as functional
from fusedact.nn.activation import CELU as CELU
from fusedact.nn.activation import ELU as ELU
from fusedact.nn.activation import GELU as GELU
from fusedact.nn.activation import SELU as SELU
from fusedact.nn.activation import Hardshrink as Hardshrink
from fusedact.nn.activation import Hardsigmoid as Hardsigmoid
from fusedact.nn.activation import Hardswish as Hardswish
from fusedact.nn.activation import Hardtanh as Hardtanh
from fusedact.nn.activation import LeakyReLU as LeakyReLU
from fusedact.nn.activation import LogSigmoid as LogSigmoid
from fusedact.nn.activation import Mish as Mish
from fusedact.nn.activation import PReLU as PReLU
from fusedact.nn.activation import ReLU as ReLU
from fusedact.nn.activation import ReLU6 as ReLU6
from fusedact.nn.activation import Sigmoid as Sigmoid
from fusedact.nn.activation import SiLU as SiLU
from fusedact.nn.activation import Softplus as Softplus
from fusedact.nn.activation import Softshrink as Softshrink
from fusedact.nn.activation import Softsign as Softsign
from fusedact.nn.activation import Step as Step
from fusedact.nn.activation import Tanh as Tanh
from fusedact.nn.activation import Tanhshrink as Tanhshrink
from fusedact.nn.activation import Threshold as Threshold
from fusedact.nn.binary_head import LinearBCEWithLogitsLoss as LinearBCEWithLogitsLoss
from fusedact.nn.binary_loss import BCELoss as BCELoss
from fusedact.nn.binary_loss import BCEWithLogitsLoss as BCEWithLogitsLoss
from fusedact.nn.binary_loss import MultiLabelSoftMarginLoss as MultiLabelSoftMarginLoss
from fusedact.nn.container import Sequential as Sequential
from fusedact.nn.convolution import Conv1d as Conv1d
from fusedact.nn.convolution import Conv2d as Conv2d
from fusedact.nn.convolution import Conv3d as Conv3d
from fusedact.nn.convolution import ConvTranspose1d as ConvTranspose1d
from fusedact.nn.convolution import ConvTranspose2d as ConvTranspose2d
from fusedact.nn.convolution import ConvTranspose3d as ConvTranspose3d
from fusedact.nn.head import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from fusedact.nn.linear import Linear as Linear
from fusedact.nn.loss import CrossEntropyLoss as CrossEntropyLoss
from fusedact.nn.loss import NLLLoss as NLLLoss
from fusedact.nn.softmax import LogSoftmax as LogSoftmax
from fusedact.nn.softmax import Softmax as Softmax
from fusedact.nn.softmax import Softmax2d as Softmax2d
from fusedact.nn.softmax import Softmin as Softmin

# `import fusedact.nn.init`, `from fusedact.nn.utils import clip_grad_norm_`: torch's own modules, under our name too.
sys.modules.update(
    {
        __name__ + name.removeprefix("torch.nn"): module
        for name, module in list(sys.modules.items())
        if name.startswith("torch.nn.") and name != "torch.nn.functional"
    }
)

_TORCH = [name for name in dir(torch.nn) if not name.startswith("_")]
_BEYOND = {"LinearBCEWithLogitsLoss", "Step"}  # torch.nn has none of that name
__all__ = sorted({*_TORCH, *_BEYOND})


def __getattr__(name: str):
    if name.startswith("__") or not hasattr(torch.nn, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(torch.nn, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_TORCH})
