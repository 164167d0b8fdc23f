"""A tensor times a number of the device's, in place."""

import math

import pytest
import torch

from fusedact.kernels import scale

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
B = scale.tile().block


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, B - 1, B, B + 1, 3 * B + 7])
def test_products(n, dtype, device):
    x = torch.randn(n, device=device, dtype=dtype)
    factor = torch.tensor(-3.7, device=device)
    truth = x.double() * factor.double()
    scale.in_place([x], factor)
    torch.testing.assert_close(x.double(), truth, rtol=2 * torch.finfo(dtype).eps + 2e-7, atol=0)


@pytest.mark.parametrize("sizes", [(B, 2 * B), (3, 0, B + 1), (0, 7), (5, 6, 7)], ids=str)
def test_several_at_once(sizes, device, launches):
    tensors = [torch.randn(n, device=device) for n in sizes]
    expected = [t * 2 for t in tensors]
    launches.reset()
    scale.in_place(tensors, torch.tensor(2.0, device=device))
    assert launches.count == 1
    for ours, truth in zip(tensors, expected, strict=True):
        assert torch.equal(ours, truth)


def test_whatever_its_strides(device):
    x = torch.randn(5, 7, 3, device=device).permute(2, 0, 1)
    expected = x * 2
    scale.in_place([x], torch.tensor(2.0, device=device))
    assert torch.equal(x, expected)


@pytest.mark.parametrize("factor", [1.0, 0.0, math.nan, math.inf, -math.inf])
def test_special_factors_as_torch(factor, device):
    x = torch.tensor([0.0, -1.0, math.inf, math.nan, 3e-45], device=device)
    expected = x * factor
    scale.in_place([x], torch.tensor(factor, device=device))
    torch.testing.assert_close(x, expected, equal_nan=True, rtol=0, atol=0)


def test_one_writes_nothing(device):
    """Bits that a product would change stay: a signalling NaN's."""
    bits = torch.full((9,), 0x7F800001, dtype=torch.int32, device=device)
    scale.in_place([bits.view(torch.float32)], torch.ones((), device=device))
    assert (bits == 0x7F800001).all()


def test_one_launch(device, launches):
    x = torch.randn(3 * B, device=device)
    launches.reset()
    scale.in_place([x], torch.tensor(2.0, device=device))
    assert launches.count == 1
