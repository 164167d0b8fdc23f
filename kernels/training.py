"""What the kernels that train in one launch share: where parameters stand, losses, and an optimizer's step.

Parameters, and each of an optimizer's moments, are one flat float32 tensor: of each layer W (outputs, inputs), rows
contiguous, then b, each at a multiple of 16 bytes. What stands between them is 0 and stays 0.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import bce

ALIGNMENT = 4  # elements
RATES = 7  # float64 numbers of an optimizer: lr, weight_decay, beta1, beta2, eps, beta1^t, beta2^t after t steps


class Layer(NamedTuple):
    """act(x Wᵀ + b). weight, bias: where they begin in the flat parameters; bias None: there is none.

    act, act_grad: device functions f(z, *params) and f_grad(dy, saved, *params), where saved is y or z.
    """

    inputs: int
    outputs: int
    weight: int
    bias: int | None
    act: Any
    act_grad: Any
    act_params: tuple[float, ...]
    from_output: bool


class Rule(NamedTuple):
    """An optimizer's step, (w, g, m, v, *rates) -> (w, m, v), and how many of the moments m and v it keeps."""

    step: Any
    moments: int


class Objective(NamedTuple):
    """A loss of one number and its target; None: cross-entropy of a row of logits and its label.

    mean: over all rows, and over all outputs where the loss has one each; else the sum.
    """

    loss: bce.Loss | None
    mean: bool


def places(widths, biased):
    """Where weight and bias of each layer begin, and the length of the flat parameters.

    widths: inputs and outputs of the layers, one more than these. biased: of each layer, whether it has a bias.
    """
    found, at = [], 0
    for inputs, outputs, has_bias in zip(widths, widths[1:], biased, strict=False):
        weight, at = at, at + _aligned(inputs * outputs)
        bias, at = (at, at + _aligned(outputs)) if has_bias else (None, at)
        found.append((weight, bias))
    return found, at


def _aligned(n):
    return -(-n // ALIGNMENT) * ALIGNMENT


# Losses


@triton.jit
def _squared_error(x, t, p):
    return (x - t) * (x - t)


@triton.jit
def _squared_error_grad(x, t, p):
    return 2.0 * (x - t)


SQUARED_ERROR = bce.Loss(_squared_error, _squared_error_grad, None)


@triton.jit
def identity_grad(dy, y):
    """dz of a layer without an activation."""
    return dy


# Optimizers, in torch's own order of operations. Rates are float64 scalars: 1 - 0.999 has no digit to lose.


@triton.jit
def _sgd(w, g, m, v, lr, decay, beta1, beta2, eps, power1, power2):
    return w - lr.to(tl.float32) * (g + decay.to(tl.float32) * w), m, v


@triton.jit
def _momentum(w, g, m, v, lr, decay, beta1, beta2, eps, power1, power2):
    m = beta1.to(tl.float32) * m + (g + decay.to(tl.float32) * w)
    return w - lr.to(tl.float32) * m, m, v


@triton.jit
def _nesterov(w, g, m, v, lr, decay, beta1, beta2, eps, power1, power2):
    g = g + decay.to(tl.float32) * w
    m = beta1.to(tl.float32) * m + g
    return w - lr.to(tl.float32) * (g + beta1.to(tl.float32) * m), m, v


@triton.jit
def _adam(w, g, m, v, lr, decay, beta1, beta2, eps, power1, power2):
    g = g + decay.to(tl.float32) * w
    m = m + (g - m) * (1.0 - beta1).to(tl.float32)
    v = beta2.to(tl.float32) * v + (1.0 - beta2).to(tl.float32) * g * g
    step_size = lr.to(tl.float32) / (1.0 - power1).to(tl.float32)
    root = tl.sqrt((1.0 - power2).to(tl.float32))
    return w - step_size * (m / (tl.sqrt(v) / root + eps.to(tl.float32))), m, v


@triton.jit
def _adamw(w, g, m, v, lr, decay, beta1, beta2, eps, power1, power2):
    zero = decay - decay
    return _adam(w * (1.0 - lr * decay).to(tl.float32), g, m, v, lr, zero, beta1, beta2, eps, power1, power2)


SGD = Rule(_sgd, 0)
MOMENTUM = Rule(_momentum, 1)
NESTEROV = Rule(_nesterov, 1)
ADAM = Rule(_adam, 2)
ADAMW = Rule(_adamw, 2)
