"""launch against kernel[grid], argument for argument, for a GPU that is not there.

The checks run in a process of their own, this file as a script, since the interpreter that the tests use replaces
triton.jit. The driver says that it is a Hopper, the compiler makes nothing, and the launcher notes what it is given:
which compiled kernel, and every argument as C would read it. Whatever kernel[grid] gives to it, `launch` must give.
"""

import functools
import gc
import itertools
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import Parameter
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend
from triton.runtime import JITFunction

import fusedact
from fusedact import backend, kernels
from fusedact import functional as F
from fusedact.kernels import (
    bce,
    bias_activation,
    class_shards,
    cross_entropy,
    elementwise,
    gated,
    multilabel,
    nll,
    softmax,
)
from fusedact.kernels import launch as warm

OPS = (bce, bias_activation, class_shards, cross_entropy, elementwise, gated, multilabel, nll, softmax)
DRY_LAUNCH = Path(__file__).with_name("dry_launch.py")
SCALE = tl.constexpr(3)
GIVEN: list[tuple] = []  # of each launch
COMPILED = itertools.count(1)


@triton.jit
def _double(x):
    return 2 * x


@triton.jit
def _kernel(x_ptr, y_ptr, n, m, numbers, FUNCTION: tl.constexpr, SIZE: tl.constexpr, LAST: tl.constexpr = 7):
    tl.store(x_ptr, FUNCTION(n) * SCALE)


class Other:
    @triton.jit
    def _double(x):
        return x + x


# A GPU that is not there


def as_read(arg: Any) -> Any:
    """What the C launcher makes of an argument; a tensor and its address are one to it."""
    if isinstance(arg, torch.Tensor):
        return as_read(arg.data_ptr())
    if isinstance(arg, tuple):
        return tuple(map(as_read, arg))
    if isinstance(arg, tl.constexpr):
        return tl.constexpr, repr(arg.value)
    return (type(arg), id(arg)) if isinstance(arg, JITFunction) else (type(arg), repr(arg))


def launcher(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args) -> None:
    for hook in filter(None, (enter, leave)):
        hook(launch_metadata)
    GIVEN.append(((x, y, z), stream, function, metadata, *map(as_read, args)))


