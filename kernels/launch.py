"""A kernel's launch without most of what Triton does for it on the host.

`kernel[grid](...)` looks at every argument anew, writes down what it found, finds by that what it compiled, and asks
the driver about every pointer. `launch` leaves that to Triton once for each set of arguments that it may tell apart.
From then on it finds the compiled kernel by the arguments themselves and hands them over, pointers as numbers.

Triton compiles for the dtypes and the alignment of pointers, for the values of integers and of constants, and never
for a float's. The key holds the same and the types besides, since 1 equals True and 1.0. That a GPU reads a tensor's
memory is not asked again: `functional` has looked at its device.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from threading import RLock
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.compiler import CompiledKernel
from triton.knobs import compilation, runtime
from triton.runtime import JITFunction, driver

from .faults import run_again

KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")  # releases in which kernel[grid] does what is done here before compiled.run
OPTIONS = {"enable_fp_fusion": True}  # x * y + z in one rounding: Triton 3.9 warns where nobody says, 3.10 does without
VALUES = frozenset({int, bool, str, type(None)})  # of one such type, what is equal compiles alike: not 0.0 and -0.0


@dataclass(eq=False, slots=True)
class Signature:
    """Of a kernel: so many pointers come first, then so many integers, then all else; which constants are functions."""

    kernel: JITFunction  # held, so that no other takes its id
    pointers: int
    integers: int
    functions: tuple[str, ...]


class Warm(NamedTuple):
    """A compiled kernel, and what it is given in every launch."""

    run: Any  # the launcher that Triton made for it
    function: int
    metadata: tuple
    constants: tuple
    globals: tuple[tuple[dict, str, Any], ...]  # where the kernel's global variables stand, their names and values
    compiled: CompiledKernel  # held, since the function is unloaded with it


_SIGNATURES: dict[int, Signature] = {}
INTERPRETER = RLock()  # whose place in the grid, and whose changes to triton.language, are the whole process's


@lru_cache(4096, typed=True)
def _kept(*key: Any, **constants: Any) -> list[Warm]:
    """What was compiled for these arguments, once it is put there."""
    return []


def launch(kernel, grid, *args, **constants):
    """kernel[grid](*args, **constants), where the grid is a tuple."""
    signature = _SIGNATURES.get(id(kernel)) or _signature(kernel, args, constants)
    if signature is None or _watched(kernel):
        by_triton(kernel, grid, *args, **constants)
        return
    pointers, dtypes, bits = [], [], 0
    for t in args[: signature.pointers]:
        if t is None:
            pointers.append(None)
            dtypes.append(None)
        else:
            pointer = t.data_ptr()
            bits |= pointer
            pointers.append(pointer)
            dtypes.append(t.dtype)
    active = driver.active
    device = active.get_current_device()
    numbers = args[signature.pointers :]
    exact = constants
    if signature.functions:
        exact = constants.copy()  # a function's own hash takes half a microsecond
        for name in signature.functions:
            if name in exact:
                exact[name] = id(exact[name])
    kept = _kept(
        signature, device, tuple(dtypes), bits % 16 and tuple([p is None or p % 16 == 0 for p in pointers]),
        *numbers[: signature.integers], *map(_kind, numbers[signature.integers :]),
        **exact,
    )  # fmt: skip
    if not kept:
        compiled = by_triton(kernel, grid, *args, **constants)
        _keep(kept, compiled, kernel, numbers[: signature.integers], len(args), constants)
        return
    run, function, metadata, rest, global_variables, _ = kept[0]
    for names, name, value in global_variables:
        if names.get(name) is not value:
            kernel[grid](*args, **OPTIONS, **constants)  # which raises, unless it is as good as before
            return
    run(
        grid[0], grid[1] if len(grid) > 1 else 1, grid[2] if len(grid) > 2 else 1,
        active.get_current_stream(device), function, metadata, None, None, None,
        *pointers, *numbers, *rest,
    )  # fmt: skip


def by_triton(kernel, grid, *args, **constants):
    """kernel[grid](*args, **OPTIONS, **constants); interpreted, one at a time whatever thread it comes from.

    LaunchError where the kernel cannot be compiled or loaded.
    """

    def run():
        if type(kernel) is JITFunction:
            return kernel[grid](*args, **OPTIONS, **constants)
        with INTERPRETER:
            return kernel[grid](*args, **OPTIONS, **constants)

    try:
        return run()
    except Exception as fault:
        return run_again(run, fault, kernel)


def _signature(kernel, args, constants):
    """As the first launch shows it. None where Triton launches: interpreted, in an unknown release, not on NVIDIA.

    On AMD a pointer also counts by the size of its storage.
    """
    if type(kernel) is not JITFunction or not triton.__version__.startswith(KNOWN):
        return None
    try:
        target = driver.active.get_current_target()
    except Exception:
        return None  # Triton says why
    if target.backend != "cuda":
        return None
    pointers = len(list(takewhile(lambda name: name.endswith("_ptr"), kernel.arg_names[: len(args)])))
    integers = len(list(takewhile(lambda arg: type(arg) is int, args[pointers:])))
    functions = tuple(name for name, value in constants.items() if type(value) is JITFunction)
    signature = _SIGNATURES[id(kernel)] = Signature(kernel, pointers, integers, functions)
    return signature


def _watched(kernel):
    """Whether somebody looks on at launches, or has kernels compiled in another way for a while."""
    try:
        return (
            runtime.launch_enter_hook.calls
            or runtime.launch_exit_hook.calls
            or kernel.pre_run_hooks
            or runtime.debug
            or runtime.add_stages_inspection_hook
            or compilation.instrumentation_mode
        )
    except AttributeError:
        return True  # a hook in the place of Triton's list of hooks


def _kind(arg):
    """What of an argument Triton may compile for."""
    if arg is None:
        return None
    kind = type(arg)
    if kind is tuple:
        kinds = tuple(map(type, arg))
        return kinds, arg if VALUES.issuperset(kinds) else tuple(map(_kind, arg))
    if kind in VALUES:
        return kind, arg
    if kind is float:
        return kind
    if kind is tl.constexpr and type(arg.value) in (int, bool, float):
        return kind, repr(arg.value)
    return object()  # equal to nothing


def _keep(kept, compiled, kernel, integers, given, constants):
    """Puts there what was compiled, where the key tells all that it was compiled for."""
    types = {*map(type, integers), *map(type, constants.values())}
    if type(compiled) is CompiledKernel and types <= VALUES | {JITFunction, tl.dtype}:
        rest = tuple(constants.get(param.name, param.default) for param in kernel.params[given:])
        places = [(names, name) for (name, _), (_, names) in kernel.used_global_vals.items()]
        global_variables = tuple((names, name, names.get(name)) for names, name in places)
        kept[:] = [Warm(compiled.run, compiled.function, compiled.packed_metadata, rest, global_variables, compiled)]
