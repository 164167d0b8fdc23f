"""The vocabulary-parallel head: loss and gradients of all ranks together against one process with the whole layer."""

import copy
import warnings
from itertools import product

import pytest
import torch
import torch.distributed as dist
from samples.sharded_calls import rows_of
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

import fusedact
from fusedact import backend
from fusedact import functional as F
from fusedact.autograd import class_shards, head_shards, linear
from fusedact.autograd.given_up import GIVEN_UP
from fusedact.autograd.linear_cross_entropy import chunk_rows
from fusedact.distributed import VocabParallelLinearCrossEntropyLoss, vocab_parallel_linear_cross_entropy
from fusedact.distributed.slices import slice_of
from fusedact.kernels.faults import LaunchError

stock = torch.nn.functional
SHAPE = 11, 37, 19
OPTIONS = {
    "plain": {},
    "weights": {"linear_bias": True, "weight": True, "ignore_index": 3},
    "smoothing": {"linear_bias": True, "weight": True, "label_smoothing": 0.1},
    "all": {"label_smoothing": 0.2, "z_loss": 0.05, "softcap": 3.0, "sample_weight": True},
}
REDUCTIONS = ("mean", "sum", "none")


def sample(options, shape=SHAPE, dtype=torch.float32):
    """x (M, K), W (C, K), target and options, True standing for a tensor: the same in every process."""
    (M, C, K), options = shape, dict(options)
    x, w = torch.randn(M, K).to(dtype), torch.randn(C, K).to(dtype)
    target = torch.randint(0, C, (M,))
    if M > 2:
        target[M // 2] = -100
    for name, size in (("linear_bias", C), ("weight", C), ("sample_weight", M)):
        if options.get(name):
            options[name] = torch.rand(size).to(dtype)
    if "ignore_index" in options:
        target.masked_fill_(target == -100, options["ignore_index"])
    return x, w, target, options


def dloss_of(loss):
    return torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype).view(loss.shape)


def results(function, x, w, target, options):
    """The loss and the gradients of x, W and the bias where there is one."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, w)]
    if options.get("linear_bias") is not None:
        leaves.append(options["linear_bias"].detach().clone().requires_grad_())
        options = options | {"linear_bias": leaves[2]}
    loss = function(*leaves[:2], target, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, dloss_of(loss))]


def formula(x, w, target, linear_bias=None, **others):
    return F.cross_entropy(stock.linear(x, w, linear_bias), target, **others)


def whole(own: Tensor, group=None) -> Tensor:
    """All slices of a parameter, one below the other."""
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    return torch.cat(found)


def sharded(x, w, target, options, group=None, function=vocab_parallel_linear_cross_entropy):
    """results of this rank's slice, the gradients of W and the bias put together again."""
    part = slice_of(len(w), group)
    options = options | {"group": group, "classes": len(w)}
    if options.get("linear_bias") is not None:
        options["linear_bias"] = options["linear_bias"][part.first : part.end]
    loss, dx, *own = results(function, x, w[part.first : part.end], target, options)
    return [loss, dx, *(whole(t, group) for t in own)]


def unsharded(x, w, target, options):
    """results in float64, and in torch's own operations in this dtype."""

    def double(t):
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    with fusedact.use_backend("torch"):
        exact = results(formula, double(x), double(w), target, {name: double(t) for name, t in options.items()})
        return exact, results(formula, x, w, target, options)


def compare(equal, what, arguments, group=None, **more):
    *tensors, options = arguments
    ours = sharded(*tensors, options | more, group)
    equal(f"head, {what}", ours, *unsharded(*tensors, options))


@pytest.mark.parametrize(
    ("name", "reduction"),
    rows_of(
        product(OPTIONS, REDUCTIONS), [("plain", "mean"), ("weights", "none"), ("smoothing", "sum"), ("all", "mean")]
    ),
)
def test_every_option_in_chunks(name, reduction, equal):
    compare(equal, f"{name}, {reduction}", sample(OPTIONS[name] | {"reduction": reduction}), chunk_rows=4)


@pytest.mark.parametrize(
    ("dtype", "reduction"),
    rows_of(
        product((torch.float16, torch.bfloat16, torch.float64), REDUCTIONS),
        [(torch.bfloat16, "mean"), (torch.float16, "mean")],
    ),
)
def test_every_dtype(dtype, reduction, equal):
    what = f"{str(dtype).removeprefix('torch.')}, {reduction}"
    compare(equal, what, sample(OPTIONS["weights"] | {"reduction": reduction}, dtype=dtype), chunk_rows=5)


