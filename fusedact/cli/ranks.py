"""A command in each of the processes that torchrun started: one prints and writes, and a fault is said once."""

import io
import itertools
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from datetime import timedelta

import torch.distributed as dist

from fusedact.distributed import processes

SHARED = ("train", "compare")  # commands whose work processes can share; compare its sweep alone
WAIT = 5.0  # seconds that the others leave the first process to say what all may have found

_runs = itertools.count()  # as many in each process


def run(command: Callable[[], int | str], words: list[str]) -> int:
    """The command's exit code, of those words. A text in its place, or an exception, is a fault."""
    name = next((word for word in words if not word.startswith("-")), "")
    if not name or "--help" in words:
        return _by_the_first(command)
    if name not in SHARED:
        fault = f"{name} runs in one process: start it without torchrun, which is for train and for compare --sweep"
        return _by_the_first(lambda: fault)
    with processes.group() as stores, processes.heeding_torchrun():
        with _speaking():
            try:
                result = command()
                fault = result if isinstance(result, str) else ""
            except Exception:
                result, fault = 1, traceback.format_exc().rstrip()
        prefix = f"fusedact/run/{next(_runs)}"
        own, lasting = (dist.PrefixStore(prefix, store) for store in stores)
        if fault and _is_said_here(fault, isinstance(result, str), own, lasting):
            _print(fault)
        return 2 if isinstance(result, str) else result


def _by_the_first(command: Callable[[], int | str]) -> int:
    """The exit code of what needs no group, and is printed by the first process alone, in its first attempt."""
    with _speaking():
        result = command()
    if isinstance(result, int):
        return result
    if processes.rank():
        time.sleep(WAIT)  # torchrun ends all with the one that ends first, which must have spoken
    elif not processes.restarts():
        _print(result)
    return 2


def _speaking() -> AbstractContextManager[object]:
    """The first process prints; of the others nothing is seen."""
    return redirect_stdout(io.StringIO()) if processes.rank() else nullcontext()


def _is_said_here(fault: str, user_error: bool, own: dist.Store, lasting: dist.Store) -> bool:
    """Whether this process says it: the first that found any, or of a user's error the first process if it found it.

    What a user gave wrong is said by the first attempt of torchrun's alone.
    """
    try:
        if user_error and processes.rank():
            with suppress(dist.DistStoreError):  # nobody has found anything
                own.wait(["found"], timedelta(seconds=WAIT))
        return own.add("found", 1) == 1 and (not user_error or lasting.add(fault, 1) == 1)
    except RuntimeError:  # the store is gone with the process that kept it
        return True


def _print(fault: str) -> None:
    who = f"fusedact: rank {processes.rank()}:" if processes.rank() else "fusedact:"
    print(who, fault, file=sys.stderr, flush=True)
