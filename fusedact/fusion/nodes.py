"""What the nodes of a traced forward are: products, activations, halves of one tensor; and their names for a reader."""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from fusedact import nn as fnn
from fusedact.activations import Activation, by_name, of_module
from fusedact.fusion.recognized import activation_of, called_activation, transposed_linear
from fusedact.fusion.running import Act, own_attributes
from fusedact.fusion.tracing import CONVOLUTIONS, PRODUCTS
from fusedact.nn.hooks import is_plain

_OURS = {stock: getattr(fnn, stock.__name__) for stock in PRODUCTS}
_SPLITS = {"chunk", "split", "unbind", "tensor_split"}


class Product(NamedTuple):
    """A linear layer or convolution that a forward calls. why: the reason why its call cannot be replaced."""

    node: fx.Node
    layer: Any
    width: int
    why: str | None

    @property
    def is_linear(self) -> bool:
        return not isinstance(self.layer, CONVOLUTIONS)


class Applied(NamedTuple):
    """An activation that a forward applies to one value. why: as a product's."""

    node: fx.Node
    input: fx.Node
    act: Act
    entry: Activation
    values: tuple[float, ...]
    why: str | None


def is_product(module: nn.Module) -> bool:
    return isinstance(module, PRODUCTS) or transposed_linear(module)


def describe(module: Any) -> str:
    """'Linear(32, 64)', and the class alone of what is no product."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        return f"{kind}({module.in_features}, {module.out_features})"
    if isinstance(module, CONVOLUTIONS):
        return f"{kind}({module.in_channels}, {module.out_channels})"
    return f"{kind}({', '.join(map(str, module.weight.shape))})" if is_product(module) else kind


def called(root: nn.Module, node: fx.Node) -> Any:
    """The module that a node calls with one value, or None."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    return root.get_submodule(str(node.target))


def product(root: nn.Module, node: fx.Node) -> Product | None:
    layer = called(root, node)
    if layer is None or not is_product(layer):
        return None
    if isinstance(layer, nn.Linear):
        return Product(node, layer, layer.out_features, _unlike(layer) or watched(layer))
    if isinstance(layer, CONVOLUTIONS):
        return Product(node, layer, layer.out_channels, _unlike(layer) or watched(layer))
    return Product(node, layer, layer.weight.shape[1], watched(layer))


def _unlike(layer: Any) -> str | None:
    """Why a layer is none of torch's own or ours."""
    if parametrize.is_parametrized(layer):
        return f"its {' and '.join(layer.parametrizations)} is parametrized"
    stock = next(kind for kind in PRODUCTS if isinstance(layer, kind))
    if type(layer) not in (stock, _OURS[stock]):
        return f"its class is {type(layer).__name__}, a subclass of {stock.__name__}"
    return None if getattr(layer, "activation", None) is None else "it runs fused with an activation of its own"


def watched(module: nn.Module) -> str | None:
    """Why a call of the module cannot be replaced by its formula."""
    if is_plain(module):
        return None
    if "forward" in vars(module):
        return "its forward was replaced"
    return "it has a hook" if module._compiled_call_impl is None else "it is compiled by itself"


def applied(root: nn.Module, node: fx.Node) -> Applied | None:
    function = called_activation(node)
    if function is not None:
        name, given = function
        entry = by_name(name)
        values = entry.parameters(given)
        input = node.args[0] if node.args else node.kwargs["input"]
        made = _made(entry, values)
        if made is None or not isinstance(input, fx.Node):
            return None
        return Applied(node, input, Act(made, apply=_apply(node)), entry, values, None)
    module = called(root, node)
    found = None if module is None else activation_of(module)
    if found is None:
        return None
    entry, values, _ = found
    act = Act() if of_module(module) is not None else Act(_made(entry, values), known=(module, own_attributes(module)))
    return Applied(node, node.args[0], act, entry, values, watched(module))  # type: ignore[arg-type]


def _made(entry: Activation, values: tuple[float, ...]) -> str | nn.Module | None:
    """What functional.linear takes for it: its name, or torch's module with these parameters, where it takes them."""
    if values == entry.default_values or entry.module is None:
        return entry.name
    if not entry.valid(*values):
        return None
    try:
        return entry.module(**dict(zip((name for name, _ in entry.defaults), values, strict=True)))
    except (AssertionError, RuntimeError, ValueError):  # which the function takes: hardtanh with equal bounds
        return None


def _apply(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The function or method of the node, with its other arguments."""
    target, args, kwargs = node.target, node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}
    if node.op == "call_method":
        return lambda z: getattr(z, target)(*args, **kwargs)  # type: ignore[arg-type]
    return lambda z: target(z, *args, **kwargs)  # type: ignore[operator]


def halves(gate: fx.Node, up: fx.Node) -> bool:
    """Two parts of one tensor that nothing else reads."""
    if gate.target is not operator.getitem or up.target is not operator.getitem or gate.args[0] is not up.args[0]:
        return False
    split = gate.args[0]
    name = getattr(split.target, "__name__", split.target)  # type: ignore[union-attr]
    base = split.args[0] if split.args else None  # type: ignore[union-attr]
    return name in _SPLITS and _is_once(gate) and isinstance(base, fx.Node) and len(base.users) == 1


def _is_once(part: fx.Node) -> bool:
    """Nothing else is the same part: all that is taken of the split are items, counted from the first."""
    users = part.args[0].users  # type: ignore[union-attr]
    items = [user.args[1] if user.target is operator.getitem else None for user in users]
    return all(type(item) is int and item >= 0 for item in items) and items.count(part.args[1]) == 1


def name_of(node: fx.Node) -> str:
    """A node for a reader: the module's path, the function's or method's name."""
    return str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
