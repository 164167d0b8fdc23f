"""What the processes of tests/ranks share: the group that torchrun started, and one rule for what is equal."""

import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

EQUALITIES: list[dict] = []


@pytest.fixture(scope="session", autouse=True)
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", timeout=timedelta(minutes=4))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def rank(group) -> int:
    return dist.get_rank()


@pytest.fixture(scope="session")
def world(group) -> int:
    return dist.get_world_size()


@pytest.fixture(scope="session")
def mesh(world):
    """All processes in a row."""
    return dist.init_device_mesh("cpu", (world,))


@pytest.fixture(scope="session")
def mesh_2d(world):
    """2 x 2 of four, else a column."""
    return dist.init_device_mesh("cpu", (2, 2) if world == 4 else (world, 1))


def _distance(found: Tensor, truth: Tensor) -> float:
    """Relative, in float64; what is not finite must be the same in both."""
    found, truth = found.detach().double(), truth.detach().double()
    assert found.shape == truth.shape
    torch.testing.assert_close(found.where(~found.isfinite(), 0.0), truth.where(~truth.isfinite(), 0.0), equal_nan=True)
    found, truth = (t.where(t.isfinite(), 0.0) for t in (found, truth))
    return ((found - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


@pytest.fixture
def equal(request, world):
    """equal(what, ours, truth, stock): no tensor of ours errs by more than twice what one process's does, and 1e-6.

    Lists of whole tensors: of the processes together, of float64, and of one process in the same dtype.
    """

    def compare(what: str, ours: Sequence[Tensor], truth: Sequence[Tensor], stock: Sequence[Tensor]) -> None:
        errors = [(_distance(a, exact), _distance(b, exact)) for a, exact, b in zip(ours, truth, stock, strict=True)]
        error, of_one = max(errors, key=lambda pair: pair[0])
        test = f"{request.path.stem}.{request.node.name}"
        EQUALITIES.append({"test": test, "what": what, "world": world, "error": error, "of one process": of_one})
        wrong = [pair for pair in errors if not pair[0] <= 2 * pair[1] + 1e-6]
        assert not wrong, f"{what}: errors and those of one process {wrong}"

    return compare


def pytest_sessionfinish() -> None:
    if os.environ.get("RANK") == "0":  # under torchrun
        Path(os.environ["EQUALITIES"]).write_text(json.dumps(EQUALITIES))


@pytest.fixture(params=["auto", "triton"])
def kernels(request) -> str:
    """On a CPU torch's own operations; kernels in the interpreter."""
    if request.param == "triton":
        request.getfixturevalue("triton_backend")
    return request.param


@pytest.fixture
def against_one(equal, world):
    """against_one(what, ours, example, stock): gradients and weights against one process on the whole batches.

    stock(model) gives what that process calls in place of the model, in float32. low: of low precision, which rounds
    the gradient of each process's rows. That process then takes as many pieces, and tensors are laid end to end, since
    a few such numbers are but a draw.
    """
    from samples.rank_models import in_one_process

    def compare(what: str, ours, example, stock=lambda model: model, low: bool = False) -> None:
        truth = in_one_process(example, torch.float64)
        one = in_one_process(example, torch.float32, stock, world if low else 1)
        for kind in ("gradients", "weights"):
            found = [getattr(each, kind) for each in (ours, truth, one)]
            if low:
                found = [[torch.cat([t.flatten() for t in tensors])] for tensors in found]
            equal(f"{what}: {kind}", *found)

    return compare
