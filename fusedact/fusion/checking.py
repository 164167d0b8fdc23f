"""A fused model beside its original forwards: outputs and gradients, each against the model in float64."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_leaves, tree_map, tree_map_with_path

from fusedact.fusion.inputs import arguments, evaluating

Results = dict[str, Tensor | None]
Stock = Callable[[nn.Module], AbstractContextManager[Any]]
RUNS = 8  # of stock, where its first may have been lucky


def compare(model: nn.Module, stock: Stock, inputs: Any) -> None:
    """Run the fused model and, within stock(model), its original forwards, on the same inputs.

    inputs: a tensor, a tuple of arguments or a dict of keyword arguments. In eval mode with gradients on; every mode,
    buffer, `.grad` and random state is afterwards what it was.

    Each floating output, and the gradient of each input and parameter from one random number per output, may err from
    the same in float64 by twice what stock errs by and 1e-6 (1e-12 in float64), by norm and by maximum, both relative
    to the truth's. A maximum is one draw, a handful of numbers a few such draws: a rounding more, or four. So is a
    gradient that is 0 but for rounding, as that of an attention's key bias, and a pre-activation that rounding moves
    across a kink: where ours errs by more, stock's error is the greatest of several runs, on parameters moved by
    roundings.

    Raises RuntimeError for the first that errs by more, with its path and both errors.
    """
    args, kwargs = arguments(inputs)
    ours = _results(model, args, kwargs)
    with stock(model):
        runs = [_results(model, args, kwargs)]
    try:
        exact = copy.deepcopy(model).double()
        with stock(exact):
            widened = tree_map(lambda t: t.double() if _is_floating(t) else t, (args, kwargs))
            truth = _results(exact, *widened)
    except Exception as error:
        error.add_note("This is the model's copy in float64, which the check takes for the truth.")
        raise
    if not ours.keys() == runs[0].keys() == truth.keys():
        raise RuntimeError(f"fused, the model gives {', '.join(ours)}; as it was, {', '.join(runs[0])}")
    if _first_difference(ours, runs, truth) is not None:
        runs += [_moved(model, stock, seed, args, kwargs) for seed in range(RUNS)]
    found = _first_difference(ours, runs, truth)
    if found is not None:
        raise RuntimeError(found)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _results(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
    """By path: floating outputs, then the gradients of floating inputs and of parameters, None where there is none."""
    leaves: dict[str, Tensor] = {}

    def given(path: Any, value: Any) -> Any:
        """A tensor of the inputs, as one that the model may write into."""
        if _is_floating(value):
            value = leaves[f"the gradient of inputs{keystr(path)}"] = value.detach().clone().requires_grad_()
        return value.clone() if isinstance(value, Tensor) else value

    with _undisturbed(model, (args, kwargs)):
        args, kwargs = tree_map_with_path(given, args), tree_map_with_path(given, kwargs)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                leaves[f"the gradient of {name}"] = parameter
        outputs = dict(_floating(model(*args, **kwargs), "output"))
        joined = {path: y for path, y in outputs.items() if y.requires_grad}
        if not joined:
            return {path: y.detach() for path, y in outputs.items()}
        dy = [_random(y) for y in joined.values()]
        gradients = torch.autograd.grad(list(joined.values()), list(leaves.values()), dy, allow_unused=True)
    found: Results = {path: y.detach() for path, y in outputs.items()}
    return found | dict(zip(leaves, gradients, strict=True))


@contextmanager
def _undisturbed(model: nn.Module, inputs: Any) -> Iterator[None]:
    """In eval mode with gradients on; modes, buffers and random states restored."""
    buffers = {module: dict(module._buffers) for module in model.modules()}
    values = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    tensors = [*model.parameters(), *(t for t in tree_leaves(inputs) if isinstance(t, Tensor))]
    devices = sorted({t.get_device() for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        try:
            yield
        finally:
            for module, before in buffers.items():
                module._buffers.clear()
                module._buffers.update(before)
            with torch.no_grad():
                for buffer, value in values.items():
                    if value.layout != torch.strided or not buffer.equal(value):  # one that expands cannot be written
                        buffer.copy_(value)


def _floating(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of an output with their paths, whatever holds them."""
    if _is_floating(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _floating(part, f"{path}[{key!r}]")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _floating(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, list | tuple):
        for at, part in enumerate(value):
            yield from _floating(part, f"{path}[{at}]")
    else:
        for at, part in enumerate(tree_leaves(value)):
            if _is_floating(part):
                yield f"{path}[{at}]", part


def _random(y: Tensor) -> Tensor:
    """Numbers for an output, the same in every dtype that has them."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(y.shape, generator=generator, device="cpu").bfloat16().to(y)


def _moved(model: nn.Module, stock: Stock, seed: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
    """Stock's results where each number of each parameter is a rounding more or less than it is.

    Four roundings in float32 and float64, whose sums are rounded as their terms are; those of bfloat16 and float16 are
    float32.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                sign = torch.randint(-1, 2, parameter.shape, generator=generator, device="cpu").to(parameter)
                roundings = 1 if parameter.itemsize == 2 else 4
                parameter.mul_(1 + roundings * torch.finfo(parameter.dtype).eps * sign)
    with stock(moved):
        return _results(moved, args, kwargs)


def _first_difference(ours: Results, runs: list[Results], truth: Results) -> str | None:
    for path, result in ours.items():
        found = _difference(result, [run[path] for run in runs], truth[path])
        if found is not None:
            return f"{path} of the fused model {found}"
    return None


def _difference(ours: Tensor | None, runs: list[Tensor | None], truth: Tensor | None) -> str | None:
    """What is wrong with ours, or None."""
    stock = [run for run in runs if run is not None]
    if ours is None or not stock or truth is None:
        return "is missing" if ours is None and stock else "exists only fused" if ours is not None else None
    if ours.dtype != stock[0].dtype or ours.shape != stock[0].shape:
        return f"is {ours.dtype} {tuple(ours.shape)}, not {stock[0].dtype} {tuple(stock[0].shape)}"
    slack, rounding = 1e-12 if ours.dtype == torch.float64 else 1e-6, torch.finfo(ours.dtype).eps
    few = 4 * rounding if truth.numel() < 32 else 0.0
    a, b, c = ours.double(), [run.double() for run in stock], truth.double()
    usual = torch.stack([t.isfinite() for t in (*b, c)]).all(0)
    alike = torch.stack([(a == t) | (a.isnan() & t.isnan()) for t in (*b, c)]).any(0)
    if not torch.where(usual, a.isfinite(), alike).all():
        return "has NaN or infinities in other places than stock's"
    for measure, size, allowed in (
        ("by norm", torch.linalg.norm, slack + few),
        ("by its maximum", lambda t: t.abs().max() if t.numel() else t.sum(), slack + max(few, rounding / 2)),
    ):
        whole = size(c[usual]).item() or 1.0
        error, *own = (size((t - c)[usual]).item() / whole for t in (a, *b))
        if error > 2 * max(own) + allowed:
            return f"errs from float64 by {error:.2e} {measure}, stock's by {max(own):.2e}"
    return None
