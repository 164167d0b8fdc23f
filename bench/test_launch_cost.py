"""pytest bench/test_launch_cost.py --benchmark-only: what the host spends on a launch, by Triton and by `launch`.

Both end in a launcher that does nothing, for a Hopper that is not there: what C and a GPU's driver take is in neither,
so neither are the driver's answers about each pointer, which Triton alone asks for. The launches are those of an op at
a small shape, forward and backward, made again with the same arguments; what pytest-benchmark shows is all of them
by `launch`. Nothing is asserted; `again` is Triton once more.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction

import fusedact
from bench.codegen import Offline
from bench.turns import TURNS, reported, timed
from fusedact import backend, functional
from fusedact.kernels import launch

x, weight, bias = torch.rand(64, 3), torch.rand(1, 3), torch.rand(1)
images, filters, slopes = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3), torch.rand(4)
logits, classes, likely = torch.randn(64, 10), torch.randint(10, (64,)), torch.rand(64, 10)

CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear + relu, 64 x 3 by 3 x 1": lambda x: functional.linear(x, weight, bias, activation="relu"),
    "conv + prelu, 2 x 4 x 6 x 6": lambda x: functional.conv2d(x, filters, slopes, activation="prelu", slope=slopes),
    "gelu, 64 x 10": functional.gelu,
    "softmax, 64 x 10": lambda x: functional.softmax(x, dim=-1),
    "cross_entropy, 64 x 10": lambda x: functional.cross_entropy(x, classes),
    "bce with logits, 64 x 10": lambda x: functional.binary_cross_entropy_with_logits(x, likely),
}
INPUTS = {"linear": x, "conv": images}


class Hopper(Offline):
    """Whose launches do nothing."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *args: (object(), 0, 0, 0, 1024),
    )

    def __init__(self) -> None:
        super().__init__(GPUTarget("cuda", 90, 32))

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args: None


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]

    def by_triton(self) -> None:
        self.kernel[self.grid](*self.args, **launch.OPTIONS, **self.constants)

    def by_launch(self) -> None:
        launch.launch(self.kernel, self.grid, *self.args, **self.constants)


def by_launch(launches: Collection[Launch]) -> None:
    """All of an op's, forward and backward."""
    for made in launches:
        made.by_launch()


@contextmanager
def noted() -> Iterator[dict[str, Launch]]:
    """The launches meanwhile, the first of each kernel, by its name."""
    launches: dict[str, Launch] = {}
    run = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> Any:
        name = f"{self.__module__.rpartition('.')[2]}.{self.__name__}"
        own = {constant: value for constant, value in constants.items() if constant not in launch.OPTIONS}
        launches.setdefault(name, Launch(self, grid, args, own))
        return run(self, *args, grid=grid, warmup=warmup, **constants)

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(launch, "_watched", lambda kernel: True):
        yield launches


@pytest.fixture(scope="module", autouse=True)
def hopper():
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET replaces the compiler")
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(Hopper())
    yield
    triton.runtime.driver.set_active(before)


@pytest.fixture(scope="module")
def rows(request):
    title = f"A launch before C, µs of a CPU thread, {TURNS} turns"
    with reported(request, title, ("op", "kernel")) as found:
        yield found


@pytest.mark.parametrize("name", CASES)
def test_launch_cost(name, rows, turns, setting, benchmark, monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    input = INPUTS.get(name.split()[0], logits).clone().requires_grad_()
    with fusedact.use_backend("triton"), noted() as launches:
        CASES[name](input).sum().backward()
    for kernel, made in launches.items():
        ways = {"Triton": made.by_triton, "launch": made.by_launch, "again": made.by_triton}
        rows[name, kernel] = timed(ways, turns)
        benchmark.extra_info[kernel] = {way: asdict(timing) for way, timing in rows[name, kernel].items()}
    benchmark.group = "launch"
    benchmark.extra_info |= setting.host_info
    benchmark.pedantic(by_launch, args=(launches.values(),), rounds=min(turns, 20), iterations=10)
