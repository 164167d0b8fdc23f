"""Activations and linear layers of any class, told by what they compute, and activations that a graph's node calls.

A module is taken for what it computes only where its forward can compute nothing else at another time: its code runs
from the first line to the last, writes to its own variables alone, and reads its input, its module's numbers, torch,
and functions of which the same holds.
"""

import builtins
import copy
import dis
import inspect
import operator
import warnings
from collections.abc import Callable
from functools import cache, partial
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fusedact import functional
from fusedact.activations import ACTIVATIONS, TABLE, Activation, lines_of, of_module, sample
from fusedact.backend import dispatching
from fusedact.fusion.running import own_attributes, unchanged
from fusedact.nn.hooks import is_plain

Known = tuple[Activation, tuple[float, ...], Tensor | None]

_NUMBERS = (bool, int, float, str, type(None), torch.dtype)
_LIBRARIES = ("torch", "math")
_BUILTINS = {abs, bool, float, int, len, max, min, pow, range, sum}
_MODES = ("training", "backends")
_ASKING = ("__", "is_", "are_", "get_")  # is_grad_enabled, get_default_dtype
_FORBIDDEN = ("JUMP", "FOR_ITER", "STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR", "STORE_DEREF", "DELETE_", "IMPORT_")
_FOUND: dict[Any, Any] = {}
_MOST_FOUND = 256  # of classes with their numbers; then it starts anew, which lets go of classes that nobody has
_KINKS = (-20.0, -6.0, -3.0, -2.0, -1.0, -0.5, -0.25, -0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 6.0, 20.0, 100.0)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_EXTREMES = (torch.nan, torch.inf, -torch.inf, 0.0, -0.0)


def activation_of(module: nn.Module) -> Known | None:
    """The activation, parameters and slope of a module that is one of the table's or computes the same, else None.

    A module of an unknown class computes the same where value and derivative are those of an activation at its default
    parameters: in float64 to 1e-10, in float32 and bfloat16 to a few roundings of the value or, as 1 + erf cancels, of
    the input; where it is 0, at 0 and far out, exactly, and NaN and infinities included. A copy of it is called.
    """
    known = of_module(module)
    if known is not None or next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return known
    activation = _remembered(_computed, module)
    return None if activation is None else (activation, activation.default_values, None)


def called_activation(node: fx.Node) -> tuple[str, dict[str, float]] | None:
    """The name and the given parameters of the activation that a node calls as a function or method, else None.

    Its input is the first argument or the keyword `input`; in place or not is not told.
    """
    target: Any = node.target
    lines = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(target)
    if lines is None:
        return None
    stock = getattr(functional, next(iter(lines.values())).name)
    try:
        given = inspect.signature(stock).bind(*node.args, **node.kwargs).arguments
    except TypeError:  # `out=`, or what torch does not take
        return None
    approximate = given.pop("approximate", next(iter(lines)))
    inplace = given.pop("inplace", False)
    input = given.pop("input")
    numbers = all(type(number) in (int, float) for number in given.values())
    if not (isinstance(input, fx.Node) and isinstance(inplace, bool) and numbers):
        return None
    act = lines.get(approximate) if isinstance(approximate, str | None) else None
    if act is None or not act.valid(*act.parameters(given)):
        return None
    return act.name, {name: float(number) for name, number in given.items()}


def transposed_linear(module: nn.Module) -> bool:
    """Whether a module of an unknown class is x W + b on the last dimension, its weight (K, N), its bias (N,)."""
    parameters = dict(module.named_parameters())
    if parameters.keys() != {"weight", "bias"} or next(module.buffers(), None) is not None:
        return False
    weight, bias = parameters["weight"], parameters["bias"]
    if weight.dim() != 2 or bias.shape != weight.shape[1:]:
        return False
    shape = f"add(getitem(size(x), {slice(None, -1)}), ({weight.shape[1]},))"
    return _remembered(_traced, module) == f"view(addmm(bias, view(x, -1, size(x, -1)), weight), {shape})"


