"""Each elementwise activation once: f(z, *params) and f_grad(dy, z, *params), on loaded tiles.

`f_grad` returns dz rather than f'(z), so that an infinite or NaN gradient meets the same branch as in torch
(`relu`: 0, not 0 · inf). Where the derivative can be taken from the output by another formula, it stands in
`f_grad_from_output(dy, y, *params)`; `f_grad` serves both where the branch is the same for z and y.
"""

import triton
import triton.language as tl

from .tiles import clamp, expm1, like, log1p_exp, sigmoid, tanh, tanh_below

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBIC = tl.constexpr(0.044715)
SELU_SCALE = tl.constexpr(1.0507009873554805)
SELU_ALPHA = tl.constexpr(1.6732632423543772)
MISH_LINEAR = tl.constexpr(20.0)  # from here on tanh(softplus(z)) is 1 in float64 too


@triton.jit
def identity(z):
    return z


@triton.jit
def step(z):
    return tl.where(z >= 0, 1.0, tl.where(z < 0, 0.0, z))


@triton.jit
def step_grad(dy, y):
    return tl.zeros_like(dy)


@triton.jit
def threshold(z, limit, value):
    return tl.where(z <= limit, like(value, z), z)


@triton.jit
def threshold_grad(dy, y, limit, value):
    return tl.where(y <= limit, 0.0, dy)


@triton.jit
def sigmoid_grad(dy, z):
    return sigmoid_grad_from_output(dy, sigmoid(z))


@triton.jit
def sigmoid_grad_from_output(dy, y):
    return dy * (1.0 - y) * y


@triton.jit
def tanh_grad(dy, z):
    return tanh_grad_from_output(dy, tanh(z))


@triton.jit
def tanh_grad_from_output(dy, y):
    return dy * (1.0 - y * y)


@triton.jit
def relu(z):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_grad(dy, y):
    return tl.where(y <= 0, 0.0, dy)


@triton.jit
def leaky_relu(z, negative_slope):
    return tl.where(z > 0, z, z * negative_slope)


@triton.jit
def leaky_relu_grad(dy, y, negative_slope):
    return tl.where(y > 0, dy, dy * negative_slope)


@triton.jit
def prelu(z, slope):
    return tl.where(z > 0, z, z * slope)


@triton.jit
def prelu_grad(dy, z, slope):
    return tl.where(z > 0, dy, dy * slope)


@triton.jit
def prelu_slope_grad(dy, z):
    return tl.where(z > 0, 0.0, dy * z)


@triton.jit
def elu(z, alpha):
    return tl.where(z > 0, z, expm1(tl.minimum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)) * alpha)


@triton.jit
def elu_grad(dy, z, alpha):
    return tl.where(z <= 0, dy * alpha * tl.exp(z), dy)


@triton.jit
def selu(z):
    return elu(z, SELU_ALPHA) * SELU_SCALE


@triton.jit
def selu_grad(dy, z):
    return elu_grad(dy, z, SELU_ALPHA) * SELU_SCALE


@triton.jit
def celu(z, alpha):
    return tl.where(z > 0, z, expm1(tl.minimum(z / alpha, 0.0, propagate_nan=tl.PropagateNan.ALL)) * alpha)


@triton.jit
def celu_grad(dy, z, alpha):
    return tl.where(z <= 0, dy * tl.exp(z / alpha), dy)


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))


@triton.jit
def gelu_grad(dy, z):
    cdf = 0.5 * (1.0 + tl.erf(z * SQRT_HALF))
    density = tl.exp(-0.5 * z * z) * INV_SQRT_2PI
    return dy * (cdf + z * density)


@triton.jit
def gelu_tanh(z):
    """z σ(2u), which is 0.5 z (1 + tanh u) without its cancellation at negative u."""
    return z * sigmoid((z + z * z * z * GELU_CUBIC) * 2.0 * GELU_SCALE)


@triton.jit
def gelu_tanh_grad(dy, z):
    s = sigmoid((z + z * z * z * GELU_CUBIC) * 2.0 * GELU_SCALE)
    du = (1.0 + z * z * 3.0 * GELU_CUBIC) * GELU_SCALE
    return dy * (s + 2.0 * z * s * (1.0 - s) * du)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_grad(dy, z):
    s = sigmoid(z)
    return dy * s * (1.0 + z * (1.0 - s))


