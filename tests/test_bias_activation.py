"""dz, db and the slope's gradient in one pass, with one and with many programs along each side."""

import pytest
import torch

from fusedact.kernels import activations, bias_activation
from fusedact.kernels.workspace import tickets

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.mark.parametrize("programs", [1, 3, 1024])
@pytest.mark.parametrize("shape", [(1, 1), (31, 16), (33, 129), (200, 257)], ids=str)
def test_sums_do_not_depend_on_how_rows_are_shared(shape, programs, device, monkeypatch, as_accurate_as_torch):
    monkeypatch.setattr(bias_activation, "PROGRAMS", programs)
    generator = torch.Generator().manual_seed(0)
    dy, z = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    config = bias_activation.tile(*shape, 4)
    for slopes in (1, shape[1]):
        slope = torch.full((slopes,), 0.25, device=device)
        dz, db, dslope = bias_activation.backward(
            dy, z, activations.prelu_grad, (), slope, want_db=True, want_dslope=True, config=config
        )
        expected = torch.where(z > 0, dy, dy * 0.25)
        per_column = torch.where(z > 0, 0, dy.double() * z.double())
        assert torch.equal(dz, expected)
        as_accurate_as_torch(db, expected.sum(0), expected.double().sum(0))
        summed = per_column.sum().view(1) if slopes == 1 else per_column.sum(0)
        as_accurate_as_torch(dslope, summed.float(), summed)


def test_tickets_are_left_at_zero(device):
    """So that the next launch on the stream needs no launch to zero them."""
    dy, z = torch.randn(2, 300, 200, device=device)
    slope = torch.full((1,), 0.25, device=device)
    bias_activation.backward(dy, z, activations.prelu_grad, (), slope, True, True, bias_activation.tile(300, 200, 4))
    assert not tickets(z.device, 1).any()


def test_transposed_and_broadcast_gradients(device):
    y = torch.randn(40, 24, device=device).relu()
    for dy in (torch.ones((), device=device).expand(40, 24), torch.randn(24, 40, device=device).t()):
        dz, db, _ = bias_activation.backward(
            dy, y, activations.relu_grad, (), None, True, False, bias_activation.tile(40, 24, 4)
        )
        assert torch.equal(dz, torch.where(y <= 0, 0, dy))
        torch.testing.assert_close(db, dz.sum(0))