def _by_target() -> tuple[dict[Any, dict[str | None, Activation]], dict[Any, dict[str | None, Activation]]]:
    """The table's lines by torch's functions and ours, in place or not, and by the names of a tensor's methods."""
    functions, methods = {}, {}
    for act in TABLE:
        if act.learned:
            continue
        stock = getattr(act.reference, "func", act.reference)
        functions[stock] = lines = lines_of(stock)
        for name in (act.name, f"{act.name}_"):
            for space in (torch, F, functional):
                if callable(getattr(space, name, None)):
                    functions[getattr(space, name)] = lines
            if hasattr(Tensor, name):
                methods[name] = lines
    return functions, methods


_FUNCTIONS, _METHODS = _by_target()


def _remembered(find: Callable[[nn.Module], Any], module: nn.Module) -> Any:
    """find(a copy of the module), once for all of a class that hold the same numbers, until the class changes."""
    own, members = own_attributes(module)
    if module._modules or not is_plain(module) or dispatching():
        return None
    if not all(isinstance(value, _NUMBERS) for value in own.values()):
        return _found(find, module)
    kind = type(module)
    key = kind, find, repr(own), len(ACTIVATIONS)
    then, found = _FOUND.get(key, ({}, None))
    if then.keys() != members.keys() or not unchanged(kind, then):
        found = _found(find, module)
        if len(_FOUND) >= _MOST_FOUND:
            _FOUND.clear()
        _FOUND[key] = members, found
    return found


def _found(find: Callable[[nn.Module], Any], module: nn.Module) -> Any:
    """find(a copy on the same parameters), None where it is not sure that one can be called and nobody notice."""
    own, _ = own_attributes(module)
    if not (all(_settled(value, module) for value in own.values()) and all(map(_settled_class, type(module).__mro__))):
        return None
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in module.parameters()})
    return find(copied) if len(inspect.signature(copied.forward).parameters) == 1 else None


def _computed(module: nn.Module) -> Activation | None:
    module.training = True  # where torch's own classes draw numbers, if they ever do
    before = _state(module)
    curve = _curve(partial(_on_numbers_alone, module.forward))
    if curve is None or _state(module) != before:
        return None
    same = (act for act in ACTIVATIONS.values() if not act.learned and _alike(curve, _reference(act)))
    return next(same, None)


def _traced(module: nn.Module) -> str | None:
    try:
        graph = fx.Tracer().trace(module)
    except Exception:  # whatever a forward says that was given no tensor
        return None
    return _formula(graph.output_node().args[0])


def _state(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}


def _settled_class(kind: type) -> bool:
    return _from_libraries(kind) or kind is object or all(_settled_member(*member) for member in vars(kind).items())


def _settled_member(name: str, value: Any) -> bool:
    """Whether what a class holds under that name leaves it a class like any other, always the same."""
    if name.startswith("__") and name.endswith("__"):
        return name in ("__init__", "__repr__") or not isinstance(value, FunctionType)
    return name == "extra_repr" or _settled(value)


def _settled(value: Any, owner: Any = None) -> bool:
    """Whether a value is what it is for good: numbers, torch's things, functions that read such alone."""
    if isinstance(value, MethodType):
        return value.__self__ is owner  # whose class is looked at by itself
    if isinstance(value, partial):
        return all(_settled(part, owner) for part in (value.func, *value.args, *value.keywords.values()))
    if isinstance(value, tuple):
        return all(_settled(part, owner) for part in value)
    return isinstance(value, _NUMBERS) or _settled_function(value)


