"""Many copies of one network at once, in torch's operations: passes derived by hand, into buffers made once.

The networks stand last, parameters (P, networks) and activations (rows, outputs, networks), so every operation runs
along them, however narrow a layer is. The first layer, whose rows all share, is one matrix product; the others are
sums of products, in blocks of networks that stay in the cache.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.fitting.passes import NATIVE, Call
from fusedact.fitting.recipe import Layer, Recipe, Rule

BLOCK = 2**17  # numbers of a block's widest layer on a CPU, half a megabyte in float32

aten = torch.ops.aten


class Batch(NamedTuple):
    """What a step reads: rows, their targets, and what each output's loss counts in the cost."""

    x: Tensor  # (rows, inputs), with a column of ones where the first layer has a bias
    y: Tensor  # (rows, outputs, 1); of labels, one-hot
    weight: Tensor  # (rows, outputs, 1)


class EachRow:
    """Batches of the rows that a pass visits, in its order."""

    def __init__(self, x: Tensor, y: Tensor, sizes: list[int], shares: list[float]) -> None:
        self.x, self.y = x, y
        self.visited_x, self.visited_y = (rows.new_empty(sum(sizes), *rows.shape[1:]) for rows in (x, y))
        parts = zip(self.visited_x.split(sizes), self.visited_y.split(sizes), shares, strict=True)
        self.batches = [Batch(rows, targets, torch.full_like(targets, share)) for rows, targets, share in parts]

    def fill(self, visited: Tensor) -> None:
        torch.index_select(self.x, 0, visited, out=self.visited_x)
        torch.index_select(self.y, 0, visited, out=self.visited_y)


class DistinctRows:
    """Batches of the few rows there are, each weighted by how often the pass visits it in that step."""

    def __init__(self, x: Tensor, y: Tensor, sizes: list[int], shares: list[float], place: Tensor) -> None:
        self.place = place  # (rows,), of each row among the distinct ones
        self.step = torch.arange(len(sizes), device=x.device).repeat_interleave(torch.tensor(sizes, device=x.device))
        self.shares = x.new_tensor(shares)[:, None]
        self.weights = y.new_empty(len(sizes), *y.shape)
        self.batches = [Batch(x, y, weight) for weight in self.weights]

    def fill(self, visited: Tensor) -> None:
        steps, rows = self.weights.shape[:2]
        counts = torch.bincount(self.step * rows + self.place[visited], minlength=steps * rows).view(steps, rows)
        self.weights.copy_((counts * self.shares)[:, :, None, None])


def batches(recipe: Recipe, x: Tensor, y: Tensor, sizes: list[int]) -> EachRow | DistinctRows:
    """x (rows, inputs) and y as the loss takes it, in batches of those sizes, each row once or in each place."""
    outputs = recipe.widths[-1]
    y = (F.one_hot(y, outputs) if recipe.objective.labels else y).to(x.dtype)
    x = x if recipe.layers[0].bias is None else torch.cat([x, x.new_ones(len(x), 1)], 1)
    terms = 1 if recipe.objective.labels else outputs
    shares = [1 / (size * terms) if recipe.objective.mean else 1.0 for size in sizes]
    together = torch.cat([x, y], 1)
    if 2 * len(together[: sizes[0]].unique(dim=0)) <= sizes[0]:
        rows, place = together.unique(dim=0, return_inverse=True)
        if 2 * len(rows) <= sizes[0]:
            x, y = rows[:, : x.shape[1]].contiguous(), rows[:, x.shape[1] :, None].contiguous()
            return DistinctRows(x, y, sizes, shares, place)
    return EachRow(x, y[:, :, None].contiguous(), sizes, shares)


class Part(NamedTuple):
    """A layer of every network."""

    layer: Layer
    weight: Tensor  # (inputs, outputs, networks)
    bias: Tensor | None  # (outputs, networks)
    both: Tensor  # (inputs or inputs + 1, outputs x networks)


