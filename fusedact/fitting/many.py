"""`fit_many`: copies of one small network that differ in where they start, or how fast they learn, trained at once."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fusedact import backend
from fusedact.fitting import batched, tiny
from fusedact.fitting.engine import check_batches
from fusedact.fitting.flat import check_rows
from fusedact.fitting.order import orders
from fusedact.fitting.recipe import Recipe, Unsupported, read

PASSES = 64  # whose orders are drawn together

Inits = Mapping[str, Tensor] | Tensor


@dataclass(frozen=True, eq=False)
class FittedMany:
    """Trained networks, of which the i-th is `{name: value[i] for name, value in parameters.items()}`.

    costs: (networks, epochs), of each epoch the mean of its steps' losses. parameters: by their names in the model,
    (networks, *shape). engine: what trained them, and reason: why not another.
    """

    costs: Tensor
    parameters: dict[str, Tensor]
    engine: str
    reason: str


def fit_many(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    inits: Inits | None = None,
    lrs: Sequence[float] | Tensor | None = None,
) -> FittedMany:
    """Trains many copies of a small network at once, each as `fit` would, all on the same batches.

    seeds: network i starts from the parameters that torch draws for the model after `torch.manual_seed(seeds[i])`: on
    a CPU, in torch's default dtype, by `reset_parameters` of each of its modules in their order, which is that of
    their construction in a Sequential. torch's own random state is left alone.
    inits: or it starts from these: of each parameter, by its name in the model, (networks, *shape), or (networks, P)
    with each network's parameters flattened in the model's order.
    lrs: its learning rate, in place of the optimizer's. With seeds or inits there are as many lrs, and network i has
    seeds[i] and lrs[i] (for each with each, repeat them as `itertools.product` does); without, each network starts
    from the model's own parameters.

    All else is as for `fit`, but that the model and the optimizer stay as they are, its moments begin at 0, and
    a network whose numbers are no longer finite, or no probabilities where the loss takes those, does not stop the
    others: its costs are then not finite.

    On a GPU each network is a program of one launch where it is small enough for registers; else, and on a CPU, all
    are trained by the same torch operations.

    Raises ValueError for what does not fit together, and for a model, a loss or an optimizer that is not supported,
    naming what is.
    """
    return prepared(
        model, x, y, loss=loss, optimizer=optimizer, epochs=epochs, batch_size=batch_size, drop_last=drop_last,
        shuffle=shuffle, generator=generator, seeds=seeds, inits=inits, lrs=lrs,
    ).train()  # fmt: skip


@dataclass(frozen=True, eq=False)
class Sweep:
    """What `fit_many` was asked for, once it is checked: all networks, or some of them.

    rates: float64 (networks,). parameters: by their names in the model, (networks, *shape), trained in place.
    """

    recipe: Recipe
    names: tuple[str, ...]  # of the recipe's parameters
    x: Tensor
    y: Tensor
    rates: Tensor
    parameters: dict[str, Tensor]
    epochs: int
    batch_size: int
    drop_last: bool
    shuffle: bool
    generator: torch.Generator | None

    def some(self, networks: slice) -> "Sweep":
        """These networks alone."""
        parameters = {name: value[networks].clone() for name, value in self.parameters.items()}
        return replace(self, rates=self.rates[networks], parameters=parameters)

    def train(self) -> FittedMany:
        rows = len(self.x)
        visited = rows // self.batch_size * self.batch_size if self.drop_last else rows
        sizes = [min(self.batch_size, visited - at) for at in range(0, visited, self.batch_size)]
        counts = [min(PASSES, self.epochs - done) for done in range(0, self.epochs, PASSES)]
        starts = [self.parameters[name] for name in self.names]

        def train(engine: Any) -> Tensor:
            passes = (row[:visited] for count in counts for row in orders(count, rows, self.generator, self.shuffle))
            return engine.train(self.recipe, self.x, self.y, starts, self.rates, sizes, passes)

        obstacle = tiny.obstacle(self.recipe, self.x, sizes[0])
        if obstacle is None:
            drawn_from = self.generator or torch.default_generator
            before = drawn_from.get_state()
            try:
                return FittedMany(train(tiny), self.parameters, "tiny", f"the fastest on {self.x.device.type}")
            except backend.launch_error() as error:
                backend.give_up(error)
                drawn_from.set_state(before)
                obstacle = str(error)
        return FittedMany(train(batched), self.parameters, "batched", obstacle)


def prepared(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    drop_last: bool = False,
    shuffle: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    inits: Inits | None = None,
    lrs: Sequence[float] | Tensor | None = None,
) -> Sweep:
    """What these arguments of `fit_many` ask for; raises as it does."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = optimizer(model.parameters())
    recipe = read(model, loss, optimizer)
    x, y = x.to(recipe.device), y.to(recipe.device)
    _check(recipe, x, y, epochs, batch_size, drop_last)
    if isinstance(inits, Tensor):
        inits = _by_name(model, inits)
    networks = _count(seeds, inits, lrs)
    rates = _rates(recipe, networks, lrs)
    parameters = _starts(model, networks, seeds, inits)
    names = {id(p): name for name, p in model.named_parameters()}
    return Sweep(
        recipe, tuple(names[id(p)] for p in recipe.parameters), x, y, rates, parameters, epochs, batch_size, drop_last,
        shuffle, generator,
    )  # fmt: skip


