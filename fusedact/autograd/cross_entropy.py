"""log-softmax + NLL on logits. Saves the logits and the target by reference and two or three numbers a row."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import backend
from fusedact.autograd.doors import Op
from fusedact.autograd.early import EarlyOp


def _launch(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    save: bool,
) -> tuple[Tensor | None, ...]:
    from fusedact.kernels import cross_entropy

    options = label_smoothing, z_loss, softcap, return_lse
    config = cross_entropy.tile(
        logits.shape[min(1, logits.dim() - 1)],
        cross_entropy.rows_after(logits),
        logits.element_size(),
        streams(target, weight, label_smoothing, softcap),
        backend.chip(logits.device).warp_size,
    )
    return cross_entropy.forward(logits, target, weight, sample_weight, ignore_index, reduction, *options, config, save)


def streams(target: Tensor, weight: Tensor | None, label_smoothing: float, softcap: float) -> int:
    """How many numbers a logit takes registers for."""
    two = target.is_floating_point() or (weight is not None and label_smoothing != 0)
    return 2 ** (two + (softcap != 0))


def _fake(
    logits, target, weight, sample_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, return_lse, save
):
    rows = logits.select(min(1, logits.dim() - 1), 0)
    wide = backend.wide(logits.dtype)
    reduced = reduction != "none"
    numbers = 3 if target.is_floating_point() or weight is not None else 2
    return (
        logits.new_empty(() if reduced else rows.shape),
        logits.new_empty(rows.shape, dtype=wide) if return_lse else None,
        logits.new_empty((numbers, rows.numel()), dtype=wide) if save else None,
        logits.new_empty(1, dtype=wide) if reduced else None,
    )


def _backward(
    dloss: Tensor | None,
    dlse: Tensor | None,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    stats: Tensor,
    total: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    from fusedact.kernels import cross_entropy

    dx, dtarget = cross_entropy.backward(
        dloss,
        dlse,
        logits,
        target,
        weight,
        sample_weight,
        stats.contiguous(),
        total if reduction == "mean" else None,
        ignore_index,
        label_smoothing,
        z_loss,
        softcap,
        *wanted[:2],
    )
    return dx, dtarget, None, None


def _backward_fake(dloss, dlse, logits, *others):
    wanted = others[-1]
    return *(logits.new_empty(logits.shape) if want else None for want in wanted[:2]), None, None


def cross_entropy_formula(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    sample_weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """The loss in torch's own operations; with return_lse, and the log-sum-exp of each row."""
    if sample_weight is None and not (z_loss or softcap or return_lse):
        return F.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    dim = min(1, logits.dim() - 1)
    x = logits.to(backend.wide(logits.dtype))
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    probabilities = target.is_floating_point()
    if probabilities:
        ignored = torch.zeros_like(x.select(dim, 0), dtype=torch.bool)
        target = target.to(x.dtype)
    else:
        ignored = target == ignore_index
    weight = weight if weight is None else weight.to(x.dtype)
    loss = F.cross_entropy(
        x, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    divisor = (~ignored).to(x.dtype)
    if weight is not None and not probabilities:
        divisor = divisor * weight[target.masked_fill(ignored, 0)]
    if z_loss:
        loss = loss + z_loss * x.masked_fill(ignored.unsqueeze(dim), 0).logsumexp(dim).square() * ~ignored
    if sample_weight is not None:
        sample_weight = sample_weight.masked_fill(ignored, 0)
        loss, divisor = loss * sample_weight, divisor * sample_weight
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        total = divisor.sum()
        loss = loss / total.masked_fill(total == 0, torch.nan)
    loss = loss.to(logits.dtype)
    return (loss, x.logsumexp(dim)) if return_lse else loss


_TENSORS = "Tensor logits, Tensor target, Tensor? weight, Tensor? sample_weight"
_OPTIONS = "int ignore_index, str reduction, float label_smoothing, float z_loss, float softcap, bool return_lse"

cross_entropy = Op(
    name="cross_entropy",
    tensors=4,
    schema=f"({_TENSORS}, {_OPTIONS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    launch=_launch,
    fake=_fake,
    extras=lambda output, options: output[2:],
    backward_schema=f"(Tensor? dloss, Tensor? dlse, {_TENSORS}, Tensor stats, Tensor total, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    backward=_backward,
    backward_fake=_backward_fake,
    composite=cross_entropy_formula,
    results=lambda options: 2 if options[5] else 1,
    most_results=2,
).register()


def _early_launch(
    logits: Tensor, target: Tensor, weight: Tensor | None, sample_weight: Tensor | None, ignore_index: int,
    reduction: str, label_smoothing: float, z_loss: float, softcap: float, wanted: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    from fusedact.kernels import cross_entropy

    tensors, options = (logits, target, weight, sample_weight), (label_smoothing, z_loss, softcap)
    if not any(wanted):
        return _launch(*tensors, ignore_index, reduction, *options, False, False)[0], None
    classes = logits.shape[min(1, logits.dim() - 1)]
    config = cross_entropy.gradient_tile(
        classes,
        logits.numel() // classes,
        logits.element_size(),
        streams(target, weight, label_smoothing, softcap),
        backend.chip(logits.device).warp_size,
        backend.chip(logits.device).multiprocessors,
        cross_entropy.rows_after(logits),
    )
    loss, dx = cross_entropy.forward_with_gradient(*tensors, ignore_index, reduction, *options, config)
    return loss, dx


def _early_fake(logits, *others):
    (want,) = others[-1]
    return logits.new_empty(()), logits.new_empty(logits.shape) if want else None


def _early_formula(*args):
    return cross_entropy_formula(*args, False)


cross_entropy_early = EarlyOp(
    name="cross_entropy_early",
    tensors=4,
    learned=1,
    schema=f"{_TENSORS}, {_OPTIONS.removesuffix(', bool return_lse')}",
    launch=_early_launch,
    fake=_early_fake,
    composite=_early_formula,
).register()
