"""What a head of a classifier hands to its op, by its types and options, and what it leaves to torch."""

from types import SimpleNamespace

import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import tuning
from fusedact.functional import heads

pytestmark = pytest.mark.usefixtures("triton_backend")
stock = torch.nn.functional

ROWS = SimpleNamespace(batch_chunk_size=4)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


def head(device="cpu", dtype=F32):
    """x (9, 16), W (7, 16) and nine classes."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, 16, generator=generator).to(device, dtype) for rows in (9, 7))
    return x, w, (torch.arange(9) % 7).to(device)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_is_a_cast_of_what_is_given(backend, device):
    x, w, target = head(device)
    options = {"reduction": "none", "options": ROWS}
    with fusedact.use_backend(backend):
        with torch.autocast(device, BF16):
            ours = F.linear_cross_entropy(x, w, target, **options)
        cast = F.linear_cross_entropy(x.bfloat16(), w.bfloat16(), target, **options)
        whole = F.linear_cross_entropy(x, w, target, **options)
    assert ours.dtype == F32 and torch.equal(ours.bfloat16(), cast)
    assert whole.dtype == F32 and not torch.equal(whole.bfloat16(), cast)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_autocast_leaves_the_sums_of_smoothing_in_float32(backend, device):
    x, w, target = head(device)
    options = {"label_smoothing": 0.3, "weight": torch.linspace(0.5, 1.5, 7, device=device)}
    with fusedact.use_backend(backend), torch.autocast(device, BF16):
        ours = F.linear_cross_entropy(x.requires_grad_(), w, target, options=ROWS, **options)
    logits = stock.linear(x.bfloat16(), w.bfloat16())
    torch.testing.assert_close(ours, stock.cross_entropy(logits.float(), target, **options), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("dtype", "of_weight", "autocast", "expected"),
    [
        (BF16, BF16, False, True),
        (F16, F32, False, False),
        (F32, F32, False, True),
        (F64, F64, False, True),
        (BF16, F32, True, True),
        (BF16, BF16, True, False),
        (F64, F64, True, True),
        (F64, F32, True, False),
    ],
    ids=str,
)
def test_class_weights_are_of_the_losss_type(dtype, of_weight, autocast, expected):
    x, w, target = head(dtype=dtype)
    given = heads._Head(x, w, None, target, torch.ones(7, dtype=of_weight), None)
    assert heads._fits(given, -100, 0.0, autocast) is expected


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("ignore_index", [2**63, -(2**63) - 1, 1.5])
def test_an_ignore_index_that_is_none_is_torchs_error(ignore_index, backend, device, launches):
    x, w, target = head(device)
    with pytest.raises((TypeError, ValueError, RuntimeError)) as theirs:
        stock.cross_entropy(stock.linear(x, w), target, ignore_index=ignore_index)
    with fusedact.use_backend(backend), pytest.raises(theirs.type) as ours:
        F.linear_cross_entropy(x, w, target, ignore_index=ignore_index, options=ROWS)
    assert str(ours.value) == str(theirs.value) and launches.count == 0


@pytest.mark.parametrize("what", ["target", "sample_weight"])
def test_what_is_no_layer_gets_its_gradient_too(what, device):
    x, w, target = head(device)
    given = {"target": target, "sample_weight": torch.full((9,), 0.5, device=device)}
    if what == "target":
        given["target"] = torch.full((9, 7), 1 / 7, device=device)
    given[what].requires_grad_()
    losses = (F.linear_cross_entropy(x, w, options=ROWS, **given), F.cross_entropy(stock.linear(x, w), **given))
    ours, truth = (torch.autograd.grad(loss, given[what])[0] for loss in losses)
    torch.testing.assert_close(ours, truth)


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no chunks of its own")
def test_torchs_own_chunks_go_backward_twice(monkeypatch):
    monkeypatch.setattr(tuning, "choose", lambda *problem: None)
    monkeypatch.setattr(heads, "SMALL", 0)
    x, w, target = head()
    leaves = x.requires_grad_(), w.requires_grad_()
    with fusedact.use_backend("auto"):
        loss, truth = F.linear_cross_entropy(x, w, target), stock.cross_entropy(stock.linear(x, w), target)
    for _ in range(2):
        grads = (torch.autograd.grad(of, leaves, retain_graph=True) for of in (loss, truth))
        torch.testing.assert_close(*grads)
