"""The vocabulary-parallel head in one process, which has all classes: its op, its memory and what it refuses."""

import copy

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import fusedact
from fusedact import functional as F
from fusedact.autograd import head_shards
from fusedact.distributed import VocabParallelLinearCrossEntropyLoss, vocab_parallel_linear_cross_entropy


def sample(shape=(6, 7, 3), dtype=torch.float32, device="cpu"):
    """x (M, K), W (C, K), bias (C,), target."""
    M, C, K = shape
    x, w, bias = (torch.randn(size, device=device).to(dtype) for size in ((M, K), (C, K), (C,)))
    return x, w, bias, torch.randint(0, C, (M,), device=device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_alone_it_is_the_head(reduction, dtype, either_backend, device):
    x, w, bias, target = sample(dtype=dtype, device=device)
    leaves = [t.requires_grad_() for t in (x, w, bias)]
    given = {"linear_bias": bias, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
    found = []
    for loss in (
        vocab_parallel_linear_cross_entropy(x, w, target, chunk_rows=4, **given),
        F.linear_cross_entropy(x, w, target, **given),
    ):
        assert loss.dtype == dtype
        found.append([loss, *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_mean_of_rows_without_weight(dtype, either_backend, device):
    """NaN, as torch's: smoothed, the loss of classes of weight 0 is not 0. The gradients are late in float16."""
    x, w, _, _ = sample((3, 4, 5), dtype=dtype, device=device)
    target, weight = torch.tensor([0, 0, -100], device=device), torch.tensor([0.0, 1, 1, 1], device=device).to(dtype)
    for head in (vocab_parallel_linear_cross_entropy, F.linear_cross_entropy):
        loss = head(x.requires_grad_(), w, target, weight=weight, label_smoothing=0.1)
        (dx,) = torch.autograd.grad(loss, x)
        assert loss.isnan() and dx[:2].isnan().all() and not dx[2].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_classes(smoothing, either_backend, device):
    """All rows ignored, as they must be."""
    x, w = torch.rand(3, 2, device=device, requires_grad=True), torch.rand(0, 2, device=device)
    target = torch.full((3,), -100, device=device)
    loss = vocab_parallel_linear_cross_entropy(x, w, target, label_smoothing=smoothing)
    assert loss.isnan() and not torch.autograd.grad(loss, x)[0].any()


WRONG = {
    "dimensionality 1 or 2, got 3": (RuntimeError, {"input": torch.ones(2, 2, 3)}),
    "linear_weight with dimensionality 2, got 3": (RuntimeError, {"linear_weight": torch.ones(7, 2, 3)}),
    "last dimensions [(]in_features[)], got 4 and 3": (RuntimeError, {"input": torch.ones(6, 4)}),
    "expected linear_bias shape [(]7,[)], got [(]3,[)]": (RuntimeError, {"linear_bias": torch.ones(3)}),
    "linear_weight must be Tensor, not list": (TypeError, {"linear_weight": [1.0]}),
    "target must be class indices": (TypeError, {"target": torch.ones(6, 7)}),
    "expected target dtype to be Long or Byte": (RuntimeError, {"target": torch.ones(6, dtype=torch.int32)}),
    "batch_size [(]6[)] to match target batch_size [(]5[)]": (
        ValueError,
        {"target": torch.zeros(5, dtype=torch.int64)},
    ),
    "Target 7 is out of bounds": (IndexError, {"target": torch.full((6,), 7)}),
    "either for all 7 classes or no classes": (RuntimeError, {"weight": torch.ones(3)}),
    "expected scalar type torch.float32 but found": (RuntimeError, {"weight": torch.ones(7).double()}),
    "get no gradient": (RuntimeError, {"weight": torch.ones(7, requires_grad=True)}),
    "linear_weight to have input's dtype": (RuntimeError, {"linear_weight": torch.ones(7, 3).double()}),
    "linear_bias to have input's dtype": (RuntimeError, {"linear_bias": torch.ones(7).double()}),
    "not implemented for torch.int64": (NotImplementedError, {"input": torch.ones(6, 3).long()}),
    "at least two devices, cpu and meta": (RuntimeError, {"linear_weight": torch.ones(7, 3, device="meta")}),
    "expected linear_weight with 9 of 9 classes": (ValueError, {"classes": 9}),
    "group must be a torch.distributed.ProcessGroup": (TypeError, {"group": 3}),
    "foo is not a valid value for reduction": (ValueError, {"reduction": "foo"}),
    "label_smoothing must be between 0.0 and 1.0. Got: 1.5": (RuntimeError, {"label_smoothing": 1.5}),
    "z_loss must not be negative": (ValueError, {"z_loss": -1.0}),
    "softcap must be positive": (ValueError, {"softcap": 0.0}),
    "sample_weight must have one number for each row": (ValueError, {"sample_weight": torch.ones(3)}),
    "chunk_rows must be a positive integer": (ValueError, {"chunk_rows": 0}),
}


@pytest.mark.parametrize("match", WRONG)
def test_errors(match, triton_backend, launches):
    error, wrong = WRONG[match]
    given = {"input": torch.ones(6, 3), "linear_weight": torch.ones(7, 3), "target": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(error, match=match):
        vocab_parallel_linear_cross_entropy(**given | wrong)
    assert launches.count == 0


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False] * 3], ids=str)
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", torch.float16), ("sum", torch.float32), ("none", torch.float32)]
)
def test_opcheck(reduction, dtype, wanted, triton_backend, device):
    x, w, bias, target = sample(dtype=dtype, device=device)
    tensors = [t.requires_grad_(want) for t, want in zip((x, w, bias), wanted, strict=True)]
    options = -100, reduction, 0.1, 0.0, 0.0, 4, "", 0, len(w), wanted
    torch.library.opcheck(
        torch.ops.fusedact.vocab_parallel_linear_cross_entropy.default,
        (*tensors, target, None, None, *options),
        test_utils=("test_schema", "test_faketensor"),
    )


class Alive(TorchDispatchMode):
    """The most bytes that results of that shape have at once."""

    def __init__(self, *shape):
        super().__init__()
        self.shape, self.storages, self.most = shape, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.shape == self.shape:
            storage = output.untyped_storage()
            self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.storages = {ref: nbytes for ref, nbytes in self.storages.items() if not ref.expired()}
        self.most = max(self.most, sum(self.storages.values()))
        return output


@pytest.mark.parametrize(
    ("smoothing", "softcap", "chunks"),
    [(0.0, 0.0, 3), (0.1, 0.0, 3), (0.0, 3.0, 4.25)],
    ids=str,
)
def test_two_chunks_of_logits_are_alive(smoothing, softcap, chunks, device):
    """And what torch's formulas take besides, of one: exponentials, then a softcap's derivative."""
    x, w, bias, target = sample((64, 301, 8), device=device)
    arguments = x, w, bias, target, None, None, -100, "mean", smoothing, 0.0, softcap, 16, "", 0, 301, [True] * 3
    with fusedact.use_backend("torch"), torch.no_grad(), Alive(16, 301) as seen:
        head_shards._launch(*arguments)
    assert seen.most == chunks * 16 * 301 * 4


def test_module():
    head = VocabParallelLinearCrossEntropyLoss(3, 7, bias=True, softcap=3.0, weight=torch.rand(7))
    x, _, _, target = sample()
    truth = F.cross_entropy(head.linear(x), target, head.weight, softcap=3.0)
    torch.testing.assert_close(head(x, target), truth)
    twin = copy.deepcopy(head)
    assert twin.linear.weight is not head.linear.weight and torch.equal(twin(x, target), head(x, target))
    assert "num_classes=7" in repr(head) and "out_features=7" in repr(head)
    assert VocabParallelLinearCrossEntropyLoss(3, 7, device="meta").linear.weight.is_meta


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"weight": torch.ones(6)}, r"expected weight shape to be [(]7,[)], got [(]6,[)]"),
        ({"label_smoothing": 1.5}, "expected label_smoothing to be in range"),
    ],
    ids=["weight", "label_smoothing"],
)
def test_errors_of_the_module(wrong, match):
    with pytest.raises(RuntimeError, match=match):
        VocabParallelLinearCrossEntropyLoss(3, 7, **wrong)