def _settled_function(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return value.__name__.split(".")[0] in _LIBRARIES
    if isinstance(value, BuiltinFunctionType | type) and value in _BUILTINS:
        return True
    if isinstance(value, BuiltinFunctionType | FunctionType | type) and _from_libraries(value):
        return not _asks(value.__name__)
    return isinstance(value, FunctionType) and _straight(value)


def _from_libraries(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "").split(".")[0] in _LIBRARIES


def _asks(name: str) -> bool:
    """Whether what goes by that name may tell a mode."""
    return name in _MODES or name.startswith(_ASKING)


def _straight(function: FunctionType) -> bool:
    """Its code neither branches nor writes beyond its own variables, and reads functions alone, like itself."""
    defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
    read = [cell.cell_contents for cell in function.__closure__ or ()]
    for instruction in dis.get_instructions(function):
        name = instruction.argval
        if any(part in instruction.opname for part in _FORBIDDEN) or isinstance(name, CodeType):
            return False
        if instruction.opname == "LOAD_GLOBAL":
            read.append(function.__globals__.get(name, vars(builtins).get(name)))
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and _asks(name):
            return False
    return all(map(_settled, defaults)) and all(v is not function and _settled_function(v) for v in read)


@cache
def _points() -> tuple[Tensor, Tensor, Tensor]:
    """Ordinary points (144,) and extremes (5,), float64 but bfloat16's, and a gradient for each of the former."""
    x, _ = sample(torch.float64)
    x = torch.cat([x, torch.tensor(_KINKS, dtype=x.dtype, device=x.device)]).bfloat16().double()
    dy = torch.linspace(0.5, 2, len(x), dtype=x.dtype, device=x.device)
    return x, torch.tensor(_EXTREMES, dtype=x.dtype, device=x.device), dy


@cache
def _reference(act: Activation) -> tuple[Tensor, Tensor] | None:
    return _curve(lambda x: act.reference(x, *act.default_values))


class _NumbersAlone(TorchFunctionMode):
    """Of tensors only tensors are made: nobody asks for a dtype, shape, device or truth."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            raise TypeError("an activation computes tensors alone")
        return result


def _on_numbers_alone(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with _NumbersAlone():
        return forward(x)


def _curve(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor] | None:
    """Values (3, 149) at all points, computed in each of _DTYPES, and the gradient (144,) at the ordinary ones.

    None for what is not elementwise or draws numbers.
    """
    x, extremes, dy = _points()
    modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False)
    with modes[0], modes[1], modes[2], torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        try:
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            (dx,) = torch.autograd.grad(y, leaf, dy)
            again = function(x.view(2, 3, 4, 6).clone())
            if not (leaf.equal(x) and torch.allclose(again.reshape(-1), y, 1e-11, 1e-14)):
                return None
            values = [
                [_kept(function, t.to(dtype, copy=True)) for t in (x.view(12, 12), extremes)] for dtype in _DTYPES
            ]
        except Exception:  # whatever a module says that is no activation
            return None
    return torch.stack([torch.cat([y.flatten(), ends]) for y, ends in values]), dx


def _kept(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = function(x)
    if y.dtype != x.dtype or y.shape != x.shape:
        raise TypeError("an activation keeps its input's dtype and shape")
    return y.double()


def _alike(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor] | None) -> bool:
    """Whether values and gradients are those of an activation."""
    if theirs is None:
        return False
    near = all(_near(*rows, theirs[0][0]) for rows in zip(_DTYPES, ours[0], theirs[0], strict=True))
    zeros = [values[:, -2:].signbit() for values, _ in (ours, theirs)]
    return near and zeros[0].equal(zeros[1]) and torch.allclose(ours[1], theirs[1], 1e-11, 1e-11)


def _near(dtype: torch.dtype, y: Tensor, stock: Tensor, truth: Tensor) -> bool:
    """Whether values computed in a dtype are stock's there, or those in float64 but for a few roundings.

    Those of the value, and up to 20 from 0 of the input, as 1 + erf cancels: what is 0 far out or at 0 is 0 exactly.
    """
    x, truth, few = torch.cat(_points()[:2]), truth.to(dtype).double(), 4 * torch.finfo(dtype).eps
    allowed = max(few, 1e-10) * truth.abs()  # constants are written with as few digits
    allowed += torch.where(x.abs() < 20, few * x.abs(), 0) + torch.where(truth == 0, 0, 1e3 * torch.finfo(dtype).tiny)
    same = [(y == known) | (y.isnan() & known.isnan()) for known in (stock, truth)]
    return bool((same[0] | same[1] | (truth.isfinite() & ((y - truth).abs() <= allowed))).all())


def _formula(value: Any) -> str:
    """What a node computes of the input `x`, as one nested call, in the arguments' order."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "placeholder":
        return "x"
    if value.op == "get_attr":
        return str(value.target)
    known: dict[Any, str] = {torch.addmm: "addmm", operator.add: "add", operator.getitem: "getitem"}
    name = value.target if value.op == "call_method" else known.get(value.target)
    return f"{name}({', '.join(map(_formula, value.args))})" if not value.kwargs else "?"
