"""One op per kernel: what it saves, which gradients it gives, and how PyTorch reaches it."""

from fusedact.autograd.bce import bce_with_logits as bce_with_logits
from fusedact.autograd.cross_entropy import cross_entropy as cross_entropy
from fusedact.autograd.linear import linear_act as linear_act
