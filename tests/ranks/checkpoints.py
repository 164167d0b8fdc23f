"""torch.distributed.checkpoint: saved by some processes, loaded by more or fewer, which go on to the same weights."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from samples.rank_models import CLASSES, EXAMPLES, FEATURES, part, whole
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

import fusedact
from fusedact import nn
from fusedact.distributed import VocabParallelLinearCrossEntropyLoss

WRAPPED = {
    "DDP": lambda model, mesh: DistributedDataParallel(model, process_group=mesh.get_group()),
    "fully_shard": lambda model, mesh: fully_shard(model, mesh=mesh),
}
SIZES = {"one": lambda world: 1, "two": lambda world: 2, "all": lambda world: world}
exhaustive = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def meshes(world):
    """Of the first so many processes."""
    return {name: DeviceMesh("cpu", list(range(size(world)))) for name, size in SIZES.items()}


@pytest.fixture
def folder(tmp_path, rank):
    """The first process's, for all."""
    told = [str(tmp_path)]
    dist.broadcast_object_list(told, src=0)
    return told[0]


@contextmanager
def alone(mesh):
    """True in the mesh's processes. The others wait at the end."""
    yield mesh.get_coordinate() is not None
    dist.barrier()


def adam(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)


def train(example, model, optimizer, batches):
    for batch in batches:
        optimizer.zero_grad()
        example.loss(model, batch).backward()
        optimizer.step()


def parts(example, mesh):
    return [part(batch, mesh.get_local_rank(), mesh.size()) for batch in example.batches()]


def one_process(example, dtype):
    with fusedact.use_backend("torch"):
        model = example.model(dtype)
        train(example, model, adam(model), example.batches(dtype))
        return list(model.parameters())


def other_weights(model):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    return model


CASES = {
    "all to one": ("fully_shard", "all", "fully_shard", "one"),
    "one to all": ("fully_shard", "one", "fully_shard", "all"),
    "two to all": ("fully_shard", "two", "fully_shard", "all"),
    "all to two": ("fully_shard", "all", "fully_shard", "two"),
    "DDP of all to fully_shard of two": ("DDP", "all", "fully_shard", "two"),
    "fully_shard of two to DDP of all": ("fully_shard", "two", "DDP", "all"),
    "DDP of one to DDP of all": ("DDP", "one", "DDP", "all"),
}
SHORT = ("all to one", "fully_shard of two to DDP of all")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in SHORT else exhaustive) for c in CASES])
@pytest.mark.parametrize("name", ["fused", pytest.param("block", marks=exhaustive)])
def test_training_goes_on(name, case, meshes, folder, equal):
    """Two steps with Adam, a checkpoint of weights and optimizer, a third step from it on other processes."""
    example, (saved_as, savers, loaded_as, loaders) = EXAMPLES[name], CASES[case]
    with alone(meshes[savers]) as taking_part:
        if taking_part:
            mesh = meshes[savers]
            model = WRAPPED[saved_as](example.model(), mesh)
            optimizer = adam(model)
            train(example, model, optimizer, parts(example, mesh)[:2])
            weights, states = get_state_dict(model, optimizer)
            assert list(weights) == list(example.model().state_dict())
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder, process_group=mesh.get_group())
    with alone(meshes[loaders]) as taking_part:
        if taking_part:
            mesh = meshes[loaders]
            model = WRAPPED[loaded_as](other_weights(example.model()), mesh)
            optimizer = adam(model)
            weights, states = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder, process_group=mesh.get_group())
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
            train(example, model, optimizer, parts(example, mesh)[2:])
            ours = [whole(p) for p in model.parameters()]
            truth, stock = one_process(example, torch.float64), one_process(example, torch.float32)
            equal(f"checkpoint, {case}, {name}", ours, truth, stock)


# The vocabulary-parallel head


class Sliced(nn.Module):
    """Layers that are whole in each process, and a head of which each has some classes."""

    def __init__(self, mesh):
        super().__init__()
        self.layer = nn.Linear(FEATURES, 6, activation="gelu")
        if mesh is None:
            self.head = nn.LinearCrossEntropyLoss(6, CLASSES, bias=True)
        else:
            self.head = VocabParallelLinearCrossEntropyLoss(6, CLASSES, bias=True, group=mesh.get_group())

    def forward(self, x, target):
        return self.head(self.layer(x), target)


def sliced(mesh, dtype=torch.float32):
    torch.manual_seed(5)
    return Sliced(mesh).to(dtype)


def as_saved(model, optimizer, mesh):
    """Weights and Adam's two means of them, those of the head as slices of whole ones; in the model's own memory."""

    def entry(name, t):
        if not name.startswith("head."):
            return t.detach()
        shape = (CLASSES, *t.shape[1:])
        return DTensor.from_local(t.detach(), mesh, [Shard(0)], shape=shape, stride=t.stride())

    found = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        found |= {name: entry(name, p), f"{name}.step": state["step"]}
        found |= {f"{name}.{mean}": entry(name, state[mean]) for mean in ("exp_avg", "exp_avg_sq")}
    return found


def head_step(model, optimizer, batch):
    optimizer.zero_grad()
    model(*batch).backward()
    optimizer.step()


@pytest.mark.parametrize(("savers", "loaders"), [("all", "one"), ("two", "all"), ("one", "all")])
def test_the_slices_of_a_head_are_those_of_other_processes(savers, loaders, meshes, folder, equal):
    """Each process has the whole batch. Of 5 classes 4 processes have 2, 2, 1 and 0."""

    def batches(dtype):
        return EXAMPLES["mlp"].batches(dtype)

    def one(dtype):
        with fusedact.use_backend("torch"):
            model = sliced(None, dtype)
            optimizer = adam(model)
            for batch in batches(dtype):
                head_step(model, optimizer, batch)
            return list(model.parameters())

    with alone(meshes[savers]) as taking_part:
        if taking_part:
            mesh = meshes[savers]
            model = sliced(mesh)
            optimizer = adam(model)
            for batch in batches(torch.float32)[:2]:
                head_step(model, optimizer, batch)
            dcp.save(as_saved(model, optimizer, mesh), checkpoint_id=folder, process_group=mesh.get_group())
    with alone(meshes[loaders]) as taking_part:
        if taking_part:
            mesh = meshes[loaders]
            model = sliced(mesh)
            optimizer = adam(model)
            head_step(model, optimizer, batches(torch.float32)[0])  # so that there are means to load into
            other_weights(model)
            dcp.load(as_saved(model, optimizer, mesh), checkpoint_id=folder, process_group=mesh.get_group())
            head_step(model, optimizer, batches(torch.float32)[2])
            ours = [whole(as_saved(model, optimizer, mesh)[name]) for name, _ in model.named_parameters()]
            equal(f"checkpoint, head, {savers} to {loaders}", ours, one(torch.float64), one(torch.float32))
