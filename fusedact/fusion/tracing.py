"""A module's own forward as a graph, one level deep, with all that this took for granted."""

import dataclasses
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
from torch.fx.immutable_collections import immutable_list
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fusedact.fusion.codes import Constant, Reader, Untraceable
from fusedact.fusion.reads import ABSENT, DTYPE, PRESENT, TENSOR, Read, Same, is_plain_value, original, static
from fusedact.fusion.recognized import activation_of, transposed_linear

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PRODUCTS = (nn.Linear, *CONVOLUTIONS)
_INTERNAL = frozenset(vars(nn.Module())) - {"training", "_modules"}
_COLLECTIONS = (dict, list, tuple, torch.Size, slice, immutable_list)
_QUESTIONS = (issubclass, hasattr, getattr, type, callable, id, hash, str, repr, vars, dir)
_ARITHMETIC = {operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul}
_OWN = {__file__}
_IN_PLACE = {name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")} - {
    "index",
    "inv",
}
_SIZES = {"shape", "ndim", "size", "dim", "numel", "__len__"}


class Trace(NamedTuple):
    """A forward's graph, and where it holds.

    names: its arguments in order, so many of them positional. fixed: those that keep their default, and it.
    reads, constants: what it found in its module and beyond. one_dtype: whether it asked for dtypes, which then must
    be one, under no autocast.
    """

    graph: fx.Graph
    names: tuple[str, ...]
    positional: int
    fixed: dict[str, Any]
    reads: tuple[Read, ...]
    constants: tuple[Constant, ...]
    one_dtype: bool


def trace(module: nn.Module, forward: Callable[..., Any], training: bool) -> Trace:
    """The graph of forward(module, ...), arguments without a default tensors, the others left away.

    The children of the module are nodes, whatever is inside them. Nothing of the module is changed, and no tensor
    computed. Raises Untraceable where the forward does what no graph shows: it branches on values, writes an
    attribute, draws a number, makes a tensor, prints.
    """
    tracer = _Tracer(module, training)
    drawn = random.getstate(), torch.get_rng_state()
    try:
        names, positional, fixed, inputs = _arguments(forward, tracer)
        told = tracer.reader.told(forward)
        with tracer.no_tensors:
            output = told(_Stand(tracer, module, ()), *inputs)
        tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    except Untraceable:
        raise
    except fx.proxy.TraceError as error:
        raise Untraceable(f"its forward does what its input's values or sizes decide{_where(error)}") from error
    except Exception as error:  # whatever a forward says that was given no tensors
        text = str(error).partition("\n")[0]
        raise Untraceable(f"its forward cannot be traced: {type(error).__name__}, {text}{_where(error)}") from error
    finally:
        fair = random.getstate() == drawn[0] and torch.equal(torch.get_rng_state(), drawn[1])
        random.setstate(drawn[0])
        torch.set_rng_state(drawn[1])
    if not fair:
        raise Untraceable("its forward draws random numbers of its own")
    reads, known = _once(tracer.reads), _once(tracer.reader.constants)
    return Trace(tracer.graph, names, positional, fixed, reads, known, tracer.one_dtype)


def _once(found: list[Any]) -> tuple[Any, ...]:
    return tuple(
        {
            (id(item[0]) if isinstance(item, Constant) else item[0], item[1], id(item[2])): item for item in found
        }.values()
    )