@pytest.mark.parametrize("rows", [1, 3, 11, 100, None])
def test_chunks_of_any_size(rows, equal):
    compare(equal, f"{rows} rows a chunk", sample(OPTIONS["weights"]), chunk_rows=rows)


@pytest.mark.parametrize("shape", [(5, 3, 4), (1, 1, 1), (6, 9, 5), (4, 8, 1)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_slices_of_every_size(shape, reduction, equal):
    """None, one and unequal ones."""
    compare(equal, f"{shape}, {reduction}", sample(OPTIONS["smoothing"] | {"reduction": reduction}, shape))


@pytest.mark.parametrize(
    ("name", "reduction", "dtype"),
    rows_of(
        product(("plain", "smoothing", "all"), REDUCTIONS, (torch.float32, torch.bfloat16)),
        [("all", "mean", torch.float32), ("smoothing", "none", torch.bfloat16)],
    ),
)
def test_kernels(name, reduction, dtype, equal, triton_backend):
    what = f"kernels, {name}, {reduction}, {str(dtype).removeprefix('torch.')}"
    arguments = sample(OPTIONS[name] | {"reduction": reduction}, (5, 13, 6), dtype)
    compare(equal, what, arguments, chunk_rows=3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients(reduction, monkeypatch):
    x, w, target, options = sample(OPTIONS["smoothing"] | {"reduction": reduction})
    trained = sharded(x, w, target, options | {"chunk_rows": 4})[0]
    monkeypatch.setattr(dist, "all_reduce", None)
    part = slice_of(len(w))
    options["linear_bias"] = options["linear_bias"][part.first : part.end]
    own = w[part.first : part.end].requires_grad_()
    with torch.no_grad():
        loss = vocab_parallel_linear_cross_entropy(x, own, target, classes=len(w), chunk_rows=4, **options)
    assert not loss.requires_grad and torch.equal(loss, trained)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["x alone", "W alone"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(wanted, reduction):
    x, w, target, options = sample({"reduction": reduction})
    part = slice_of(len(w))
    leaves = [x, w[part.first : part.end].clone()]
    all_of = results(vocab_parallel_linear_cross_entropy, *leaves, target, options | {"classes": len(w)})[1:]
    for leaf, want in zip(leaves, wanted, strict=True):
        leaf.requires_grad_(want)
    loss = vocab_parallel_linear_cross_entropy(*leaves, target, classes=len(w), **options)
    loss.backward(dloss_of(loss))
    for leaf, want, expected in zip(leaves, wanted, all_of, strict=True):
        assert torch.equal(leaf.grad, expected) if want else leaf.grad is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_bits_twice_and_everywhere(reduction, world):
    x, w, target, options = sample(OPTIONS["smoothing"] | {"reduction": reduction, "chunk_rows": 3})
    runs = [sharded(x, w, target, options) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    for found in runs[0][:2]:  # the loss and dx
        of_all = whole(found[None])
        assert len(of_all) == world and all(torch.equal(found, of_rank) for of_rank in of_all)


@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", torch.float32), ("sum", torch.float16), ("none", torch.float32)]
)
def test_backward_twice(reduction, dtype):
    x, w, target, options = sample({"reduction": reduction, "chunk_rows": 4}, dtype=dtype)
    part = slice_of(len(w))
    leaves = x.requires_grad_(), w[part.first : part.end].clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(*leaves, target, classes=len(w), **options)
    first = torch.autograd.grad(loss, leaves, dloss_of(loss), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, leaves, dloss_of(loss))))


def test_rows_that_do_not_count(equal):
    """All ignored: a mean is NaN, the gradients are 0. One whose logits are NaN, ignored: as if it were not there."""
    x, w, target, options = sample(OPTIONS["all"])
    compare(equal, "nothing counts", (x, w, torch.full_like(target, -100), options), chunk_rows=4)
    x, w, target, _ = sample({})
    x[5] = torch.nan
    loss, dx, dw = sharded(x, w, target, {"chunk_rows": 4})
    assert target[5] == -100 and loss.isfinite() and not dx[5].any()
    x[5] = 0
    exact, of_one = unsharded(x, w, target, {})
    equal("head, NaN in an ignored row", [loss, dx], exact[:2], of_one[:2])
    assert dw.isnan().all()  # as 0 times NaN is to the unsharded head


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(reduction):
    x, w, target, options = sample({"linear_bias": True, "reduction": reduction}, (0, 7, 3))
    loss, *gradients = sharded(x, w, target, options)
    exact, _ = unsharded(x, w, target, options)
    torch.testing.assert_close([loss, *gradients], [t.float() for t in exact], equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_row(reduction):
    x, w, target, options = sample(OPTIONS["all"] | {"reduction": reduction}, (1, 7, 3))
    weight = options.pop("sample_weight")
    rows = sharded(x, w, target, options | {"sample_weight": weight})
    one = sharded(x[0], w, target[0], options | {"sample_weight": weight[0]})
    assert one[0].shape == () and all(torch.equal(a.view_as(b), b) for a, b in zip(one, rows, strict=True))


@pytest.fixture
def sent(monkeypatch):
    """The kind of every collective that the head starts, in order; their sizes are in scaling.py."""
    kinds = []

    def counting(kind, run):
        return lambda *tensors, **options: kinds.append(kind) or run(*tensors, **options)

    for place, name, kind in ((class_shards, "_all_gather", "gather"), (dist, "all_reduce", "reduce")):
        monkeypatch.setattr(place, name, counting(kind, getattr(place, name)))
    return kinds


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gather_and_one_sum_a_chunk(reduction, sent):
    """The next chunk's gather before the sum; where gradients are late, backward gathers nothing again."""
    x, w, target, options = sample({"reduction": reduction})
    part = slice_of(len(w))
    leaves = x.requires_grad_(), w[part.first : part.end].clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(*leaves, target, classes=len(w), chunk_rows=4, **options)
    assert sent == (["gather"] * 3 if reduction == "none" else ["gather", *["gather", "reduce"] * 2, "reduce"])
    loss.sum().backward()
    assert reduction == "mean" or sent[3:] == ["reduce"] * 3


@pytest.mark.parametrize("classes", [2**18, 2**18 + 1])
def test_chunks_are_alike_on_all_ranks(classes, world):
    """Whose slices differ by a class; two chunks of logits are within the bytes of one that is not sharded."""
    part = slice_of(classes)
    x, w = torch.empty(2000, 1), torch.empty(part.own, 1)
    head = head_shards._Head(x, w, None, *[None] * 7, 0, part.group, part.first, classes)
    parts = head.parts()
    assert parts[0].stop == chunk_rows(x, 2 * -(-classes // world), 0)
    of_all = whole(torch.tensor([[p.stop for p in parts]]))
    assert len(parts) > 1 and all(torch.equal(of_all[0], of_rank) for of_rank in of_all)


@pytest.mark.exhaustive
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction):
    torch.compiler.reset()
    arguments = sample(OPTIONS["weights"] | {"reduction": reduction, "chunk_rows": 4})
    compiled = torch.compile(vocab_parallel_linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(sharded(*arguments, function=compiled), sharded(*arguments), rtol=0, atol=0)


def test_autocast():
    """The product in bfloat16, the loss in float32, gradients as the parameters."""
    x, w, target, options = sample(OPTIONS["smoothing"])
    with torch.autocast("cpu", torch.bfloat16):
        ours = sharded(x, w, target, options | {"chunk_rows": 4})
        of_one = results(formula, x, w, target, options)
        logits = stock.linear(x, w, options["linear_bias"])
    truth = F.cross_entropy(logits.double(), target, options["weight"].double(), label_smoothing=0.1)
    assert [t.dtype for t in ours] == [torch.float32] * 4
    assert abs(ours[0] - truth) <= 2 * abs(of_one[0] - truth) + 1e-6 * abs(truth)
    torch.testing.assert_close(ours[1:], of_one[1:], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    x, w, target, options = sample({"reduction": reduction})
    part = slice_of(len(w))
    leaf, own = x.requires_grad_(), w[part.first : part.end]
    loss = vocab_parallel_linear_cross_entropy(leaf, own, target, classes=len(w), **options)
    with pytest.raises(RuntimeError, match="first derivative"):
        torch.autograd.grad(loss.sum(), leaf, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="first derivative"):
        torch.autograd.grad(loss.sum(), leaf, torch.ones(2), is_grads_batched=True)
    with pytest.raises(RuntimeError, match="first derivative"):
        torch.func.grad(lambda x: vocab_parallel_linear_cross_entropy(x, own, target, classes=len(w)))(x)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param({"classes": 60}, ValueError, "of 60 classes", id="slice of another size"),
        pytest.param({"classes": None}, ValueError, "classes must be given where", id="classes of no number"),
        pytest.param({"target": torch.full((11,), 37)}, IndexError, "Target 37 is out of bounds", id="label too large"),
        pytest.param({"weight": torch.ones(5)}, RuntimeError, "weight tensor should be defined", id="weight's length"),
    ],
)
def test_errors_come_before_any_collective(change, error, match, sent):
    x, w, target, _ = sample({})
    part = slice_of(len(w))
    given = {"target": target, "classes": len(w)} | change
    with pytest.raises(error, match=match):
        vocab_parallel_linear_cross_entropy(x, w[part.first : part.end], **given)
    assert not sent


def test_a_rank_without_kernels_keeps_step(rank, equal, monkeypatch):
    """Where its products cannot be compiled, it takes torch's, in the same collectives."""
    if rank == 0:

        def broken():
            raise LaunchError("a product", ValueError("no such instruction"))

        monkeypatch.setattr(linear, "_kernels", broken)
        monkeypatch.setattr(backend, "uses_triton", lambda x: True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        compare(equal, "a rank without kernels", sample({}, (6, 9, 5)), chunk_rows=2)
    given_up = {"vocab_parallel logits", "vocab_parallel product"} if rank == 0 else set()
    assert {kind[0] for kind in GIVEN_UP} == given_up
    GIVEN_UP.clear()


@pytest.mark.exhaustive
def test_input_that_is_still_under_way():
    """As a functional collective leaves it: waited for where it is read."""
    x, w, target, options = sample({}, (6, 9, 5))

    class Arriving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return AsyncCollectiveTensor(x.clone())

        @staticmethod
        def backward(ctx, dx):
            return dx

    def late(x, *others, **more):
        return vocab_parallel_linear_cross_entropy(Arriving.apply(x), *others, **more)

    ours, expected = (sharded(x, w, target, options, function=f) for f in (late, vocab_parallel_linear_cross_entropy))
    assert all(map(torch.equal, ours, expected))


@pytest.mark.exhaustive
def test_a_group_of_some(world, rank, equal):
    """Pairs of ranks, each with a head of its own; whoever is in none is told so."""
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world - 1, 2)]
    outside = dist.new_group([world - 1])
    own = pairs[rank // 2] if rank // 2 < len(pairs) else outside
    compare(equal, "a group of some", sample(OPTIONS["weights"]), own, chunk_rows=4)
    if rank != world - 1:
        x, w, target, _ = sample({})
        with pytest.raises(ValueError, match="not in the group"):
            vocab_parallel_linear_cross_entropy(x, w, target, group=outside)


@pytest.mark.parametrize("bias", [False, True])
def test_module_is_the_unsharded_one(bias, equal):
    """One seed gives both the same parameters; three steps of training leave them the same."""
    given = {"bias": bias, "label_smoothing": 0.1, "z_loss": 0.01, "weight": torch.rand(13)}
    torch.manual_seed(1)
    head = VocabParallelLinearCrossEntropyLoss(7, 13, group=dist.group.WORLD, chunk_rows=3, **given)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    linear = torch.nn.Linear(7, 13, bias)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(whole(getattr(head.linear, name).detach()), t) for name, t in linear.named_parameters())
    assert set(head.state_dict()) == {"weight", *(f"linear.{name}" for name, _ in linear.named_parameters())}
    x, target = torch.randn(8, 7), torch.randint(0, 13, (8,))
    exact, options = copy.deepcopy(linear).double(), {"label_smoothing": 0.1, "z_loss": 0.01}

    def steps(parameters, loss_of):
        optimizer = torch.optim.SGD(parameters, 0.5, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()

    steps(head.parameters(), lambda: head(x, target))
    for one in (linear, exact):
        dtype = one.weight.dtype
        weight, rows = given["weight"].to(dtype), x.to(dtype)
        steps(one.parameters(), lambda: F.cross_entropy(one(rows), target, weight, **options))  # noqa: B023
    found = [whole(t.detach()) for t in copy.deepcopy(head).linear.parameters()]
    equal(f"head, trained, bias {bias}", found, list(exact.parameters()), list(linear.parameters()))
