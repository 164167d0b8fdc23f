"""OpInfo's samples through our functions and through torch's: values, gradients, dtypes, errors, signatures."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as stock_functional
from samples.cases import DEVICE, Case, launches_of
from samples.outcomes import Outcome, difference, outcome, same
from torch.testing._internal.common_methods_invocations import SampleInput, op_db
from torch.utils._pytree import tree_leaves

import fusedact
from fusedact import functional

OTHERS = (torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)
WHOLE = 2**12  # elements; through the kernels a larger sample is cut to its first rows
EPILOGUES = ("relu", "gelu")  # activations that linear's samples run with too
FORMULAS = {
    "hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6,  # in torch's float64 gradient 1/6 is rounded to float32
}


@dataclass(frozen=True)
class Function:
    """A function of ours, torch's of that name, and the entries that op_db has for it."""

    name: str
    ours: Callable
    stock: Callable
    infos: list

    @property
    def formula(self) -> Callable:
        """What the truth is taken from, in float64."""
        return FORMULAS.get(self.name, self.stock)

    def launches_of(self, y: Any, grads: tuple = ()) -> int | None:
        if self.name == "linear_cross_entropy":
            return None
        return launches_of(y, grads, linear=self.name.startswith("linear "))


def discover() -> tuple[list[Function], list[str]]:
    """The functions of torch.nn.functional that are ours, and the names that merely fall through."""
    functions, others = [], []
    for name in functional.__all__:
        ours, stock = getattr(functional, name), getattr(stock_functional, name, None)
        if ours is stock:
            others += [name] if inspect.isroutine(stock) else []
        elif callable(stock):
            infos = [info for info in op_db if info.name.removeprefix("nn.functional.") == name]
            infos = [info for info in infos if not info.variant_test_name.startswith("chunked")]  # torch's own options
            functions.append(Function(name, ours, stock, infos))
            for activation in EPILOGUES if name == "linear" else ():
                composite = partial(_activated, stock, getattr(stock_functional, activation))
                fused = partial(ours, activation=activation)
                functions.append(Function(f"linear {activation}", fused, composite, infos))
    return functions, others


def _activated(linear: Callable, activation: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
    return activation(linear(*args, **kwargs))


def run(function: Callable, sample: SampleInput) -> Any:
    return function(sample.input, *sample.args, **sample.kwargs)


def leaves_of(sample: SampleInput) -> list[torch.Tensor]:
    return [t for t in _tensors_of(sample) if t.requires_grad]


def _tensors_of(sample: SampleInput) -> list[torch.Tensor]:
    return [t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, torch.Tensor)]


def _apart(sample: SampleInput, wide: bool = False, near: bool = False) -> SampleInput:
    """The sample with leaves of its own: the same, in float64, or a little nearer to 0."""

    def change(t: Any) -> Any:
        if not isinstance(t, torch.Tensor):
            return torch.float64 if wide and t.is_floating_point else t
        own = t.detach()
        if t.is_floating_point():
            own = own.double() if wide else own * (1 - torch.rand_like(own) / 32) if near else own
        return own.requires_grad_(t.requires_grad)

    return sample.transform(change)


def _cut(sample: SampleInput) -> SampleInput:
    x = sample.input
    if x.numel() <= WHOLE:
        return sample
    rows = WHOLE // (x.numel() // len(x))
    return SampleInput(x.detach()[:rows].requires_grad_(x.requires_grad), args=sample.args, kwargs=sample.kwargs)


def _samples(function: Function, dtype: torch.dtype, requires_grad: bool = False) -> Iterator[SampleInput]:
    """The reference inputs, which contain the samples.

    To spare the interpreter: the samples alone for float64 and for gradients, and no more rows than WHOLE.
    """
    kernels = fusedact.get_backend() == "triton"
    few = kernels and (requires_grad or dtype == torch.float64)
    for info in function.infos:
        if dtype in info.supported_dtypes(DEVICE):
            inputs = info.sample_inputs if few else info.reference_inputs
            for sample in inputs(DEVICE, dtype, requires_grad=requires_grad):
                yield _cut(sample) if kernels else sample


def _strides(result: Any) -> list:
    return [t.stride() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]


def _compared(
    function: Function, ours: Outcome, stock: Outcome, sample: SampleInput, dy: torch.Tensor | None = None
) -> str | None:
    """Exactly where torch answered for us, else against the formula in float64."""

    def answer(chosen: Callable, given: SampleInput) -> Any:
        return run(chosen, given) if dy is None else _pull_back(chosen, dy, given)

    def truth(given: SampleInput) -> Any:
        return answer(function.formula, _apart(given, wide=True))

    def again() -> tuple[Any, Any]:
        near = _apart(sample, near=True)
        return answer(function.stock, near), truth(near)

    if not ours.launches or stock.error is not None:
        return difference(ours, stock)
    return difference(ours, stock, truth(sample), again)


