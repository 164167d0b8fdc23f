"""A network's forward and backward pass and its optimizer's step, as lists of bound torch calls.

Activations stand feature-major, (outputs, rows), with a row of ones below the hidden ones, so that a bias is the last
column of its weight: a layer is one product forward, one for its gradient and one for the layer's before it. Every
step's numbers begin at a multiple of 64 bytes, so that its products are the same bits wherever in a block it stands.
"""

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.fitting.recipe import Layer, Recipe
from fusedact.fitting.state import State

Call = Callable[[], Any]
ALIGNED = 16  # numbers: 64 bytes of float32
LEAST = 1e-12  # BCELoss divides by p (1 - p), or by this where that is less

# In place on z, then dz from dy and the output, by torch's own kernels; other activations by their references.
aten = torch.ops.aten
NATIVE = {
    F.sigmoid: (torch.sigmoid_, aten.sigmoid_backward.grad_input, ()),
    F.tanh: (torch.tanh_, aten.tanh_backward.grad_input, ()),
    F.relu: (torch.relu_, aten.threshold_backward.grad_input, (0,)),
}


class Weights(NamedTuple):
    """A layer's place in the flat parameters and gradients: W, and b as one column more where there is one."""

    layer: Layer
    augmented: Tensor  # (outputs, inputs + 1) or (outputs, inputs)
    gradient: Tensor  # as that
    weight: Tensor  # (outputs, inputs)


class Network:
    """Parameters, gradients and the optimizer's step, each one flat tensor."""

    def __init__(self, recipe: Recipe, optimizer: torch.optim.Optimizer) -> None:
        self.recipe = recipe
        shapes = [(w.shape[0], w.shape[1] + (b is not None)) for w, b, *_ in recipe.layers]
        sizes = [outputs * columns for outputs, columns in shapes]

        def augmented(numbers: Tensor) -> list[Tensor]:
            return [part.view(shape) for part, shape in zip(numbers.split(sizes), shapes, strict=True)]

        def views(numbers: Tensor) -> list[Tensor]:
            pairs = zip(recipe.layers, augmented(numbers), strict=True)
            split = [(part[:, : w.shape[1]], part[:, w.shape[1] :]) for (w, *_), part in pairs]
            return [view for w, b in split for view in ((w, b[:, 0]) if b.shape[1] else (w,))]

        self.state = State(recipe, optimizer, sum(sizes), views)
        self.gradient = torch.zeros_like(self.state.numbers[0])
        self.step_counter = torch.zeros((), dtype=torch.float32)
        parts = zip(recipe.layers, augmented(self.state.numbers[0]), augmented(self.gradient), strict=True)
        self.weights = [Weights(layer, w, g, w[:, : layer.weight.shape[1]]) for layer, w, g in parts]

    @property
    def is_linear(self) -> bool:
        """The optimizer's step is a multiple of the gradient."""
        return self.recipe.rule.name == "sgd" and not self.recipe.rule.weight_decay

    def update(self, scale: float) -> list[Call]:
        """The optimizer's step, where it is linear times the scale."""
        rule, (flat, *moments) = self.recipe.rule, self.state.numbers
        if self.is_linear:
            return [partial(flat.add_, self.gradient, alpha=-rule.lr * scale)]
        lists = [[flat], [self.gradient], *([moment] for moment in moments)]
        if len(moments) == 2:
            step = torch._fused_adamw_ if rule.name == "adamw" else torch._fused_adam_
            numbers = {"beta1": rule.beta1, "beta2": rule.beta2, "eps": rule.eps, "amsgrad": False}
            step = partial(step, *lists, [], [self.step_counter], **numbers)
        else:
            numbers = {"momentum": rule.beta1, "dampening": 0.0, "nesterov": rule.name == "nesterov"}
            step = partial(torch._fused_sgd_, *lists, *([] if moments else [[]]), is_first_step=False, **numbers)
        counted = partial(self.step_counter.add_, 1)
        return [counted, partial(step, lr=rule.lr, weight_decay=rule.weight_decay, maximize=False)]


