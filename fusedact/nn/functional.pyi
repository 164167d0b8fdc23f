# Written by tools/make_nn_stubs.py from torch 2.13.0: not by hand.

from typing import Any

from torch import Tensor as Tensor
from torch.nn.functional import GRID_SAMPLE_INTERPOLATION_MODES as GRID_SAMPLE_INTERPOLATION_MODES
from torch.nn.functional import GRID_SAMPLE_PADDING_MODES as GRID_SAMPLE_PADDING_MODES
from torch.nn.functional import ScalingType as ScalingType
from torch.nn.functional import SwizzleType as SwizzleType
from torch.nn.functional import adaptive_avg_pool1d as adaptive_avg_pool1d
from torch.nn.functional import adaptive_avg_pool2d as adaptive_avg_pool2d
from torch.nn.functional import adaptive_avg_pool3d as adaptive_avg_pool3d
from torch.nn.functional import adaptive_max_pool1d as adaptive_max_pool1d
from torch.nn.functional import adaptive_max_pool1d_with_indices as adaptive_max_pool1d_with_indices
from torch.nn.functional import adaptive_max_pool2d as adaptive_max_pool2d
from torch.nn.functional import adaptive_max_pool2d_with_indices as adaptive_max_pool2d_with_indices
from torch.nn.functional import adaptive_max_pool3d as adaptive_max_pool3d
from torch.nn.functional import adaptive_max_pool3d_with_indices as adaptive_max_pool3d_with_indices
from torch.nn.functional import affine_grid as affine_grid
from torch.nn.functional import alpha_dropout as alpha_dropout
from torch.nn.functional import assert_int_or_pair as assert_int_or_pair
from torch.nn.functional import avg_pool1d as avg_pool1d
from torch.nn.functional import avg_pool2d as avg_pool2d
from torch.nn.functional import avg_pool3d as avg_pool3d
from torch.nn.functional import batch_norm as batch_norm
from torch.nn.functional import bilinear as bilinear
from torch.nn.functional import celu_ as celu_
from torch.nn.functional import channel_shuffle as channel_shuffle
from torch.nn.functional import conv_tbc as conv_tbc
from torch.nn.functional import cosine_embedding_loss as cosine_embedding_loss
from torch.nn.functional import cosine_similarity as cosine_similarity
from torch.nn.functional import ctc_loss as ctc_loss
from torch.nn.functional import dropout as dropout
from torch.nn.functional import dropout1d as dropout1d
from torch.nn.functional import dropout2d as dropout2d
from torch.nn.functional import dropout3d as dropout3d
from torch.nn.functional import elu_ as elu_
from torch.nn.functional import embedding as embedding
from torch.nn.functional import embedding_bag as embedding_bag
from torch.nn.functional import feature_alpha_dropout as feature_alpha_dropout
from torch.nn.functional import fold as fold
from torch.nn.functional import fractional_max_pool2d as fractional_max_pool2d
from torch.nn.functional import fractional_max_pool2d_with_indices as fractional_max_pool2d_with_indices
from torch.nn.functional import fractional_max_pool3d as fractional_max_pool3d
from torch.nn.functional import fractional_max_pool3d_with_indices as fractional_max_pool3d_with_indices
from torch.nn.functional import gaussian_nll_loss as gaussian_nll_loss
from torch.nn.functional import glu as glu
from torch.nn.functional import grid_sample as grid_sample
from torch.nn.functional import group_norm as group_norm
from torch.nn.functional import grouped_mm as grouped_mm
from torch.nn.functional import gumbel_softmax as gumbel_softmax
from torch.nn.functional import hardtanh_ as hardtanh_
from torch.nn.functional import hinge_embedding_loss as hinge_embedding_loss
from torch.nn.functional import huber_loss as huber_loss
from torch.nn.functional import instance_norm as instance_norm
from torch.nn.functional import interpolate as interpolate
from torch.nn.functional import kl_div as kl_div
from torch.nn.functional import l1_loss as l1_loss
from torch.nn.functional import layer_norm as layer_norm
from torch.nn.functional import leaky_relu_ as leaky_relu_
from torch.nn.functional import local_response_norm as local_response_norm
from torch.nn.functional import lp_pool1d as lp_pool1d
from torch.nn.functional import lp_pool2d as lp_pool2d
from torch.nn.functional import lp_pool3d as lp_pool3d
from torch.nn.functional import margin_ranking_loss as margin_ranking_loss
from torch.nn.functional import max_pool1d as max_pool1d
from torch.nn.functional import max_pool1d_with_indices as max_pool1d_with_indices
from torch.nn.functional import max_pool2d as max_pool2d
from torch.nn.functional import max_pool2d_with_indices as max_pool2d_with_indices
from torch.nn.functional import max_pool3d as max_pool3d
from torch.nn.functional import max_pool3d_with_indices as max_pool3d_with_indices
from torch.nn.functional import max_unpool1d as max_unpool1d
from torch.nn.functional import max_unpool2d as max_unpool2d
from torch.nn.functional import max_unpool3d as max_unpool3d
from torch.nn.functional import mse_loss as mse_loss
from torch.nn.functional import multi_head_attention_forward as multi_head_attention_forward
from torch.nn.functional import multi_margin_loss as multi_margin_loss
from torch.nn.functional import multilabel_margin_loss as multilabel_margin_loss
from torch.nn.functional import native_channel_shuffle as native_channel_shuffle
from torch.nn.functional import normalize as normalize
from torch.nn.functional import one_hot as one_hot
from torch.nn.functional import pad as pad
from torch.nn.functional import pairwise_distance as pairwise_distance
from torch.nn.functional import pdist as pdist
from torch.nn.functional import pixel_shuffle as pixel_shuffle
from torch.nn.functional import pixel_unshuffle as pixel_unshuffle
from torch.nn.functional import poisson_nll_loss as poisson_nll_loss
from torch.nn.functional import relu_ as relu_
from torch.nn.functional import rms_norm as rms_norm
from torch.nn.functional import rrelu as rrelu
from torch.nn.functional import rrelu_ as rrelu_
from torch.nn.functional import scaled_dot_product_attention as scaled_dot_product_attention
from torch.nn.functional import scaled_mm as scaled_mm
from torch.nn.functional import selu_ as selu_
from torch.nn.functional import smooth_l1_loss as smooth_l1_loss
from torch.nn.functional import soft_margin_loss as soft_margin_loss
from torch.nn.functional import triplet_margin_loss as triplet_margin_loss
from torch.nn.functional import triplet_margin_with_distance_loss as triplet_margin_with_distance_loss
from torch.nn.functional import unfold as unfold
from torch.nn.functional import upsample as upsample
from torch.nn.functional import upsample_bilinear as upsample_bilinear
from torch.nn.functional import upsample_nearest as upsample_nearest

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

BroadcastingList1: Any
BroadcastingList2: Any
BroadcastingList3: Any
Callable: Any
DType: Any
Optional: Any
TYPE_CHECKING: Any
boolean_dispatch: Any
dataclasses: Any
grad: Any
handle_torch_function: Any
has_torch_function: Any
has_torch_function_unary: Any
has_torch_function_variadic: Any
importlib: Any
math: Any
np: Any
reproducibility_notes: Any
scaled_grouped_mm: Any
sparse_support_notes: Any
tf32_notes: Any
threshold_: Any
torch: Any
warnings: Any