def values(function: Function, dtype: torch.dtype) -> Case:
    case = Case(function.name, "values", str(dtype))
    for sample in _samples(function, dtype):
        before = [t.clone() for t in _tensors_of(sample)]
        stock, ours = (outcome(run, f, sample) for f in (function.stock, function.ours))
        problem = _compared(function, ours, stock, sample)
        if not all(map(same, _tensors_of(sample), before)):
            problem = "an argument was written to"
        problem = problem or case.count(ours, function.launches_of(ours.result))
        case.judge(sample, problem)
        case.other_strides += _strides(ours.result) != _strides(stock.result)
    return case


def gradients(function: Function, dtype: torch.dtype) -> Case:
    case = Case(function.name, "gradients", str(dtype))
    for at, sample in enumerate(_samples(function, dtype, requires_grad=True)):
        if not leaves_of(sample):
            continue
        y = run(function.stock, sample)
        dy = torch.randn(y.shape, device=y.device).to(y.dtype)
        if at % 2:
            dy = torch.stack([dy, dy], -1)[..., 0]  # as a slice arrives
        stock, ours = (outcome(_pull_back, f, dy, _apart(sample)) for f in (function.stock, function.ours))
        problem = _compared(function, ours, stock, sample, dy)
        if not problem and stock.error is None:
            problem = case.count(ours, function.launches_of(*ours.result))
        case.judge(sample, problem)
        case.other_strides += _strides(ours.result) != _strides(stock.result)
    return case


def _pull_back(function: Callable, dy: torch.Tensor, sample: SampleInput) -> tuple:
    y = run(function, sample)
    return y, torch.autograd.grad(y, leaves_of(sample), dy.to(y.dtype), allow_unused=True)


def other_dtypes(function: Function) -> Case:
    """float16; dtypes that torch takes otherwise, and those that it refuses, in its own words."""
    case = Case(function.name, "other dtypes")
    for info in function.infos:
        for dtype in OTHERS:
            taken = dtype in info.supported_dtypes(DEVICE)
            for sample in info.sample_inputs(DEVICE, dtype if taken else torch.float32):
                sample.input = sample.input.to(dtype)
                stock, ours = (outcome(run, f, sample) for f in (function.stock, function.ours))
                problem = _compared(function, ours, stock, sample)
                case.judge(f"{dtype}: {sample.summary()}", problem)
                case.fused += ours.launches > 0
    return case


def in_place(function: Function) -> Case:
    case = Case(function.name, "inplace")
    if "inplace" not in _parameters(function.stock):
        case.skipped = "torch's has no such argument"
        return case
    for sample in _samples(function, torch.float32):
        xs = sample.input.clone(), sample.input.clone()
        stock, ours = (
            outcome(f, x, *sample.args, **{**sample.kwargs, "inplace": True})
            for f, x in zip((function.stock, function.ours), xs, strict=True)
        )
        problem = difference(ours, stock)
        if not problem and (ours.launches or ours.result is not xs[1]):
            problem = f"{ours.launches} launches, and the argument is not returned"
        case.judge(sample, problem)
    return case


def out(function: Function) -> Case:
    """The keyword out=, which torch's builtins have beyond what is documented."""
    case = Case(function.name, "out")
    if inspect.isfunction(function.stock) or isinstance(function.stock, partial):
        case.skipped = "torch's is no builtin"
        return case
    for info in function.infos:
        for sample in info.sample_inputs(DEVICE, torch.float32):
            outs = [torch.empty_like(run(function.stock, sample)) for _ in range(2)]
            if isinstance(outcome(run, partial(function.stock, out=outs[0]), sample).error, TypeError):
                case.skipped = "torch's has none"
                return case
            stock, ours = (
                outcome(run, partial(f, out=y), sample)
                for f, y in zip((function.stock, function.ours), outs, strict=True)
            )
            problem = difference(ours, stock)
            if not problem and stock.error is None and ours.result is not outs[1]:
                problem = "returns another tensor"
            case.judge(sample, problem)
    return case


def signature(function: Function) -> Case:
    """Torch's parameters in torch's order with torch's defaults; ours beyond them are keyword-only."""
    case = Case(function.name, "signature")
    theirs = [(p.name, p.default) for p in _parameters(function.stock).values()]
    own = _parameters(function.ours).values()
    beyond = {p.name for p in own if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD)} - {name for name, _ in theirs}
    ours = [(p.name, p.default) for p in own if p.name not in beyond]
    if not theirs:
        case.skipped = "torch has no Python function to compare"
    else:
        case.judge("parameters", None if ours == theirs else f"{ours}, not {theirs}")
    return case


def _parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """None of a builtin's, nor of a composition's."""
    return dict(inspect.signature(function).parameters) if inspect.isfunction(function) else {}


def error_inputs(function: Function) -> Case:
    case = Case(function.name, "error inputs")
    for info in function.infos:
        for wrong in info.error_inputs(DEVICE) if info.error_inputs_func else ():
            stock, ours = (outcome(run, f, wrong.sample_input) for f in (function.stock, function.ours))
            problem = difference(ours, stock)
            if not isinstance(stock.error, wrong.error_type) or not re.search(wrong.error_regex, str(stock.error)):
                problem = f"torch itself gives {stock.error!r}"
            case.judge(wrong.sample_input, problem)
    if not case.samples:
        case.skipped = "op_db has none for it"
    return case
