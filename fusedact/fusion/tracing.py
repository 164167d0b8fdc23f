"""A module's own forward as a graph, one level deep, with all that this took for granted."""

import enum
import functools
import inspect
import operator
import os
import random
import traceback
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fusedact.fusion.codes import FUNCTIONS, PLAIN, Constant, Untraceable, constants
from fusedact.fusion.recognized import activation_of, transposed_linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCTS = (nn.Linear, *CONVOLUTIONS)
ABSENT = object()  # what a read found where there is nothing of that name
_INTERNAL = frozenset(vars(nn.Module())) - {"training", "_modules"}
_ARITHMETIC = {operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul}
_OWN = {__file__}
_ASKING = {"__get__", "size", "dim", "ndimension", "numel", "is_floating_point", "is_complex", "__len__", "__hash__"}


class Read(NamedTuple):
    """An attribute that a forward read, of the module at a path within its own, and what was found."""

    path: tuple[str, ...]
    name: str
    value: Any

    def holds(self, module: nn.Module) -> bool:
        owner: Any = module
        for child in self.path:
            owner = owner._modules.get(child)
            if owner is None:
                return False
        if self.name == "_modules":
            return tuple(owner._modules) == self.value
        value = getattr(owner, self.name, ABSENT)
        if isinstance(value, Tensor):
            return self.value == (value.dtype, value.shape)
        return value is self.value or (type(value) is type(self.value) and value == self.value)


class Trace(NamedTuple):
    """A forward's graph, and where it holds.

    names: its arguments in order. fixed: those that keep their default, and it. reads, constants: what it found in its
    module and beyond. dtype: of every input, where the forward asks for it; it then holds under no autocast.
    """

    graph: fx.Graph
    names: tuple[str, ...]
    fixed: dict[str, Any]
    reads: tuple[Read, ...]
    constants: tuple[Constant, ...]
    dtype: torch.dtype | None


def trace(module: nn.Module, forward: Callable[..., Any], training: bool) -> Trace:
    """The graph of forward(module, ...), arguments without a default tensors, the others left away.

    The children of the module are nodes, whatever is inside them. Nothing of the module is changed, and no tensor
    computed. Raises Untraceable where the forward does what no graph shows: it branches on values, writes an
    attribute, draws a number, makes a tensor, prints.
    """
    tracer = _Tracer(module, training)
    names, fixed, inputs = _arguments(forward, tracer)
    drawn = random.getstate()
    try:
        forward = tracer.seen(forward)
        with tracer.no_tensors:
            output = forward(_Stand(tracer, module, ()), *inputs)
        tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    except Untraceable:
        raise
    except fx.proxy.TraceError as error:
        raise Untraceable(f"its forward does what its input's values or sizes decide{_where(error)}") from error
    except Exception as error:  # whatever a forward says that was given no tensors
        text = str(error).partition("\n")[0]
        raise Untraceable(f"its forward cannot be traced: {type(error).__name__}, {text}{_where(error)}") from error
    finally:
        fair = random.getstate() == drawn
        random.setstate(drawn)
    if not fair:
        raise Untraceable("its forward draws random numbers in Python")
    return Trace(tracer.graph, names, fixed, tuple(tracer.reads), tuple(tracer.constants), tracer.assumed)