def _check(recipe: Recipe, x: Tensor, y: Tensor, epochs: int, batch_size: int, drop_last: bool) -> None:
    if recipe.dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"fit_many computes in float32 and float64, not {recipe.dtype}")
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    check_batches(x, y, batch_size, drop_last)
    check_rows(x, y, recipe)


def _count(
    seeds: Sequence[int] | None, inits: Mapping[str, Tensor] | None, lrs: Sequence[float] | Tensor | None
) -> int:
    """How many networks there are."""
    if seeds is not None and inits is not None:
        raise ValueError("seeds and inits both say where the networks start, give one of them")
    given = {"seeds": seeds, "lrs": lrs} | {f"inits[{name!r}]": init for name, init in (inits or {}).items()}
    counts = {name: len(each) for name, each in given.items() if each is not None}
    if not counts:
        raise ValueError("one of seeds, inits and lrs must say which networks there are")
    if len(set(counts.values())) > 1 or 0 in counts.values():
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"seeds, inits and lrs must be one for each network, got {found}")
    return next(iter(counts.values()))


def _rates(recipe: Recipe, networks: int, lrs: Sequence[float] | Tensor | None) -> Tensor:
    """Each network's learning rate, float64 (networks,)."""
    given = [recipe.rule.lr] * networks if lrs is None else lrs
    rates = torch.as_tensor(given, dtype=torch.float64, device=recipe.device)
    if rates.dim() != 1 or not (rates >= 0).all():
        raise ValueError(f"lrs must be numbers of at least 0, got {lrs!r}")
    return rates


def _starts(
    model: nn.Module, networks: int, seeds: Sequence[int] | None, inits: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Of each parameter, by name, a new tensor (networks, *shape)."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    if seeds is not None:
        drawn = [*_drawn(model, seeds)]
        return {name: torch.stack([each[name] for each in drawn]).to(p) for name, p in own.items()}
    if inits is None:
        return {name: p.expand(networks, *p.shape).clone() for name, p in own.items()}
    if set(inits) != set(own):
        raise ValueError(f"inits must have the model's parameters {', '.join(own)}, got {', '.join(inits)}")
    for name, p in own.items():
        expected = (networks, *p.shape)
        if inits[name].shape != expected:
            raise ValueError(f"inits[{name!r}] must be {expected}, got {tuple(inits[name].shape)}")
    return {name: inits[name].detach().to(p, copy=True) for name, p in own.items()}


def _by_name(model: nn.Module, inits: Tensor) -> dict[str, Tensor]:
    own = dict(model.named_parameters())
    sizes = [p.numel() for p in own.values()]
    if inits.dim() != 2 or inits.shape[1] != sum(sizes):
        raise ValueError(f"inits must be (networks, {sum(sizes)}), got {tuple(inits.shape)}")
    parts = zip(own.items(), inits.split(sizes, 1), strict=True)
    return {name: part.reshape(-1, *p.shape) for (name, p), part in parts}


def _drawn(model: nn.Module, seeds: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """The model's parameters by name, drawn anew after each seed."""
    drawn: Any = copy.deepcopy(model).to("cpu", torch.get_default_dtype())
    modules = [module for module in drawn.modules() if [*module.parameters(recurse=False)]]
    for module in modules:
        if not hasattr(module, "reset_parameters"):
            kind = type(module).__name__
            raise ValueError(f"seeds need the reset_parameters of each module, {kind} has none; give inits instead")
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
            for module in modules:
                module.reset_parameters()
            yield {name: p.detach().clone() for name, p in drawn.named_parameters()}
