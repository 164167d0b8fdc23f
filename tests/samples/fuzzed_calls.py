"""A call of an op as plain data, which prints as it is pasted, how it is drawn, and what is wrong with ours.

The oracle is stock in float64, the measure stock's own error in the same dtype, or, in float64 itself, what a change of
the last digits of its arguments makes of its result. Where only one of both is finite, ours may also be the truth,
rounded to its dtype.
"""

import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from math import inf, nan, prod
from typing import Any

import torch
from hypothesis import strategies as st
from samples.outcomes import Outcome, difference, outcome, same
from torch import Tensor

import fusedact

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "permuted": lambda t: _reversed(_reversed(t).contiguous()),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t,
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "flipped": lambda t: t.flip(0) if t.dim() else t,
    "expanded": lambda t: t[:1].expand_as(t) if t.dim() and len(t) else t,
    "expanded last": lambda t: t[..., :1].expand_as(t) if t.dim() and t.shape[-1] else t,
    "expanded whole": lambda t: t.flatten()[0].expand_as(t) if t.numel() else t,
    "offset": lambda t: _within(t, (t.numel() + 1,), lambda whole: whole[1:].view(t.shape)),
    "window": lambda t: _within(
        t, [n + 3 for n in t.shape], lambda whole: whole[tuple(slice(1, 1 + n) for n in t.shape)]
    ),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, [1] * t.dim()) if t.numel() else t,
}
ODD = [nan, inf, -inf, 0.0, -0.0, 1e-45, 1e-40, -6e-8, 3e38, -3e38, 65504.0, -1e4, 88.8, 1.0, -1.0, 3.0, 6.0, 20.0, 0.5]
SCALES = [1.0, 1.0, 1.0, 1.0, 1e-3, 30.0, 1e4, 1e-30]
SMALLEST = 2.0**-126  # Triton's interpreter loses digits of a smaller bfloat16; its compiler does not
LEGACY = {"size_average", "reduce"}
MANY = 2**16  # numbers, of which the worst of several draws is taken
DTYPES = ["float32", "float16", "bfloat16", "float64"]


def _reversed(t: Tensor) -> Tensor:
    return t.permute(tuple(range(t.dim()))[::-1])


def _within(t: Tensor, shape: Any, view: Callable[[Tensor], Tensor]) -> Tensor:
    """t as a part of something larger, of which nothing else may be read."""
    numbers = t.dtype in (torch.int64, torch.int32, torch.uint8)
    outside = torch.iinfo(t.dtype).max if numbers else nan
    return view(torch.full(tuple(shape), outside, dtype=t.dtype)).copy_(t)


def _told(made: Any) -> str:
    """As the dataclass prints itself, without what is as usual."""
    usual = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(made)}
    given = (f"{name}={getattr(made, name)!r}" for name in usual if getattr(made, name) != usual[name])
    return f"{type(made).__name__}({', '.join(given)})"


