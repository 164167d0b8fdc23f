"""A kernel that cannot be compiled or loaded here: what is tried once more, and what is told. Imports no Triton.

What Triton's cache does to a launch ends there: a damaged kernel is compiled anew in its place, and where the folder
cannot be read or written this process keeps its kernels in one of its own.
"""

import atexit
import errno
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import currentframe
from json import JSONDecodeError
from multiprocessing import current_process
from tempfile import mkdtemp
from threading import Lock
from traceback import walk_tb
from typing import Any

import torch

_COMPILING = "triton.compiler", "triton.runtime.build", "triton.runtime.driver"  # which also load, and start the driver
_REFUSED = "kernel image", "kernel file", "device function", "symbol not found", "PTX"  # what a driver says of code
_OLD_DRIVER = "unsupported toolchain"
_NO_COMPILER = "C compiler", "non-zero exit status"  # what Triton's build says without one, and with one that fails
_PASSING = MemoryError, torch.OutOfMemoryError, torch.AcceleratorError
_SHORTAGES = errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE  # of memory, processes, open files
_WARNED: set[str] = set()
_FOLDER: list[str] = []  # this process's own cache, once it has one
_REMEDY = Lock()  # a remedy turns knobs that are the whole process's


class LaunchError(RuntimeError):
    """A kernel that cannot be compiled or loaded. cause: in one line; everywhere: no other kernel can be either."""

    def __init__(self, what: str, error: Exception) -> None:
        self.cause = _one_line(error)
        self.everywhere = isinstance(error, OSError | ImportError) or _says(error, *_NO_COMPILER, _OLD_DRIVER)
        super().__init__(f"{what} cannot be compiled or loaded: {self.cause}")


def run_again(run: Callable[[], Any], fault: Exception, kernel: Any = None) -> Any:
    """run(), which has ended in that fault, where the cache may be the reason. LaunchError where it is not."""
    error = _of_compiling(fault)
    with _REMEDY:
        for remedy, cures in ((_anew, _is_damage), (_elsewhere, _is_of_the_folder)):
            if not cures(error):
                continue
            getattr(kernel, "device_caches", {}).clear()  # a kernel whose code was refused is kept there
            try:
                with remedy() as done:
                    found = run()
            except Exception as another:
                error = _of_compiling(another)
            else:
                _warn(remedy.__name__, f"{done} ({_one_line(fault)})")
                return found
    raise LaunchError(_name(kernel), error) from fault


def _of_compiling(error: Exception) -> Exception:
    """The error, where it comes out of compiling or loading. Else it is raised: what comes out of launching; what may
    pass, as a shortage; an earlier kernel's fault, which a driver tells late; and whatever ends a capture.
    """
    of_the_driver = _says(error, "Triton Error")
    if of_the_driver and _says(error, "out of memory"):
        raise torch.OutOfMemoryError(str(error)) from error
    modules = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    if (
        isinstance(error, _PASSING)
        or getattr(error, "errno", None) in _SHORTAGES
        or (of_the_driver and not _says(error, *_REFUSED))
        or not any(module.startswith(_COMPILING) for module in modules)
        or _is_capturing()
    ):
        raise error
    return error


def _says(error: Exception, *texts: str) -> bool:
    return any(text in str(error) for text in texts)


def _is_damage(error: Exception) -> bool:
    """Of a file that Triton has read: of its text, or of the code that the driver was given."""
    if isinstance(error, JSONDecodeError | UnicodeDecodeError | KeyError):
        return True
    return _says(error, "Triton Error") and not _says(error, _OLD_DRIVER)


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
        _FOLDER.append(mkdtemp(prefix="fusedact-triton-"))
        atexit.register(_remove, _FOLDER[0], current_process().pid)
    knobs.cache.dir = _FOLDER[0]  # Triton tells it to the processes that this one starts, too
    try:
        yield f"Triton's cache {before} cannot be used: this process keeps its kernels in a temporary folder"
    except BaseException:
        knobs.cache.dir = before
        raise


def _remove(folder: str, owner: int) -> None:
    if current_process().pid == owner:  # not a forked child
        shutil.rmtree(folder, ignore_errors=True)


def _warn(key: str, text: str) -> None:
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel())


def stacklevel() -> int:
    """For a warning of the function that asks: the first line outside of fusedact and torch."""
    level, frame = 1, currentframe().f_back
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in ("fusedact", "torch"):
        level, frame = level + 1, frame.f_back
    return level


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