def padded(recipe: Recipe, size: int) -> int:
    """Columns of x, one more for the bias, and more until a batch is a multiple of 64 bytes."""
    columns = recipe.widths[0] + (recipe.layers[0].bias is not None)
    step = ALIGNED // math.gcd(size, ALIGNED)
    return -(-columns // step) * step


class Passes:
    """Buffers for some steps on batches of one size, and the calls that each of them is."""

    def __init__(self, network: Network, size: int, steps: int) -> None:
        self.network, self.size, self.steps = network, size, steps
        recipe = network.recipe
        self.objective, self.layers = recipe.objective, recipe.layers
        *hidden, outputs = recipe.widths[1:]

        def ones(*shape: int) -> Tensor:
            return torch.ones(*shape, -(-size // ALIGNED) * ALIGNED, dtype=recipe.dtype)[..., :size]

        self.x = torch.empty(steps * size, padded(recipe, size), dtype=recipe.dtype)
        self.outputs = ones(steps, outputs)
        self.targets = ones(steps, outputs)  # of labels, one-hot
        self.dz = [ones(n) for n in recipe.widths[1:]]
        self.z = [ones(n) for n in recipe.widths[1:]]  # for activations that are not native
        self.hidden = [ones(n + 1) for n in hidden]
        self.clamp = ones(outputs)  # what is left of p - y behind BCELoss's clamp and a sigmoid
        self.zero, self.one = torch.tensor([0, 1], dtype=recipe.dtype)

        last = self.layers[-1].activation
        # Then dz is p - y, but where p (1 - p) is less than BCELoss divides by.
        sigmoid = last is not None and last.reference is F.sigmoid
        self.sigmoid_and_bce = sigmoid and self.objective.name == "binary_cross_entropy"
        self.saturated = False
        native = all(layer.activation is None or layer.activation.reference in NATIVE for layer in self.layers)
        self.mode = torch.inference_mode if native else torch.no_grad

    def run(self, x: Tensor, y: Tensor, visited: Tensor) -> Tensor:
        """Steps on the visited rows of x and y, as many as they are batches; returns each one's loss."""
        state, steps = self.network.state, len(visited) // self.size
        self.network.step_counter.fill_(state.steps)
        with self.mode():
            self._gather(x, visited)
            targets = self._targets(y.index_select(0, visited), steps)
            if self.sigmoid_and_bce:
                self._step_with_clamps(steps)
            else:
                self._call(self.plain, steps)
            state.steps += steps
            return self._losses(targets, steps)

    def _step_with_clamps(self, steps: int) -> None:
        """Plain steps, taken back where an output met a clamp; the next steps then begin with clamps."""
        network, clamped = self.network, self.saturated
        before = None if clamped else network.state.snapshot()
        self._call(self.clamped if clamped else self.plain, steps)
        self.saturated = self._is_saturated(steps)
        if before and self.saturated:
            network.state.restore(before)
            network.step_counter.fill_(network.state.steps)
            self._call(self.clamped, steps)

    def _gather(self, x: Tensor, visited: Tensor) -> None:
        rows = self.x[: len(visited)]
        if x.shape[1] == rows.shape[1]:
            torch.index_select(x, 0, visited, out=rows)
        else:
            rows[:, : x.shape[1]].copy_(x.index_select(0, visited))

    def _call(self, calls: list[Call], steps: int) -> None:
        for call in calls[: len(calls) // self.steps * steps]:
            call()

    def _targets(self, y: Tensor, steps: int) -> Tensor:
        """As the losses take them: labels (steps, rows) or numbers (steps, outputs, rows); steps read the latter."""
        if not self.objective.labels:
            return self.targets[:steps].copy_(y.view(steps, self.size, -1).transpose(1, 2))
        labels = y.view(steps, self.size)
        self.targets[:steps].zero_().scatter_(1, labels[:, None], 1.0)
        return labels

    def _losses(self, targets: Tensor, steps: int) -> Tensor:
        outputs, name = self.outputs[:steps], self.objective.name
        if name == "binary_cross_entropy":  # torch's own takes its logarithms one by one, and raises at NaN
            log, log_rest = torch.log(outputs).clamp_min_(-100), torch.log1p(-outputs).clamp_min_(-100)
            losses = (targets - 1) * log_rest - targets * log
        else:
            losses = getattr(F, name)(outputs, targets, reduction="none")
        return losses.flatten(1).mean(1) if self.objective.mean else losses.flatten(1).sum(1)

    def _is_saturated(self, steps: int) -> bool:
        low, high = torch.aminmax(self.outputs[:steps])
        return low.item() < 1.01 * LEAST or high.item() > 1 - 1.01 * LEAST

    @cached_property
    def plain(self) -> list[Call]:
        return [call for step in range(self.steps) for call in self._step(step, clamped=False)]

    @cached_property
    def clamped(self) -> list[Call]:
        """The same with BCELoss's clamp behind a sigmoid."""
        return [call for step in range(self.steps) for call in self._step(step, clamped=True)]

    def _step(self, step: int, clamped: bool) -> list[Call]:
        below = self.x[step * self.size :][: self.size].t()
        calls, inputs = [], []
        for at, (layer, augmented, _, _) in enumerate(self.network.weights):
            below = below[: augmented.shape[1]]  # without ones where there is no bias, and padding
            inputs.append(below)
            last = at == len(self.layers) - 1
            y = self.outputs[step] if last else self.hidden[at][:-1]
            calls += self._activated(layer, partial(torch.mm, augmented, below), self.z[at], y)
            below = y if last else self.hidden[at]
        calls += self._loss_gradient(step, clamped)
        if not self.network.is_linear:
            calls.append(partial(self.dz[-1].mul_, torch.tensor(self._scale(), dtype=self.dz[-1].dtype)))
        for at in reversed(range(len(self.layers))):
            layer, _, gradient, weight = self.network.weights[at]
            calls.append(partial(torch.mm, self.dz[at], inputs[at].t(), out=gradient))
            if at:
                calls.append(partial(torch.mm, weight.t(), self.dz[at], out=self.dz[at - 1]))
                calls += self._derivative(self.layers[at - 1], at - 1, self.hidden[at - 1][:-1])
        return calls + self.network.update(self._scale())

    def _activated(self, layer: Layer, product: Callable[..., Tensor], z: Tensor, y: Tensor) -> list[Call]:
        """y = act(the product), z kept where the derivative needs it."""
        if layer.activation is None:
            return [partial(product, out=y)]
        if layer.activation.reference in NATIVE:
            in_place, *_ = NATIVE[layer.activation.reference]
            return [partial(product, out=y), partial(in_place, y)]
        reference = layer.activation.reference
        return [partial(product, out=z), lambda: y.copy_(reference(z, *layer.parameters))]

    def _derivative(self, layer: Layer, at: int, y: Tensor) -> list[Call]:
        """dy of a layer, in its dz, becomes dz."""
        dz, z = self.dz[at], self.z[at]
        if layer.activation is None:
            return []
        if layer.activation.reference in NATIVE:
            _, derivative, numbers = NATIVE[layer.activation.reference]
            return [partial(derivative, dz, y, *numbers, grad_input=dz)]
        reference = layer.activation.reference

        def by_autograd() -> None:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                dz.copy_(torch.autograd.grad(reference(leaf, *layer.parameters), leaf, dz)[0])

        return [by_autograd]

    def _loss_gradient(self, step: int, clamped: bool) -> list[Call]:
        """dz of the last layer, but for the scale."""
        y, target, dz, clamp = self.outputs[step], self.targets[step], self.dz[-1], self.clamp
        name, calls = self.objective.name, list[Call]()
        if name == "cross_entropy":
            calls += [partial(torch.softmax, y, 0, out=dz), partial(dz.sub_, target)]
        elif name == "binary_cross_entropy_with_logits":
            calls += [partial(torch.sigmoid, y, out=dz), partial(dz.sub_, target)]
        else:
            calls += [partial(torch.sub, y, target, out=dz)]
        if name != "binary_cross_entropy":
            return calls + self._derivative(self.layers[-1], len(self.layers) - 1, y)
        rest = partial(torch.sub, self.one, y, out=clamp)  # 1 - p
        if not self.sigmoid_and_bce:
            divided = [rest, partial(clamp.mul_, y), partial(clamp.clamp_min_, LEAST), partial(dz.div_, clamp)]
            return calls + divided + self._derivative(self.layers[-1], len(self.layers) - 1, y)
        if clamped:
            share = partial(torch.addcmul, self.zero, clamp, y, value=1 / LEAST, out=clamp)
            calls += [rest, share, partial(clamp.clamp_max_, 1), partial(dz.mul_, clamp)]
        return calls

    def _scale(self) -> float:
        numbers = self.size * (1 if self.objective.labels else self.outputs.shape[1])
        return (2.0 if self.objective.name == "mse_loss" else 1.0) / (numbers if self.objective.mean else 1)
