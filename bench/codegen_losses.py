"""What the machine-code report calls of the losses: each launcher, and the least work of each, as codegen_launchers."""

import torch

from bench.codegen_launchers import PRECISIONS, Work, product_tile
from fusedact.kernels import (
    bce,
    class_shards,
    cross_entropy,
    linear_bce,
    linear_cross_entropy,
    multilabel,
    nll,
    softmax,
)


def cross_entropy_tensors(p, shape, options):
    """Logits, target, class weight and sample weight, for what of these is in the options."""
    rows = (shape[0], *shape[2:])
    probabilities = options.get("probabilities", False)
    target = p.empty(*shape) if probabilities else torch.empty(rows, dtype=torch.int64, device="meta")
    weight = p.empty(shape[1]) if options.get("weight") else None
    return p.empty(*shape), target, weight, p.empty(*rows) if options.get("sample_weight") else None


def cross_entropy_numbers(options):
    return tuple(options.get(name, 0.0) for name in ("smoothing", "z_loss", "softcap"))


def cross_entropy_streams(options):
    """How many numbers a logit takes registers for."""
    two_streams = "probabilities" in options or {"weight", "smoothing"} <= set(options)
    return 2 ** (two_streams + ("softcap" in options))


def cross_entropy_forward(chip, p, *shape, reduction="mean", save=True, **options):
    x, *others = cross_entropy_tensors(p, shape, options)
    streams = cross_entropy_streams(options)
    config = cross_entropy.tile(
        shape[1], cross_entropy.rows_after(x), x.element_size(), streams, chip.target.warp_size
    )  # fmt: skip
    numbers = cross_entropy_numbers(options)
    loss, _, stats, _ = cross_entropy.forward(x, *others, -100, reduction, *numbers, False, config, save)
    tensors = (x, *others, loss, stats)
    return Work(config, sum(t.nbytes for t in tensors if t is not None))