def _where(error: Exception) -> str:
    """The last line outside torch that led there."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in _OWN]
    ours = [f for f in frames if f"{os.sep}torch{os.sep}" not in f.filename]
    return f" ({os.path.basename(ours[-1].filename)}, line {ours[-1].lineno})" if ours else ""


def _arguments(
    forward: Callable[..., Any], tracer: "_Tracer"
) -> tuple[tuple[str, ...], int, dict[str, Any], list[Any]]:
    names, fixed, inputs, positional = [], {}, [], 0
    for name, parameter in list(inspect.signature(forward).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        names.append(name)
        positional += parameter.kind is not parameter.KEYWORD_ONLY
        if parameter.default is not parameter.empty:
            fixed[name] = parameter.default
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise Untraceable(f"its forward needs the keyword {name!r}")
        else:
            inputs.append(tracer.create_proxy("placeholder", name, (), {}))
    return tuple(names), positional, fixed, inputs


class _NoTensors(TorchFunctionMode):
    """Nothing is computed while a forward is traced: a tensor made without the input would be a constant."""

    def __init__(self, tracer: "_Tracer") -> None:
        super().__init__()
        self.tracer, self.looking = tracer, False  # at what a child computes

    def __torch_function__(self, func, types, args=(), kwargs=None):
        leaves = () if self.looking else tree_leaves((args, kwargs))
        if leaves != () and not any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return self.tracer.asked(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Value(fx.Proxy):
    """What stands for what a tensor or an operation gives. Its dtype is told only where it is known."""

    tracer: "_Tracer"

    @property
    def dtype(self) -> "_Dtype":
        self.tracer.one_dtype = self.tracer.has_one_dtype(self.node)
        return _Dtype(self, "dtype")

    def __str__(self) -> str:
        raise Untraceable("its forward makes a text of its input")

    def __format__(self, spec: str) -> str:
        raise Untraceable("its forward makes a text of its input")


class _Dtype(fx.proxy.Attribute):
    """The one floating dtype that all inputs and parameters are taken to have."""

    def __eq__(self, other: Any) -> bool:  # type: ignore[override]
        if type(other) is _Dtype:
            return True
        if not isinstance(other, torch.dtype) or other.is_floating_point:
            raise Untraceable("its forward asks which dtype its input has")
        return False

    def __ne__(self, other: Any) -> bool:  # type: ignore[override]
        return not self == other

    __hash__ = None  # type: ignore[assignment]


class _Tracer(fx.Tracer):
    def __init__(self, module: nn.Module, training: bool) -> None:
        super().__init__()
        self.root, self.training = module, training
        self.graph = fx.Graph(tracer_cls=fx.Tracer)
        self.tensor_attrs = {}
        self.reads: list[Read] = []
        self.one_dtype = False
        self.no_tensors = _NoTensors(self)
        kinds: set[type] = {original(type(m)) for m in module.modules()}
        self.reader = Reader({**{f.__name__: _careful(f) for f in _QUESTIONS}, "isinstance": self._isinstance}, kinds)
        self._paths: dict[int, tuple[str, ...]] = {}  # of the tensors and children that the forward read
        self._stands: dict[int, _Stand] = {}
        self._modes = _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None):
        if _modes() != self._modes:
            raise Untraceable("its forward switches gradients or autocast on or off")
        if writes(kind, target, args, kwargs) and isinstance(args[0], fx.Node) and args[0].op == "get_attr":
            raise Untraceable("its forward writes to a parameter or buffer")
        return self.graph.create_node(kind, target, args, kwargs, name, type_expr)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Value:
            return a.node
        if type(a) is _Stand:
            raise Untraceable("its forward hands a module to a function")
        if isinstance(a, Tensor):
            return self._node_of(a)
        odd = isinstance(a, dict | list | tuple) and type(a) not in _COLLECTIONS and not hasattr(a, "_fields")
        if odd or isinstance(a, enum.Enum) or (dataclasses.is_dataclass(a) and not isinstance(a, type)):
            raise Untraceable(f"its forward makes or hands on a {type(a).__name__}")
        return super().create_arg(a)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._paths:
            raise Untraceable("its forward takes a tensor that is neither an input nor an attribute")
        return self.graph.create_node("get_attr", ".".join(self._paths[id(tensor)]))

    def asked(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What torch is asked of a parameter or buffer; Untraceable where it would compute something."""
        name = getattr(func, "__name__", str(func))
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor) or id(tensor) not in self._paths or name not in {*_SIZES, "dtype", "device"}:
            raise Untraceable(f"its forward computes without its input ({name})")
        *path, attribute = self._paths[id(tensor)]
        if name == "device":
            return self.create_proxy("call_function", getattr, (tensor, "device"), {})
        if name == "dtype":
            self.one_dtype = True
            self.reads.append(Read(tuple(path), attribute, DTYPE))
            return _Dtype(_Value(self._node_of(tensor), self), "dtype")
        self.reads.append(Read(tuple(path), attribute, tuple(tensor.shape)))
        return func(*args, **kwargs)

    def _isinstance(self, value: Any, kinds: Any) -> bool:
        if type(value) is _Stand:
            return issubclass(value.__class__, kinds)
        if not isinstance(value, fx.Proxy):
            return isinstance(value, kinds)
        if type(value) is not _Value or not self._is_tensor(value.node):
            raise Untraceable("its forward asks for the type of what an operation gives")
        return issubclass(Tensor, kinds)

    def read(self, stand: "_Stand", module: nn.Module, path: tuple[str, ...], name: str) -> Any:
        """module.name, as the forward is to see it, and noted."""
        state, kind = vars(module), original(type(module))
        if name == "__class__":
            self.reads.append(Read(path, name, kind))
            return kind
        found = static(kind, name)
        if isinstance(found, property):
            self.reads.append(Read(path, name, found))
            return self.reader.told(found.fget)(stand)
        if name == "training":
            return self._noted(path, name, self.training)
        if name == "_modules":
            self.reads.append(Read(path, name, tuple(state[name])))
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
            self.reads.append(Read(path, name, found))
            return types.MethodType(self.reader.told(found), stand)
        if found is ABSENT:
            self.reads.append(Read(path, name, ABSENT))
            raise AttributeError(f"{kind.__name__!r} object has no attribute {name!r}")
        return self._noted(path, name, getattr(kind, name))

    def _child(self, path: tuple[str, ...], name: str, child: nn.Module | None) -> "_Stand | None":
        if child is None:
            return self._noted(path, name, None)
        if not self._is_known(child, path, name):
            self.reads.append(Read(path, name, PRESENT))
        return self._stands.setdefault(id(child), _Stand(self, child, (*path, name)))

    def _is_known(self, thing: Any, path: tuple[str, ...], name: str) -> bool:
        """Read before. Under another name, then the two must stay one."""
        first = self._paths.setdefault(id(thing), (*path, name))
        if first == (*path, name):
            return False
        self.reads.append(Read(path, name, Same(first)))
        return True

    def _noted(self, path: tuple[str, ...], name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not self._is_known(value, path, name):
                self.reads.append(Read(path, name, TENSOR))
            return value
        if not is_plain_value(value):
            raise Untraceable(f"its forward reads `{name}` ({type(value).__name__}), which may change")
        kept = list(value) if isinstance(value, list) else value
        if isinstance(value, functools.partial):
            kept = value.func, value.args, dict(value.keywords)
        self.reads.append(Read(path, name, kept))
        return immutable_list(value) if isinstance(value, list) else self.reader.told(value)

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or self._keeps_dtype(node)

    def _keeps_dtype(self, node: fx.Node) -> bool:
        """A layer whose output has its input's dtype, outside autocast."""
        if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return False
        *path, name = str(node.target).split(".")
        layer = self.root.get_submodule(str(node.target))
        self.no_tensors.looking = True
        try:
            known = type(layer) in (*PRODUCTS, nn.Dropout, nn.Identity) or transposed_linear(layer)
            if known or activation_of(layer) is not None:
                self.reads.append(Read((*path, name), "__class__", original(type(layer))))
                return True
            return False
        finally:
            self.no_tensors.looking = False

    def has_one_dtype(self, node: fx.Node) -> bool:
        """That of the input, where all that goes in has that. Untraceable where it is not known."""
        if node.op in ("placeholder", "get_attr"):
            return True
        if self._keeps_dtype(node) or node.target in _ARITHMETIC:
            return all(map(self.has_one_dtype, node.all_input_nodes))
        raise Untraceable(f"its forward asks for the dtype of what `{node.name}` gives")


def writes(kind: str, target: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a function or method writes to its first argument."""
    name = getattr(target, "__name__", str(target))
    if kind not in ("call_function", "call_method") or not args:
        return False
    in_place = name.endswith("_") and not name.endswith("__")
    in_place = in_place or name in _IN_PLACE or "out" in kwargs
    return in_place or kwargs.get("inplace") is True or any(arg is True for arg in args[1:])


def _careful(function: Callable[..., Any]) -> Callable[..., Any]:
    """A builtin that says nothing of what only stands for a tensor or a module."""

    def answer(*args: Any, **kwargs: Any) -> Any:
        reads = function in (hasattr, getattr) and type(args[0]) is _Stand
        if not reads and any(isinstance(arg, fx.Proxy) or type(arg) is _Stand for arg in args):
            raise Untraceable(f"its forward asks for {function.__name__}()")
        return function(*args, **kwargs)

    return answer


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch._C._is_any_autocast_enabled()


class _Stand:
    """A module as its own forward sees it while it is traced: called it is a node, what is read of it is noted."""

    __slots__ = ("_state",)

    def __init__(self, tracer: _Tracer, module: nn.Module, path: tuple[str, ...]) -> None:
        object.__setattr__(self, "_state", (tracer, module, path))

    def __getattribute__(self, name: str) -> Any:
        tracer, module, path = object.__getattribute__(self, "_state")
        return tracer.read(self, module, path, name)

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
