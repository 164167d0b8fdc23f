"""What the machine-code report calls of the losses: each launcher, and the least work of each, as codegen_launchers."""

import torch

from bench.codegen_launchers import PRECISIONS, Work
from fusedact.kernels import bce, cross_entropy, multilabel, nll, softmax


def cross_entropy_tensors(p, shape, options):
    """Logits, target, class weight and sample weight, for what of these is in the options."""
    rows = (shape[0], *shape[2:])
    probabilities = options.get("probabilities", False)
    target = p.empty(*shape) if probabilities else torch.empty(rows, dtype=torch.int64, device="meta")
    weight = p.empty(shape[1]) if options.get("weight") else None
    return p.empty(*shape), target, weight, p.empty(*rows) if options.get("sample_weight") else None


def cross_entropy_numbers(options):
    return tuple(options.get(name, 0.0) for name in ("smoothing", "z_loss", "softcap"))


def cross_entropy_forward(chip, p, *shape, reduction="mean", save=True, **options):
    x, *others = cross_entropy_tensors(p, shape, options)
    two_streams = "probabilities" in options or {"weight", "smoothing"} <= set(options)
    streams = 2 ** (two_streams + ("softcap" in options))
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
