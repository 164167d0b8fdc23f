"""`fit_many` over processes: all networks of one process, in order, and the generator where one process leaves it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusedact import data
from fusedact.distributed import processes, sweeps
from fusedact.fitting import fit_many


def bits():
    x, y = data.xor(rows=200)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid())
    return model, x, y, {"loss": nn.BCELoss(), "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}


def classes():
    x, y = torch.randn(70, 5), torch.randint(3, (70,))
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    return model, x, y, {"loss": nn.CrossEntropyLoss(), "optimizer": lambda p: torch.optim.Adam(p, lr=1e-2)}


def trained(train, task, networks, dtype=torch.float32, **options):
    torch.manual_seed(1)
    model, x, y, how = task()
    y = y.to(dtype) if y.is_floating_point() else y
    starts = {"seeds": range(networks), "lrs": torch.linspace(0.1, 1, networks)}
    return train(model.to(dtype), x.to(dtype), y, epochs=6, batch_size=32, drop_last=True, **how, **starts, **options)


tasks = pytest.mark.parametrize("task", [bits, classes])


@tasks
@pytest.mark.parametrize("networks", [1, 2, 5, 50, 300])
def test_networks_equal_one_process(task, networks, equal):
    """Fewer than processes, too."""
    truth, stock = (trained(fit_many, task, networks, dtype) for dtype in (torch.float64, torch.float32))
    ours = trained(sweeps.fit_many, task, networks)
    assert (ours.engine, ours.reason, [*ours.parameters]) == (stock.engine, stock.reason, [*stock.parameters])
    found = [[each.costs, *each.parameters.values()] for each in (ours, truth, stock)]
    equal(f"fit_many, {task.__name__}", *found)


@pytest.mark.parametrize("networks", [1, 5])
@pytest.mark.parametrize("generated", [False, True], ids=["torch's own generator", "a generator"])
def test_the_first_process_draws_for_all(generated, networks, rank, equal):
    """The generators, which differ from process to process before, are then where one process leaves its own."""

    def drawn(train, seed, dtype=torch.float32):
        generator = (torch.Generator() if generated else torch.default_generator).manual_seed(seed)
        model, x, y, how = bits()
        y, model, x = y.to(dtype), model.to(dtype), x.to(dtype)
        how |= {"generator": generator} if generated else {}
        fitted = train(model, x, y, seeds=range(networks), epochs=3, batch_size=7, **how)
        return fitted, generator.get_state()

    (truth, after), (stock, _), (ours, state) = (
        drawn(fit_many, 7, torch.float64), drawn(fit_many, 7), drawn(sweeps.fit_many, 7 + rank),
    )  # fmt: skip
    assert torch.equal(state, after)
    equal("fit_many, each process's generator elsewhere", [ours.costs], [truth.costs], [stock.costs])


def test_a_group_of_the_first_process(rank):
    """Whoever is not of the group is told so, and waits for nobody."""
    group = dist.new_group([0])
    if rank == 0:
        one, ours = trained(fit_many, bits, 3), trained(sweeps.fit_many, bits, 3, group=group)
        assert torch.equal(one.costs, ours.costs)
    else:
        with pytest.raises(ValueError, match="not in the group"):
            trained(sweeps.fit_many, bits, 3, group=group)


@pytest.mark.parametrize("networks", [1, 3, 7, 65, 129, 300, 960, 1000, 5000])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 16])
def test_parts_are_even(networks, count):
    """None is longer by a tenth than it must be, and none is empty while another has two networks."""
    parts = sweeps._parts(networks, count)
    sizes = [part.stop - part.start if part else 0 for part in parts]
    assert [i for part in parts if part for i in range(networks)[part]] == [*range(networks)]
    assert len(sizes) == count and max(sizes) <= 1.1 * -(-networks // count)
    assert min(sizes) > 0 or max(sizes) == 1


def test_parts_of_many_networks_are_whole_vectors():
    assert sweeps._parts(5000, 2) == [slice(0, 2496), slice(2496, 5000)]


FAULTS = {
    "no networks": {"seeds": None, "lrs": None},
    "counts": {"seeds": [1, 2, 3]},
    "a rate of the last network": {"lrs": [0.1, -0.1]},
    "a batch": {"batch_size": 201},
    "a loss": {"loss": nn.L1Loss()},
    "inits": {"seeds": None, "inits": torch.zeros(2, 4)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_are_those_of_one_process_in_each(fault):
    model, x, y, how = bits()
    options = {"epochs": 1, "batch_size": 32, "drop_last": True, "seeds": [0, 1], "lrs": [0.1, 0.2]}
    told = []
    for train in (fit_many, sweeps.fit_many):
        with pytest.raises(ValueError) as error:
            train(copy.deepcopy(model), x, y, **how | options | FAULTS[fault])
        told.append(str(error.value))
    assert told[0] == told[1]


def test_what_the_first_process_makes_is_everyones(rank):
    assert processes.from_first(lambda: f"of {rank}") == "of 0"
    made = []

    def fail():
        made.append(rank)
        raise ValueError(f"in {rank}")

    with pytest.raises(ValueError, match="in 0"):
        processes.from_first(fail)
    assert made == [0] * (rank == 0)


class Unsendable(Exception):
    """Whose pickle does not load: it is made of two arguments, and keeps one."""

    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


@pytest.mark.parametrize("tell", [processes.from_first, processes.in_turn])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        pytest.param(FileNotFoundError(2, "none", "there"), FileNotFoundError, "none: 'there'", id="its own type"),
        pytest.param(ZeroDivisionError("by 0"), ZeroDivisionError, "by 0", id="any type"),
        pytest.param(Unsendable("fault", "it"), RuntimeError, "Unsendable: fault in it", id="what cannot be sent"),
    ],
)
def test_an_exception_of_the_first_process_is_everyones(tell, error, kind, text):
    def fail():
        raise error

    with pytest.raises(kind, match=text):
        tell(fail)
