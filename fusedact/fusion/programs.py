"""A module's class, swapped for a subclass of it whose forward runs the rewritten graph.

Nothing else of the module changes: its parameters, children, hooks, names and what isinstance says are as they were.
"""

import copyreg
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from fusedact import backend
from fusedact.fusion import sites
from fusedact.fusion.codes import Untraceable
from fusedact.fusion.cuts import cut
from fusedact.fusion.reads import Read, is_fused, is_sequential, original
from fusedact.fusion.site import Site
from fusedact.fusion.tracing import Trace, trace

CUT = "_fusedact_cut"  # attribute of a module whose end a loss took over: what it gives in training
JOINED = "_fusedact_loss"  # attribute of a model that was given a loss: the site where they meet
END = "_fusedact_end"  # attribute of a loss: a weak reference to the module whose end it took over; None in a copy
DIM = "_fusedact_dim"  # attribute of a loss: along which dimension the model's softmax was
_OURS = ("_fusedact", CUT, JOINED, END, DIM)


class Program(NamedTuple):
    """A rewritten forward, run(module, *inputs), of the class's own.

    traced: what it was made of, which says where it holds. sites: what is fused in it.
    """

    run: Callable[..., Any]
    own: Callable[..., Any]
    traced: Trace
    sites: tuple[Site, ...]

    def inputs(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
        """The tensors to run it on; None where the call is another than the traced one."""
        _, names, positional, fixed, reads, constants, one_dtype = self.traced
        if len(args) > positional or forward_of(type(module)) is not self.own:
            return None
        given = dict(zip(names, args, strict=False))
        if kwargs:
            if not kwargs.keys() <= set(names) - given.keys():
                return None
            given.update(kwargs)
        inputs = [given[name] for name in names if name not in fixed and name in given]
        if len(inputs) + len(fixed) != len(names) or not all(isinstance(x, Tensor) for x in inputs):
            return None
        if any(given[name] is not value for name, value in fixed.items() if name in given):
            return None
        dtype = inputs[0].dtype if inputs and all(x.dtype is inputs[0].dtype for x in inputs) else None
        if one_dtype and (
            dtype is None or not dtype.is_floating_point or backend.autocast_dtype(inputs[0]) is not None
        ):
            return None
        if not all(read.holds(module, dtype) for read in reads) or not all(known.holds() for known in constants):
            return None
        return inputs


def analysed(module: nn.Module, path: str) -> tuple[tuple[Program, ...], list[Site]]:
    """The programs of a module's forward, one for each mode in which it is another, and the sites, as in training.

    Raises Untraceable where its forward has no graph, or cannot be looked at.
    """
    try:
        return _analysed(module, path)
    except Untraceable:
        raise
    except Exception as error:  # a model may be anything; what fuse() cannot look at it leaves
        text = str(error).partition("\n")[0]
        raise Untraceable(f"fuse() fails to look at it: {type(error).__name__}, {text}") from error


def _analysed(module: nn.Module, path: str) -> tuple[tuple[Program, ...], list[Site]]:
    forward, gives = forward_of(type(module)), vars(module).get(CUT)
    traces = [trace(module, forward, True)]
    if gives is not None or any(read.name == "training" for read in traces[0].reads):
        traces.append(trace(module, forward, False))
    if gives is not None:
        of_end = cut(module, traces[0].graph, gives)
        traces = [
            traced._replace(reads=(*traced.reads, Read((), "training", mode), *of_end))
            for traced, mode in zip(traces, (True, False), strict=True)
        ]
    programs, found = [], []
    for traced in traces:
        graph, of_mode = sites.find(module, path, traced)
        found.append(of_mode)
        fused = tuple(site for site in of_mode if site.fused)
        if fused or gives is not None:
            programs.append(Program(_compiled(module, graph), forward, traced, fused))
    return tuple(programs), found[0]


def forward_of(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward to trace: torch's own of our Sequential, which does the same."""
    kind = original(kind)
    return nn.Sequential.forward if is_sequential(kind) else kind.forward


def _compiled(module: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module and its inputs."""
    return type(fx.GraphModule(module, graph)).forward


def attach(module: nn.Module, programs: tuple[Program, ...]) -> None:
    kind = type(module)
    if original(kind) is kind:
        module.__class__ = _fused_class(kind)  # type: ignore[arg-type]
    module.__dict__["_fusedact"] = programs


def detach(module: nn.Module) -> None:
    """Class and attributes as they were. RuntimeError where the class was changed once more since."""
    kind = type(module)
    if is_fused(kind):
        module.__class__ = original(kind)
    elif any(map(is_fused, kind.__mro__)):
        raise RuntimeError(
            f"unfuse() cannot give {kind.__name__} back: its class was changed after fuse(), as fully_shard() does"
        )
    for name in _OURS:
        vars(module).pop(name, None)


def _fused_class(base: Any) -> type[nn.Module]:
    """The one made of this class. Python's own weak list of subclasses keeps it: who makes classes can let them go."""
    made = (kind for kind in type.__subclasses__(base) if {"_original", "_fusedact"} <= vars(kind).keys())
    return next(made, None) or _made_of(base)


def _made_of(base: Any) -> type[nn.Module]:
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        is_cut = CUT in vars(self)
        if is_cut or ((_meets_triton(args) or _meets_triton(kwargs.values())) and not _has_any_global_hook()):
            for program in self._fusedact:
                inputs = program.inputs(self, args, kwargs)
                if inputs is not None:
                    return program.run(self, *inputs)
        if is_cut and self.training:
            raise RuntimeError(
                f"{base.__name__} was fused with its loss, and is called or was changed as it was not then: unfuse() it"
            )
        return base.forward(self, *args, **kwargs)

    def reduced(self: Any, protocol: Any) -> Any:
        """As the original class, with what the copy makes anew left out."""
        made: Any = base.__reduce_ex__(self, protocol)
        function, args, *rest = made
        if function is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return made
        state, *others = rest
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != "_fusedact"}
        return _blank, (base, *args[1:]), state, *others

    def set_state(self: Any, state: Any) -> None:
        base.__setstate__(self, state)
        try:
            attach(self, analysed(self, "")[0])
        except Untraceable:
            attach(self, ())

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    methods = {"forward": forward, "__reduce_ex__": reduced, "__setstate__": set_state}
    kind = type(base.__name__, (nn.Module,), {**names, **methods, "_original": base, "_fusedact": ()})
    kind.__bases__ = (base,)  # not from the start: no __init_subclass__, which may want arguments, is to see it
    return kind


def _meets_triton(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and backend.uses_triton(value) for value in values)


def _blank(base: type[nn.Module], *args: Any) -> nn.Module:
    kind = _fused_class(base)  # type: ignore[arg-type]
    return kind.__new__(kind, *args)
