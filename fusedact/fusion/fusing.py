"""fuse, unfuse and report."""

import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import fx, nn

from fusedact.fusion.checking import compare
from fusedact.fusion.codes import Untraceable
from fusedact.fusion.losses import join
from fusedact.fusion.nodes import describe, is_product
from fusedact.fusion.programs import CUT, JOINED, Program, analysed, attach, detach
from fusedact.fusion.reads import is_fused, is_sequential, original
from fusedact.fusion.reporting import Report, positions
from fusedact.fusion.site import Site
from fusedact.fusion.tracing import CONVOLUTIONS

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@overload
def fuse(model: nn.Module, loss: None = None, *, check: Any = None, allow_different: bool = False) -> nn.Module: ...
@overload
def fuse(model: nn.Module, loss: Any, *, check: Any = None, allow_different: bool = False) -> tuple[nn.Module, Any]: ...
def fuse(model: nn.Module, loss: Any = None, *, check: Any = None, allow_different: bool = False) -> Any:
    """Make a model that someone else wrote run fused, in place: model, or (model, loss) where a loss was given.

    Each module whose own forward applies an activation to a layer's output, multiplies an activation by another layer's
    output, or takes a softmax gets a subclass of its class that does so in fused kernels, where Triton runs; everything
    else about it stays: parameters, state_dict, hooks, names, isinstance. What cannot be proved the same is left as it
    is, and `report` says why. A call that differs from the traced one (an argument that had its default, an attribute
    that was changed since) runs the module's own forward.

    loss: NLLLoss is joined with the model's last LogSoftmax, CrossEntropyLoss with its last Linear, and, only with
    allow_different=True because torch's clamps then no longer act, BCELoss with its last Sigmoid. In training the model
    then returns what the returned loss takes, logits or (hidden state, weight, bias); in eval what it ever did. Any
    other loss of torch's runs fused by itself.

    check: inputs, a tensor, a tuple of arguments or a dict of keyword arguments. The model runs fused and as it was, in
    eval mode, and outputs and gradients are compared with those in float64; RuntimeError where fused ones err by more
    than twice as much, and the model is as it was.

    Raises TypeError for a model that is no torch.nn.Module. Calling it again looks at a changed model anew.
    """
    _check_model("fuse", model)
    for path, module in model.named_modules():
        if loss is not None:
            vars(module).pop(CUT, None)  # of another loss
        _renew(module, path)
    try:
        if check is not None:
            compare(model, _as_it_was, check)
    except Exception:
        unfuse(model)
        raise
    if loss is None:
        return model
    loss, site = join(model, loss, allow_different)
    vars(model)[JOINED] = site
    return model, loss


def unfuse(model: nn.Module) -> nn.Module:
    """Give a fused model, or loss, back as it was, its classes and attributes; the same object.

    Raises TypeError for what is no torch.nn.Module, RuntimeError where a module's class was changed after `fuse`.
    """
    _check_model("unfuse", model)
    for module in model.modules():
        detach(module)
    return model


def report(model: nn.Module, inputs: Any = None) -> Report:
    """Each site of a model: what is fused and what that saves, what is not and why. `print` shows it.

    inputs: a tensor, a tuple of arguments or a dict of keyword arguments, on which the model runs once, in eval mode
    without gradients, so that bytes are told for a step, not for a position.

    Raises TypeError for a model that is no torch.nn.Module.
    """
    _check_model("report", model)
    found = Report(tuple(_sites(model)))
    if inputs is None:
        return found
    with _as_it_was(model):
        return found.measured(positions(model, inputs))


def _check_model(caller: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}() takes a torch.nn.Module, got {type(model).__name__}")


def _renew(module: nn.Module, path: str) -> None:
    """Fuse what can be fused in the module's own forward as it is now; nothing, where it cannot be looked at."""
    try:
        programs = () if is_sequential(type(module)) else _looked_at(module, path)[0]
        if programs:
            attach(module, programs)
    except Untraceable:
        programs = ()
    kind = type(module)
    if programs or original(kind) is kind:
        return
    if is_fused(kind):
        detach(module)
    else:  # under a class of fully_shard's
        attach(module, ())


def _looked_at(module: nn.Module, path: str) -> tuple[tuple[Program, ...], list[Site]]:
    if not _has_forward(module):
        return (), []
    if (why := _unfit(module)) is not None:
        raise Untraceable(why)
    return analysed(module, path)


def _unfit(module: nn.Module) -> str | None:
    """Why its class must stay what it is."""
    kind = original(type(module))
    if "forward" in vars(module):
        return "its forward was replaced"
    if issubclass(kind, fx.GraphModule | torch.jit.ScriptModule):
        return f"it is a {kind.__name__}, whose forward torch makes"
    if type(kind) not in (type, abc.ABCMeta):
        return f"its class is made by another metaclass, {type(kind).__name__}"
    if any(
        "__slots__" in vars(base) for base in kind.__mro__ if base is not object and not issubclass(nn.Module, base)
    ):
        return "its class has slots"
    own = kind.__reduce_ex__ is not object.__reduce_ex__ or kind.__reduce__ is not object.__reduce__
    return "its class says itself how it is copied" if own else None


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model's original classes, while this lasts."""
    fused = {module: type(module) for module in model.modules() if is_fused(type(module))}
    try:
        for module in fused:
            module.__class__ = original(type(module))
        yield
    finally:
        for module, kind in fused.items():
            module.__class__ = kind


def _has_forward(module: nn.Module) -> bool:
    """Whether its forward may hold a site: those of torch's own layers without children, and of lists, do not."""
    kind = original(type(module))
    own = next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))
    of_library = own.__module__.startswith(("torch.nn.", "fusedact."))
    return kind not in _CONTAINERS and (not of_library or next(module.children(), None) is not None)


def _sites(model: nn.Module) -> Iterator[Site]:
    if JOINED in vars(model):
        yield vars(model)[JOINED]
    for path, module in model.named_modules():
        try:
            programs, found = _looked_at(module, path)
            if programs and programs[0].traced.fixed:
                how = f" (with the default of {', '.join(programs[0].traced.fixed)})"
                found = [replace(site, label=site.label + how) if site.fused else site for site in found]
        except Untraceable as error:
            found = [
                Site(path, (f"{path}.{name}".lstrip("."),), _kind(child), describe(child), str(error))
                for name, child in _children(module)
                if is_product(child)
            ]
        fused = _fused_parts(module, path)
        for site in found:
            fits = not site.fused or fused is None or _relative(site, path) in fused
            yield site if fits else replace(site, reason="fuse(model) has not seen it", launches=(0, 0), moves=(0, 0))


def _fused_parts(module: nn.Module, path: str) -> set[Any] | None:
    """What stands fused in a module's programs; None where it fuses by itself."""
    if is_sequential(type(module)):
        return None
    return {_relative(site, site.module) for program in vars(module).get("_fusedact", ()) for site in program.sites}


def _relative(site: Site, path: str) -> tuple[str, ...]:
    return (site.kind, *(part.removeprefix(f"{path}.") for part in site.parts))


def _kind(layer: nn.Module) -> str:
    return "convolution" if isinstance(layer, CONVOLUTIONS) else "linear"


def _children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules that a forward has at hand, those in its lists as well."""
    for name, child in module.named_children():
        yield prefix + name, child
        if type(child) in _CONTAINERS:
            yield from _children(child, f"{prefix}{name}.")
