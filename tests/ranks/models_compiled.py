"""torch.compile of models of several processes. Backend aot_eager: the graphs of inductor without its C++ compiler."""

import pytest
import torch
from samples.rank_models import EXAMPLES, backward_of, part, trained
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

GRAPHS = []  # compiled in this test


def backend(graph, inputs):
    GRAPHS.append(graph)
    return aot_eager(graph, inputs)


def compiled(model):
    return torch.compile(model, backend=backend)


def compiled_children(model):
    for child in model.children():
        if any(True for _ in child.parameters()):
            child.compile(backend=backend)
            fully_shard(child)
    return fully_shard(model)


WAYS = {
    "compile, then DDP": lambda model: DistributedDataParallel(compiled(model)),
    "DDP, then compile": lambda model: compiled(DistributedDataParallel(model)),
    "DDP in buckets, then compile": lambda model: compiled(DistributedDataParallel(model, bucket_cap_mb=2e-4)),
    "fully_shard, then compile": lambda model: compiled(fully_shard(model)),
    "children compiled and sharded": compiled_children,
}


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    monkeypatch.setattr("torch.distributed._DEFAULT_FIRST_BUCKET_BYTES", 100)  # else 1 MiB, all that these models have
    GRAPHS.clear()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(name, way, rank, world, against_one):
    example = EXAMPLES[name]
    model = WAYS[way](example.model())
    batches = [part(batch, rank, world) for batch in example.batches()]
    against_one(f"{way}, {name}", trained(model, backward_of(example, model, batches)), example)


@pytest.mark.parametrize(
    "way", [pytest.param("DDP, then compile", marks=pytest.mark.exhaustive), "fully_shard, then compile"]
)
def test_compiled(way, rank, world, against_one):
    check("mlp", way, rank, world, against_one)
    assert GRAPHS


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["fused", "block"])
def test_compiled_in_kernels(name, way, triton_backend, rank, world, against_one):
    check(name, way, rank, world, against_one)
    of_layers = name != "block" and way == "children compiled and sharded"  # each alone, so that no pair is whole
    called = [str(node.target) for graph in GRAPHS for node in graph.graph.nodes if node.op == "call_function"]
    assert any(target.startswith("fusedact.") for target in called) != of_layers
    assert len(GRAPHS) > 1 or way != "DDP in buckets, then compile"
