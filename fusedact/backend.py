"""Which implementation runs, on what chip, at which precision; and what the doors ask of torch's private state.

The choice is the process's: `FUSEDACT_BACKEND`, read at the first call, then `set_backend` and `use_backend`.
`auto` runs Triton for CUDA tensors from compute capability 8.0 and for ROCm tensors, PyTorch for everything else.
"""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedact.tuning import Chip

BACKENDS = ("auto", "triton", "torch")
FLOAT32 = ("auto", "ieee")
KERNEL_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
PLAIN = frozenset({Tensor, torch.nn.Parameter})  # types whose memory a kernel may read
_HERE = nullcontext()
_STRIDED, _is_batched = torch.strided, torch._C._functorch.is_legacy_batchedtensor  # bound: asked for every gradient
_chosen: str | None = None
_float32: str | None = None
_broken: str | None = None  # why no kernel can be launched, since one has shown it
_warned: set[str] = set()  # what was told already
_Result = TypeVar("_Result")


def get_backend() -> str:
    """The backend in force: 'auto', 'triton' or 'torch'."""
    global _chosen
    if _chosen is None:
        _chosen = _checked(os.environ.get("FUSEDACT_BACKEND", "auto"))
    return _chosen


def set_backend(name: str) -> None:
    """Choose the backend for the whole process; ValueError for a name that is none."""
    global _chosen
    _chosen = _checked(name)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """The backend inside the `with` block, for the whole process; the former one after it."""
    global _chosen
    before, _chosen = _chosen, _checked(name)
    try:
        yield
    finally:
        _chosen = before


def _checked(name: str, names: tuple[str, ...] = BACKENDS, what: str = "backend") -> str:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}, expected one of {', '.join(names)}")
    return name


