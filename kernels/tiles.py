"""Device helpers that two kernels share: transcendental functions, tile order, the last program, the grid barrier.

The functions are written from `tl` primitives, which run alike in the interpreter, on NVIDIA and on AMD.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def widen(x):
    """x as `tl.dot` takes it: the interpreter's dot would multiply bfloat16's bits as integers."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x rounded to the dtype of a store: the interpreter would truncate to bfloat16."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
            x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def exp_minus(x):
    """exp(-x), in float32 with |x| roundings' error, that of x log₂ e. Triton's -x is 0 - x, an instruction more."""
    if x.dtype == tl.float32:
        return tl.exp2(x * -LOG2_E)
    else:
        return tl.exp(-x)


# The three polynomials below are minimax fits (Lawson's iteration over 4,001 Chebyshev points, in float64). Those of
# log(1 + x) / x and -log(1 - x) / x are fits by relative error with 1 as the first coefficient, so that a small x keeps
# its digits: 3.3e-8 and 2.4e-8, as evaluated in float32 1.8e-7 and 1.5e-7 of any result that is not denormal. That of
# log r for |log2 r| <= 0.043 is 3.5e-8 off; the logarithm made of it errs by 2.7e-7 of itself.


@triton.jit
def log(x):
    """log |x| for |x| <= 1/2 by its bits, which as an integer are nearly a logarithm: log x = log(x 2^n) - n log 2.

    x is scaled to where denormal numbers are ordinary ones. At 0, which has no logarithm, less than -104 in float32.
    """
    if x.dtype == tl.float64:
        return tl.log(tl.abs(x))
    else:
        scaled = tl.abs(x) * 16777216.0  # 2^24
        n = 126.9569643 - scaled.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920929e-7
        rest = scaled * tl.exp2(n) - 1.0
        return rest * (1.0 + rest * (-0.50018334 + rest * 0.3332498)) - (n + 24.0) * LN_2


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, to the last digits where x is small; in float64 by Kahan's quotient."""
    if x.dtype == tl.float64:
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
    else:
        q = -0.13753803 + x * (0.079204537 + x * (-0.030065792 + x * 0.0053648246))
        q = 0.33321324 + x * (-0.24857163 + x * (0.19153655 + x * q))
        return x * (1.0 + x * (-0.49999648 + x * q))


@triton.jit
def log1p_exp(x):
    """log(1 + exp(-|x|))"""
    return log1p(exp_minus(tl.abs(x)))


