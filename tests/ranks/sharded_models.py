"""fully_shard of models made of fusedact's layers, or fused by it, against one process."""

import pytest
import torch
from samples.rank_models import EXAMPLES, Stock, backward_of, in_each, part, trained
from samples.sharded_calls import or_kernels
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.func import functional_call

import fusedact
from fusedact import nn as fnn

exhaustive = pytest.mark.exhaustive
each_example = pytest.mark.parametrize("name", EXAMPLES)
a_few = pytest.mark.parametrize("name", ["fused", pytest.param("block", marks=exhaustive)])
smooth = a_few  # where weights are rounded, a pre-activation may cross the kink of an activation that has one
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def children(model, **options):
    """Each child that has parameters, then what is left: of a Sequential, layer by layer."""
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, **options)
    return fully_shard(model, **options)


def checkpointed(model, **options):
    for name, child in model.named_children():
        if any(True for _ in child.parameters()) and name not in ("embed", "head"):
            setattr(model, name, checkpoint_wrapper(child))
    return fully_shard(model, **options)


def fused_after(model, **options):
    return fusedact.fuse(fully_shard(fusedact.unfuse(model), **options))


WAYS = {
    "whole": fully_shard,
    "children": children,
    "resharded after forward": lambda model: fully_shard(model, reshard_after_forward=True),
    "children, not resharded": lambda model: children(model, reshard_after_forward=False),
    "checkpointed": checkpointed,
    "fused after": fused_after,
}


def check(name, way, rank, world, against_one):
    example = EXAMPLES[name]
    model = WAYS[way](example.model())
    batches = [part(batch, rank, world) for batch in example.batches()]
    against_one(f"fully_shard, {way}, {name}", trained(model, backward_of(example, model, batches)), example)


@in_each
def test_fully_shard(name, kernels, rank, world, against_one):
    check(name, "resharded after forward", rank, world, against_one)


@or_kernels
@a_few
def test_fully_shard_child_by_child(name, kernels, rank, world, against_one):
    check(name, "children", rank, world, against_one)


@exhaustive
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("children", "resharded after forward")])
@or_kernels
@a_few
def test_fully_shard_otherwise(name, way, kernels, rank, world, against_one):
    check(name, way, rank, world, against_one)


def in_bfloat16(model):
    """Called on bfloat16 parameters, whose gradients are added up in float32."""

    def call(*batch):
        low = {name: p.bfloat16() for name, p in model.named_parameters()}
        return functional_call(model, low, tuple(t.bfloat16() if t.is_floating_point() else t for t in batch))

    return call


@or_kernels
@smooth
def test_fully_shard_in_mixed_precision(name, kernels, rank, world, against_one):
    example = EXAMPLES[name]
    model = fully_shard(example.model(), mp_policy=BFLOAT16)
    batches = [part(batch, rank, world) for batch in example.batches()]
    ours = trained(model, backward_of(example, model, batches))
    against_one(f"fully_shard, bfloat16, {name}", ours, example, in_bfloat16, low=True)


@or_kernels
@a_few
def test_fully_shard_accumulates_over_two_micro_batches(name, kernels, rank, world, against_one):
    example = EXAMPLES[name]
    model = fully_shard(example.model())

    def step(batch):
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            (example.loss(model, part(batch, micro, 2)) / 2).backward()

    steps = [lambda batch=batch: step(part(batch, rank, world)) for batch in example.batches()]
    against_one(f"fully_shard, accumulated, {name}", trained(model, steps), example)


@each_example
def test_state_dict_keeps_its_keys(name):
    example = EXAMPLES[name]
    assert list(fully_shard(example.model()).state_dict()) == list(example.model().state_dict())


# What is saved for backward


def saved_by(run):
    """Every tensor that autograd saves of run()."""
    found = []

    def pack(t):
        found.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return found, run()


@in_each
def test_no_gathered_weight_is_held_until_backward(name, kernels, rank, world):
    """What is saved of a weight is the gathered one itself, given back after the forward; nothing saved is a copy."""
    example = EXAMPLES[name]
    model = fully_shard(example.model(), reshard_after_forward=True)
    weights = [p.full_tensor().detach() for p in model.parameters()]
    saved, loss = saved_by(lambda: example.loss(model, part(example.batches()[0], rank, world)))
    given_back = sum(t.untyped_storage().size() == 0 for t in saved)
    held = [t for t in saved if t.untyped_storage().size()]
    copied = sum(t.numel() > 1 and any(is_same(t, weight) for weight in weights) for t in held)
    assert given_back and not copied  # asked as numbers: pytest would read the memory that is gone
    loss.backward()


def is_same(t, weight):
    return t.numel() == weight.numel() and torch.equal(t.detach().flatten(), weight.flatten())


# What stays fused


def launches_of(model, x, launches):
    launches.reset()
    model(x).sum().backward()
    return launches.count


def _pair():
    return fnn.Sequential(fnn.Linear(7, 6), fnn.ReLU(), fnn.Linear(6, 5))


def _activated():
    return fnn.Sequential(fnn.Linear(7, 6, activation="relu"), fnn.Linear(6, 5))


FUSED = {
    "Sequential": (_pair, fully_shard, True),
    "Sequential, layer by layer": (_pair, children, False),
    "Linear(activation=)": (_activated, fully_shard, True),
    "fuse, then fully_shard": (lambda: fusedact.fuse(Stock()), fully_shard, True),
    "fully_shard, then fuse": (lambda: fusedact.fuse(Stock()), fused_after, True),
    "fuse, then layer by layer": (lambda: fusedact.fuse(Stock()), children, False),
    "fuse an iterated Sequential": (lambda: fusedact.fuse(nn.Sequential(*_pair())), fully_shard, True),
}


@pytest.mark.parametrize("name", FUSED)
def test_what_stays_fused(name, triton_backend, launches):
    """A module that is sharded whole launches what it launches unsharded; layers that are sharded one by one do not."""
    make, shard, whole = FUSED[name]
    x = torch.randn(4, 7)
    alone, sharded = launches_of(make(), x, launches), launches_of(shard(make()), x, launches)
    assert alone > 0 and (sharded == alone) == whole


def test_a_sharded_model_is_fused_again_and_reported():
    model = fully_shard(fusedact.fuse(Stock()))
    before, kind = str(fusedact.report(model)), type(model)
    assert before == str(fusedact.report(fusedact.fuse(Stock())))
    assert fusedact.fuse(model) is model and type(model) is kind and str(fusedact.report(model)) == before


def test_a_sharded_model_is_not_unfused():
    """Its class was made of the fused one. Fused after fully_shard it can be."""
    with pytest.raises(RuntimeError, match="as fully_shard"):
        fusedact.unfuse(fully_shard(fusedact.fuse(Stock())))
    model = fully_shard(Stock())
    kind = type(model)
    assert type(fusedact.unfuse(fusedact.fuse(model))) is kind


def test_a_layer_of_a_head_is_not_sharded_by_itself(kernels):
    """The head reads its weight without calling it: torch says so, and nothing is computed of a part."""
    head = fnn.LinearCrossEntropyLoss(6, 5)
    fully_shard(head.linear)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        fully_shard(head)(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))
