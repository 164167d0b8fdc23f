"""A kernel that cannot be compiled or loaded here: what is tried once more, and what is told. Imports no Triton.

What Triton's cache does to a launch ends there: a damaged kernel is compiled anew in its place, and where the folder
cannot be read or written this process keeps its kernels in one of its own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from tempfile import TemporaryDirectory
from typing import Any

import torch

_WARNED: set[str] = set()
_FOLDER: list[TemporaryDirectory] = []  # this process's own cache, once it has one
_NO_COMPILER = "C compiler", "non-zero exit status"  # what Triton's build says without one, and with one that fails


class LaunchError(RuntimeError):
    """A kernel that cannot be compiled or loaded. cause: in one line; everywhere: no other kernel can be either."""

    def __init__(self, what: str, error: Exception) -> None:
        self.cause = _one_line(error)
        known = any(said in self.cause for said in _NO_COMPILER)
        self.everywhere = known or isinstance(error, OSError | ImportError)
        super().__init__(f"{what} cannot be compiled or loaded: {self.cause}")


def run_again(run: Callable[[], Any], fault: Exception, kernel: Any = None) -> Any:
    """run(), which has ended in that fault, where the cache may be the reason. LaunchError where it is not.

    What says that memory is short passes, and what goes wrong inside a capture, which it ends.
    """
    if isinstance(fault, torch.OutOfMemoryError | MemoryError) or _is_capturing():
        raise fault
    if "out of memory" in str(fault):
        raise torch.OutOfMemoryError(str(fault)) from fault
    error = fault
    for remedy, cures in ((_anew, _is_damage), (_elsewhere, _is_of_the_folder)):
        if not cures(error):
            continue
        getattr(kernel, "device_caches", {}).clear()  # a kernel whose code was refused is kept there
        try:
            with remedy() as done:
                found = run()
        except Exception as another:
            error = another
        else:
            _warn(remedy.__name__, f"{done} ({_one_line(fault)})")
            return found
    raise LaunchError(_name(kernel), error) from fault


def _is_damage(error: Exception) -> bool:
    """Of a file that Triton has read: of its text, or of the code that the driver was given."""
    if isinstance(error, JSONDecodeError | UnicodeDecodeError | KeyError):
        return True
    return "Triton Error" in str(error)


def _is_of_the_folder(error: Exception) -> bool:
    """Also what is damaged and cannot be compiled anew: Triton 3.6 reads a group's list of files in any case."""
    return isinstance(error, OSError | JSONDecodeError)


@contextmanager
def _anew() -> Iterator[str]:
    from triton import knobs

    with knobs.compilation.scope():
        knobs.compilation.always_compile = True
        yield f"a damaged kernel in Triton's cache {knobs.cache.dir} was compiled anew"


@contextmanager
def _elsewhere() -> Iterator[str]:
    from triton import knobs

    before = knobs.cache.dir
    if not _FOLDER:
        _FOLDER.append(TemporaryDirectory(prefix="fusedact-triton-"))
    knobs.cache.dir = _FOLDER[0].name  # Triton tells it to the processes that this one starts, too
    try:
        yield f"Triton's cache {before} cannot be used: this process keeps its kernels in a temporary folder"
    except BaseException:
        knobs.cache.dir = before
        raise


def _warn(key: str, text: str) -> None:
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(text, RuntimeWarning, stacklevel=4)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _name(kernel: Any) -> str:
    function = getattr(kernel, "fn", None)
    if function is None:
        return "Triton's driver"
    return f"kernel {function.__module__.rpartition('.')[2]}.{function.__name__}"


def _one_line(error: Exception) -> str:
    """Its type and what it says; of a place in a kernel's source what is wrong there, which Triton says last."""
    while type(error).__name__ == "CompilationError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # inside the function that is called there
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    text = lines[-1 if lines[0].startswith("at ") else 0] if lines else ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
