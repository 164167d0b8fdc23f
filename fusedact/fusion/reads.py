"""What a forward read of its module while it was traced, and whether it would find the same now."""

import functools
import types
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedact.fusion.codes import PLAIN
from fusedact.nn.container import Sequential
from fusedact.nn.hooks import is_plain

# What a read found: nothing of that name, a tensor, a tensor of the input's dtype, a child.
ABSENT, TENSOR, DTYPE, PRESENT = object(), object(), object(), object()


class Same(NamedTuple):
    """A child or tensor that the forward read under another path before."""

    path: tuple[str, ...]


class Read(NamedTuple):
    """An attribute that a forward read, of the module at a path within its own, and what was found."""

    path: tuple[str, ...]
    name: str
    value: Any

    @property
    def of_structure(self) -> bool:
        """Which children there are, no more."""
        return self.value is PRESENT or isinstance(self.value, Same) or self.name in ("_modules", "__class__")

    def holds(self, module: nn.Module, dtype: torch.dtype | None) -> bool:
        """Whether it would find the same now; dtype is that of the input, None where it differs among inputs."""
        owner: Any = module
        for child in self.path:
            owner = owner._modules.get(child)
            if owner is None:
                return False
        if self.name == "_modules":
            return tuple(owner._modules) == self.value
        if self.name == "__call__":
            return is_plain(owner)
        if isinstance(self.value, property):
            return static(original(type(owner)), self.name) is self.value
        if self.name == "__class__":
            return original(type(owner)) is self.value
        if isinstance(self.value, Same):
            return _at(owner, (self.name,)) is _at(module, self.value.path)
        if self.value is PRESENT:
            return owner._modules.get(self.name) is not None
        value = getattr(owner, self.name, ABSENT)
        if isinstance(value, Tensor):
            return self.value is TENSOR or (value.dtype is dtype if self.value is DTYPE else value.shape == self.value)
        if isinstance(value, types.MethodType):
            return value.__func__ is self.value
        if isinstance(value, functools.partial):
            return (value.func, value.args, value.keywords) == self.value
        return value is self.value or self._equals(value)

    def _equals(self, value: Any) -> bool:
        return type(value) is type(self.value) and is_plain_value(value) and value == self.value


def _at(module: Any, path: tuple[str, ...]) -> Any:
    """The child or tensor at a path."""
    for name in path:
        module = getattr(module, name, None)
    return module


def is_plain_value(value: Any) -> bool:
    """Which nobody changes unseen: a list of such is compared."""
    if type(value) in (tuple, list):
        return all(type(item) in PLAIN for item in value)
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, types.ModuleType)
    if isinstance(value, functools.partial):
        return all(type(item) in PLAIN for item in (*value.args, *value.keywords.values())) and callable(value.func)
    return type(value) in PLAIN or isinstance(value, types.FunctionType | type)


def static(kind: type, name: str) -> Any:
    """What the class has of that name, or ABSENT, as inspect.getattr_static, into which torch 2.11 does not compile."""
    for base in kind.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return ABSENT


def original(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused one was made of, also where fully_shard put one of torch.distributed's over that."""
    for base in kind.__mro__:
        if "_original" in vars(base):
            return vars(base)["_original"]
        if not base.__module__.startswith("torch.distributed."):
            break
    return kind


def is_fused(kind: type[nn.Module]) -> bool:
    """Whether that class itself was made by `fuse`."""
    return "_original" in vars(kind)


def is_sequential(kind: type[nn.Module]) -> bool:
    """Whether it runs our Sequential's forward, as the class that fully_shard made of that does."""
    return static(original(kind), "forward") is Sequential.forward