def parts(recipe: Recipe, flat: Tensor) -> list[Part]:
    """Where each layer stands in (P, networks): W as (inputs, outputs, networks), then b."""
    found, at, networks = [], 0, flat.shape[1]
    for layer in recipe.layers:
        outputs, inputs = layer.weight.shape
        end = at + (inputs + (layer.bias is not None)) * outputs
        weight = flat[at : at + inputs * outputs].view(inputs, outputs, networks)
        bias = None if layer.bias is None else flat[at + inputs * outputs : end]
        found.append(Part(layer, weight, bias, flat[at:end].view(-1, outputs * networks)))
        at = end
    return found


def parameters(recipe: Recipe, flat: Tensor) -> list[Tensor]:
    """Views of (P, networks) that are (networks, *shape) for each of the recipe's parameters, in order."""
    pairs = [(part.weight.permute(2, 1, 0), part.bias) for part in parts(recipe, flat)]
    return [view for weight, bias in pairs for view in ([weight] if bias is None else [weight, bias.t()])]


def train(
    recipe: Recipe,
    x: Tensor,
    y: Tensor,
    starts: Sequence[Tensor],
    lrs: Tensor,
    sizes: list[int],
    orders: Iterable[Tensor],
) -> Tensor:
    """Trains networks from their starts, (networks, *shape) for each of the recipe's parameters, and writes them there.

    lrs: of each network, float64. sizes: of the batches of a pass. orders: the rows that each pass visits, as many as
    the sizes sum to. Returns each network's cost of each pass, (networks, passes).
    """
    data = batches(recipe, x, y, sizes)
    width = max(1, BLOCK // (max(len(batch.x) for batch in data.batches) * max(recipe.widths[1:])))
    width = len(lrs) if x.is_cuda else min(width, len(lrs))
    blocks = [
        Block(recipe, [start[at : at + width] for start in starts], lrs[at : at + width], data.batches)
        for at in range(0, len(lrs), width)
    ]
    native = all(layer.activation is None or layer.activation.reference in NATIVE for layer in recipe.layers)
    costs = []
    with torch.inference_mode() if native else torch.no_grad():
        for visited in orders:
            data.fill(visited.to(x.device))
            costs.append(torch.cat([block.run() for block in blocks]))
        for block in blocks:
            block.write()
    return torch.stack(costs, 1)


class Block:
    """Some of the networks: their parameters and buffers, and the calls that a pass over the batches is."""

    def __init__(self, recipe: Recipe, starts: list[Tensor], lrs: Tensor, batches: list[Batch]) -> None:
        self.flat = starts[0].new_empty(sum(p.numel() for p in recipe.parameters), len(lrs))
        self.numbers = [*zip(parameters(recipe, self.flat), starts, strict=True)]
        for here, start in self.numbers:
            here.copy_(start)
        self.gradient = torch.empty_like(self.flat)
        self.parts, self.gradients = parts(recipe, self.flat), parts(recipe, self.gradient)
        self.loss = LOSSES[recipe.objective.name]
        rows, networks = max(len(batch.x) for batch in batches), len(lrs)

        def empty(outputs: int) -> Tensor:
            return self.flat.new_empty(rows, outputs, networks)

        self.z = [empty(outputs) for outputs in recipe.widths[1:]]
        in_place = [layer.activation is None or layer.activation.reference in NATIVE for layer in recipe.layers]
        self.y = [z if same else torch.empty_like(z) for z, same in zip(self.z, in_place, strict=True)]
        self.dz = [torch.empty_like(z) for z in self.z]
        self.spare = [torch.empty_like(z) for z in self.z]

        self.log_likelihoods = self.flat.new_empty(len(batches), networks)  # minus the costs
        self.update = Update(recipe.rule, self.flat, self.gradient, lrs, len(batches))
        self.calls = [call for step, batch in enumerate(batches) for call in self._step(step, batch)]

    def run(self) -> Tensor:
        """A pass over the batches as they are filled; returns its cost, (networks,)."""
        self.update.begin()
        for call in self.calls:
            call()
        return self.log_likelihoods.mean(0).neg_()

    def write(self) -> None:
        for here, start in self.numbers:
            start.copy_(here)

    def _step(self, step: int, batch: Batch) -> list[Call]:
        z, y, dz, spare = (
            [buffer[: len(batch.x)] for buffer in each] for each in (self.z, self.y, self.dz, self.spare)
        )
        value, gradient = self.loss
        weights = batch.weight.view(1, -1)
        calls = []
        for at, part in enumerate(self.parts):
            calls += _product(y[at - 1], part, z[at]) if at else [_shared_product(batch.x, part, z[0])]
            calls += _activated(part.layer, z[at], y[at])
        calls += value(y[-1], batch.y, spare[-1], dz[-1])
        calls.append(
            partial(torch.mm, weights, spare[-1].view(weights.shape[1], -1), out=self.log_likelihoods[step, None])
        )
        calls += gradient(y[-1], batch.y, batch.weight, dz[-1])
        for at in reversed(range(len(self.parts))):
            calls += _derivative(self.parts[at].layer, z[at], y[at], dz[at])
            if at:
                calls += _input_gradient(dz[at], self.parts[at], dz[at - 1])
                calls += _parameter_gradients(y[at - 1], dz[at], self.gradients[at], spare[at])
        calls.append(partial(torch.mm, batch.x.t(), dz[0].view(len(batch.x), -1), out=self.gradients[0].both))
        return calls + self.update.calls(step)


# A layer


def _shared_product(x: Tensor, part: Part, z: Tensor) -> Call:
    return partial(torch.mm, x, part.both, out=z.view(len(x), -1))


def _product(x: Tensor, part: Part, z: Tensor) -> list[Call]:
    terms = [(x[:, i : i + 1], weight) for i, weight in enumerate(part.weight)]
    if part.bias is None:
        first = partial(torch.mul, *terms[0], out=z)
    else:
        first = partial(torch.addcmul, part.bias, *terms[0], out=z)
    return [first, *(partial(z.addcmul_, *term) for term in terms[1:])]


def _input_gradient(dz: Tensor, part: Part, dx: Tensor) -> list[Call]:
    terms = [(dz[:, o : o + 1], part.weight[:, o]) for o in range(dz.shape[1])]
    return [partial(torch.mul, *terms[0], out=dx), *(partial(dx.addcmul_, *term) for term in terms[1:])]


def _parameter_gradients(x: Tensor, dz: Tensor, gradient: Part, spare: Tensor) -> list[Call]:
    calls: list[Call] = [] if gradient.bias is None else [partial(torch.sum, dz, 0, out=gradient.bias)]
    for i, of_input in enumerate(gradient.weight):
        calls += [partial(torch.mul, x[:, i : i + 1], dz, out=spare), partial(torch.sum, spare, 0, out=of_input)]
    return calls


def _activated(layer: Layer, z: Tensor, y: Tensor) -> list[Call]:
    if layer.activation is None:
        return []
    reference = layer.activation.reference
    if reference in NATIVE:
        return [partial(NATIVE[reference][0], z)]
    return [lambda: y.copy_(reference(z, *layer.parameters))]


def _derivative(layer: Layer, z: Tensor, y: Tensor, dz: Tensor) -> list[Call]:
    """dy, in dz, becomes dz."""
    if layer.activation is None:
        return []
    reference = layer.activation.reference
    if reference in NATIVE:
        _, derivative, numbers = NATIVE[reference]
        return [partial(derivative, dz, y, *numbers, grad_input=dz)]

    def by_autograd() -> None:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            dz.copy_(torch.autograd.grad(reference(leaf, *layer.parameters), leaf, dz)[0])

    return [by_autograd]


# Losses: minus each output's, (y, target, out, spare); and the weighted gradients, (y, target, weight, dy)


def _bce(y: Tensor, target: Tensor, out: Tensor, spare: Tensor) -> list[Call]:
    """log y where the target is 1, log(1 - y) where it is 0, each at least -100."""
    return [
        partial(torch.log, y, out=out),
        partial(out.clamp_min_, -100.0),
        partial(torch.neg, y, out=spare),
        spare.log1p_,
        partial(spare.clamp_min_, -100.0),
        partial(torch.lerp, spare, out, target, out=out),
    ]


def _bce_gradient(y: Tensor, target: Tensor, weight: Tensor, dy: Tensor) -> list[Call]:
    operands = weight.expand_as(y), y, target.expand_as(y)
    return [partial(aten.binary_cross_entropy_backward.grad_input, *operands, None, 0, grad_input=dy)]


def _bce_with_logits(y: Tensor, target: Tensor, out: Tensor, spare: Tensor) -> list[Call]:
    return [
        partial(aten.log_sigmoid.out, y, out=out),
        partial(torch.neg, y, out=spare),
        partial(aten.log_sigmoid.out, spare, out=spare),
        partial(torch.lerp, spare, out, target, out=out),
    ]


def _bce_with_logits_gradient(y: Tensor, target: Tensor, weight: Tensor, dy: Tensor) -> list[Call]:
    return [partial(torch.sigmoid, y, out=dy), partial(dy.sub_, target), partial(dy.mul_, weight)]


def _cross_entropy(y: Tensor, target: Tensor, out: Tensor, spare: Tensor) -> list[Call]:
    return [partial(torch.log_softmax, y, 1, out=out), partial(out.mul_, target)]


def _cross_entropy_gradient(y: Tensor, target: Tensor, weight: Tensor, dy: Tensor) -> list[Call]:
    return [partial(torch.softmax, y, 1, out=dy), partial(dy.sub_, target), partial(dy.mul_, weight)]


def _squared_error(y: Tensor, target: Tensor, out: Tensor, spare: Tensor) -> list[Call]:
    return [partial(torch.sub, y, target, out=out), partial(torch.neg, out, out=spare), partial(out.mul_, spare)]


def _squared_error_gradient(y: Tensor, target: Tensor, weight: Tensor, dy: Tensor) -> list[Call]:
    return [partial(torch.sub, y, target, out=dy), partial(dy.mul_, weight), partial(dy.mul_, 2.0)]


LOSSES: dict[str, tuple[Callable[..., list[Call]], Callable[..., list[Call]]]] = {
    "binary_cross_entropy": (_bce, _bce_gradient),
    "binary_cross_entropy_with_logits": (_bce_with_logits, _bce_with_logits_gradient),
    "cross_entropy": (_cross_entropy, _cross_entropy_gradient),
    "mse_loss": (_squared_error, _squared_error_gradient),
}


class Update:
    """The optimizer's steps of a pass, each network's at its own learning rate."""

    def __init__(self, rule: Rule, flat: Tensor, gradient: Tensor, lrs: Tensor, steps: int) -> None:
        self.rule, self.flat, self.gradient, self.lrs = rule, flat, gradient, lrs
        self.moments = [torch.zeros_like(flat) for _ in rule.moments]
        self.kept = (1 - lrs * rule.weight_decay).to(flat.dtype)
        self.minus_lr = (-lrs).to(flat.dtype).expand(steps, -1).contiguous()
        self.root = flat.new_ones(steps)
        self.taken = 0

    def begin(self) -> None:
        """Adam's corrections of its moments in the steps of the next pass."""
        if len(self.moments) == 2:
            steps = torch.arange(1, len(self.root) + 1, dtype=torch.float64, device=self.flat.device) + self.taken
            self.root.copy_((1 - self.rule.beta2**steps).sqrt_())
            self.minus_lr.copy_(-self.lrs / (1 - self.rule.beta1**steps)[:, None])
            self.taken += len(self.root)

    def calls(self, step: int) -> list[Call]:
        rule, flat, gradient, moments = self.rule, self.flat, self.gradient, self.moments
        calls: list[Call] = []
        if rule.name == "adamw":
            calls.append(partial(flat.mul_, self.kept))
        elif rule.weight_decay:
            calls.append(partial(gradient.add_, flat, alpha=rule.weight_decay))
        if len(moments) == 1:
            calls += [partial(moments[0].mul_, rule.beta1), partial(moments[0].add_, gradient)]
        direction = moments[0] if rule.name == "momentum" else gradient
        if rule.name == "nesterov":
            calls.append(partial(gradient.add_, moments[0], alpha=rule.beta1))
        if len(moments) == 2:
            mean, square = moments
            calls += [
                partial(mean.lerp_, gradient, 1 - rule.beta1),
                partial(square.mul_, rule.beta2),
                partial(square.addcmul_, gradient, gradient, value=1 - rule.beta2),
                partial(torch.sqrt, square, out=gradient),
                partial(gradient.div_, self.root[step]),
                partial(gradient.add_, rule.eps),
                partial(torch.div, mean, gradient, out=gradient),
            ]
        return [*calls, partial(flat.addcmul_, direction, self.minus_lr[step])]
