"""Many copies of one small network at once, each a program of one launch whose parameters are registers."""

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fusedact import backend
from fusedact.fitting.network import batches, network, rates
from fusedact.fitting.recipe import Recipe

MOST_NUMBERS = 2**24  # of an order, or of losses: an eighth of a gigabyte a launch for both


def obstacle(recipe: Recipe, x: Tensor, batch_size: int) -> str | None:
    """Why these networks cannot be trained so, or None where they can."""
    if not backend.uses_triton(x):
        return f"Triton does not run on {x.device}"
    if recipe.dtype != torch.float32:
        return f"a launch of programs computes in float32, not {recipe.dtype}"
    from fusedact.kernels import training_tiny

    layers, _, rule, _ = network(recipe)
    if not training_tiny.fits(layers, batch_size, rule):
        return f"a network takes more than a warp's registers, with batches of {batch_size}"
    return None


def train(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    starts: Sequence[Tensor],
    lrs: Tensor,
    sizes: list[int],
    orders: Iterable[Tensor],
) -> Tensor:
    """As `batched.train`, a launch for so many passes that order and losses stay small."""
    from fusedact.kernels import training_tiny

    layers, objective, rule, size = small = network(recipe)
    flat = x.new_zeros(len(lrs), size)
    views = small.views(flat)
    for view, start in zip(views, starts, strict=True):
        view.copy_(start)

    moments = flat.new_zeros(len(lrs), rule.moments, size)
    numbers = lrs.new_tensor(rates(recipe.rule, 0)).repeat(len(lrs), 1)
    numbers[:, 0] = lrs
    config = training_tiny.tile(max(sizes))
    x, y = x.contiguous(), y.contiguous()
    costs, orders = [], iter(orders)
    most = max(1, MOST_NUMBERS // (len(sizes) * max(len(lrs), max(sizes))))
    with torch.no_grad(), backend.on_device(x):
        while passes := [*itertools.islice(orders, most)]:
            order = batches(torch.stack(passes), max(sizes)).to(x.device)
            losses = flat.new_empty(len(lrs), len(order))
            training_tiny.train(x, y, order, flat, moments, numbers, losses, layers, objective, rule, config)
            costs.append(losses.view(len(lrs), len(passes), -1).mean(2))
        for view, start in zip(views, starts, strict=True):
            start.copy_(view)
    return torch.cat(costs, 1)
