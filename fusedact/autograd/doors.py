"""How an op attaches to PyTorch: one launcher behind the doors that the surroundings ask for.

While torch traces or dispatches: the registered op. Under functorch transforms and forward-mode AD: torch's own
formula. Where gradients are wanted: a ctx-style Function. Otherwise: the bare launch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedact import backend


@dataclass(frozen=True)
class Op:
    """A fused op: its arguments are `tensors` tensors (or None), then options that a schema can carry.

    launch(*args, save) gives the result first, then what else it computed; `extras` picks from that what the
    backward needs. backward(dy, *tensors, *extras, *options, wanted) gives a gradient per tensor, an empty tensor
    where it is not wanted. `composite(*args)` is the same in torch's own operations.
    """

    name: str
    tensors: int
    schema: str
    launch: Callable[..., tuple[Tensor, ...]]
    fake: Callable[..., tuple[Tensor, ...]]
    extras: Callable[[tuple[Tensor, ...], tuple], tuple[Tensor, ...]]
    backward_schema: str
    backward: Callable[..., tuple[Tensor, ...]]
    backward_fake: Callable[..., tuple[Tensor, ...]]
    composite: Callable[..., Tensor]

    def register(self) -> Callable[..., Tensor]:
        """Register the op and its backward with torch; return the function that goes through the doors."""
        forward_op = _define(self.name, self.schema, self.launch, self.fake)
        backward_op = _define(f"{self.name}_backward", self.backward_schema, self.backward, self.backward_fake)
        torch.library.register_autograd(
            f"fusedact::{self.name}",
            lambda ctx, dy, *_: (*self._gradients(ctx, dy, backward_op), None),
            setup_context=lambda ctx, inputs, output: self._save(ctx, inputs[:-1], output),
        )
        function = self._function()

        def through_a_door(*args: Any) -> Tensor:
            tensors = [t for t in args[: self.tensors] if t is not None]
            save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
            if backend.transforming():
                return self.composite(*args)
            if torch.compiler.is_compiling() or backend.dispatching(tensors):
                return forward_op(*args, save)[0]
            return function.apply(*args) if save else self.launch(*args, False)[0]

        return through_a_door

    def _function(self) -> type[torch.autograd.Function]:
        def forward(ctx: Any, *args: Any) -> Tensor:
            output = self.launch(*args, True)
            self._save(ctx, args, output)
            return output[0]

        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
            return self._gradients(ctx, dy, self.backward)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        name = self.name.title().replace("_", "")  # as users read it in `grad_fn` and in errors
        return type(name, (torch.autograd.Function,), methods)

    def _save(self, ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.options = args[self.tensors :]
        ctx.save_for_backward(*args[: self.tensors], *self.extras(output, ctx.options))

    def _gradients(
        self, ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor, ...]]
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks each only once
        inputs, extras = saved[: self.tensors], saved[self.tensors :]
        wanted = list(ctx.needs_input_grad[: self.tensors])
        if torch.is_grad_enabled() or backend.transforming() or backend.is_batched(dy):
            # The gradient must itself be differentiable (create_graph), or is many at once: torch's own formula.
            grads = _differentiate(lambda *xs: self.composite(*xs, *ctx.options), inputs, wanted, dy)
        else:
            grads = backward(dy, *inputs, *extras, *ctx.options, wanted)
        kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
        return *kept, *(None for _ in ctx.options)


def _define(name: str, schema: str, launch: Callable, fake: Callable) -> Callable:
    qualified = f"fusedact::{name}"
    torch.library.define(qualified, schema)
    for device in ("cpu", "cuda"):  # a CPU tensor is for the interpreter
        torch.library.impl(qualified, device, launch)
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.fusedact, name).default


def _differentiate(
    formula: Callable[..., Tensor], inputs: Sequence[Tensor | None], wanted: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of formula(*inputs) in torch's own recorded operations.

    Each input is replaced by an alias of its own, so that no gradient flows from one to another behind it.
    """
    with torch.enable_grad():
        aliases = [x if x is None else x.view_as(x) for x in inputs]
        chosen = [alias for alias, want in zip(aliases, wanted, strict=True) if alias is not None and want]
        y = formula(*aliases)
    grads = iter(torch.autograd.grad(y, chosen, dy, create_graph=torch.is_grad_enabled(), materialize_grads=True))
    return tuple(next(grads) if want else None for want in wanted)
