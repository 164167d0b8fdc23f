"""One op per kernel: what it saves, which gradients it gives, and how PyTorch reaches it."""

from fusedact.autograd.activation import activation as activation
from fusedact.autograd.bce import bce_with_logits as bce_with_logits
from fusedact.autograd.bce import binary_cross_entropy as binary_cross_entropy
from fusedact.autograd.bce import multilabel_soft_margin as multilabel_soft_margin
from fusedact.autograd.chain import can_be_chained as can_be_chained
from fusedact.autograd.chain import linear_chain as linear_chain
from fusedact.autograd.class_shards import vocab_parallel_cross_entropy as vocab_parallel_cross_entropy
from fusedact.autograd.convolution import convolution_act as convolution_act
from fusedact.autograd.cross_entropy import cross_entropy as cross_entropy
from fusedact.autograd.cross_entropy import cross_entropy_early as cross_entropy_early
from fusedact.autograd.cross_entropy import cross_entropy_formula as cross_entropy_formula
from fusedact.autograd.gated import gated as gated
from fusedact.autograd.head_shards import vocab_parallel_linear_cross_entropy as vocab_parallel_linear_cross_entropy
from fusedact.autograd.linear import linear_act as linear_act
from fusedact.autograd.linear import prefers_stock as prefers_stock
from fusedact.autograd.linear_bce import fits_in_registers as fits_in_registers
from fusedact.autograd.linear_bce import linear_bce as linear_bce
from fusedact.autograd.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fusedact.autograd.linear_cross_entropy import measured_chunk as measured_chunk
from fusedact.autograd.linear_cross_entropy import total_weight as total_weight
from fusedact.autograd.nll import nll_loss as nll_loss
from fusedact.autograd.softmax import softmax as softmax
