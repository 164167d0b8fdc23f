"""torch.nn with every linear+activation and every classification loss as one fused kernel."""

from fusedact import nn as nn
from fusedact.activations import register_activation as register_activation
from fusedact.backend import get_backend as get_backend
from fusedact.backend import get_float32 as get_float32
from fusedact.backend import set_backend as set_backend
from fusedact.backend import set_float32 as set_float32
from fusedact.backend import use_backend as use_backend
from fusedact.fitting import Fitted as Fitted
from fusedact.fitting import FittedMany as FittedMany
from fusedact.fitting import fit as fit
from fusedact.fitting import fit_many as fit_many
from fusedact.fusion import fuse as fuse
from fusedact.fusion import report as report
from fusedact.fusion import unfuse as unfuse
from fusedact.nn import functional as functional

__version__ = "0.1.0"