def _constant(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """torch.compiler.assume_constant_result, which would import torch._dynamo and Triton to set this one flag."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uses_triton(x: Tensor) -> bool:
    """Whether ops on x run Triton kernels. RuntimeError with the cause where 'triton' was asked for and cannot."""
    name = _chosen or get_backend()
    if (name == "auto" and not x.is_cuda) or name == "torch" or x.is_meta:
        return False
    problem = triton_problem(x.device)
    if problem is None:
        return _broken is None or name == "triton"  # which tries again
    if name == "triton":
        raise RuntimeError(f"backend 'triton' was asked for, but cannot run on {x.device}: {problem}")
    _warn_once(problem, problem)
    return False


def launch_error() -> type[Exception]:
    """What a kernel that cannot be compiled or loaded raises; as `except` asks for it, Triton's part is imported."""
    from fusedact.kernels.faults import LaunchError

    return LaunchError


def give_up(error: Any) -> None:
    """A warning, once for each cause, that torch's operations answer instead; under 'triton' the error itself."""
    global _broken
    if get_backend() == "triton":
        raise error
    if error.everywhere:
        _broken = error.cause
    _warn_once(error.cause, str(error))


@_constant
def triton_problem(device: torch.device) -> str | None:
    """Why Triton cannot run on that device, or None where it can. Asked once per device."""
    return _triton_problem(device)


@functools.cache
def _triton_problem(device: torch.device) -> str | None:
    try:
        import triton

        interprets = triton.knobs.runtime.interpret
    except Exception as error:  # of a broken or an old installation any
        return f"Triton does not import ({type(error).__name__}: {error})"
    if interprets:
        _fork_between_launches()
        return None if device.type in ("cpu", "cuda") else "the interpreter takes CPU tensors"
    if device.type != "cuda":
        return "Triton runs on GPUs (set TRITON_INTERPRET=1 before the first import to interpret it on a CPU)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or newer"
    return _driver_problem()


@functools.cache
def _fork_between_launches() -> None:
    """A fork waits for the interpreter, which the child would find locked and half-way through a kernel."""
    from fusedact.kernels.launch import INTERPRETER

    if hasattr(os, "register_at_fork"):
        release = INTERPRETER.release
        os.register_at_fork(before=INTERPRETER.acquire, after_in_parent=release, after_in_child=release)


def _driver_problem() -> str | None:
    """Why Triton's driver does not start, which compiles a part of itself; without it no kernel would be launched."""
    from triton.runtime import driver

    from fusedact.kernels.faults import LaunchError, run_again

    def start() -> None:
        driver.active.get_current_target()

    try:
        start()
    except Exception as fault:
        try:
            run_again(start, fault)
        except LaunchError as error:
            return str(error)
    return None


def looks_at_values(t: Tensor) -> bool:
    """Whether labels and probabilities out of range are looked for, before a launch.

    On a CPU they are; on a GPU, where that is a synchronisation, under FUSEDACT_CHECKS=1. Never while torch traces,
    transforms or captures a graph.
    """
    if torch.compiler.is_compiling() or transforming() or dispatching() or type(t) not in PLAIN:
        return False
    return not t.is_cuda or (_checks() and not torch.cuda.is_current_stream_capturing())


@functools.cache
def _checks() -> bool:
    value = os.environ.get("FUSEDACT_CHECKS", "0")
    if value not in ("0", "1"):
        raise ValueError(f"FUSEDACT_CHECKS is {value!r}, expected 0 or 1")
    return value == "1"


@_constant  # else an error in a compiled graph
def _warn_once(cause: str, text: str) -> None:
    from fusedact.kernels.faults import stacklevel

    if cause not in _warned:
        _warned.add(cause)
        warnings.warn(f"fusedact runs stock PyTorch operations: {text}", RuntimeWarning, stacklevel=stacklevel())


@functools.cache
def chip(device: torch.device, library: bool = True) -> Chip:
    """What the choice of a kernel asks of a device; whether that may be the library's. The interpreter plays Hopper."""
    if device.type != "cuda":
        return Chip("sm_90", 227 * 1024, warp_size=32, multiprocessors=132, interpreted=True, library=False)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    # Newer consumer chips have neither the matrix instructions nor the shared memory of sm_90 and sm_100.
    kind = {9: "sm_90", 10: "sm_100"}.get(properties.major, "sm_80") if torch.version.hip is None else "gfx942"
    return Chip(
        kind, shared, properties.warp_size, properties.multi_processor_count, library=library, name=properties.name
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a grid surely run at once. In the interpreter one does: they run one after the other."""
    return chip(device).multiprocessors if device.type == "cuda" else 1


@functools.cache
def is_ampere(device: torch.device) -> bool:
    """NVIDIA's chips before Hopper, whose compiler must be told that a program may take all registers."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 8


def on_device(x: Tensor) -> AbstractContextManager:
    """x's GPU made current where it is not: a launch goes to the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


def elsewhere(x: Tensor) -> bool:
    """x is on a GPU that is not the current one, to which a launch would go."""
    return x.is_cuda and x.get_device() != torch.cuda.current_device()


# How many dispatch modes are on: fake tensors, FLOP counting, selective checkpointing.
dispatching = torch._C._len_torch_dispatch_stack


@contextmanager
def recording() -> Iterator[None]:
    """Inside, autograd records, in the body of a registered op too, above which its dispatch keys are left out."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    with torch.enable_grad(), torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def process_group(name: Any) -> Any:
    """The group of processes of that name, a string, as the schema of an op carries it."""
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


@contextmanager
def overlooking() -> Iterator[None]:
    """Inside, no dispatch mode counts: under one that only looks on, ops launch as they do without it."""
    global dispatching
    before, dispatching = dispatching, lambda: 0
    try:
        yield
    finally:
        dispatching = before


# What torch.backends.cuda.matmul.fp32_precision asks, without its microsecond of Python.
_float32_precision = torch._C._get_fp32_precision_getter


def dot_precision(dtype: torch.dtype) -> str:
    """How exact a product is: tf32 by torch's own setting, old or new; else ieee, or forced ieee.

    What need not be IEEE arithmetic itself but as accurate may come from three products on tensor cores.
    """
    if dtype is not torch.float32:
        return "ieee"
    if _float32_precision("cuda", "matmul") == "tf32":
        return "tf32"
    return "forced ieee" if (_float32 or get_float32()) == "ieee" else "ieee"


def get_float32() -> str:
    """How float32 products are taken where torch asks for full precision: 'auto' or 'ieee'."""
    global _float32
    if _float32 is None:
        _float32 = _checked(os.environ.get("FUSEDACT_FLOAT32", "auto"), FLOAT32, "float32 arithmetic")
    return _float32


def set_float32(name: str) -> None:
    """'auto': the fastest that is as accurate as IEEE arithmetic; 'ieee': IEEE arithmetic itself. For the process."""
    global _float32
    _float32 = _checked(name, FLOAT32, "float32 arithmetic")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What a loss in that dtype is added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The low precision of the autocast region that x is in, or None outside one."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@_constant
def transforming() -> bool:
    """Inside vmap, grad, jvp or another functorch transform, or at a level of forward-mode AD."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unreadable(t: Tensor | None) -> bool:
    """A gradient that no kernel reads: many in one, of `is_grads_batched=True`; a sparse one; torch's zeros without
    memory.
    """
    return t is not None and (t.layout is not _STRIDED or _is_batched(t) or t._is_zerotensor())


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply without the Python that looks for functorch, which the doors have ruled out."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def profiling() -> bool:
    """Whether torch's profiler records or, under emit_nvtx, hands ranges to NVTX. A range that nobody asks for costs
    6 µs.
    """
    return profiler._is_profiler_enabled


def named(name: str, run: Callable[..., _Result]) -> Callable[..., _Result]:
    """run, recorded as a range of that name."""

    def there(*args: Any) -> _Result:
        with profiler.record_function(name):
            return run(*args)

    return there


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor, whose module nothing of ours imports before there is one."""
    if type(t) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_transparent(t: Tensor) -> bool:
    """A subclass whose memory a kernel may read as a tensor's.

    It has no __torch_function__ of its own and wraps no other tensors, as DTensor does. Not `has_torch_function`,
    which is also true inside `with torch.device(...)` and every other function mode.
    """
    kind = type(t)
    disabled = kind.__torch_function__ is torch._C._disabled_torch_function_impl
    return disabled and not is_traceable_wrapper_subclass(t) and not is_sharded(t)  # Dynamo does not know the former
