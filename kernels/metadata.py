"""What a launch tells of itself to a profiler such as Proton, which asks by Triton's hook; to nobody else.

`@triton.jit(launch_metadata=told(__name__, ...))`: its name with sizes, the bytes that it must move and, where a count
is given, its FLOPs. Needs no Triton.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

SHARED = {"ticket_ptr", "tickets_ptr", "counter_ptr", "failed_ptr"}  # counters, of which a launch takes a few


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of an argument, which may be None, a number, a tuple of others or a tensor's description."""
    value = getattr(value, "base", value)
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def distinct_bytes(t: torch.Tensor) -> int:
    """Of the elements in memory: what is expanded counts once."""
    sizes = (size for size, stride in zip(t.shape, t.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * t.element_size()


def told(
    module: str,
    flops: Callable[[dict[str, Any]], int] | None = None,
    untouched: tuple[str, ...] = (),
    visited: Callable[[dict[str, Any]], tuple[int, tuple[torch.Tensor, ...]]] | None = None,
) -> Callable[..., dict[str, Any]]:
    """launch_metadata of a kernel of that module: each tensor is moved once, but for those that may be `untouched`.

    flops(args) counts by the arguments' names, and is told by the width of the first floating-point one. visited(args)
    gives visits and tensors of which a row is moved a visit. Of what cannot be told that way, the kernel's name alone.
    """

    def metadata(grid: tuple, compiled: Any, args: dict[str, Any]) -> dict[str, Any]:
        try:
            return counted(compiled.name, args)
        except Exception:  # whatever the arguments are: no launch may fail since a profiler asks about it
            return {"name": compiled.name}

    def counted(kernel: str, args: dict[str, Any]) -> dict[str, Any]:
        tensors = {name: [*tensors_in(arg)] for name, arg in args.items() if name not in SHARED}
        given = [t for some in tensors.values() for t in some]
        moved = sum(distinct_bytes(t) for name, some in tensors.items() if name not in untouched for t in some)
        if visited is not None:
            visits, data = visited(args)
            moved += sum(visits * distinct_bytes(t[0]) - distinct_bytes(t) for t in data)
        found = {"name": f"{_name(module, kernel)} {_sizes(args, given)}", "bytes": moved}
        if flops is not None:
            width = 8 * next(t.element_size() for t in given if t.is_floating_point())
            found[f"flops{width}"] = flops(args)
        return found

    return metadata


def _name(module: str, kernel: str) -> str:
    """softmax.forward of softmax's _forward_kernel; of a kernel that has no other name than its module the module's."""
    module, kernel = module.rpartition(".")[2], kernel.removesuffix("kernel").strip("_")
    return module if module.endswith(kernel) else f"{module}.{kernel}"


def _sizes(args: dict[str, Any], tensors: list[torch.Tensor]) -> str:
    """Of a product M, N and K, else of the largest tensor."""
    product = [args[size] for size in "MNK" if size in args]
    sizes = product if len(product) == 3 else max(tensors, key=torch.Tensor.numel).shape
    return "x".join(map(str, sizes)) or "1"


def product_flops(args: dict[str, Any]) -> int:
    """Of x (M, K) and w (N, K)."""
    return 2 * args["M"] * args["N"] * args["K"]


def flops_each(argument: str, count: int) -> Callable[[dict[str, Any]], int]:
    """So many for each element of that argument."""
    return lambda args: count * next(tensors_in(args[argument])).numel()


def training_flops(visits: int, layers: list[tuple[int, int]]) -> int:
    """Of so many rows visited: y and dW of each layer of (inputs, outputs), and dx of all but the first."""
    sizes = [inputs * outputs for inputs, outputs in layers]
    return 2 * visits * (3 * sum(sizes) - sizes[0])