@dataclass(frozen=True, repr=False)
class Array:
    """A tensor to be drawn. kind: normal, uniform, distribution (over dimension 1), or integers below `high`."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    kind: str = "normal"
    odd: tuple[float, ...] = ()
    scale: float = 1.0
    high: int = 1
    dtype: str = ""
    grad: bool = True

    def __repr__(self) -> str:
        return _told(self)

    def drawn(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        values = getattr(self, f"_{self.kind}")(generator)
        for odd in self.odd if values.numel() else ():
            at = torch.randint(values.numel(), (), generator=generator)
            values.view(-1)[at] = 0.0 if dtype == torch.bfloat16 and abs(odd) < SMALLEST else odd
        of_kind = torch.int64 if self.kind == "integers" else dtype
        return LAYOUTS[self.layout](values.to(getattr(torch, self.dtype) if self.dtype else of_kind))

    def _normal(self, generator: torch.Generator) -> Tensor:
        return self.scale * torch.randn(self.shape, generator=generator, dtype=torch.float64)

    def _uniform(self, generator: torch.Generator) -> Tensor:
        return torch.rand(self.shape, generator=generator, dtype=torch.float64)

    def _distribution(self, generator: torch.Generator) -> Tensor:
        return (3 * self._normal(generator)).softmax(min(1, len(self.shape) - 1))

    def _integers(self, generator: torch.Generator) -> Tensor:
        return torch.randint(max(self.high, 1), self.shape, generator=generator)


@dataclass(frozen=True)
class Op:
    """ours and stock take tensors and options by name; `truth` is what is computed in float64, if not stock.

    own: the formula of what stock has not, so that none of its numbers can be expected exactly. several: ops in a row,
    of which one may run before the next one's error.
    """

    ours: Callable[..., Any]
    stock: Callable[..., Any]
    calls: Callable[..., Any]
    truth: Callable[..., Any] | None = None
    own: bool = False
    several: bool = False


@dataclass(frozen=True, repr=False)
class Call:
    op: str
    tensors: dict[str, Array | None]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    seed: int = 0
    dy: str = "contiguous"  # the layout of the incoming gradient
    dy_odd: tuple[float, ...] = ()
    grad: bool = True
    backend: str = "triton"

    def __repr__(self) -> str:
        return _told(self)

    def drawn(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        made = {name: array and array.drawn(generator, dtype) for name, array in self.tensors.items()}
        for name, array in self.tensors.items():
            if array and array.grad and self.grad and made[name].is_floating_point():
                made[name].requires_grad_()
        return made

    def run(self, function: Callable, tensors: dict[str, Tensor | None]) -> Any:
        """The results and the gradients of all that want one."""
        y = function(**tensors, **self.options)
        results = y if isinstance(y, tuple) else (y,)
        leaves = [t for t in tensors.values() if t is not None and t.requires_grad]
        told = [result for result in results if result.requires_grad]
        if not (leaves and told):
            return results, ()
        dys = [self._dy(result) for result in told]
        return results, torch.autograd.grad(told, leaves, dys, allow_unused=True)

    @property
    def pulls_hugely(self) -> bool:
        return any(abs(odd) > torch.finfo(getattr(torch, self.dtype)).max / 1e3 for odd in self.dy_odd)

    def _dy(self, y: Tensor) -> Tensor:
        """Numbers that the narrowest dtype holds exactly, lest the truth's differ."""
        drawn = Array(tuple(y.shape), odd=self.dy_odd).drawn(
            torch.Generator().manual_seed(self.seed + 1), torch.float64
        )
        return LAYOUTS[self.dy](drawn.to(getattr(torch, self.dtype)).to(y.dtype))


