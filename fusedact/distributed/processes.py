"""The processes of a run: who they are, their group by torchrun's environment, and what one of them tells the rest."""

import gc
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import Any, TypeVar

import torch.distributed as dist

ENVIRONMENT = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # torchrun sends the second to the rest when a process has died

T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return set(os.environ) >= ENVIRONMENT


def local_rank() -> int:
    """This process's number on its machine, by which it takes a GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarts() -> int:
    """How often torchrun has started this machine's processes again since one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def started() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number in the group, or before there is one in torchrun's environment; else 0."""
    if started():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


def world() -> int:
    """How many processes the group has; 1 where there is none."""
    return dist.get_world_size() if started() else 1


def restarted() -> bool:
    """Whether torchrun has started the group's processes again, as any machine has counted."""
    counts = [restarts()] * world()
    if started():
        dist.all_gather_object(counts, restarts())
    return any(counts)


@contextmanager
def group() -> Iterator[tuple[dist.Store, dist.Store]]:
    """The process group that torchrun's environment describes: gloo for CPUs, NCCL for CUDA. One at hand stays.

    Yields the group's own store, and one that outlives it where torchrun keeps it and starts processes again.
    The group's threads end with it: one that lets go of a tensor while the interpreter ends aborts the process
    (PyTorch issue 190489).
    """
    if started():
        at_hand: Any = dist.group.WORLD
        yield (at_hand.get_group_store(),) * 2
        return
    store, number, count = next(dist.rendezvous("env://"))
    # Started again, processes would find the dead ones' addresses in torchrun's store.
    own = dist.PrefixStore(f"fusedact/{restarts()}", store) if _outlives_processes() else store
    import_module("torch.distributed.nn.functional")  # DDP imports it, and its defaults keep a group that is there
    dist.init_process_group(store=own, rank=number, world_size=count)
    try:
        yield own, store
    finally:
        gc.collect()  # DDP's modules, which keep the group too
        dist.destroy_process_group()


def _outlives_processes() -> bool:
    """Whether torchrun keeps the store itself, else the first process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def in_turn(make: Callable[[], T]) -> T:
    """What `make` returns in each process, called in the first of every machine before the others there.

    So that files which it makes where they are absent are made once. An exception of a first is everyone's.
    """
    if not started():
        return make()
    first = local_rank() == 0
    made: Any
    made, fault = _tried(make) if first else (None, None)
    faults: list[Exception | None] = [None] * world()
    dist.all_gather_object(faults, fault)
    for found in filter(None, faults):
        raise found
    return made if first else make()


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the group's first process alone, in every one; its exception is everyone's."""
    if not started():
        return make()
    told: list[Any] = list(_tried(make)) if rank() == 0 else [None, None]
    dist.broadcast_object_list(told, src=0)
    made, fault = told
    if fault is not None:
        raise fault
    return made


def _tried(make: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What it returns, or its exception; as a RuntimeError where its own type cannot be sent."""
    try:
        return make(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, RuntimeError(f"{type(error).__name__}: {error}")
        return None, error


@contextmanager
def heeding_torchrun() -> Iterator[None]:
    """The first of SIGINT and SIGTERM is a KeyboardInterrupt, those after it are nothing: time for what must be saved.

    torchrun sends one more to processes that a terminal has interrupted, and ends them after half a minute.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handling(interrupt):
        yield


@contextmanager
def unstoppable() -> Iterator[None]:
    """SIGINT and SIGTERM are nothing where torchrun sends them: who lost another process saves before its own end."""
    if not launched():
        yield
        return
    with _handling(signal.SIG_IGN):
        yield


@contextmanager
def _handling(handler: Any) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in SIGNALS}
    try:
        yield
    finally:
        for each, former in before.items():
            signal.signal(each, former)
