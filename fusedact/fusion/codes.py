"""What the code of a forward reads beyond its module and does beside its result: a trace would fix it, or lose it."""

import builtins
import dis
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, type(None))
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_LIBRARIES = sys.stdlib_module_names | {"torch"}
_DOES = {
    "print": "prints",
    "is_grad_enabled": "asks whether gradients are recorded",
    "is_autocast_enabled": "asks for autocast",
    "is_compiling": "asks whether it is compiled",
    "is_torchdynamo_compiling": "asks whether it is compiled",
    "time": "asks for the time",
    "perf_counter": "asks for the time",
}
_WRITES = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}


class Untraceable(Exception):
    """Why no graph can stand for a forward."""


class Constant(NamedTuple):
    """A plain value that code found under a name of its module, or of one that it imports."""

    place: dict[str, Any]
    name: str
    value: Any

    def holds(self) -> bool:
        value = self.place.get(self.name)
        return type(value) is type(self.value) and value == self.value


def constants(function: Any) -> list[Constant]:
    """The plain globals that a function reads, and the functions that it calls, but torch's and Python's own.

    Raises Untraceable for code that reads any other global or closed-over object, or does what a graph does not show.
    """
    found: list[Constant] = []
    pending, seen = [function], {id(function)}
    while pending:
        function = pending.pop()
        inner = getattr(function, "__wrapped__", None)
        for value in [*([] if inner is None else [inner]), *_read(function, found)]:
            if isinstance(value, types.FunctionType) and not _of_library(value) and id(value) not in seen:
                seen.add(id(value))
                pending.append(value)
    return found


def _of_library(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in _LIBRARIES


def _read(function: types.FunctionType, found: list[Constant]) -> Iterator[Any]:
    """The functions that its code has at hand; plain values go to `found`."""
    places = function.__globals__
    for code in _codes(function.__code__):
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if name in _DOES and "LOAD" in instruction.opname:
                raise Untraceable(f"its forward {_DOES[name]}")
            if instruction.opname in _WRITES and name not in code.co_cellvars:
                raise Untraceable(f"its forward writes `{name}`")
            if instruction.opname == "LOAD_GLOBAL":
                yield from _value(places if name in places else vars(builtins), name, code, found)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if name != "__class__":
            yield from _value({name: cell.cell_contents}, name, function.__code__, found)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _value(place: dict[str, Any], name: str, code: types.CodeType, found: list[Constant]) -> Iterator[Any]:
    value = place.get(name)
    if isinstance(value, FUNCTIONS):
        yield value
    elif isinstance(value, types.ModuleType):
        if value.__name__.partition(".")[0] not in _LIBRARIES:
            for attribute in set(code.co_names) & vars(value).keys():
                yield from _value(vars(value), attribute, code, found)
    elif isinstance(value, PLAIN):
        found.append(Constant(place, name, value))
    elif not (type(value).__module__ or "").startswith(("typing", "torch")):
        raise Untraceable(f"its forward reads `{name}`, a {type(value).__name__} that may change")
