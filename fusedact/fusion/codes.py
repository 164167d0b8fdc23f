"""What the code of a forward reads beyond its module and does beside its result: a trace would fix it, or lose it."""

import builtins
import dis
import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

PLAIN = frozenset(
    {bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.Size, type(None)}
)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)
_LIBRARIES = sys.stdlib_module_names | {"torch"}
_RANDOM = "seeds or keeps random numbers"
_MODES = "asks for what torch is set to"
_DOES = {
    "print": "prints",
    "open": "opens files",
    **dict.fromkeys(("setattr", "delattr"), "writes an attribute"),
    **dict.fromkeys(("exec", "eval", "globals", "locals"), "runs or reads what is not in its code"),
    "checkpoint": "is checkpointed inside",
    "checkpoint_sequential": "is checkpointed inside",
    **dict.fromkeys(("__class__", "is_tensor"), "asks for types"),
    **dict.fromkeys(("grad_fn", "grad", "_base"), "asks for gradients"),
    "environ": "reads the environment",
    "getenv": "reads the environment",
    **dict.fromkeys(("time", "time_ns", "perf_counter", "process_time", "monotonic", "now"), "asks for the time"),
    **dict.fromkeys(("manual_seed", "seed", "get_rng_state", "set_rng_state"), _RANDOM),
    **dict.fromkeys(("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"), _MODES),
    **dict.fromkeys(("get_default_dtype", "are_deterministic_algorithms_enabled", "get_autocast_dtype"), _MODES),
    **dict.fromkeys(("is_autocast_cpu_enabled", "is_autocast_cache_enabled", "get_autocast_cpu_dtype"), _MODES),
    **dict.fromkeys(("get_autocast_gpu_dtype", "get_float32_matmul_precision", "is_anomaly_enabled"), _MODES),
    **dict.fromkeys(("is_in_onnx_export", "is_tracing", "use_deterministic_algorithms"), _MODES),
    **dict.fromkeys(("is_compiling", "is_torchdynamo_compiling", "is_dynamo_compiling"), _MODES),
}
# Of Python's own modules those that do nothing beside their result, and read nothing but their arguments.
_HARMLESS = {"abc", "builtins", "cmath", "collections", "copy", "dataclasses", "enum", "functools", "itertools", "math"}
_HARMLESS |= {"numbers", "operator", "torch", "types", "typing"}
_REFUSED = {
    "PUSH_EXC_INFO": "has a with or a try block",
    "IMPORT_NAME": "imports",
    "STORE_ATTR": "writes an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "writes a global",
    "DELETE_GLOBAL": "writes a global",
    **dict.fromkeys(("MATCH_CLASS", "MATCH_SEQUENCE", "MATCH_MAPPING"), "asks for types"),
    "YIELD_VALUE": "is a generator",
}


class Untraceable(Exception):
    """Why no graph can stand for a forward."""


class Constant(NamedTuple):
    """A plain value, a function or a class that code found under a name: of its module, a class, or closed over."""

    place: Mapping[str, Any] | types.CellType
    name: str
    value: Any

    def holds(self) -> bool:
        place = self.place
        value = place.cell_contents if isinstance(place, types.CellType) else place.get(self.name)
        return value is self.value or (type(value) in PLAIN and type(value) is type(self.value) and value == self.value)


