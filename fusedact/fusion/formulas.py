"""What a fused site saves in training, by formula, against torch's operations one after the other.

A launch is one of a kernel; a move is one read or write of a tensor of the site's output's size. What both sides do
alike is left out: the products, and the tensors that these read. Stock's activation is taken as one launch, two moves
forward and three backward, so that one which torch composes of several operations saves more than is said here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fusedact.activations import Activation


class Saves(NamedTuple):
    """How many fewer than stock, each (forward, backward), as in Site."""

    launches: tuple[int, int]
    moves: tuple[int, int]


class ChainLayer(NamedTuple):
    """A layer of a chain: its activation with parameters, whether it has a bias, the features that it puts out."""

    activation: Activation | None
    parameters: tuple[float, ...]
    bias: bool
    width: int


def linear_saves(activation: Activation, dtype: torch.dtype, parameters: Sequence[float], bias: bool) -> Saves:
    """act(x Wᵀ + b) by our own kernel; where the library's was measured to be faster, forward saves nothing.

    Forward, stock's product writes z, and its activation reads z and writes y; ours writes y, and z only where the
    derivative needs it. Backward, one pass of three moves stands for the activation's and the sum for db, which reads
    dz; a slope's gradient takes stock two moves and a sum more.
    """
    keeps_z = not activation.from_output(dtype, *parameters)
    return Saves((1, bias + activation.learned), (2 - keeps_z, bias + 2 * activation.learned))


def chain_saves(layers: Sequence[ChainLayer], dtype: torch.dtype) -> tuple[int, Saves]:
    """Linear layers in a row, as linear_saves each, and for all but the last the pass of the backward too.

    By our own kernels, as there; behind a product of the library's the backward's pass stays.

    The product that makes dy of such a layer takes the derivative itself, so that dy is neither written nor read; where
    z was kept, it writes y again beside dz: in both directions two moves, or one. Returns the width in which moves are
    counted, which divides that of every activated layer, and what is saved.
    """
    width = math.gcd(*(layer.width for layer in layers if layer.activation is not None))
    forward, backward, moved, moved_back = 0, 0, 0, 0
    for at, layer in enumerate(layers, 1):
        if layer.activation is None:
            continue
        launches, moves = linear_saves(layer.activation, dtype, layer.parameters, layer.bias)
        inner, times = at < len(layers), layer.width // width
        forward, backward = forward + launches[0], backward + launches[1] + inner
        moved, moved_back = moved + times * moves[0], moved_back + times * (moves[1] + inner * moves[0])
    return width, Saves((forward, backward), (moved, moved_back))


def convolution_saves(activation: Activation, bias: bool, depthwise: bool) -> Saves:
    """act(x * W + b), whose product is torch's on both sides.

    cuDNN's has no bias: torch adds it in an operation of its own (ATen/native/Convolution.cpp: `output.add_`), which
    reads and writes the product; ours adds it in the activation's pass. Torch's own kernel of a depthwise layer adds it
    itself, so that nothing is saved forward. Backward as in linear_saves.
    """
    apart = bias and not depthwise
    return Saves((int(apart), bias + activation.learned), (2 * apart, bias + 2 * activation.learned))


def gated_saves() -> Saves:
    """act(gate) * up.

    Forward, stock's activation and product take five moves, ours three: gate, up, y. Backward, stock takes three
    passes of three for dy up, dy act(gate) and the activation; ours reads dy, gate and up and writes both gradients.
    """
    return Saves((1, 2), (2, 4))


def activation_saves(activation: Activation) -> Saves:
    """act(x) alone: a slope's gradient takes stock two moves and a sum more."""
    return Saves((0, int(activation.learned)), (0, 2 * activation.learned))
