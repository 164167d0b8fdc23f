"""Where kernels cannot be compiled or loaded: torch's own formula in their place, remembered by what they compile for.

Without that each call would spend the seconds of a compilation to fail again. Asked for by name, an op tries again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedact import backend

GIVEN_UP: set[tuple] = set()


def kind_of(name: str, args: Any) -> tuple:
    """Of a call, what its kernels may be compiled for: devices, dtypes and names, not numbers."""
    return name, *map(_kind, args)


def _kind(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.device, arg.dtype
    if isinstance(arg, list | tuple):
        return tuple(map(_kind, arg))
    return arg if arg is None or isinstance(arg, str | bool | torch.dtype) else type(arg)


def is_given_up(kind: tuple) -> bool:
    return kind in GIVEN_UP and backend.get_backend() != "triton"


def give_up(kind: tuple, error: Exception) -> None:
    """Remembers it, with a warning; under 'triton' raises the error."""
    backend.give_up(error)
    GIVEN_UP.add(kind)


def guarded(run: Callable[..., Any], instead: Callable[..., Any], *kinds: Callable[..., tuple]) -> Callable[..., Any]:
    """run, with its tensors' GPU made current, since a launch goes to the current one; or `instead` of it.

    The first of the kinds that it tells of its arguments is what it gives up; another one's loss ends it too, whatever
    the backend: what a registered op in its place has not saved cannot be read.
    """

    def there(*args: Any) -> Any:
        with backend.on_device(next(arg for arg in args if isinstance(arg, Tensor))):
            if GIVEN_UP and _ends(*(kind(*args) for kind in kinds)):
                return instead(*args)
            try:
                return run(*args)
            except backend.launch_error() as error:
                give_up(kinds[0](*args), error)
                return instead(*args)

    return there


def _ends(own: tuple, *others: tuple) -> bool:
    return is_given_up(own) or any(kind in GIVEN_UP for kind in others)