class Reader:
    """Reads the code that a trace runs. constants: what it found, which must be found again at a call.

    answers: what isinstance and the like say to that code instead. kinds: the classes of modules whose methods run.
    """

    def __init__(self, answers: Mapping[str, Callable[..., Any]], kinds: set[type]) -> None:
        self.constants: list[Constant] = []
        self._answers, self._kinds = answers, kinds
        self._told: dict[Any, Any] = {}

    def told(self, function: Any) -> Any:
        """The function as a trace may run it, with all of the user's that it calls.

        Raises Untraceable for code that does or reads what a graph does not show.
        """
        if isinstance(function, functools.partial):
            self.told(function.func)
            return function
        if not isinstance(function, types.FunctionType) or _is_library(function):
            return function
        if function not in self._told:
            self._told[function] = function  # of a recursive one
            if hasattr(function, "__wrapped__"):
                self.told(function.__wrapped__)
                if _root(function.__globals__.get("__name__")) in _LIBRARIES:
                    raise Untraceable("its forward is decorated by a library")
            defaults = *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()
            if any(type(default) not in PLAIN | {tuple, type} for default in defaults):
                raise Untraceable("its forward has a default that may change")
            self._told[function] = self._copy(function)
        return self._told[function]

    def _copy(self, function: types.FunctionType) -> types.FunctionType:
        """The function with our answers, and the functions that it calls told likewise, among its globals."""
        places: dict[str, Any] = {}
        for code in _codes(function.__code__):
            if _asks_for_none(code):
                raise Untraceable("its forward asks whether what it computed is None")
            for name in _globals(code):
                own = name in function.__globals__
                if name in self._answers and not own:
                    places[name] = self._answers[name]
                    continue
                place = function.__globals__ if own else vars(builtins)
                told = self._look(place, name, place.get(name), code)
                if told is not None:
                    places[name] = told
            if "super" in code.co_names:
                self._parents(function, code)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if name != "__class__" and self._look(cell, name, cell.cell_contents, function.__code__) is not None:
                raise Untraceable(f"its forward calls `{name}`, which is closed over")
        globals_ = {**function.__globals__, **places}
        copy = types.FunctionType(
            function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        return copy

    def _look(self, place: Any, name: str, value: Any, code: types.CodeType) -> Any:
        """Note what was found; the user's functions are returned as told."""
        module = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if _root(module).removeprefix("_") in sys.stdlib_module_names - _HARMLESS and place is not vars(builtins):
            raise Untraceable(f"its forward uses the module `{_root(module)}`")
        if isinstance(value, types.ModuleType):
            if _root(value.__name__) not in _LIBRARIES:
                for attribute in set(code.co_names) & vars(value).keys():
                    if self._look(vars(value), attribute, vars(value)[attribute], code) is not None:
                        raise Untraceable(f"its forward calls `{attribute}` of a module of its own")
            return None
        if isinstance(value, _FUNCTIONS):
            if getattr(value, "__name__", "") in _DOES:
                raise Untraceable(f"its forward {_DOES[value.__name__]}")
            if place is not vars(builtins):
                self.constants.append(Constant(place, name, value))
            if isinstance(value, type) and _root(value.__module__) not in _LIBRARIES | {"builtins"}:
                self._class(value, code)
            told = self.told(value)
            return told if told is not value else None
        if type(value) not in PLAIN and not _root(type(value).__module__) == "typing":
            raise Untraceable(f"its forward reads `{name}` ({type(value).__name__}), which may change")
        self.constants.append(Constant(place, name, value))
        return None

    def _class(self, kind: type, code: types.CodeType) -> None:
        """What code may read of a class of the user's; what making one does it may not."""
        if not issubclass(kind, torch.nn.Module) and {"__init__", "__new__", "__post_init__"} & vars(kind).keys():
            raise Untraceable(f"its forward makes or asks for a {kind.__name__}")
        for attribute in set(code.co_names) & vars(kind).keys():
            value = vars(kind)[attribute]
            inner = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if self._look(vars(kind), attribute, inner, code) is not None:
                raise Untraceable(f"its forward calls `{attribute}` of {kind.__name__}")

    def _parents(self, function: types.FunctionType, code: types.CodeType) -> None:
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        kind = cells["__class__"].cell_contents if "__class__" in cells else object
        orders = [k.__mro__ for k in self._kinds if kind in k.__mro__] or [kind.__mro__]
        for base in dict.fromkeys(base for order in orders for base in order[order.index(kind) + 1 :]):
            for name in set(code.co_names) & vars(base).keys():
                method = vars(base)[name]
                if isinstance(method, types.FunctionType) and self.told(method) is not method:
                    asks = {n for c in _codes(method.__code__) for n in _globals(c)} & self._answers.keys()
                    if asks:
                        raise Untraceable("its forward asks for types, in a class that it inherits from")


def _is_library(function: types.FunctionType) -> bool:
    """torch's or Python's own, not the user's in a decorator of theirs."""
    return {_root(function.__module__), _root(function.__globals__.get("__name__"))} <= _LIBRARIES


def _root(name: str | None) -> str:
    return (name or "").partition(".")[0]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _asks_for_none(code: types.CodeType) -> bool:
    """Whether it asks if what it computed is None: what stands for that never is.

    Of its arguments, attributes and globals it may ask.
    """
    computed: set[str] = set()
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name in ("CACHE", "EXTENDED_ARG", "NOT_TAKEN"):
            continue
        if name == "IS_OP" or name.endswith(("IF_NONE", "IF_NOT_NONE")):
            asked = _base_of(before[: len(before) - (name == "IS_OP")])
            given = asked.opname.startswith(("LOAD_GLOBAL", "LOAD_CONST", "LOAD_FAST", "LOAD_DEREF"))
            if not given or ("LOAD_FAST" in asked.opname and _locals(asked)[-1] in computed):
                return True
        if name.startswith("STORE_FAST") and before and before[-1].opname != "LOAD_CONST":
            computed.update(_locals(instruction))
        before.append(instruction)
    return False


def _base_of(instructions: list[dis.Instruction]) -> dis.Instruction:
    """What the attributes are read of that the last of the instructions reads."""
    return next(i for i in reversed(instructions) if i.opname != "LOAD_ATTR")


def _locals(instruction: dis.Instruction) -> tuple[str, ...]:
    value = instruction.argval  # Python 3.13 stores and loads two at once
    return value if isinstance(value, tuple) else (value,)


def _globals(code: types.CodeType) -> Iterator[str]:
    """The globals that it reads. Untraceable where it does what no graph shows."""
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in _REFUSED and (instruction.opname, code.co_name) != ("YIELD_VALUE", "<genexpr>"):
            raise Untraceable(f"its forward {_REFUSED[instruction.opname]}")
        if instruction.opname == "STORE_DEREF" and name in code.co_freevars:
            raise Untraceable(f"its forward writes `{name}`")
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR") and name in _DOES:
            raise Untraceable(f"its forward {_DOES[name]}")
        if instruction.opname == "LOAD_GLOBAL":
            yield name
