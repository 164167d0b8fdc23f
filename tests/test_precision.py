"""The emulated products of bench/precision.py: that they are the kernel's, the rule they are held to, the record."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from bench import precision
from fusedact.kernels import activations, linear

RECORD = json.loads(precision.RECORD.read_text())
ULP = 2.0**-10  # of a tf32 number from 1 to 2

each_core = pytest.mark.parametrize("core", precision.CORES)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of small products, which wait for a second thread more than it helps."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def errors(K):
    """By inputs."""
    return dict(zip(precision.INPUTS, precision.errors(*precision.made(K)), strict=True))


def breaks(name, K, sgemm=precision.PLAIN):
    """Inputs and cores where a product breaks the rule."""
    return [
        (inputs, core)
        for inputs, found in errors(K).items()
        for core, measured in found[name].items()
        if not precision.keeps(measured, found, sgemm)
    ]


# The emulation


@pytest.mark.parametrize(
    ("x", "truncated", "rounded"),
    [
        (1 + ULP / 4, 1, 1),
        (1 + ULP / 2, 1, 1),
        (1 + ULP * 3 / 4, 1, 1 + ULP),
        (1 + ULP * 3 / 2, 1 + ULP, 1 + 2 * ULP),
        (-1 - ULP * 3 / 4, -1, -1 - ULP),
        (2 - ULP / 4, 2 - ULP, 2),
        (torch.inf, torch.inf, torch.inf),
        (-0.0, -0.0, -0.0),
    ],
)
def test_operands_are_made_tf32(x, truncated, rounded):
    x = torch.tensor(x)
    torch.testing.assert_close(precision.truncated(x), torch.tensor(float(truncated)), rtol=0, atol=0)
    torch.testing.assert_close(precision.rounded(x), torch.tensor(float(rounded)), rtol=0, atol=0)


def test_sums_cut_off_never_grow():
    z = torch.randn(10_000, dtype=torch.float64) * 1e3
    nearest, cut = precision.to_nearest(z), precision.cut_off(z)
    grown = nearest.double().abs() > z.abs()
    torch.testing.assert_close(cut, torch.where(grown, nearest.nextafter(torch.zeros(())), nearest), rtol=0, atol=0)
    assert grown.any() and not grown.all()


def test_nothing_is_lost_in_a_split():
    x = torch.randn(10_000) * 10 ** (60 * torch.rand(10_000) - 30)
    leading, rest = precision.split(x)
    assert torch.equal(leading.double() + rest.double() / precision.REST.value, x.double())
    assert torch.equal(precision.rounded(leading), leading)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's dot is what a core stands in for")
@each_core
@pytest.mark.parametrize("block_k", [16, 32])
def test_the_emulation_is_the_kernels(core, block_k, monkeypatch):
    """To the last bit, where the interpreter's dot is the core's."""

    def dot(self, x, w, z, *_):
        x, w, sum_before = (torch.from_numpy(np.ascontiguousarray(t)) for t in (x.data, w.data.T, z.data))
        return TensorHandle(precision.CORES[core].dot(x, w, sum_before).numpy(), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    x, w = torch.randn(40, 104), torch.randn(50, 104)
    tile = linear.Tile(32, 32, block_k, num_warps=4, num_stages=1, precision="tf32x3")
    z, _ = linear.forward(x, w, None, activations.identity, (), None, tile, save_z=False)
    taken = precision.PRODUCTS[f"tf32x3 as the kernel takes it, BLOCK_K {block_k}"][core]
    assert torch.equal(z, taken(x, w))


# The rule


@pytest.mark.parametrize("sgemm", precision.SGEMM)
@pytest.mark.parametrize("K", [64, 784, 4096])
@pytest.mark.parametrize("name", precision.KERNEL)
def test_the_kernel_errs_little_more_than_float32(name, K, sgemm):
    """At most twice sgemm's error plus 1e-6, on every core."""
    assert breaks(name, K, sgemm) == []


def test_one_accumulator_is_for_a_small_k():
    """What fresh accumulators are for: each addition cuts something off, all in one direction."""
    assert breaks(precision.ONE_ACCUMULATOR, 64) == []
    cut_off = [(inputs, core) for inputs in precision.INPUTS for core in precision.CORES if "sums cut off" in core]
    assert breaks(precision.ONE_ACCUMULATOR, 4096) == cut_off


@pytest.mark.parametrize("K", [64, 784, 4096])
def test_tf32_alone_errs_too_much(K):
    assert len(breaks("tf32", K)) == len(precision.INPUTS) * len(precision.CORES)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
@pytest.mark.parametrize("name", precision.KERNEL)
def test_nothing_overflows_while_the_sum_of_magnitudes_does_not(name, draw):
    """Times REST or not: a rest so multiplied is at most half its x."""
    x, w = draw(2, 64, 784, dtype=torch.float64)
    largest = (x.abs() @ w.abs().T).max()
    x, w = (t * (0.9999 * torch.finfo(torch.float32).max / largest) ** 0.5 for t in (x, w))
    (found,) = precision.errors(x.float()[None], w.float()[None])
    assert all(precision.keeps(measured, found) for measured in found[name].values())


def test_float32s_infinities_are_the_kernels():
    x = torch.rand(8, 64) * 1e19 + 1e19
    assert (x @ x.T).isposinf().all()
    assert all(precision.as_float32s(x, x).values())


def test_nan_and_inf_are_float32s():
    x, w = precision.not_finite()
    z = x @ w.T
    assert z.isnan().any() and z.isposinf().any() and z.isneginf().any()
    assert precision.as_float32s(x, w) == dict.fromkeys(precision.PRODUCTS, True)


# The record


def test_the_record_is_of_these_products():
    assert list(RECORD["errors"]) == list(precision.INPUTS)
    for depths in RECORD["errors"].values():
        assert list(map(int, depths)) == list(precision.DEPTHS)
        for found in depths.values():
            assert {name: list(cores) for name, cores in found.items()} == {
                name: list(cores) for name, cores in precision.PRODUCTS.items()
            }
    assert tuple(map(float, RECORD["normal, x denormal"])) == precision.DENORMAL
    assert RECORD["not finite as float32's"] == dict.fromkeys(precision.PRODUCTS, True)
