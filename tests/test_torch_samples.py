"""PyTorch's own tests as ours: tests/torch_samples.py in processes of its own, a case for each thing that it checks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedact
from fusedact import functional

SCRIPT = Path(__file__).with_name("torch_samples.py")
DTYPES = ["torch.float32", "torch.float64", "torch.bfloat16"]
FUNCTIONS = [
    name
    for name in functional.__all__
    if callable(stock := getattr(torch.nn.functional, name, None)) and getattr(functional, name) is not stock
]
FUNCTIONS += [f"linear {activation}" for activation in ("relu", "gelu")]
MODULES = [
    f"nn.{name}"
    for name in fusedact.nn.__all__
    if isinstance(cls := getattr(torch.nn, name, None), type)
    and issubclass(cls, torch.nn.Module)
    and getattr(fusedact.nn, name) is not cls
]
OF_A_FUNCTION = [
    *[(kind, dtype) for kind in ("values", "gradients") for dtype in DTYPES],
    ("gradcheck", "torch.float64"),
    ("gradgradcheck", "torch.float64"),
    ("error inputs", ""),
    ("other dtypes", ""),
    ("inplace", ""),
    ("out", ""),
    ("signature", ""),
]
OF_A_MODULE = [*[("module", dtype) for dtype in DTYPES], ("module errors", "")]
STOCKS = {"linear", "nn.Linear"}  # without an activation, so never fused
STOCKS |= {f"{name}{dims}d" for name in ("conv", "conv_transpose", "nn.Conv", "nn.ConvTranspose") for dims in (1, 2, 3)}


def run(*arguments):
    """{(name, kind, dtype): the case}, and the names that fall through."""
    pytest.importorskip("expecttest", reason="torch's own tests import it")
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    *cases, last = map(json.loads, done.stdout.splitlines())
    return {(case["name"], case["kind"], case["dtype"]): case for case in cases}, last["fall through"]


@pytest.fixture(scope="module")
def fallback():
    return run("fallback")


@pytest.fixture(scope="module")
def kernels():
    return run("kernels", "functions")[0]


@pytest.fixture(scope="module")
def module_kernels():
    return run("kernels", "modules")[0]


def check(case, fused=False):
    """All samples passed, there were some (unless torch has none, as the case says), and some were fused."""
    assert not case["failed"], "\n".join([f"{case['failed']} of {case['samples']}", *case["failures"]])
    if case["skipped"]:
        return
    assert case["samples"]
    if fused:
        assert case["fused"] + case["empty"] + sum(case["left"].values()) == case["samples"]
        assert (case["fused"] > 0) == (case["name"] not in STOCKS)


@pytest.mark.parametrize(("kind", "dtype"), OF_A_FUNCTION)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_on_the_fallback(name, kind, dtype, fallback):
    check(fallback[0][name, kind, dtype])


@pytest.mark.parametrize(("kind", "dtype"), [*OF_A_MODULE, ("copies", "")])
@pytest.mark.parametrize("name", MODULES)
def test_module_on_the_fallback(name, kind, dtype, fallback):
    check(fallback[0][name, kind, dtype])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "dtype"), OF_A_FUNCTION)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_through_the_kernels(name, kind, dtype, kernels):
    check(kernels[name, kind, dtype], fused=kind in ("values", "gradients"))


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "dtype"), OF_A_MODULE)
@pytest.mark.parametrize("name", MODULES)
def test_module_through_the_kernels(name, kind, dtype, module_kernels):
    check(module_kernels[name, kind, dtype], fused=kind == "module")


def test_what_falls_through_is_listed_apart(fallback):
    cases, others = fallback
    ours = {name for name, _, _ in cases}
    assert ours == {*FUNCTIONS, *MODULES}
    assert ours.isdisjoint(others) and {"max_pool3d", "nn.MaxPool3d"} <= set(others)