def _where(error: Exception) -> str:
    """The last line outside torch that led there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in _OWN]
    ours = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename]
    return f" ({os.path.basename(ours[-1].filename)}, line {ours[-1].lineno})" if ours else ""


def _arguments(forward: Callable[..., Any], tracer: "_Tracer") -> tuple[tuple[str, ...], dict[str, Any], list[Any]]:
    names, fixed, inputs = [], {}, []
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        names.append(name)
        if parameter.default is not parameter.empty:
            fixed[name] = parameter.default
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise Untraceable(f"its forward needs the keyword {name!r}")
        else:
            inputs.append(tracer.create_proxy("placeholder", name, (), {}))
    return tuple(names), fixed, inputs


class _NoTensors(TorchFunctionMode):
    """Nothing is computed while a forward is traced: a tensor made without the input would be a constant."""

    looking = False  # at what a child computes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        leaves = () if self.looking or name in _ASKING else tree_leaves((args, kwargs))
        if leaves != () and not any(type(leaf) in (_Value, fx.proxy.Attribute) for leaf in leaves):
            raise Untraceable(f"its forward computes without its input ({name})")
        return func(*args, **(kwargs or {}))


class _Value(fx.Proxy):
    """What stands for what a tensor or an operation gives. Its dtype is told only where it is known."""

    tracer: "_Tracer"

    @property
    def dtype(self) -> torch.dtype:
        return self.tracer.dtype_of(self.node)


class _Tracer(fx.Tracer):
    def __init__(self, module: nn.Module, training: bool) -> None:
        super().__init__()
        self.root, self.training = module, training
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.tensor_attrs = {}
        self.reads: list[Read] = []
        self.constants: list[Constant] = []
        self.assumed: torch.dtype | None = None
        self.no_tensors = _NoTensors()
        self._paths: dict[int, str] = {}  # of the tensors that the forward read
        self._modes = _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None):
        if _modes() != self._modes:
            raise Untraceable("its forward switches gradients or autocast on or off")
        return self.graph.create_node(kind, target, args, kwargs, name, type_expr)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node
        if type(a) is _Stand:
            raise Untraceable("its forward hands a module to a function")
        if isinstance(a, Tensor):
            if id(a) not in self._paths:
                raise Untraceable("its forward takes a tensor that is neither an input nor an attribute")
            return self.graph.create_node("get_attr", self._paths[id(a)])
        if isinstance(a, dict | list) and type(a) not in (dict, list):
            raise Untraceable(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)

    def seen(self, function: Any) -> Any:
        """The function as a trace may call it. Untraceable where its code does what a graph does not show."""
        self.constants += constants(function)
        code: Any = getattr(inspect.unwrap(function), "__code__", None)
        if code is None or "isinstance" not in code.co_names:
            return function
        if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
            raise Untraceable("its forward asks for types (isinstance)")
        places = {**function.__globals__, "isinstance": self._isinstance}
        told = types.FunctionType(code, places, function.__name__, function.__defaults__, function.__closure__)
        told.__kwdefaults__ = function.__kwdefaults__
        return told

    def _isinstance(self, value: Any, kinds: Any) -> bool:
        if not isinstance(value, fx.Proxy):
            return isinstance(value, kinds)
        if type(value) is not _Value or not self._is_tensor(value.node):
            raise Untraceable(f"its forward asks for the type of what `{value.node.name}` gives")
        return issubclass(Tensor, kinds)

    def read(self, stand: "_Stand", module: nn.Module, path: tuple[str, ...], name: str) -> Any:
        """module.name, as the forward is to see it, and noted."""
        state, kind = vars(module), _original(module)
        found = inspect.getattr_static(kind, name, ABSENT)
        if isinstance(found, property):
            return self.seen(found.fget)(stand)
        if name == "training":
            return self._noted(path, name, self.training)
        if name == "_modules":
            self._noted(path, name, tuple(state[name]))
            return {child: self._child(path, child, m) for child, m in state[name].items()}
        if name in _INTERNAL:
            raise Untraceable(f"its forward reads `{name}`")
        if name in state:
            return self._noted(path, name, state[name])
        for tensors in (state["_parameters"], state["_buffers"]):
            if name in tensors:
                return self._noted(path, name, tensors[name])
        if name in state["_modules"]:
            return self._child(path, name, state["_modules"][name])
        if isinstance(found, types.FunctionType):
            return types.MethodType(self.seen(found), stand)
        if found is ABSENT:
            self._noted(path, name, ABSENT)
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        return self._noted(path, name, getattr(kind, name))

    def _child(self, path: tuple[str, ...], name: str, child: nn.Module | None) -> "_Stand | None":
        return self._noted(path, name, None) if child is None else _Stand(self, child, (*path, name))

    def _noted(self, path: tuple[str, ...], name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._paths[id(value)] = ".".join((*path, name))
            self.reads.append(Read(path, name, (value.dtype, value.shape)))
            return value
        if not (value is ABSENT or _is_plain_value(value)):
            raise Untraceable(f"its forward reads `{name}`, a {type(value).__name__}")
        self.reads.append(Read(path, name, list(value) if isinstance(value, list) else value))
        return self.seen(value) if isinstance(value, types.FunctionType) else value

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or self._keeps_dtype(node)

    def _keeps_dtype(self, node: fx.Node) -> bool:
        """A layer whose output has its input's dtype, outside autocast."""
        if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return False
        layer = self.root.get_submodule(str(node.target))
        self.no_tensors.looking = True
        try:
            known = type(layer) in (*PRODUCTS, nn.Dropout, nn.Identity) or transposed_linear(layer)
            return known or activation_of(layer) is not None
        finally:
            self.no_tensors.looking = False

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """What follows from the parameters' dtype, if every input has that."""
        if node.op == "placeholder":
            parameter = next((p for p in self.root.parameters() if p.is_floating_point()), None)
            if parameter is None:
                raise Untraceable("its forward asks for the dtype of its input")
            self.assumed = parameter.dtype
            return parameter.dtype
        if self._keeps_dtype(node) or node.target in _ARITHMETIC:
            dtypes = {self.dtype_of(before) for before in node.all_input_nodes}
            if len(dtypes) == 1:
                return dtypes.pop()
        raise Untraceable(f"its forward asks for the dtype of what `{node.name}` gives")


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()


def _is_plain_value(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return type(value) in (tuple, list, torch.Size) and all(map(_is_plain_value, value))
    return isinstance(value, (*PLAIN, *FUNCTIONS, enum.Enum, functools.partial))


def _original(module: nn.Module) -> type[nn.Module]:
    return vars(type(module)).get("_original", type(module))


class _Stand:
    """A module as its own forward sees it while it is traced: called it is a node, what is read of it is noted."""

    __slots__ = ("_state",)

    def __init__(self, tracer: _Tracer, module: nn.Module, path: tuple[str, ...]) -> None:
        object.__setattr__(self, "_state", (tracer, module, path))

    def __getattribute__(self, name: str) -> Any:
        tracer, module, path = object.__getattribute__(self, "_state")
        return _original(module) if name == "__class__" else tracer.read(self, module, path, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Untraceable(f"its forward writes `{name}`")

    def __delattr__(self, name: str) -> None:
        raise Untraceable(f"its forward deletes `{name}`")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer, _, path = object.__getattribute__(self, "_state")
        if not path:
            raise Untraceable("its forward calls itself")
        return tracer.create_proxy("call_module", ".".join(path), args, kwargs)

    def __iter__(self) -> Any:
        return self.__class__.__iter__(self)

    def __len__(self) -> int:
        return self.__class__.__len__(self)

    def __getitem__(self, key: Any) -> Any:
        return self.__class__.__getitem__(self, key)

    def __contains__(self, key: Any) -> bool:
        return self.__class__.__contains__(self, key)
