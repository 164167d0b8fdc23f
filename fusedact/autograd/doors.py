"""How an op attaches to PyTorch: one launcher behind the doors that the surroundings ask for.

While torch traces or dispatches: the registered op. Under functorch transforms and forward-mode AD: torch's own
formula. Where gradients are wanted: a ctx-style Function. Otherwise: the bare launch. Where no kernel can be compiled
or loaded, torch's own formula behind each of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusedact import backend
from fusedact.autograd.given_up import GIVEN_UP, give_up, guarded, is_given_up, kind_of
from fusedact.backend import PLAIN


@dataclass(frozen=True)
class Op:
    """A fused op: its arguments are `tensors` tensors (or None), then options that a schema can carry.

    launch(*args, save) gives the results first, then what else it computed; `results` says how many the caller gets
    under those options, and `extras` picks what the backward needs. backward(*dys, *tensors, *extras, *options,
    wanted) takes a gradient for as many as may ever be results, None where there is none, and gives one for each
    tensor, None where it is not wanted. `composite(*args)` is the same in torch's own operations; backward_formula is
    the backward so, where it is no derivative of that.

    A registered op gives an empty tensor in the place of each None.
    """

    name: str
    tensors: int
    schema: str
    launch: Callable[..., Any]
    fake: Callable[..., Any]
    extras: Callable[[Any, tuple], tuple[Tensor | None, ...]]
    backward_schema: str
    backward: Callable[..., Any]
    backward_fake: Callable[..., Any]
    composite: Callable[..., Any]
    results: Callable[[tuple], int] | None = None
    most_results: int = 1
    backward_formula: Callable[..., Any] | None = None

    def register(self) -> Callable[..., Any]:
        """Register the op and its backward with torch; return the function that goes through the doors."""
        of_forward = partial(kind_of, self.name)
        by_formula = guarded(self.launch, self._outputs_by_formula, lambda *args: of_forward(args[:-1]))
        forward_op: Any = define(self.name, self.schema, by_formula, self.fake)
        options = len(forward_op._schema.arguments) - self.tensors - 1
        launch_backward, of_registered = self._guarded_backward(options)
        backward_op = define(f"{self.name}_backward", self.backward_schema, of_registered, self.backward_fake)
        torch.library.register_autograd(
            f"fusedact::{self.name}",
            lambda ctx, *dys: (*self._gradients(ctx, dys, backward_op), None),
            setup_context=lambda ctx, inputs, output: self._save(ctx, inputs[:-1], output),
        )
        count, single, presented = self.tensors, self.results is None, self._presented
        launch, named = self.launch, backend.named(f"fusedact::{self.name}", self.launch)
        apply = backend.apply_of(self._function(named, launch_backward))

        def through_a_door(*args: Any) -> Any:
            if backend.transforming():
                return self.composite(*args)
            save, recording = False, torch.is_grad_enabled()
            plain = not (torch.compiler.is_dynamo_compiling() or backend.dispatching())
            for t in args[:count]:
                if t is not None:
                    if recording and t.requires_grad:
                        save = True
                    plain = plain and type(t) in PLAIN and not t.is_neg()  # a registered op is given it resolved
            if not plain:
                return presented(forward_op(*args, save), args[count:])
            if backend.elsewhere(args[0]):
                with torch.cuda.device(args[0].device):
                    return through_a_door(*args)
            if GIVEN_UP and is_given_up(of_forward(args)):
                return self.composite(*args)
            try:
                if save:
                    return apply(*args)
                output = (named if backend.profiling() else launch)(*args, False)
            except backend.launch_error() as error:
                give_up(of_forward(args), error)
                return self.composite(*args)
            return output[0] if single else presented(output, args[count:])

        return through_a_door

    def _presented(self, output: Any, options: tuple) -> Any:
        count = 1 if self.results is None else self.results(options)
        return output[0] if count == 1 else output[:count]

    def _outputs_by_formula(self, *args: Any) -> tuple[Tensor | None, ...]:
        """What launch gives, all that it computes besides unwritten: the backward knows that this was given up."""
        outputs = self.fake(*args)
        results = self.composite(*args[:-1])
        for output, result in zip(outputs, results if isinstance(results, tuple) else (results,), strict=False):
            output.copy_(result)
        return outputs

    def _guarded_backward(self, options: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The backward of what was launched; and of the registered op, whose forward may have been the formula."""

        def own(*args: Any) -> tuple:
            return kind_of(f"{self.name}_backward", args)

        if self.backward_formula:
            return (guarded(self.backward, self.backward_formula, own),) * 2

        def inputs_and_options(args: tuple) -> tuple:
            given = args[self.most_results : -1]
            return *given[: self.tensors], *given[len(given) - options :]

        def formula(*args: Any) -> tuple[Tensor | None, ...]:
            given = inputs_and_options(args)
            inputs, rest = given[: self.tensors], given[self.tensors :]
            dys = args[: 1 if self.results is None else self.results(rest)]
            return differentiate(lambda *xs: self.composite(*xs, *rest), inputs, args[-1], dys)

        def forwards(*args: Any) -> tuple:
            return kind_of(self.name, inputs_and_options(args))

        return guarded(self.backward, formula, own), guarded(self.backward, formula, own, forwards)

    def _function(
        self, named: Callable[..., Any], launch_backward: Callable[..., Any]
    ) -> type[torch.autograd.Function]:
        def forward(ctx: Any, *args: Any) -> Any:
            output = (named if backend.profiling() else self.launch)(*args, True)
            self._save(ctx, args, output)
            ctx.set_materialize_grads(False)
            return self._presented(output, ctx.options)

        named_backward = backend.named(f"fusedact::{self.name}_backward", launch_backward)

        def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
            dys = tuple(dy if dy is None else dy.resolve_neg() for dy in dys)  # a registered op is given it so
            return self._gradients(ctx, dys, named_backward if backend.profiling() else launch_backward)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        name = self.name.title().replace("_", "")  # as users read it in `grad_fn` and in errors
        return type(name, (torch.autograd.Function,), methods)

    def _save(self, ctx: Any, args: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.options = args[self.tensors :]
        ctx.save_for_backward(*args[: self.tensors], *self.extras(output, ctx.options))

    def _gradients(
        self, ctx: Any, dys: tuple[Tensor | None, ...], backward: Callable[..., Any]
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks each only once
        inputs, extras = saved[: self.tensors], saved[self.tensors :]
        wanted = list(ctx.needs_input_grad[: self.tensors])
        dys = dys[: 1 if self.results is None else self.results(ctx.options)]
        others = (None,) * len(ctx.options)
        if all(dy is None for dy in dys):
            return (None,) * self.tensors + others
        if torch.is_grad_enabled() or backend.transforming() or any(map(backend.unreadable, dys)):
            # The gradient must itself be differentiable (create_graph), or no kernel reads it: torch's own formula.
            grads = differentiate(lambda *xs: self.composite(*xs, *ctx.options), inputs, wanted, dys)
            return grads + others
        absent = (None,) * (self.most_results - len(dys))
        grads = backward(*dys, *absent, *inputs, *extras, *ctx.options, wanted)
        # A registered op gives an empty tensor for what is not wanted.
        return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True)) + others


