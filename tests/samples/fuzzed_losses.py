"""Stock's answer for each loss of fusedact.functional, and how its arguments are drawn."""

from math import inf, nan, prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from samples.fuzzed_calls import Array, arrays, shapes, sizes
from torch import Tensor, nn

from fusedact import functional

Arguments = tuple[dict[str, Array | None], dict[str, Any]]
REDUCTIONS = st.sampled_from([*["mean", "sum", "none"] * 4, "avg"])
EXTENSIONS = ("z_loss", "softcap", "sample_weight", "return_lse", "grad_in_forward")


def _logits(draw: Any, dims: int = 4) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The shape of logits, how many classes, and the shape of what is without them."""
    shape = draw(shapes(1, dims))
    at = min(1, len(shape) - 1)
    return shape, shape[at], shape[:at] + shape[at + 1 :]


def _labels(draw: Any, rows: tuple[int, ...], classes: int, ignore: int) -> Array:
    odd = (
        draw(st.sampled_from([*[()] * 6, *[(ignore,), (ignore, ignore)] * 3, (classes,), (-1,)])) if prod(rows) else ()
    )
    return draw(arrays(rows, "integers", odd=None, high=classes, grad=False)).__class__(
        rows, draw(st.sampled_from(["contiguous", "permuted", "sliced", "expanded", "offset", "window"])),
        "integers", odd, 1.0, classes, "", False,
    )  # fmt: skip


def cross_entropy(draw: Any) -> Arguments:
    shape, classes, rows = _logits(draw)
    options: dict[str, Any] = {"reduction": draw(REDUCTIONS)}
    ignore = -100
    if draw(st.integers(0, 3)) == 3:
        ignore = options["ignore_index"] = draw(st.sampled_from([-100, 0, 1, -1]))
    if draw(st.integers(0, 3)) == 3:
        target = draw(arrays(shape, "distribution", odd=[0.0, 1.0, 2.0, nan], grad=draw(st.integers(0, 3)) == 3))
    else:
        target = _labels(draw, rows, classes, ignore)
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 1.0, 0.5, 1.5, -0.1]))
    weight = draw(st.none() | arrays((classes,), "uniform", odd=[0.0, 1.0, -1.0], grad=False))
    tensors = {"input": draw(arrays(shape)), "target": target, "weight": weight}
    if draw(st.integers(0, 2)) == 2 and not (target.kind == "distribution" and target.grad):
        extra, more = _extended(draw, rows)
        tensors, options = {**tensors, **extra}, {**options, **more}
    return tensors, options


def _extended(draw: Any, rows: tuple[int, ...]) -> Arguments:
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    for name, values in (("z_loss", [0.1, 1e-4]), ("softcap", [5.0, 30.0]), ("return_lse", [True])):
        if draw(st.booleans()):
            options[name] = draw(st.sampled_from(values))
    if draw(st.booleans()):
        options["grad_in_forward"] = True
    tensors = {}
    if draw(st.booleans()):
        tensors["sample_weight"] = draw(arrays(rows, "uniform", odd=[0.0, 2.0], grad=False))
    return tensors, options


def extended_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    sample_weight: Tensor | None = None,
    return_lse: bool = False,
    grad_in_forward: bool = False,
) -> Any:
    """Stock's loss, and around it what ours has beyond."""
    usual = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if not (z_loss or softcap or return_lse or sample_weight is not None):
        return F.cross_entropy(input, target, weight, reduction=reduction, **usual)
    dim = min(1, input.dim() - 1)
    x = input if input.dtype == torch.float64 else input.float()
    x = softcap * torch.tanh(x / softcap) if softcap else x
    of_classes = not target.is_floating_point()
    target = target if of_classes else target.to(x.dtype)
    weight = weight if weight is None else weight.to(x.dtype)
    counts = target != ignore_index if of_classes else torch.ones_like(x.select(dim, 0), dtype=torch.bool)
    loss = F.cross_entropy(x, target, weight, reduction="none", **usual)
    lse = x.logsumexp(dim)
    if z_loss:
        loss = loss + torch.where(counts, z_loss * lse.square(), 0)
    share = counts.to(x.dtype)
    if of_classes and weight is not None:
        share = share * weight[target.where(counts, 0)]
    if sample_weight is not None:
        loss, share = (torch.where(counts, part * sample_weight, 0) for part in (loss, share))
    if reduction != "none":
        loss = loss.sum() / (share.sum() if reduction == "mean" else 1)
    return (loss.to(input.dtype), lse) if return_lse else loss.to(input.dtype)


def nll_loss(draw: Any) -> Arguments:
    shape, classes, rows = _logits(draw)
    ignore = draw(st.sampled_from([-100, 0, 1]))
    weight = draw(st.none() | arrays((classes,), "uniform", odd=[0.0, 1.0], grad=False))
    tensors = {"input": draw(arrays(shape)), "target": _labels(draw, rows, classes, ignore), "weight": weight}
    return tensors, {"ignore_index": ignore, **_reduced(draw)}


def _reduced(draw: Any) -> dict[str, Any]:
    """The reduction, now and then as it was once asked for."""
    if draw(st.integers(0, 9)) < 9:
        return {"reduction": draw(REDUCTIONS)}
    return {name: draw(st.booleans()) for name in draw(st.sampled_from([("size_average",), ("reduce",)]))}