def copies(tensors: dict[str, Tensor | None], change: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    made = {name: None if t is None else change(t.detach()) for name, t in tensors.items()}
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            made[name].requires_grad_()
    return made


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _near(t: Tensor) -> Tensor:
    return t * (1 - torch.rand_like(t) / 32) if t.is_floating_point() else t


def _nudged(t: Tensor) -> Tensor:
    return t * (1 + 4 * (torch.rand_like(t) - 0.5) * torch.finfo(t.dtype).eps) if t.is_floating_point() else t


def verdict(op: Op, call: Call) -> tuple[str | None, Outcome]:
    """What is wrong with ours, or None; and what ours did."""
    tensors, formula = call.drawn(), op.truth or op.stock
    before = copies(tensors, torch.clone)
    torch.manual_seed(call.seed)
    stock = outcome(call.run, op.stock, copies(tensors, lambda t: t))
    with fusedact.use_backend(call.backend):
        ours = outcome(call.run, op.ours, copies(tensors, lambda t: t))
    if any(t is not None and not same(t, before[name]) for name, t in tensors.items()):
        return "an argument was written to", ours
    if LEGACY & call.options.keys():  # whose warning points at the file that looked at them
        ours.warned, stock.warned = ([(*warned[:2], "") for warned in each.warned] for each in (ours, stock))
    if op.several and stock.error is not None:
        ours.launches = 0
    if stock.error is not None or ours.error is not None or not (ours.launches or op.own):
        return difference(ours, stock), ours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told once already
        truth = call.run(formula, copies(tensors, _wide))

        stock.result, truth = forgiven(ours.result, stock.result, truth, call.pulls_hugely)

        def again() -> tuple[Any, Any]:
            if call.dtype == "float64":
                return call.run(formula, copies(tensors, _nudged)), truth
            near = copies(tensors, _near)
            return call.run(op.stock, near), call.run(formula, copies(near, _wide))

        return difference(ours, stock, truth, again, some=MANY), ours


def forgiven(ours: Any, stock: Any, truth: Any, overflown: bool) -> tuple[Any, Any]:
    """stock and truth, with ours in the place of elements of which one is not finite and ours is the truth, rounded.

    overflown: where stock is not finite, too, since its formula or its order of summation takes inf - inf or 0 · inf.
    """
    pairs = [
        tuple(zip(*(_forgiven(*each, overflown) for each in zip(*parts, strict=True)), strict=True)) or ((), ())
        for parts in zip(ours, stock, truth, strict=True)
        if len(set(map(len, parts))) == 1
    ]
    return tuple(zip(*pairs, strict=True)) if len(pairs) == len(ours) else (stock, truth)


def _forgiven(ours: Any, stock: Any, truth: Any, overflown: bool) -> tuple[Any, Any]:
    if not all(isinstance(t, Tensor) and t.shape == ours.shape for t in (ours, stock, truth)):
        return stock, truth
    own, theirs, true = ours.detach(), stock.detach(), truth.detach()
    slack = 8 * torch.finfo(own.dtype).eps
    right = own.isclose(true.to(own.dtype), rtol=slack, atol=0, equal_nan=True)
    right |= own.double().isclose(true, rtol=slack, atol=0)
    kept = right & ~(own.isfinite() & theirs.isfinite())
    if overflown:
        kept |= ~(own.isfinite() | theirs.isfinite())
    if own.dtype == torch.bfloat16:
        kept |= torch.maximum(own.abs(), theirs.abs()) < 2 * SMALLEST
    replaced = torch.where(kept, own.to(theirs.dtype), theirs), torch.where(kept, own.double(), true)
    return tuple(t.requires_grad_(of.requires_grad) for t, of in zip(replaced, (stock, truth), strict=True))


# What hypothesis draws from


def sizes(most: int) -> Any:
    edges = [n for power in range(4, 12) for n in (2**power - 1, 2**power, 2**power + 1) if n <= most]
    small = st.integers(0, min(most, 9))
    return small | st.sampled_from(edges) if edges else small


@st.composite
def shapes(draw: Any, least: int = 0, dims: int = 4, elements: int = 4200) -> tuple[int, ...]:
    found: list[int] = []
    for _ in range(draw(st.integers(least, dims))):
        found.append(draw(sizes(elements // max(prod(found), 1))))
    return tuple(found)


@st.composite
def arrays(draw: Any, shape: tuple[int, ...], kind: str = "normal", odd: Any = ODD, **given: Any) -> Array:
    specials = draw(st.just(()) | st.lists(st.sampled_from(odd), max_size=3).map(tuple)) if odd else ()
    return Array(
        shape,
        layout=draw(st.just("contiguous") | st.sampled_from(list(LAYOUTS))),
        kind=kind,
        odd=specials,
        scale=draw(st.sampled_from(SCALES)) if kind == "normal" and "scale" not in given else given.pop("scale", 1.0),
        grad=draw(st.booleans()) if "grad" not in given else given.pop("grad"),
        **given,
    )


@st.composite
def calls(draw: Any, name: str, op: Op, backends: tuple[str, ...] = ("triton", "triton", "triton", "torch")) -> Call:
    tensors, options = op.calls(draw)
    if draw(st.integers(0, 11)) == 11:
        tensors = draw(spoilt(tensors))
    return Call(
        name,
        tensors,
        options,
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
        dy=draw(st.just("contiguous") | st.sampled_from(list(LAYOUTS))),
        dy_odd=draw(st.just(()) | st.lists(st.sampled_from(ODD), max_size=1).map(tuple)),
        grad=draw(st.sampled_from([True, True, True, False])),
        backend=draw(st.sampled_from(backends)),
    )


@st.composite
def spoilt(draw: Any, tensors: dict[str, Array | None]) -> dict[str, Array | None]:
    """One tensor of another dtype or another shape."""
    name = draw(st.sampled_from(sorted(name for name, array in tensors.items() if array)))
    array = tensors[name]
    assert array is not None
    dtype, shape = array.dtype, list(array.shape)
    match draw(st.sampled_from(["dtype", "size", "fewer", "more"])):
        case "dtype":
            dtype = draw(st.sampled_from([*DTYPES, "int64", "int32", "uint8", "bool", "complex64"]))
        case "size" if shape:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 5))
        case "fewer" if shape:
            shape.pop(draw(st.integers(0, len(shape) - 1)))
        case _:
            shape.insert(draw(st.integers(0, len(shape))), draw(st.integers(0, 3)))
    changed = Array(
        tuple(shape), array.layout, array.kind, array.odd, array.scale, array.high, dtype, array.grad and not dtype
    )
    return tensors | {name: changed}