@triton.jit
def mish(z):
    """z tanh(softplus z) = z n / (n + 2) with e = exp z and n = e (e + 2)."""
    e = tl.exp(tl.minimum(z, MISH_LINEAR))
    n = e * (e + 2.0)
    return z * (n / (n + 2.0))


@triton.jit
def mish_grad(dy, z):
    """The same n: tanh' is 4 (n + 1) / (n + 2)², which does not cancel."""
    e = tl.exp(tl.minimum(z, MISH_LINEAR))
    n = e * (e + 2.0)
    slope = n / (n + 2.0) + z * sigmoid(z) * 4.0 * (n + 1.0) / ((n + 2.0) * (n + 2.0))
    return dy * tl.where(z > MISH_LINEAR, 1.0 + (z - z), slope)  # at inf NaN, torch's inf · 0


@triton.jit
def hardswish(z):
    return z * clamp(z + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardswish_grad(dy, z):
    return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, dy * (z / 3.0 + 0.5), dy))


@triton.jit
def hardsigmoid(z):
    return clamp(z + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardsigmoid_grad(dy, z):
    return tl.where((z > -3.0) & (z < 3.0), dy / 6.0, 0.0)


@triton.jit
def hardtanh(z, min_val, max_val):
    return clamp(z, min_val, max_val)


@triton.jit
def hardtanh_grad(dy, y, min_val, max_val):
    return tl.where((y <= min_val) | (y >= max_val), 0.0, dy)


@triton.jit
def relu6(z):
    return clamp(z, 0.0, 6.0)


@triton.jit
def relu6_grad(dy, y):
    return hardtanh_grad(dy, y, 0.0, 6.0)


@triton.jit
def softplus(z, beta, limit):
    scaled = z * beta
    stable = tl.maximum(scaled, 0.0) + log1p_exp(scaled)
    return tl.where(scaled > limit, z, stable / beta)


@triton.jit
def softplus_grad(dy, z, beta, limit):
    return tl.where(z * beta > limit, dy, dy * sigmoid(z * beta))


@triton.jit
def softplus_grad_from_output(dy, y, beta, limit):
    return tl.where(y * beta > limit, dy, -dy * expm1(-(y * beta)))


@triton.jit
def logsigmoid(z):
    return tl.minimum(z, 0.0) - log1p_exp(z)


@triton.jit
def logsigmoid_grad(dy, z):
    return dy * sigmoid(-z)


@triton.jit
def softsign(z):
    return z / (1.0 + tl.abs(z))


@triton.jit
def softsign_grad(dy, z):
    d = 1.0 + tl.abs(z)
    return tl.where(d == float("inf"), float("nan"), dy / (d * d))  # torch's inf / inf


@triton.jit
def tanhshrink(z):
    """Near 0 from the numbers of tanh's fraction, subtracted beforehand: z - tanh(z) would lose most digits there."""
    z2 = z * z
    lacking = z2 * (11486475.0 + z2 * (810810.0 + z2 * (12870.0 + z2 * 44.0)))
    return tl.where(tl.abs(z) < 0.6, z * (lacking / tanh_below(z2)), z - tanh(z))


@triton.jit
def tanhshrink_grad(dy, z):
    t = tanh(z)
    return dy * t * t


@triton.jit
def softshrink(z, lambd):
    return tl.where(z > lambd, z - lambd, tl.where(z < -lambd, z + lambd, z * 0.0))


@triton.jit
def softshrink_grad(dy, z, lambd):
    return hardshrink_grad(dy, z, lambd)


@triton.jit
def hardshrink(z, lambd):
    return tl.where((z >= -lambd) & (z <= lambd), 0.0, z)


@triton.jit
def hardshrink_grad(dy, z, lambd):
    return tl.where((z >= -lambd) & (z <= lambd), 0.0, dy)


@triton.jit
def squared_relu(z):
    return relu(z) * relu(z)


@triton.jit
def squared_relu_grad(dy, z):
    return tl.where(z <= 0, 0.0, 2.0 * dy * z)
