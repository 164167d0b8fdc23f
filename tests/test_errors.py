"""What stock raises and what it accepts: ours does the same, before any launch."""

import numpy as np
import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: (torch.ones(4, 3).long(), torch.ones(2, 3)), RuntimeError, "the same dtype"),
        (lambda: (torch.ones(4, 5), torch.ones(2, 3)), RuntimeError, "shapes cannot be multiplied"),
        (lambda: (torch.ones(()), torch.ones(2, 3)), RuntimeError, "at least 1D"),
        (lambda: (torch.ones(4, 3), torch.ones(2, 3, 1)), RuntimeError, "2 dimensions|2-D|at most 2"),
        (lambda: (torch.ones(4, 3), torch.ones(2, 3), torch.ones(3)), RuntimeError, "expanded size|match"),
        (lambda: ([1.0, 2.0, 3.0], torch.ones(2, 3)), TypeError, "must be Tensor, not list"),
    ],
    ids=["dtype", "in_features", "0-d", "3-D weight", "bias length", "list"],
)
def test_bad_input_is_torchs_error(make, kind, message, name, device, launches):
    with torch.device(device):
        tensors = make()
    with fusedact.use_backend(name), pytest.raises(kind, match=message):
        F.linear(*tensors, activation="relu")
    assert launches.count == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(4, 3), torch.randn(3)),
        lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(1)),
        lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)),
        lambda: (torch.randn(4, 3).to_sparse(), torch.randn(2, 3)),
    ],
    ids=["1-D weight", "bias (1,)", "bias (4, 2)", "sparse"],
)
def test_what_stock_accepts_is_accepted(make, device, triton_backend):
    with torch.device(device):
        tensors = make()
    torch.testing.assert_close(F.linear(*tensors, activation="relu"), torch.nn.functional.linear(*tensors).relu())


@pytest.mark.parametrize(
    ("name", "parameters", "kind", "message"),
    [
        ("hardtanh", {"min_val": 2.0, "max_val": 1.0}, ValueError, "min_val cannot be greater than max_val"),
        ("softshrink", {"lambd": -1.0}, RuntimeError, "lambda must be"),
        ("celu", {"alpha": 0.0}, RuntimeError, "alpha"),
    ],
)
def test_parameters_that_stock_refuses(name, parameters, kind, message, device, triton_backend, launches):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    with pytest.raises(kind, match=message):
        F.linear(x, w, activation=name, **parameters)
    assert launches.count == 0


@pytest.mark.parametrize("slope", [np.float32(0.25), torch.tensor(0.25), 1])
def test_parameters_may_be_any_number(slope, device, triton_backend):
    x, layer = torch.randn(2, 3, device=device), torch.nn.LeakyReLU(slope)
    model = nn.Sequential(nn.Linear(3, 4), layer).to(device)
    torch.testing.assert_close(model(x), layer(model[0](x)))


def test_a_module_brings_its_own_parameters(device):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    with pytest.raises(TypeError, match="from its module"):
        F.linear(x, w, activation=torch.nn.LeakyReLU(), negative_slope=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7])
def test_bounds_that_rounding_moves(bound, dtype, device, triton_backend):
    """A saturated unit's output is the bound rounded: its derivative must be 0 all the same."""
    x = torch.tensor([[3.0], [-3.0], [0.05]], device=device, dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for name, parameters, expected in (
        ("hardtanh", {"min_val": -bound, "max_val": bound}, [0, 0, 1]),
        ("threshold", {"threshold": bound, "value": bound}, [1, 0, 0]),
    ):
        y = F.linear(x, one, activation=name, **parameters)
        assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == expected


@pytest.mark.parametrize("ignore_index", [-100.0, None, 2**63], ids=str)
def test_ignore_index_of_a_wrong_kind(ignore_index, device, triton_backend, launches):
    x, target = torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        F.cross_entropy(x, target, ignore_index=ignore_index)
    assert launches.count == 0


def test_autocast_leaves_float64_and_refuses_integers(device, triton_backend):
    logits, target = torch.randn(4, device=device, dtype=torch.float64), torch.ones(4, device=device).double()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.binary_cross_entropy_with_logits(logits, target).dtype == torch.float64
        with pytest.raises(RuntimeError):
            F.binary_cross_entropy_with_logits(logits.float(), target.long())


def test_labels_of_a_wrong_kind_are_torchs_error(device, triton_backend):
    logits = torch.randn(4, 3, device=device)
    with pytest.raises(RuntimeError, match=r"expected target dtype to be Long or Byte|not implemented for 'Int'"):
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device=device), reduction="foo")
    with pytest.raises(ValueError, match=r"batch_size \(4\) to match target batch_size \(3\)"):
        F.cross_entropy(logits, torch.zeros(3, dtype=torch.int64, device=device))