def cross_entropy_backward(chip, p, *shape, **options):
    x, *others = cross_entropy_tensors(p, shape, options)
    config = cross_entropy.tile(shape[1], cross_entropy.rows_after(x), x.element_size(), 1, chip.target.warp_size)
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    stats = statistic(3 if options.get("probabilities") or options.get("weight") else 2, x.numel() // shape[1])
    cross_entropy.backward(
        p.empty(), None, x, *others, stats, statistic(1), -100, *cross_entropy_numbers(options), True, False
    )
    return Work(config, sum(t.nbytes for t in (x, x, *others, stats) if t is not None))


def cross_entropy_gradient_tile(chip, x, options):
    return cross_entropy.gradient_tile(
        x.shape[1], x.numel() // x.shape[1], x.element_size(), cross_entropy_streams(options), chip.target.warp_size,
        chip.speed.multiprocessors, cross_entropy.rows_after(x),
    )  # fmt: skip


def cross_entropy_forward_with_gradient(chip, p, *shape, reduction="mean", **options):
    """What is counted is one read of the logits, and one write."""
    x, *others = cross_entropy_tensors(p, shape, options)
    config = cross_entropy_gradient_tile(chip, x, options)
    results = cross_entropy.forward_with_gradient(x, *others, -100, reduction, *cross_entropy_numbers(options), config)
    return Work(config, sum(t.nbytes for t in (x, *others, *results) if t is not None))


def cross_entropy_overwrite_with_gradient(chip, p, *shape, **options):
    """What is counted is one read of the logits, and one write."""
    x, *others = cross_entropy_tensors(p, shape, options)
    config = cross_entropy_gradient_tile(chip, x, options)
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    losses, total = statistic(shape[0]), statistic(1)
    cross_entropy.overwrite_with_gradient(x, *others, losses, total, -100, *cross_entropy_numbers(options), config)
    return Work(config, sum(t.nbytes for t in (x, x, *others, losses) if t is not None))


def class_shards_statistics(chip, p, *shape, first=0, **options):
    """Of a slice of the classes, those from `first` on of twice as many."""
    x, target, _, _ = cross_entropy_tensors(p, shape, {})
    weight = p.empty(2 * shape[1]) if options.get("weight") else None
    config = cross_entropy.tile(
        shape[1], cross_entropy.rows_after(x), x.element_size(), cross_entropy_streams(options), chip.target.warp_size
    )  # fmt: skip
    spread, softcap = "smoothing" in options, options.get("softcap", 0.0)
    numbers = class_shards.statistics(x, target, weight, first, -100, spread, softcap, config)
    return Work(
        config,
        sum(t.nbytes for t in (x, target, numbers)) + (weight.nbytes // 2 if spread and weight is not None else 0),
    )


def class_shards_backward(chip, p, *shape, first=0, **options):
    """Of a slice of the classes, those from `first` on of twice as many, in the logits' place."""
    x, target, _, sample_weight = cross_entropy_tensors(p, shape, options | {"weight": False})
    weight = p.empty(2 * shape[1]) if options.get("weight") else None
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    stats = statistic(2 if weight is None else 3, x.numel() // shape[1])
    numbers = cross_entropy_numbers(options)
    others = target, weight, sample_weight, stats, statistic(1), -100, *numbers
    cross_entropy.backward(p.empty(), None, x, *others, True, False, first, 2 * shape[1], x)
    config = cross_entropy.tile(shape[1], cross_entropy.rows_after(x), x.element_size(), 1, chip.target.warp_size)
    return Work(config, sum(t.nbytes for t in (x, x, target, sample_weight, stats) if t is not None))


def class_shards_combined(chip, p, slices, M, reduction="mean", save=True, smoothing=0.0, weight=False, z_loss=0.0):
    """One read of what the processes have exchanged."""
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    gathered, target = statistic(slices, 5 if smoothing else 3, M), torch.empty(M, dtype=torch.int64, device="meta")
    weight = p.empty(1024) if weight else None
    numbers = -100, reduction, smoothing, z_loss, False, save, p.dtype
    loss, _, stats, _ = class_shards.combined(gathered, target, weight, None, 1024, *numbers)
    return Work(
        class_shards.tile(slices), sum(t.nbytes for t in (gathered, target, weight, loss, stats) if t is not None)
    )


def nll_forward(chip, p, *shape, reduction="mean"):
    config = nll.tile()
    x, target = p.empty(*shape), torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device="meta")
    loss, _ = nll.forward(x, target, None, -100, reduction, config)
    return Work(config, target.numel() * p.dtype.itemsize + target.nbytes + loss.nbytes)


def nll_backward(chip, p, *shape):
    config = nll.tile()
    x, target = p.empty(*shape), torch.empty((shape[0], *shape[2:]), dtype=torch.int64, device="meta")
    nll.backward(p.empty(), x, target, p.empty(shape[1]), None, -100)
    return Work(config, x.nbytes + target.nbytes)


def binary_tensors(p, shape, labels=False, pos_weight=False, weight=False):
    """Input, target and, where asked for, weight and pos_weight of a number per class."""
    classes = p.empty(shape[-1])
    target = torch.empty(shape, dtype=torch.int64, device="meta") if labels else p.empty(*shape)
    return p.empty(*shape), target, classes if weight else None, classes if pos_weight else None


def bce_forward(chip, p, *shape, reduction="mean", loss="LOGITS", **options):
    tensors = binary_tensors(p, shape, **options)
    divisor = None if reduction == "none" else tensors[0].numel()
    config = bce.tile(p.dtype.itemsize)
    result = bce.forward(getattr(bce, loss), *tensors, divisor, config)
    return Work(config, sum(t.nbytes for t in (*tensors, result) if t is not None))


def bce_backward(chip, p, *shape, reduction="mean", loss="LOGITS", both=False, **options):
    tensors = binary_tensors(p, shape, **options)
    dloss = p.empty(*shape) if reduction == "none" else p.empty()
    formula = multilabel.SOFT_MARGIN if loss == "SOFT_MARGIN" else getattr(bce, loss)
    config = bce.tile(p.dtype.itemsize)
    gradients = bce.backward(formula, dloss, *tensors, tensors[0].numel(), True, both, config)
    return Work(config, sum(t.nbytes for t in (dloss, *tensors, *gradients) if t is not None))


def linear_bce_tensors(chip, p, N, d):
    """x, w, b, target, without weights, and the head's configuration."""
    tensors = p.empty(N, d), p.empty(1, d), p.empty(1), p.empty(N, 1), None, None
    itemsize = max(4, p.dtype.itemsize)
    return tensors, linear_bce.tile(N, d, itemsize, chip.target.warp_size, chip.speed.multiprocessors)


def linear_bce_forward(chip, p, N, d, wanted=(False, True, True)):
    tensors, config = linear_bce_tensors(chip, p, N, d)
    results = linear_bce.forward(*tensors, N, wanted, config)
    return Work(config, sum(t.nbytes for t in (*tensors, *results) if t is not None))


def linear_bce_backward(chip, p, N, d, wanted=(True, True, True)):
    tensors, config = linear_bce_tensors(chip, p, N, d)
    gradients = linear_bce.backward(p.empty(N, 1), *tensors, 1, wanted, config)
    return Work(config, sum(t.nbytes for t in (*tensors, *gradients) if t is not None))


def multilabel_rows(chip, p, N, C, **options):
    x, target, weight, _ = binary_tensors(p, (N, C), **options)
    config = multilabel.tile(C, p.dtype.itemsize)
    loss = multilabel.forward_rows(x, target, weight, config)
    return Work(config, sum(t.nbytes for t in (x, target, weight, loss) if t is not None))


def softmax_forward(chip, p, *shape, dim=-1, kind="softmax", dtype=None):
    """A row too wide for the registers is read twice; what is counted is once."""
    dim, dtype = dim % len(shape), dtype or p.dtype
    x = p.empty(*shape)
    itemsize = 8 if torch.float64 in (p.dtype, dtype) else 4
    config = softmax.tile(x.shape, x.stride(), dim, itemsize, 1, chip.target.warp_size)
    y = softmax.forward(x, dim, dtype, kind == "log_softmax", kind == "softmin", config)
    return Work(config, x.nbytes + y.nbytes)


def softmax_backward(chip, p, *shape, dim=-1, kind="softmax"):
    """A row too wide for the registers is read twice; what is counted is once."""
    dim = dim % len(shape)
    dy, y = p.empty(*shape), p.empty(*shape)
    config = softmax.tile(y.shape, y.stride(), dim, max(4, p.dtype.itemsize), 2, chip.target.warp_size)
    dx = softmax.backward(dy, y, dim, p.dtype, kind == "log_softmax", kind == "softmin", config)
    return Work(config, dy.nbytes + y.nbytes + dx.nbytes)


def head_statistics(chip, p, M, N, K, tile=None, bias=False, smoothing=False, weight=False, softcap=0.0):
    """The logits are counted as what is left of them: two or four numbers for a row and a tile's classes."""
    x, w = p.empty(M, K), p.empty(N, K)
    config = product_tile(chip, p, "loss", x, w, tile)
    target = torch.empty(M, dtype=torch.int64, device="meta")
    others = p.empty(N) if bias else None, target, p.empty(N) if weight else None
    given = linear_cross_entropy.statistics(x, w, *others, smoothing, softcap, config)
    return Work(config, sum(t.nbytes for t in (x, w, *others, *given) if t is not None), 2 * M * N * K)


def head_combined(chip, p, M, N, reduction="mean", smoothing=0.0, z_loss=0.0, block_n=256):
    statistic = PRECISIONS["fp64" if p.dtype == torch.float64 else "fp32"].empty
    partial, x_target = statistic(4 if smoothing else 2, -(-N // block_n), M), statistic(M)
    target = torch.empty(M, dtype=torch.int64, device="meta")
    loss = linear_cross_entropy.combined(
        partial, x_target, target, None, None, N, -100, reduction, smoothing, z_loss
    )  # fmt: skip
    return Work(linear_cross_entropy.tile(), sum(t.nbytes for t in (partial, x_target, target, loss)))