@triton.jit
def log1m(x):
    """log(1 - x) for 0 <= x <= 1/2, as log1p has it."""
    if x.dtype == tl.float64:
        u = 1.0 - x
        return tl.where(u == 1.0, -x, tl.log(u) * (x / (1.0 - u)))
    else:
        q = 0.18095306 + x * (-1.2087158 + x * (1.6395918 - x * 1.4145488))
        q = -0.3336321 + x * (-0.2436826 + x * (-0.2636911 + x * q))
        return x * (-1.0 + x * (-0.49999523 + x * q))


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0, to the last digits where x is small (Kahan's quotient)."""
    u = tl.exp(x)
    return tl.where(u == 1.0, x, tl.where(u < 1e-3, u - 1.0, (u - 1.0) * (x / tl.log(u))))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Lambert's continued fraction to x²/17 near 0, exact in float64; further out 1 - 2u / (1 + u), u = exp(-2|x|)."""
    magnitude = tl.abs(x)
    z = x * x
    above = 34459425.0 + z * (4729725.0 + z * (135135.0 + z * (990.0 + z)))
    near = x * (above / tanh_below(z))
    u = tl.exp(-2.0 * magnitude)
    return tl.where(magnitude < 0.6, near, tl.where(x < 0, -1.0, 1.0) * (1.0 - 2.0 * u / (1.0 + u)))


@triton.jit
def tanh_below(z):
    """The denominator of tanh's fraction, z = x²."""
    return 34459425.0 + z * (16216200.0 + z * (945945.0 + z * (13860.0 + z * 45.0)))


@triton.jit
def finite_or_0(m):
    """0 in place of -inf, so that a row of nothing but -inf sums to 0 rather than to NaN on the way."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def clamp(x, low, high):
    """x between low and high; NaN stays NaN."""
    low, high = like(low, x), like(high, x)
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def like(number, x):
    """A number in x's dtype; `tl.where` would take it as float32 first."""
    return tl.full((), number, x.dtype)


@triton.jit
def below(n, end, BLOCK: tl.constexpr):
    """n < end, (BLOCK,): one comparison for a mask. `&` with a scalar's is no mask to Triton 3.9's interpreter."""
    return tl.full((BLOCK,), n, tl.int32) < end


@triton.jit
def within(offsets, mask, BLOCK: tl.constexpr):
    """A block of offsets, 0 beyond the edge, yet known as contiguous: a load along it takes 16 bytes at once.

    Where the layout allows such a load, one that crosses the edge stays in its aligned 16 bytes.
    """
    return tl.max_contiguous(tl.multiple_of(tl.where(mask, offsets, 0), BLOCK), BLOCK)


@triton.jit
def strided(offsets, size_1, size_2, stride_0, stride_1, stride_2):
    """Where the elements of these numbers, counted along (size 0, size 1, size 2), stand in a tensor's memory."""
    unsigned: tl.constexpr = tl.uint32 if offsets.dtype == tl.int32 else tl.uint64  # its remainder is the shorter one
    offsets, size_1, size_2 = offsets.to(unsigned), tl.cast(size_1, unsigned), tl.cast(size_2, unsigned)
    rest = offsets // size_2
    return rest // size_1 * stride_0 + rest % size_1 * stride_1 + offsets % size_2 * stride_2


@triton.jit
def halves(x):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def blocks_of(n, BLOCK: tl.constexpr):
    """n / BLOCK, rounded up, for n >= 1; `tl.cdiv` would overflow where n is close to 2³¹."""
    return (n - 1) // BLOCK + 1


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile's row and column when tiles are taken in groups of GROUP_M rows, which keeps operands in L2."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def is_last_program(ticket_ptr, programs):
    """Whether all other programs that share this ticket have finished their stores, which are then visible.

    The barrier orders every warp's stores before the release; the last program sets the ticket back to 0 for
    the next launch on the stream.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def grid_barrier(counter_ptr, target, polls):
    """Waits until `target` programs have arrived in all; False where that takes more than so many polls.

    counter_ptr: a number that is 0 at the launch; of a launch's n-th barrier the target is n times its programs, which
    must all run at once. What any program stored before it, each sees after it.
    """
    tl.debug_barrier()  # every warp's stores before the release
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (arrived < target) & (polls > 0):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls -= 1
    tl.debug_barrier()
    return arrived >= target


@triton.jit
def ordered_sum(partial_ptr, rows, stride, cols, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column sums of partials (rows, ...), in the same order in every run; returns (BLOCK_N,)."""
    total = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
    for first in range(0, rows, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        ptrs = partial_ptr + row[:, None].to(tl.int64) * stride + cols[None, :]
        total += tl.load(ptrs, mask=(row[:, None] < rows) & mask[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def store_reduced(
    loss_sum, weight_sum, partial_ptr, ticket_ptr, loss_ptr, total_ptr, MEAN: tl.constexpr, MAX_PROGRAMS: tl.constexpr
):
    """The loss of all programs from each one's sums, and what a mean divides by: the last program to finish adds."""
    programs = tl.num_programs(0)
    which = tl.arange(0, 2)
    sums = tl.where(which == 0, tl.sum(loss_sum, 0), tl.sum(weight_sum, 0))
    tl.store(partial_ptr + tl.program_id(0) * 2 + which, sums)
    if is_last_program(ticket_ptr, programs):
        sums = ordered_sum(partial_ptr, programs, 2, which, which < 2, MAX_PROGRAMS, 2)
        total = tl.sum(tl.where(which == 1, sums, 0.0), 0)
        loss = tl.sum(tl.where(which == 0, sums, 0.0), 0)
        if MEAN:
            total = tl.where(total == 0, float("nan"), total)  # smoothed, the loss of classes of weight 0 is not 0
            loss = loss / total
        tl.store(loss_ptr, narrow(loss, loss_ptr.dtype.element_ty))
        tl.store(total_ptr, total)
