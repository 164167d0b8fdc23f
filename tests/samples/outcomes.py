"""What a call did (its result or exception, warnings, launches), and how ours differs from torch's."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

FEW = 32  # numbers, which are no norm but draws
SOME = 64  # numbers, whose largest error is torch's worst of several draws
DRAWS = 8
Redraw = Callable[[], tuple[Any, Any]]


@dataclass
class Outcome:
    result: Any = None
    error: Exception | None = None
    warned: list[tuple[str, str, str]] = field(default_factory=list)
    launches: int = 0


class Launches:
    """Kernel launches of this process, once `counted` has been called; compiled or interpreted."""

    count = 0

    @classmethod
    def counted(cls) -> None:
        if torch.cuda.is_available():
            from triton.runtime.jit import JITFunction as launcher

            method = "run"
        else:
            from triton.runtime.interpreter import GridExecutor as launcher

            method = "__call__"
        original = getattr(launcher, method)

        def counted(self, *args, **kwargs):
            cls.count += 1
            return original(self, *args, **kwargs)

        setattr(launcher, method, counted)


def outcome(function: Callable, *args: Any, **kwargs: Any) -> Outcome:
    made, before = Outcome(), Launches.count
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made.result = function(*args, **kwargs)
        except Exception as error:
            made.error = error
    made.launches = Launches.count - before
    made.warned = [
        (w.category.__name__, str(w.message), _blamed(w))
        for w in caught
        if "deterministic" not in str(w.message)  # torch.empty is filled with NaN for the kernels' sake
        and "encountered" not in str(w.message)  # numpy, of which the interpreter is made
        and "array with ndim > 0 to a scalar" not in str(w.message)  # what Triton 3.6's asks of a newer numpy
    ]
    return made


def _blamed(w: warnings.WarningMessage) -> str:
    """The file that a warning points at; C++ always points at the Python that called it, which may be ours."""
    return "" if "Triggered internally" in str(w.message) else os.path.basename(w.filename)


def difference(
    ours: Outcome, stock: Outcome, truth: Any = None, again: Redraw | None = None, some: int = SOME
) -> str | None:
    """What torch would not have done, or None.

    Its exception, in its words and before any launch; its warnings; its numbers exactly, or, given the truth in
    float64, with at most twice its error. Of a handful of numbers torch's rounding may be lucky: `again` gives its
    result and the truth at numbers close by, and the worst of a few is taken.
    """
    if stock.error is not None:
        if type(ours.error) is not type(stock.error) or str(ours.error) != str(stock.error):
            return f"torch raises {stock.error!r}, ours {ours.error!r}"
        return f"{ours.launches} launches before the error" if ours.launches else None
    if ours.error is not None:
        return f"raises {ours.error!r}"
    if ours.warned != stock.warned:
        return f"warns {ours.warned}, torch {stock.warned}"
    results, torchs = tree_leaves(ours.result), tree_leaves(stock.result)
    truths = torchs if truth is None else tree_leaves(truth)
    if len(results) != len(torchs):
        return f"{len(results)} results, not {len(torchs)}"
    for at, (own, theirs, true) in enumerate(zip(results, torchs, truths, strict=True)):
        problem = unlike(own, theirs, exactly=truth is None)
        if not problem and truth is not None and isinstance(own, torch.Tensor) and own.is_floating_point():
            problem = inaccuracy(own, true, [(theirs, true)])
            if problem and again is not None and true.numel() <= some:
                draws = [tuple(tree_leaves(each)[at] for each in again()) for _ in range(DRAWS)]
                problem = inaccuracy(own, true, [(theirs, true), *draws])
        if problem:
            return f"result {at}: {problem}"
    return None


def unlike(ours: Any, stock: Any, exactly: bool) -> str | None:
    if not isinstance(stock, torch.Tensor):
        return None if ours is stock or ours == stock else f"{ours!r}, not {stock!r}"
    for what in ("dtype", "shape", "device", "requires_grad", "layout"):
        if getattr(ours, what) != getattr(stock, what):
            return f"{what} {getattr(ours, what)}, not {getattr(stock, what)}"
    ours, stock = ours.detach(), stock.detach()
    if exactly or not stock.is_floating_point():
        return None if same(ours, stock) else "not torch's own numbers"
    odd = ~stock.isfinite()
    if not torch.equal(ours.isfinite(), ~odd) or not same(ours[odd], stock[odd]):
        return "NaN or infinities in other places"
    return None


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def inaccuracy(ours: torch.Tensor, truth: torch.Tensor, draws: list[tuple[torch.Tensor, torch.Tensor]]) -> str | None:
    """As conftest's as_accurate_as_torch, for torch's worst error of these (result, truth)."""
    slack = 1e-12 if ours.dtype == torch.float64 else 1e-6
    if truth.numel() < FEW:
        slack += 4 * torch.finfo(ours.dtype).eps
    torchs = [max(kind) for kind in zip(*(errors(*draw) for draw in draws), strict=True)]
    for kind, own, theirs in zip(("norm", "maximum"), errors(ours, truth), torchs, strict=True):
        if not own <= 2 * theirs + slack:
            return f"{kind} of the error {own:.3g}, torch's {theirs:.3g}"
    return None


def errors(x: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """By norm and by maximum, each relative to the truth's, where both are finite."""
    usual = x.isfinite() & truth.isfinite()
    if not usual.any():
        return 0.0, 0.0
    x, truth = x.detach()[usual].double(), truth.detach()[usual].double()
    scale = truth.abs().max() or 1.0  # lest a square overflow
    x, truth = x / scale, truth / scale
    return tuple(
        (size(x - truth) / (size(truth) or 1.0)).item() for size in (torch.linalg.vector_norm, lambda t: t.abs().max())
    )