class Driver:
    """A chip, and which of such devices and of its streams are current."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *args: (object(), next(COMPILED), 0, 0, 1024),
        unload_module=lambda module: None,
    )

    def __init__(self, target: GPUTarget, device: int = 0):
        self.device, self.stream = device, 0
        self.launcher_cls = lambda src, metadata: launcher
        self.get_current_target = lambda: target
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: device * 100 + self.stream


HOPPER = Driver(GPUTarget("cuda", 90, 32))
MI300 = Driver(GPUTarget("hip", "gfx942", 64), device=3)  # of which nothing is compiled yet


def compile_nothing(src, target, options):
    """A compiled kernel without code, as Triton would read it from its cache."""
    folder = Path(tempfile.mkdtemp(dir=os.environ["TRITON_CACHE_DIR"]))
    metadata = {"name": src.name, "target": target.__dict__, "num_ctas": 1, "shared": 0, "warp_size": target.warp_size}
    metadata |= {name: options[name] for name in ("num_warps", "enable_fp_fusion")}
    (folder / "kernel.json").write_text(json.dumps(metadata))
    binary = f"kernel.{make_backend(target).binary_ext}"
    (folder / binary).write_bytes(b"")
    return CompiledKernel(src, {name: str(folder / name) for name in ("kernel.json", binary)}, src.hash())


def launch_as_triton(kernel, grid, *args, **constants) -> int:
    """Launch by kernel[grid] and twice by `launch`; the same is given each time. Of the second, how often by Triton."""
    kernel[grid](*args, **warm.OPTIONS, **constants)
    warm.launch(kernel, grid, *args, **constants)
    with mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as run:
        warm.launch(kernel, grid, *args, **constants)
    expected, *found = GIVEN[-3:]
    assert found == [expected, expected], (found, expected)
    return run.call_count


# Arguments


def arguments(x=None, y=None, n=5, m=6, numbers=(), function=_double, **constants) -> tuple[tuple, dict]:
    return (ONE if x is None else x, y, n, m, numbers), {"FUNCTION": function, "SIZE": 16, "num_warps": 4} | constants


def again(**changed) -> int:
    """launch_as_triton with these arguments changed."""
    args, constants = arguments(**changed)
    return launch_as_triton(_kernel, (1,), *args, **constants)


ONE = torch.zeros(64)
POINTERS = [
    None, ONE[1:], ONE[4:], ONE[:0], ONE[0], torch.zeros(()), Parameter(torch.zeros(3)), torch.zeros(2, 2).t(),
    *(torch.zeros(8, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)),
]  # fmt: skip
INTEGERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, 2**63 - 16]
SCALARS = [*INTEGERS, 2**63, True, False, 0.0, -0.0, 1.0, 16.0, 0.5, None]
CONSTEXPRS = [tl.constexpr(value) for value in (0, 1, False, True, 0.0, -0.0, 1.0, 0.5, 0.25)]
FUNCTIONS = [_double, triton.jit(_double.fn), Other._double]
TUPLES = [
    (), (None,), (0.5,), (1.5,), (1,), (True,), (1.0,), (0,), (False,), (0.0,), (-0.0,), (16, 1, 2**31), (2, 1, 2**31),
    (None, 0.5), (0.5, None), (1, 0.5), (True, 0.5), ((1,), 2), ((1.0,), 2), ((True,), 2), ((), ()), ((),),
    *((number,) for number in CONSTEXPRS), (tl.constexpr(0), 5, tl.constexpr(1)), (0, 5, 1),
]  # fmt: skip
CONSTANTS = [1, True, 2, 0, False, None, "1", 2**40]


def table() -> list[tuple[tuple, dict]]:
    """Each argument in turn as it may be, all others the same."""
    return [
        *(arguments(x=t) for t in POINTERS[1:]),
        *(arguments(y=t) for t in POINTERS),
        *(arguments(x=x, y=y) for x in (ONE, ONE[1:]) for y in (ONE, ONE[1:])),
        *(arguments(n=number) for number in SCALARS),
        *(arguments(m=number) for number in SCALARS),
        *(arguments(numbers=numbers) for numbers in (*TUPLES, *SCALARS)),
        *(arguments(function=function) for function in FUNCTIONS),
        *(arguments(**{name: value}) for name in ("SIZE", "LAST") for value in CONSTANTS),
        *(arguments(num_warps=warps, num_stages=stages) for warps in (1, 4, 8) for stages in (1, 3)),
    ]


@st.composite
def drawn(draw) -> tuple[tuple, dict]:
    inner = st.sampled_from([*SCALARS, *CONSTEXPRS])
    numbers = inner | st.lists(inner | st.sampled_from(TUPLES), max_size=3).map(tuple)
    args, constants = arguments(
        draw(st.sampled_from(POINTERS[1:])),
        draw(st.sampled_from(POINTERS)),
        draw(st.sampled_from(SCALARS) | st.integers(-(2**40), 2**40)),
        draw(st.sampled_from(INTEGERS)),
        draw(numbers | st.floats(allow_nan=False, width=32)),
        draw(st.sampled_from(FUNCTIONS)),
        SIZE=draw(st.sampled_from(CONSTANTS)),
    )
    return args, dict(draw(st.permutations([*constants.items()])))


# Checks


def check_every_argument() -> None:
    """Both ways through the table, since what was kept for one must not be found for another."""
    for kernel in (_kernel, triton.jit(_kernel.fn, do_not_specialize=["m"])):
        for args, constants in (*table(), *reversed(table())):
            launch_as_triton(kernel, (3,), *args, **constants)


def check_drawn_arguments() -> None:
    @settings(max_examples=400, deadline=None, derandomize=True, database=None)
    @given(drawn(), st.lists(st.integers(1, 2**16), min_size=1, max_size=3).map(tuple))
    def check(drawn_arguments, grid):
        args, constants = drawn_arguments
        launch_as_triton(_kernel, grid, *args, **constants)

    check()


def check_the_second_launch_is_warm() -> None:
    """Whatever the kernels of the package are given."""
    for numbers in ((), (0.5, 2.0), (1, 2, 3, 4), (None, 0.5), None, (tl.constexpr(0.5),), 0.5):
        for y in (None, ONE, ONE[1:]):
            assert again(y=y, numbers=numbers) == 0


def check_every_kernel_of_the_package() -> None:
    """As dry_launch.py's cases launch them, and a convolution; those of an op warm the second time."""
    modules = [import_module(f"fusedact.kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    modules = [module for module in modules if module is not warm and getattr(module, "launch", None) is warm.launch]
    seen: dict[JITFunction, int] = {}

    def launch(kernel, grid, *args, **constants):
        seen[kernel] = launch_as_triton(kernel, grid, *args, **constants)

    def convolution():
        shapes = (2, 3, 8, 8), (4, 3, 3, 3), 4, 4
        x, weight, bias, slope = (torch.zeros(shape, requires_grad=True) for shape in shapes)
        F.conv2d(x, weight, bias, activation="prelu", slope=slope).sum().backward()

    cases = runpy.run_path(str(DRY_LAUNCH))["CASES"]
    for module in modules:
        module.launch = launch
    with mock.patch.object(backend, "_triton_problem", lambda device: None), fusedact.use_backend("triton"):
        for case in (*cases.values(), convolution):
            case()
    for module in modules:
        module.launch = warm.launch
    for module in OPS:
        launched = [kernel for name, kernel in vars(module).items() if name.endswith("_kernel")]
        assert launched and all(seen.get(kernel) == 0 for kernel in launched), module.__name__


def check_a_float_is_passed_and_not_kept() -> None:
    again(numbers=(0.5, 1))
    before = warm._kept.cache_info().currsize
    for number in (0.25, 1.0, 1e30):
        again(numbers=(number, 1))
        assert (float, repr(number)) in GIVEN[-1][8]
    assert warm._kept.cache_info().currsize == before


def check_shapes_without_end_are_forgotten() -> None:
    for n in range(5000):
        args, constants = arguments(n=n)
        warm.launch(_kernel, (1,), *args, **constants)
    assert warm._kept.cache_info().currsize <= 4096
    assert again(n=3) == again(n=4999) == 0


def check_no_tensor_is_kept() -> None:
    tensor = torch.zeros(4)
    again(x=tensor, y=tensor)
    again(numbers=(tensor, 0.5))
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None


def check_constants_in_any_order_or_left_out() -> None:
    args, constants = arguments(LAST=8)
    for order in itertools.permutations(constants.items()):
        assert launch_as_triton(_kernel, (1,), *args, **dict(order)) == 0
    for numbers in (5, 6):
        assert launch_as_triton(_kernel, (1,), *args[:-1], numbers=numbers, **constants) == 0
    for numbers in ((0.5,), (1.5,)):
        launch_as_triton(_kernel, (1,), *args[:-1], numbers=numbers, **constants)


def check_the_current_device_and_stream() -> None:
    compiled = set()
    for device, stream in itertools.product((1, 0), (5, 0)):
        HOPPER.device, HOPPER.stream = device, stream
        assert again() == 0
        assert GIVEN[-1][1] == device * 100 + stream
        compiled.add((device, GIVEN[-1][2]))
    assert len(compiled) == 2 and len({function for _, function in compiled}) == 2


def check_who_looks_on_is_told() -> None:
    told: list[object] = []
    watchers = {
        "enter": mock.patch.object(knobs.runtime.launch_enter_hook, "calls", [told.append]),
        "leave": mock.patch.object(knobs.runtime.launch_exit_hook, "calls", [told.append]),
        "a hook of its own": mock.patch.object(knobs.runtime, "launch_enter_hook", told.append),
        "no hook": mock.patch.object(knobs.runtime, "launch_enter_hook", None),
        "before": mock.patch.object(_kernel, "pre_run_hooks", [lambda *args, **kwargs: told.append(args)]),
        "debug": mock.patch.object(knobs.runtime, "debug", True),
        "instruments": mock.patch.object(knobs.compilation, "instrumentation_mode", "other"),
    }
    for name, watcher in watchers.items():
        told.clear()
        with watcher:
            assert again() == 1, name
        assert len(told) == (3 if name in ("enter", "leave", "a hook of its own", "before") else 0), name
        assert again() == 0, name


def check_a_changed_global_is_refused() -> None:
    args, constants = arguments(SIZE=32)
    assert again(SIZE=32) == 0
    with mock.patch.dict(globals(), SCALE=tl.constexpr(4)):
        for launch in (_kernel[1,], functools.partial(warm.launch, _kernel, (1,))):
            with pytest.raises(RuntimeError, match="SCALE has changed"):
                launch(*args, **constants)
    with mock.patch.dict(globals(), SCALE=tl.constexpr(SCALE.value)):
        again(SIZE=32)
    assert again(SIZE=32) == 0


def check_what_is_not_known_is_tritons() -> None:
    assert again(SIZE=0.5) == 1  # which might be -0.0
    with mock.patch.object(warm, "_SIGNATURES", {}):
        with mock.patch.object(triton, "__version__", "3.90.0"):
            assert again() == 1
        triton.runtime.driver.set_active(MI300)
        assert again() == 1
        triton.runtime.driver.set_active(HOPPER)
        assert again() == 0


def check_what_fails_or_is_only_compiled_is_not_kept() -> None:
    args, constants = arguments(SIZE=64)
    for _ in range(2):
        with pytest.raises(KeyError, match="nonsense"):
            warm.launch(_kernel, (1,), *args, nonsense=1, **constants)
        with mock.patch.object(JITFunction, "run", lambda *args, **constants: None):  # as by the machine-code report
            warm.launch(_kernel, (1,), *args, **constants)
    assert again(SIZE=64) == 0


def check_multiply_and_add_is_fused_whatever_tritons_default() -> None:
    args, constants = arguments(SIZE=128)
    for default in "01":
        with mock.patch.dict(os.environ, TRITON_DEFAULT_FP_FUSION=default):
            assert warm.by_triton(_kernel, (1,), *args, **constants).metadata.enable_fp_fusion
            _kernel.device_caches.clear()


def check_threads() -> None:
    """Each launches what it was asked to, none of which is kept yet."""
    asked = [arguments(n=n, numbers=(n / 2,)) for n in range(40)]
    expected = {}
    for args, constants in asked:
        _kernel[(1,)](*args, **warm.OPTIONS, **constants)
        expected[args[2]] = GIVEN[-1][1:]
    warm._kept.cache_clear()
    GIVEN.clear()

    def launch_all(first: int) -> None:
        for args, constants in asked[first:] + asked[:first]:
            warm.launch(_kernel, (first + 1, args[2] + 1), *args, **constants)

    with ThreadPoolExecutor(8) as threads:
        [*threads.map(launch_all, range(8))]
    found = {launched[0]: launched[1:] for launched in GIVEN}
    assert found == {(x + 1, n + 1, 1): given for n, given in expected.items() for x in range(8)}


CHECKS: dict[str, Callable[[], None]] = {
    name.removeprefix("check_"): check for name, check in vars().copy().items() if name.startswith("check_")
}


def main() -> None:
    """Run the checks; print {name: what went wrong, or nothing}."""
    triton.compiler.compile = compile_nothing
    triton.runtime.driver.set_active(HOPPER)
    outcomes = dict.fromkeys(CHECKS, "")
    for name, check in CHECKS.items():
        try:
            check()
        except (Exception, pytest.fail.Exception):
            outcomes[name] = traceback.format_exc()[-2000:]
    print(json.dumps(outcomes))


# Tests


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CHECKS)
def test_launch_is_tritons(name, outcomes):
    assert outcomes[name] == ""


if __name__ == "__main__":
    main()