def binary(draw: Any, kind: str = "normal", target: tuple[str, Any] = ("uniform", [0.0, 1.0, 2.0, nan])) -> Arguments:
    shape = draw(shapes())
    odd = [0.0, 1.0, 1e-40, 0.99999, nan] if kind == "uniform" else [nan, inf, -inf, 3e38, 88.8, -1e4, -0.0]
    x, (of, special) = draw(arrays(shape, kind, odd=odd)), target
    if any(number != number for number in x.odd):
        special = special and [0.0, 1.0]  # lest both be refused, of which stock tells the first that it meets
    y = draw(arrays(shape, of, odd=special, high=2, grad=False if of == "integers" else draw(st.booleans())))
    weight = draw(st.none() | arrays(_broadcast(draw, shape), "uniform", odd=[0.0, -1.0], grad=False))
    return {"input": x, "target": y, "weight": weight}, _reduced(draw)


def _broadcast(draw: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to this one."""
    found = tuple(draw(st.sampled_from([n, n, 1])) for n in shape)
    return found[draw(st.integers(0, len(found))) :]


def with_logits(draw: Any) -> Arguments:
    tensors, options = binary(draw)
    shape = tensors["input"].shape  # type: ignore[union-attr]
    positive = draw(st.none() | arrays(_broadcast(draw, shape), "uniform", odd=[0.0, 3.0], grad=False))
    return {**tensors, "pos_weight": positive}, options


def multilabel(draw: Any) -> Arguments:
    tensors, _ = binary(draw, target=draw(st.sampled_from([("uniform", [0.0, 1.0]), ("integers", None)])))
    return tensors, {"reduction": draw(REDUCTIONS)}


def exact_multilabel(input: Tensor, target: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Without the difference of two logarithms by which stock loses the digits of a small logit."""
    target = target.to(input.dtype)
    loss = F.binary_cross_entropy_with_logits(input, target, weight, reduction="none").mean(-1)
    return loss if reduction == "none" else getattr(loss, reduction)()


def bce_head(draw: Any) -> Arguments:
    features = draw(sizes(260))
    rows = draw(st.sampled_from([(), (2, 3)]) | sizes(130).map(lambda n: (n,)))
    tensors: dict[str, Array | None] = {
        "input": draw(arrays((*rows, features))),
        "linear_weight": draw(arrays((1, features))),
        "linear_bias": draw(st.none() | arrays((1,))),
        "target": draw(arrays((*rows, 1), "uniform", odd=[0.0, 1.0], grad=False)),
        "weight": draw(st.none() | arrays(_broadcast(draw, (*rows, 1)), "uniform", odd=None, grad=False)),
        "pos_weight": draw(st.none() | arrays((1,), "uniform", odd=None, grad=False)),
    }
    return tensors, {"reduction": draw(REDUCTIONS)}


def stock_bce_head(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None, **others: Any
) -> Tensor:
    return F.binary_cross_entropy_with_logits(F.linear(input, linear_weight, linear_bias), target, **others)


def head(draw: Any) -> Arguments:
    features, classes = draw(sizes(70)), draw(sizes(130))
    rows = draw(st.sampled_from([(), (0,)]) | sizes(40).map(lambda n: (n,)))
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    ignore = -100
    if draw(st.booleans()):
        target = draw(arrays((*rows, classes), "distribution", odd=[0.0, 1.0], grad=False))
    else:
        if draw(st.booleans()):
            ignore = options["ignore_index"] = draw(st.sampled_from([-100, 0, 1]))
        target = _labels(draw, rows, classes, ignore)
    for name, values in (("label_smoothing", [0.1, 1.0]), ("z_loss", [0.1]), ("softcap", [5.0]), ("chunk", [1, 7, 64])):
        if draw(st.integers(0, 3)) == 3:
            options[name] = draw(st.sampled_from(values))
    tensors: dict[str, Array | None] = {
        "input": draw(arrays((*rows, features))),
        "linear_weight": draw(arrays((classes, features))),
        "target": target,
        "linear_bias": draw(st.none() | arrays((classes,))),
        "weight": draw(st.none() | arrays((classes,), "uniform", odd=[0.0], grad=False)),
    }
    if draw(st.integers(0, 3)) == 3:
        tensors["sample_weight"] = draw(arrays(rows, "uniform", odd=[0.0], grad=False))
    return tensors, options


def ours_head(*, chunk: int | None = None, **others: Any) -> Tensor:
    options = None if chunk is None else nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return functional.linear_cross_entropy(**others, options=options)


def stock_head(
    *,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    chunk: int | None = None,
    ignore_index: int = -100,
    **others: Any,
) -> Tensor:
    """The layer and its loss, one after the other; where these are refused, in the words of torch's op of both."""
    try:
        z = F.linear(input, linear_weight, linear_bias)
        return extended_cross_entropy(z, ignore_index=ignore_index, **others)
    except (RuntimeError, IndexError):
        usual = {name: value for name, value in others.items() if name not in EXTENSIONS}
        usual["ignore_index"] = None if ignore_index == -100 else ignore_index
        F.linear_cross_entropy(input, linear_weight, linear_bias=linear_bias, **usual)
        raise


def true_head(*, input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None = None, **others: Any) -> Tensor:
    """In which, as from kernels, rows that are ignored have a gradient of 0 whatever they hold."""
    z, target = F.linear(input, linear_weight, linear_bias), others["target"]
    if not target.is_floating_point():
        z = z.masked_fill((target == others.get("ignore_index", -100)).unsqueeze(-1), 0)
    return extended_cross_entropy(z, **{name: value for name, value in others.items() if name != "chunk"})
