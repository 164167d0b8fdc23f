"""Ops whose gradients are made with their value, while what both need is at hand.

A loss knows its gradients but for dloss, the number that multiplies them all, which is 1 where `loss.backward()` was
called. The first backward hands them over, multiplied in place by what dloss is on the device: the host does not look,
and a 1 ends that launch at once. A second one (`retain_graph`) makes them anew, bit by bit the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedact import backend
from fusedact.autograd.doors import define, differentiate
from fusedact.autograd.given_up import GIVEN_UP, give_up, guarded, is_given_up, kind_of
from fusedact.backend import PLAIN


@dataclass(frozen=True)
class EarlyOp:
    """A loss: its arguments are `tensors` tensors (or None), then options that a schema can carry.

    The first `learned` of the tensors may want gradients. launch(*args, wanted) gives the loss and a gradient for each:
    None where it is not wanted, and for all of them where `late_only(tensors, options)`. There late(dloss, *kept,
    *args, wanted) gives the gradients for that dloss; `kept` is how many tensors, the last of what launch gives, it
    then finds again. `composite(*args)` is the loss in torch's own operations.

    schema names the arguments before `wanted`. A registered op gives an empty tensor for each None.
    """

    name: str
    tensors: int
    learned: int
    schema: str
    launch: Callable[..., tuple[Any, ...]]
    fake: Callable[..., tuple[Tensor | None, ...]]
    composite: Callable[..., Tensor]
    late: Callable[..., tuple[Tensor | None, ...]] | None = None
    late_only: Callable[[Sequence, tuple], bool] = lambda tensors, options: False
    kept: int = 0

    def register(self) -> Callable[..., Tensor]:
        """Register the op and its late gradients with torch; return the function that goes through the doors."""
        gradients = ", ".join(["Tensor"] * self.learned)
        schema = f"({self.schema}, bool[] wanted) -> (Tensor, {gradients}{', Tensor' * self.kept})"
        of_forward = partial(kind_of, self.name)
        launch_or_formula = guarded(self.launch, self._outputs_by_formula, lambda *args: of_forward(args[:-1]))
        late = self._guarded_late(self.late) if self.late else None
        forward_op = define(self.name, schema, launch_or_formula, self.fake)
        late_op = self._late_op(late, gradients) if late else None
        torch.library.register_autograd(
            f"fusedact::{self.name}",
            lambda ctx, dloss, *_: (*self._registered_gradients(ctx, dloss, late_op), None),
            setup_context=self._save,
        )
        count, learned = self.tensors, self.learned
        launch, named = self.launch, backend.named(f"fusedact::{self.name}", self.launch)
        apply = backend.apply_of(self._function(named, launch_or_formula, late))

        def through_a_door(*args: Any) -> Any:
            if backend.transforming():
                return self.composite(*args)
            recording = torch.is_grad_enabled()
            wanted = [recording and t is not None and t.requires_grad for t in args[:learned]]
            plain = not (torch.compiler.is_dynamo_compiling() or backend.dispatching())
            if not plain or not all(t is None or (type(t) in PLAIN and not t.is_neg()) for t in args[:count]):
                return forward_op(*args, wanted)[0]
            if backend.elsewhere(args[0]):
                with torch.cuda.device(args[0].device):
                    return through_a_door(*args)
            if GIVEN_UP and is_given_up(of_forward(args)):
                return self.composite(*args)
            try:
                return apply(*args) if any(wanted) else (named if backend.profiling() else launch)(*args, wanted)[0]
            except backend.launch_error() as error:
                give_up(of_forward(args), error)
                return self.composite(*args)

        return through_a_door

    def _outputs_by_formula(self, *given: Any) -> tuple[Tensor | None, ...]:
        """What launch gives, in torch's own operations."""
        args, wanted = given[:-1], given[-1]
        outputs: Any = self.fake(*given)
        loss = self.composite(*args)
        outputs[0].copy_(loss)
        if any(output is not None for output in outputs[1 : 1 + self.learned]):
            tensors, options = args[: self.tensors], args[self.tensors :]
            grads: Any = self._differentiated(tensors, options, wanted, torch.ones_like(loss))
            for output, grad in zip(outputs[1 : 1 + self.learned], grads, strict=True):
                if output is not None:
                    output.copy_(grad)
        return outputs

    def _guarded_late(self, late: Callable[..., Any]) -> Callable[..., Any]:
        def formula(dloss: Tensor, *given: Any) -> tuple[Tensor | None, ...]:
            args, wanted = given[self.kept : -1], given[-1]
            return self._differentiated(args[: self.tensors], args[self.tensors :], wanted, dloss)

        return guarded(late, formula, lambda *args: kind_of(f"{self.name}_late", args[:-1]))

    def _late_op(self, late: Callable, gradients: str) -> Callable:
        kept = "".join(f"Tensor kept{i}, " for i in range(self.kept))
        schema = f"(Tensor dloss, {kept}{self.schema}, bool[] wanted) -> ({gradients})"
        return define(f"{self.name}_late", schema, late, self._late_fake)

    def _late_fake(self, dloss: Tensor, *args: Any) -> tuple[Tensor | None, ...]:
        likes = zip(args[self.kept : self.kept + self.learned], args[-1], strict=True)
        return tuple(t.new_empty(t.shape) if want else None for t, want in likes)

    def _function(
        self, named: Callable[..., Any], launch: Callable[..., Any], late: Callable[..., Any] | None
    ) -> type[torch.autograd.Function]:
        def forward(ctx: Any, *args: Any) -> Tensor:
            wanted = list(ctx.needs_input_grad[: self.learned])
            loss, *outputs = (named if backend.profiling() else self.launch)(*args, wanted)
            ctx.gradients, kept = outputs[: self.learned], outputs[self.learned :]
            ctx.options = args[self.tensors :]
            ctx.save_for_backward(*args[: self.tensors], *kept)
            ctx.set_materialize_grads(False)
            return loss

        def gradients(
            ctx: Any, dloss: Tensor, tensors: tuple, kept: tuple, options: tuple, wanted: list[bool]
        ) -> tuple:
            if late is not None and self.late_only(tensors, options):
                return tuple(late(dloss, *kept, *tensors, *options, wanted))
            held = ctx.__dict__.pop("gradients", None)  # one step: of two threads one takes them
            if held is None:
                held = launch(*tensors, *options, wanted)[1 : 1 + self.learned]
            _multiply(held, dloss)
            return tuple(held)

        named_gradients = backend.named(f"fusedact::{self.name}_backward", gradients)

        def backward(ctx: Any, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
            saved, options = ctx.saved_tensors, ctx.options
            tensors, kept = saved[: self.tensors], saved[self.tensors :]
            wanted = list(ctx.needs_input_grad[: self.learned])
            others = (None,) * (self.tensors - self.learned + len(options))
            if dloss is None:
                return (None,) * self.learned + others
            dloss = dloss.resolve_neg()
            if self._must_be_differentiable(dloss):
                return self._differentiated(tensors, options, wanted, dloss) + others
            run = named_gradients if backend.profiling() else gradients
            return run(ctx, dloss, tensors, kept, options, wanted) + others

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self.name.title().replace("_", ""), (torch.autograd.Function,), methods)

    def _must_be_differentiable(self, dloss: Tensor) -> bool:
        """create_graph, or a gradient that no kernel reads."""
        return torch.is_grad_enabled() or backend.transforming() or backend.unreadable(dloss)

    def _differentiated(
        self, tensors: Sequence[Tensor | None], options: tuple, wanted: list[bool], dloss: Tensor
    ) -> tuple[Tensor | None, ...]:
        others = [False] * (self.tensors - self.learned)
        grads = differentiate(lambda *xs: self.composite(*xs, *options), tensors, wanted + others, (dloss,))
        return grads[: self.learned]

    def _save(self, ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *args, ctx.wanted = inputs
        ctx.options = tuple(args[self.tensors :])
        ctx.save_for_backward(*args[: self.tensors], *output[1:])

    def _registered_gradients(self, ctx: Any, dloss: Tensor, late_op: Callable | None) -> tuple[Tensor | None, ...]:
        tensors, outputs = ctx.saved_tensors[: self.tensors], ctx.saved_tensors[self.tensors :]
        gradients, kept = outputs[: self.learned], outputs[self.learned :]
        others = (None,) * (self.tensors - self.learned + len(ctx.options))
        if self._must_be_differentiable(dloss):
            return self._differentiated(tensors, ctx.options, ctx.wanted, dloss) + others
        if late_op is not None and self.late_only(tensors, ctx.options):
            gradients = late_op(dloss, *kept, *tensors, *ctx.options, ctx.wanted)
        else:
            gradients = [(g.to(backend.wide(g.dtype)) * dloss).to(g.dtype) for g in gradients]
        return tuple(g if want else None for g, want in zip(gradients, ctx.wanted, strict=True)) + others


def _multiply(gradients: Sequence[Tensor | None], dloss: Tensor) -> None:
    """Each in place by dloss, which may exceed their dtype; on a CPU only where it is not 1."""
    held = [gradient for gradient in gradients if gradient is not None]
    if backend.uses_triton(held[0]):
        _multiply_or_formula(dloss, *held)
    elif held[0].is_cuda or dloss != 1:
        _multiply_by_torch(dloss, *held)


def _multiply_in_one_launch(dloss: Tensor, *gradients: Tensor) -> None:
    from fusedact.kernels import scale

    scale.in_place(gradients, dloss)


def _multiply_by_torch(dloss: Tensor, *gradients: Tensor) -> None:
    for gradient in gradients:
        wide = backend.wide(gradient.dtype)
        if gradient.dtype == wide:
            gradient.mul_(dloss)
        else:
            gradient.copy_(gradient.to(wide) * dloss)


_multiply_or_formula = guarded(_multiply_in_one_launch, _multiply_by_torch, lambda *args: kind_of("scale", args))
