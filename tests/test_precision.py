"""The emulated products of bench/precision.py: the numbers they take, the rule they are held to, and the record."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from bench import precision

RECORD = json.loads(precision.RECORD.read_text())
ULP = 2.0**-10  # of a tf32 number from 1 to 2
ONE_ACCUMULATOR = [name for name in precision.SPLIT if name.endswith("toward zero")]
KEEP_THE_RULE = [name for name in precision.SPLIT if name not in ONE_ACCUMULATOR]

each_input = pytest.mark.parametrize("inputs", precision.INPUTS)


@cache
def errors(inputs, K):
    return precision.errors(*precision.made(inputs, K), precision.PRODUCTS)


def keeps(name, inputs, K):
    found = errors(inputs, K)
    return found[name].within(found[precision.PLAIN].allowed())


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


def test_sums_toward_zero_never_grow():
    z = torch.randn(10_000, dtype=torch.float64) * 1e3
    nearest, cut = precision.to_nearest(z), precision.toward_zero(z)
    grown = nearest.double().abs() > z.abs()
    torch.testing.assert_close(cut, torch.where(grown, nearest.nextafter(torch.zeros(())), nearest), rtol=0, atol=0)
    assert grown.any() and not grown.all()


def test_nothing_is_lost_in_a_split():
    x = torch.randn(10_000) * 10 ** (60 * torch.rand(10_000) - 30)
    leading, rest = precision.split(x)
    assert torch.equal(leading.double() + rest.double() / precision.REST, x.double())
    assert torch.equal(precision.rounded(leading), leading)


@each_input
@pytest.mark.parametrize("K", [64, 784, 4096])
def test_tf32x3_errs_little_more_than_float32(inputs, K):
    """At most twice plain float32's error plus 1e-6: sums rounded to nearest, or no more of K than CHUNK in one."""
    assert [name for name in KEEP_THE_RULE if not keeps(name, inputs, K)] == []


@each_input
def test_tf32_alone_errs_too_much(inputs):
    assert not keeps(precision.TF32, inputs, 64)


@each_input
def test_one_accumulator_toward_zero_is_for_a_small_k(inputs):
    """What CHUNK is for: each addition cuts something off, all in one direction."""
    assert all(keeps(name, inputs, 64) for name in ONE_ACCUMULATOR)
    assert not any(keeps(name, inputs, 4096) for name in ONE_ACCUMULATOR)


@pytest.mark.parametrize("name", precision.PRODUCTS)
def test_nan_and_inf_are_float32s(name):
    x, w = precision.not_finite()
    z = x @ w.T
    assert z.isnan().any() and z.isposinf().any() and z.isneginf().any()
    assert precision.same_pattern(precision.PRODUCTS[name](x, w), z)


def test_the_record_is_of_these_products():
    assert list(RECORD["errors"]) == list(precision.INPUTS)
    for depths in RECORD["errors"].values():
        assert list(map(int, depths)) == list(precision.DEPTHS)
        assert all(list(found) == list(precision.PRODUCTS) for found in depths.values())
    assert RECORD["not finite as float32's"] == dict.fromkeys(precision.PRODUCTS, True)


def test_the_readmes_table_is_the_records():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert precision.rendered(readme) == readme