def define(name: str, schema: str, launch: Callable, fake: Callable) -> Callable:
    qualified = f"fusedact::{name}"
    torch.library.define(qualified, schema)
    for device in ("cpu", "cuda"):  # a CPU tensor is for the interpreter
        torch.library.impl(qualified, device, _without_none(launch))
    torch.library.register_fake(qualified, _without_none(fake))
    return getattr(torch.ops.fusedact, name).default


def _without_none(run: Callable[..., Any]) -> Callable[..., Any]:
    def complete(*args: Any) -> Any:
        output = run(*args)
        if isinstance(output, Tensor):
            return output
        like = next(arg for arg in args if isinstance(arg, Tensor))
        return tuple(like.new_empty(0) if t is None else t for t in output)

    return complete


def differentiate(
    formula: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dys: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Gradients of formula(*inputs) in torch's own recorded operations.

    Each input is replaced by an alias of its own, so that no gradient flows from one to another behind it.
    """
    with backend.recording():
        aliases = [x if x is None else x.view_as(x) for x in inputs]
        for alias, want in zip(aliases, wanted, strict=True):
            if want and alias is not None and not alias.requires_grad:  # as a compiled graph saves it
                alias.requires_grad_()
        chosen = [alias for alias, want in zip(aliases, wanted, strict=True) if alias is not None and want]
        y = formula(*aliases)
    results = [(y, dy) for y, dy in zip(y if isinstance(y, tuple) else (y,), dys, strict=True) if dy is not None]
    outputs, grad_outputs = zip(*results, strict=True)
    create_graph = torch.is_grad_enabled()
    grads = iter(torch.autograd.grad(outputs, chosen, grad_outputs, create_graph=create_graph, materialize_grads=True))
    return tuple(next(grads) if want else None for want in wanted)
