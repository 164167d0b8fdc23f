"""The gradient of a loss of logits by what comes back from it and the statistics that its forward kept of each row."""

import triton
import triton.language as tl

from .class_rows import alignment, coefficients, logits, numbers_of, rows_after, target_of
from .launch import launch
from .metadata import flops_each, told
from .tiles import LOG2_E, blocks_of, narrow
from .workspace import around_classes, by_row, cdiv, gradient_block, row_strides

NUMBERS = ["ignore_index", "first", "classes"]  # whose values no kernel is compiled for


@triton.jit(do_not_specialize=NUMBERS, launch_metadata=told(__name__, flops_each("x_ptr", 4)))
def _backward_kernel(
    dloss_ptr,  # (A, B), one number, or None
    dlse_ptr,  # (A, B) or None
    x_ptr,  # (A, C, B)
    target_ptr,  # (A, B) int64, or probabilities (A, C, B)
    weight_ptr,  # (C,), of these classes, inside the weight of all, or None
    sample_weight_ptr,  # (A, B) or None
    stats_ptr,  # as from forward
    total_ptr,  # (1,) or None
    dx_ptr,  # (A, C, B) or None
    dtarget_ptr,  # (A, C, B) or None
    A,
    B,
    C,
    stride_dloss_a,
    stride_dloss_b,
    stride_dlse_a,
    stride_dlse_b,
    stride_xa,
    stride_xb,
    stride_xc,
    stride_ta,
    stride_tb,
    stride_tc,
    stride_weight,
    stride_sa,
    stride_sb,
    stride_dxa,
    stride_dxb,
    stride_dxc,
    ignore_index,
    first,  # of all classes, where these C are a slice of them, else None
    classes,
    numbers,
    PROBABILITIES: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    smoothing, z_loss, softcap = numbers
    ACCUMULATOR: tl.constexpr = stats_ptr.dtype.element_ty
    C = C // ALIGNED * ALIGNED
    stride_xb = stride_xb // ALIGNED * ALIGNED
    stride_dxb = stride_dxb // ALIGNED * ALIGNED
    if PROBABILITIES:
        stride_tb = stride_tb // ALIGNED * ALIGNED
    blocks_b = blocks_of(B, ROWS)
    a = (tl.program_id(0) // blocks_b).to(tl.int64)
    b = (tl.program_id(0) % blocks_b).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1).to(tl.int64) * LANES + tl.arange(0, LANES)
    mask_b = b < B
    mask = mask_b[:, None] & (cols < C)[None, :]
    row = a * B + b
    n = tl.cast(A, tl.int64) * B
    base = tl.load(stats_ptr + row, mask=mask_b, other=0.0)
    s = tl.load(stats_ptr + n + row, mask=mask_b, other=1.0)
    dloss = tl.zeros((ROWS,), ACCUMULATOR)
    if dloss_ptr is not None:
        dloss_ptrs = dloss_ptr + a * stride_dloss_a + b * stride_dloss_b
        dloss = tl.load(dloss_ptrs, mask=mask_b, other=0.0).to(ACCUMULATOR)
        if total_ptr is not None:
            dloss = dloss / tl.load(total_ptr)
        if sample_weight_ptr is not None:
            sample_ptrs = sample_weight_ptr + a * stride_sa + b * stride_sb
            dloss = dloss * tl.load(sample_ptrs, mask=mask_b, other=0.0).to(ACCUMULATOR)

    x_ptrs = x_ptr + a * stride_xa + b[:, None] * stride_xb + cols[None, :] * stride_xc
    x = logits(x_ptrs, mask, softcap, ACCUMULATOR, False, "")
    p = tl.exp2((x - base[:, None]) * LOG2_E) * (1.0 / s)[:, None]
    target_ptrs = target_ptr + a * stride_ta + b * stride_tb
    counts = mask_b
    weight_ptrs = None if weight_ptr is None else (weight_ptr + cols * stride_weight)[None, :]
    if PROBABILITIES:
        target_ptrs = target_ptrs[:, None] + cols[None, :] * stride_tc
        k = coefficients(target_ptrs, weight_ptrs, mask, smoothing, C, ACCUMULATOR, PROBABILITIES, False)
    else:
        target = tl.load(target_ptrs, mask=mask_b, other=ignore_index)
        counts = target != ignore_index
        if classes is None:
            classes = C
        in_range = (target >= 0) & (target < classes)
        if first is not None:
            target = target - first
        dloss = tl.where(in_range, dloss, float("nan"))
        k_target = tl.full((ROWS,), 1.0, ACCUMULATOR)
        if weight_ptr is not None:
            k_target = tl.load(weight_ptr + target * stride_weight, mask=in_range, other=0.0).to(ACCUMULATOR)
        if smoothing is not None:
            k_target = k_target * (1.0 - smoothing)
        k = tl.where(cols[None, :] == target[:, None], k_target[:, None], 0.0)
        if smoothing is not None:
            share = smoothing / tl.cast(classes, ACCUMULATOR)
            w = coefficients(None, weight_ptrs, mask, None, C, ACCUMULATOR, PROBABILITIES, False)
            k += share if w is None else w * share

    if dx_ptr is not None:
        if PROBABILITIES or weight_ptr is not None:
            k_sum = tl.load(stats_ptr + 2 * n + row, mask=mask_b, other=0.0)
            dx = p * k_sum[:, None] - k
        else:
            dx = p - k
        if z_loss is not None:
            lse = tl.log(s) + base
            dx += p * (lse * z_loss * 2.0)[:, None]
        dx = tl.where(counts[:, None], dx * dloss[:, None], 0.0)
        if dlse_ptr is not None:
            dlse = tl.load(dlse_ptr + a * stride_dlse_a + b * stride_dlse_b, mask=mask_b, other=0.0).to(ACCUMULATOR)
            dx += p * dlse[:, None]
        if softcap is not None:
            y = x * (1.0 / softcap)
            dx = tl.where(dx == 0.0, dx, dx * (1.0 - y * y))  # 0 of an ignored row, whatever its logits
        dx_ptrs = dx_ptr + a * stride_dxa + b[:, None] * stride_dxb + cols[None, :] * stride_dxc
        tl.store(dx_ptrs, narrow(dx, dx_ptr.dtype.element_ty), mask=mask)
    if dtarget_ptr is not None:
        dtarget = (tl.log(s)[:, None] - (x - base[:, None])) * dloss[:, None]
        if weight_ptr is not None:
            dtarget = dtarget * tl.load(weight_ptrs, mask=mask, other=0.0).to(ACCUMULATOR)
        if smoothing is not None:
            dtarget = dtarget * (1.0 - smoothing)
        dtarget_ptrs = dtarget_ptr + a * stride_dxa + b[:, None] * stride_dxb + cols[None, :] * stride_dxc
        tl.store(dtarget_ptrs, narrow(dtarget, dtarget_ptr.dtype.element_ty), mask=mask)


def backward(
    dloss, dlse, x, target, weight, sample_weight, stats, total,
    ignore_index, smoothing, z_loss, softcap, want_dx, want_dtarget, first=None, classes=None, into=None,
):  # fmt: skip
    """dloss () or a number a row or None, dlse a number a row or None, and what forward took and gave.

    `total` is given for a mean. Returns dx and the probabilities' gradient, both as x, or None. One launch.
    Where x has some of the classes, from `first` on, target and weight are of all classes. into: what dx is written to;
    x itself if its rows are of neighbours, since then whoever writes an element has read it.
    """
    dx = (x.new_empty(x.shape) if into is None else into) if want_dx else None
    dtarget = x.new_empty(x.shape) if want_dtarget else None
    if x.numel() == 0 or not (want_dx or want_dtarget):
        return dx, dtarget
    after = rows_after(x)
    x, gradient = around_classes(x), around_classes(dx if want_dx else dtarget)
    A, C, B = x.shape
    rows, lanes = gradient_block(C, after)
    probabilities = target.is_floating_point()
    weight = weight if weight is None or first is None else weight[first : first + C]
    target, target_strides = target_of(target, A, B)
    (dloss, dloss_strides), (dlse, dlse_strides), (sample_weight, sample_strides) = (
        by_row(t, A, B) for t in (dloss, dlse, sample_weight)
    )
    launch(
        _backward_kernel, (A * cdiv(B, rows), cdiv(C, lanes)),
        dloss, dlse, x, target, weight, sample_weight, stats, total, dx, dtarget,
        A, B, C,
        *dloss_strides, *dlse_strides, *row_strides(x), *target_strides,
        0 if weight is None else weight.stride(0), *sample_strides,
        *row_strides(gradient),
        ignore_index, first, classes, numbers_of(x.dtype, smoothing, z_loss, softcap),
        PROBABILITIES=probabilities,
        ALIGNED=alignment(x, gradient, *[target] * probabilities), ROWS=rows, LANES=lanes,
        num_warps=4,
    )  # fmt: skip
    return dx, dtarget
