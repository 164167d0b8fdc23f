"""DistributedDataParallel of models made of fusedact's layers, or fused by it, against one process."""

from contextlib import nullcontext

import pytest
import torch
from samples.rank_models import EXAMPLES, FEATURES, STEPS, Stock, backward_of, in_each, in_one_process, part, trained
from samples.sharded_calls import or_kernels
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import fusedact

OPTIONS = {
    "default": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
}
exhaustive = pytest.mark.exhaustive
a_few = pytest.mark.parametrize("name", ["fused", pytest.param("block", marks=exhaustive)])
smooth = a_few  # where weights are rounded, a pre-activation may cross the kink of an activation that has one


def parts(example, rank, world):
    return [part(batch, rank, world) for batch in example.batches()]


def check_ddp(name, way, rank, world, against_one):
    """Three steps: the second would fail where the first had left a parameter without a gradient."""
    example = EXAMPLES[name]
    model = DistributedDataParallel(example.model(), **OPTIONS[way])
    ours = trained(model, backward_of(example, model, parts(example, rank, world)))
    against_one(f"DDP, {way}, {name}", ours, example)


@in_each
def test_ddp(name, kernels, rank, world, against_one):
    check_ddp(name, "default", rank, world, against_one)


@exhaustive
@pytest.mark.parametrize("way", list(OPTIONS)[1:])
@or_kernels
@a_few
def test_ddp_with_options(name, way, kernels, rank, world, against_one):
    check_ddp(name, way, rank, world, against_one)


class Unused(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.unused = model, torch.nn.Linear(2, 3)

    def forward(self, *args):
        return self.model(*args)


@pytest.mark.parametrize(("wrap", "bytes_unused"), [(lambda model: model, 0), (Unused, 36)], ids=["ours", "one unused"])
@a_few
def test_no_parameter_is_reported_unused(name, wrap, bytes_unused, kernels, rank, world):
    example = EXAMPLES[name]
    model = DistributedDataParallel(wrap(example.model()), find_unused_parameters=True)
    for backward in backward_of(example, model, parts(example, rank, world)):
        backward()
    assert model._get_ddp_logging_data().get("unused_parameter_size", 0) == bytes_unused


@or_kernels
@a_few
def test_ddp_accumulates_over_two_micro_batches(name, kernels, rank, world, against_one):
    example = EXAMPLES[name]
    model = DistributedDataParallel(example.model())

    def step(batch):
        for micro in range(2):
            with model.no_sync() if micro == 0 else nullcontext():
                (example.loss(model, part(batch, micro, 2)) / 2).backward()

    steps = [lambda batch=batch: step(batch) for batch in parts(example, rank, world)]
    against_one(f"DDP, no_sync, {name}", trained(model, steps), example)


def rounded(model):
    """Each process's gradient in float16, and what they add up to, as fp16_compress_hook sends them."""

    def round_sum(p):
        p.grad = p.grad.half().to(p.dtype)

    for p in model.parameters():
        if p.requires_grad:
            p.register_hook(lambda grad: grad.half().to(grad.dtype))
            p.register_post_accumulate_grad_hook(round_sum)
    return model


@or_kernels
@smooth
def test_ddp_sends_gradients_in_float16(name, kernels, rank, world, against_one):
    example = EXAMPLES[name]
    model = DistributedDataParallel(example.model())
    model.register_comm_hook(None, fp16_compress_hook)
    ours = trained(model, backward_of(example, model, parts(example, rank, world)))
    against_one(f"DDP, gradients in float16, {name}", ours, example, rounded, low=True)


@or_kernels
@smooth
def test_ddp_under_autocast(name, kernels, rank, world, against_one):
    example = EXAMPLES[name].under(lambda: torch.autocast("cpu", torch.bfloat16))
    model = DistributedDataParallel(example.model())
    ours = trained(model, backward_of(example, model, parts(example, rank, world)))
    against_one(f"DDP, autocast, {name}", ours, example, low=True)


@or_kernels
@a_few
def test_ddp_joins_uneven_batches(name, kernels, rank, world, equal):
    """Odd ranks have no third batch: the gradient is then the others' sum over all ranks."""
    example, mine = EXAMPLES[name], parts(EXAMPLES[name], rank, world)
    model = DistributedDataParallel(example.model())
    with Join([model]):
        ours = trained(model, backward_of(example, model, mine[: STEPS - rank % 2]))

    def has_batch(step, process):
        return step < STEPS - process % 2

    truth, stock = (
        in_one_process(example, d, pieces=world, takes_part=has_batch) for d in (torch.float64, torch.float32)
    )
    equal(f"DDP, Join, {name}: gradients", ours.gradients, truth.gradients, stock.gradients)
    if rank % 2 == 0:  # who had the last batch
        equal(f"DDP, Join, {name}: weights", ours.weights, truth.weights, stock.weights)


def test_a_wrapped_model_is_fused(triton_backend, launches):
    def launched(model):
        launches.reset()
        model(torch.randn(4, FEATURES)).sum().backward()
        return launches.count

    assert launched(fusedact.fuse(DistributedDataParallel(Stock()))) == launched(fusedact.fuse(Stock())) > 0
