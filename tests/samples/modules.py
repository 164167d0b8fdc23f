"""ModuleInfo's inputs through our modules and through torch's of the same state: values, gradients, errors, copies."""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from samples.cases import DEVICE, Case, launches_of
from samples.outcomes import Outcome, difference, outcome
from torch import nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db
from torch.testing._internal.common_utils import set_rng_seed
from torch.utils._pytree import tree_leaves, tree_map

import fusedact


@dataclass(frozen=True)
class Module:
    """A module of ours, and torch's of that name with its entry in module_db, if it has one."""

    name: str
    ours: type[nn.Module]
    stock: type[nn.Module]
    info: ModuleInfo | None

    def modes(self) -> tuple[bool, ...]:
        """Training and evaluation, or one where they do not differ, as torch's own suite does."""
        if self.info is None:
            return ()
        return (True, False) if self.info.train_and_eval_differ else (True,)

    def inputs(self, dtype: torch.dtype, requires_grad: bool) -> Iterator[tuple[str, Any]]:
        for training in self.modes():
            set_rng_seed(0)
            given = self.info.module_inputs_func(self.info, DEVICE, dtype, requires_grad, training)
            for at, each in enumerate(given):
                if each.constructor_input.kwargs.get("options") is not None:
                    continue  # torch's own way through a head
                yield f"input {at} {each.desc} {'train' if training else 'eval'}", each

    def pair(self, given: Any, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
        """Torch's and ours, of the same state."""
        made = given.constructor_input
        stock, ours = (cls(*made.args, **made.kwargs).to(DEVICE, dtype) for cls in (self.stock, self.ours))
        ours.load_state_dict(stock.state_dict())
        return stock, ours


def discover() -> tuple[list[Module], list[str]]:
    """The modules of torch.nn that are ours, and the names that merely fall through."""
    infos = {info.module_cls: info for info in module_db}
    modules, others = [], []
    for name in fusedact.nn.__all__:
        stock, ours = getattr(nn, name, None), getattr(fusedact.nn, name)
        if not isinstance(stock, type) or not issubclass(stock, nn.Module):
            continue
        if ours is stock:
            others.append(f"nn.{name}")
        else:
            modules.append(Module(f"nn.{name}", ours, stock, infos.get(stock)))
    return modules, others


def values(module: Module, dtype: torch.dtype) -> Case:
    """The result and the gradients of inputs and parameters."""
    case = Case(module.name, "module", str(dtype), skipped="" if module.info else "module_db has no entry")
    for told, given in module.inputs(dtype, requires_grad=True):
        stock, ours = module.pair(given, dtype)
        results = [outcome(_pull_back, m, given.forward_input) for m in (ours, stock)]
        problem = _compared(*results, stock, given.forward_input)
        if not problem and results[1].error is None:
            headed = module.name == "nn.LinearCrossEntropyLoss"
            problem = case.count(results[0], None if headed else launches_of(*results[0].result))
        case.judge(told, problem)
    return case


def _pull_back(module: nn.Module, given: Any) -> tuple:
    args, kwargs = tree_map(_leaf, (given.args, given.kwargs))
    y = module(*args, **kwargs)
    wanted = [t for t in [*tree_leaves((args, kwargs)), *module.parameters()] if getattr(t, "requires_grad", False)]
    dy = torch.linspace(0.5, 2.0, y.numel(), dtype=torch.bfloat16, device=y.device).view(y.shape).to(y.dtype)
    return y, torch.autograd.grad(y, wanted, dy, allow_unused=True) if y.requires_grad else ()


def _compared(ours: Outcome, stock: Outcome, module: nn.Module, given: Any) -> str | None:
    """Exactly where torch answered for us, else against its module in float64."""
    if not ours.launches or stock.error is not None:
        return difference(ours, stock)
    wide = copy.deepcopy(module).double()

    def again() -> tuple[Any, Any]:
        near = _changed(given, lambda t: t * (1 - torch.rand_like(t) / 32))
        return _pull_back(module, near), _pull_back(wide, _changed(near, torch.Tensor.double))

    return difference(ours, stock, _pull_back(wide, _changed(given, torch.Tensor.double)), again)


def _leaf(t: Any) -> Any:
    return t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t


def _changed(given: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The input with its floating tensors changed."""

    def changed(t: Any) -> Any:
        floating = isinstance(t, torch.Tensor) and t.is_floating_point()
        return change(t.detach()).requires_grad_(t.requires_grad) if floating else t

    return type(given)(*tree_map(changed, given.args), **tree_map(changed, given.kwargs))


def copies(module: Module) -> Case:
    """repr and state are torch's; a pickled and a deep copy are of our class and answer as the first."""
    case = Case(module.name, "copies", skipped="" if module.info else "module_db has no entry")
    for told, given in module.inputs(torch.float32, requires_grad=False):
        stock, ours = module.pair(given, torch.float32)
        problem = None
        if repr(ours) != repr(stock) or list(ours.state_dict()) != list(stock.state_dict()):
            problem = f"{ours!r} {list(ours.state_dict())}, not {stock!r} {list(stock.state_dict())}"
        first = outcome(_pull_back, ours, given.forward_input)
        for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            if type(copied) is not module.ours:
                problem = f"a copy is {type(copied)}"
            problem = problem or difference(outcome(_pull_back, copied, given.forward_input), first)
        case.judge(told, problem)
    return case


def errors(module: Module) -> Case:
    case = Case(module.name, "module errors")
    function = module.info.module_error_inputs_func if module.info else None
    for training in module.modes() if function else ():
        for wrong in function(module.info, DEVICE, torch.float32, False, training):
            case.judge(wrong.error_regex, _error(module, wrong))
    if not case.samples:
        case.skipped = "module_db has none for it"
    return case


def _error(module: Module, wrong: Any) -> str | None:
    made, given = wrong.module_error_input.constructor_input, wrong.module_error_input.forward_input

    def use(cls: type[nn.Module]) -> Any:
        built = cls(*made.args, **made.kwargs)
        return None if wrong.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR else built(*given.args, **given.kwargs)

    stock, ours = outcome(use, module.stock), outcome(use, module.ours)
    if not isinstance(stock.error, wrong.error_type) or not re.search(wrong.error_regex, str(stock.error)):
        return f"torch itself gives {stock.error!r}"
    return difference(ours, stock)
