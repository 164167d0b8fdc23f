"""The sites in the graph of a forward, found and, where they can be, rewritten as one call each."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fusedact.fusion import formulas, running
from fusedact.fusion.formulas import ChainLayer, Saves
from fusedact.fusion.nodes import Applied, applied, called, describe, halves, name_of, product, watched
from fusedact.fusion.site import Site
from fusedact.fusion.tracing import Trace, writes

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_RESHAPES = {"view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous", "squeeze", "unsqueeze"}
_NOTHING = Saves((0, 0), (0, 0))
_Part = tuple[fx.Node, fx.Node | None]  # a linear layer and the activation after it


def find(module: nn.Module, path: str, trace: Trace) -> tuple[fx.Graph, list[Site]]:
    """The graph with every site in it fused that can be, and all sites, in the order of the forward."""
    search = _Search(module, path, trace)
    for step in (search.gated_pairs, search.linear_layers, search.convolutions, search.alone, search.left):
        step()
    return search.graph, [site for _, site in sorted(search.found, key=operator.itemgetter(0))]


class _Search:
    def __init__(self, module: nn.Module, path: str, trace: Trace) -> None:
        self.module, self.path = module, path
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(trace.graph, {}))
        self.nodes = list(self.graph.nodes)
        self.order = {node: at for at, node in enumerate(self.nodes)}
        self.products = {node: layer for node in self.nodes if (layer := product(module, node)) is not None}
        self.applied = {node: act for node in self.nodes if (act := applied(module, node)) is not None}
        self.done: set[fx.Node] = set()
        self.found: list[tuple[int, Site]] = []

    # The sites

    def gated_pairs(self) -> None:
        """act(gate) * up, where gate and up are products of one width, or parts of one tensor."""
        for node in self.nodes:
            for act, up in self._gates(node):
                gate = act.input
                if act.why is not None or len(act.node.users) > 1 or len(gate.users) > 1 or node in self.done:
                    continue
                if not (self._same_width(gate, up) or (halves(gate, up) and self._is_still(gate))):
                    continue
                products = [n for n in (gate, up) if n in self.products]
                width = self.products[gate].width if products else 0
                label = f"{act.entry.name}({self._label(gate)}) * {self._label(up)}"
                if halves(gate, up):
                    split: Any = gate.args[0]
                    base = split.args[0]
                    label = f"{act.entry.name}(half of {self._label(base)}) * its other half"
                    if base in self.products:
                        width = self.products[base].width // len({part.args[1] for part in split.users})
                        products = [] if base.args[0] in self.applied else [base]  # which a chain may end in
                parts = sorted({act.node, *products}, key=self.order.__getitem__)
                self._note("gated", parts, label, None, width, formulas.gated_saves())
                self._replace([act.node, node], node, running.gated(act.act), gate, up, self._live(act.node))
                self.done.update(products)

    def linear_layers(self) -> None:
        """Linear layers in a row, of which all but the last have an activation, and the last may."""
        for node in self.nodes:
            parts = list(self._row(node))
            if not parts or (len(parts) == 1 and parts[0][1] is None):
                continue
            layers = [self._chain_layer(*part) for part in parts]
            if len(layers) == 1:
                (entry, values, bias, width), dtype = layers[0], self._dtype(node)
                assert entry is not None
                kind, saves = "linear", formulas.linear_saves(entry, dtype, values, bias)
            else:
                kind, (width, saves) = "chain", formulas.chain_saves(layers, self._dtype(node))
            nodes = [n for part in parts for n in part if n is not None]
            label = ", ".join(" + ".join(self._label(n) for n in part if n is not None) for part in parts)
            self._note(kind, nodes, label, None, width, saves)
            kinds = [type(self.products[layer].layer) for layer, _ in parts]
            acts = [None if act is None else self.applied[act].act for _, act in parts]
            live = [self._live(n) for part in parts for n in part]
            self._replace(nodes, node, running.linear(kinds, acts), node.args[0], *live)

    def convolutions(self) -> None:
        for node, found in self.products.items():
            act = self._activation_after(node)
            if node in self.done or found.is_linear or found.why is not None or act is None:
                continue
            layer = found.layer
            depthwise = 1 < layer.in_channels == layer.groups and not layer.transposed
            saves = formulas.convolution_saves(act.entry, layer.bias is not None, depthwise)
            label = f"{self._label(node)} + {self._label(act.node)}"
            self._note("convolution", [node, act.node], label, None, found.width, saves)
            target = running.convolution(type(found.layer), act.act)
            self._replace([node, act.node], node, target, node.args[0], self._live(node), self._live(act.node))

    def alone(self) -> None:
        """Softmaxes, and activations that stock runs as several launches."""
        for node in self.nodes:
            act = self.applied.get(node)
            several = act is not None and (act.entry.fused_alone or act.act.known is not None)
            if act is not None and several and node not in self.done and act.why is None:
                self._note("activation", [node], self._label(node), None, 0, formulas.activation_saves(act.entry))
                self._replace([node], node, running.activation(act.act), act.input, self._live(node))
            module = called(self.module, node)
            if type(module) in running.SOFTMAXES:
                self._note("softmax", [node], describe(module), watched(module), 0, _NOTHING)
                if watched(module) is None:
                    self._replace([node], node, running.softmax, node.args[0], self._live(node))
            elif node.op in ("call_function", "call_method") and node.target in running.SOFTMAX_FUNCTIONS:
                if "out" in node.kwargs:
                    continue
                self._note("softmax", [node], name_of(node), None, 0, _NOTHING)
                node.op, node.target = "call_function", running.SOFTMAX_FUNCTIONS[node.target]

    def left(self) -> None:
        """Products that stand as they are, each with the reason."""
        for node in self.nodes:
            act = self._activation_after(node) if node.target in running.PRODUCT_FUNCTIONS else None
            if act is not None:
                why = "a function takes the product, not a layer"
                label = f"{name_of(node)} + {self._label(act.node)}"
                self._note("linear", [node, act.node], label, why, 0, _NOTHING)
        for node, found in self.products.items():
            if node not in self.done:
                act = next((n for n in node.users if n in self.applied), None)
                label = self._label(node) + (f" + {self._label(act)}" if act is not None else "")
                kind = "linear" if found.is_linear else "convolution"
                nodes = [node] if act is None else [node, act]
                self._note(kind, nodes, label, found.why or self._why_left(node), found.width, _NOTHING)

    # What they are made of

    def _gates(self, node: fx.Node) -> Iterator[tuple[Applied, fx.Node]]:
        """Each activation that the node multiplies by another value, and that value."""
        if node.target not in (operator.mul, torch.mul, "mul") or len(node.args) != 2 or node.kwargs:
            return
        for one, other in (node.args, node.args[::-1]):
            if one in self.applied and isinstance(other, fx.Node) and one is not other:
                yield self.applied[one], other  # type: ignore[index]

    def _same_width(self, gate: fx.Node, up: fx.Node) -> bool:
        one, other = self.products.get(gate), self.products.get(up)
        return one is not None and other is not None and one.is_linear == other.is_linear and one.width == other.width

    def _is_still(self, part: fx.Node) -> bool:
        """Nothing writes to the tensor that this is a part of: a layer made it, or no node writes to anything."""
        base = part.args[0].args[0]  # type: ignore[union-attr]
        return base in self.products or not any(writes(n.op, n.target, n.args, n.kwargs) for n in self.nodes)

    def _row(self, node: fx.Node) -> Iterator[_Part]:
        while node in self.products and node not in self.done:
            found = self.products[node]
            if not found.is_linear or found.why is not None:
                return
            act = self._activation_after(node)
            yield node, None if act is None else act.node
            if act is None or len(act.node.users) != 1:
                return
            node = next(iter(act.node.users))

    def _activation_after(self, node: fx.Node) -> Applied | None:
        """The activation that alone takes the value of the node."""
        act = self.applied.get(next(iter(node.users))) if len(node.users) == 1 else None
        return act if act is not None and act.why is None and act.input is node and act.node not in self.done else None

    def _chain_layer(self, layer: fx.Node, act: fx.Node | None) -> ChainLayer:
        found = self.products[layer]
        entry, values = (None, ()) if act is None else (self.applied[act].entry, self.applied[act].values)
        return ChainLayer(entry, values, found.layer.bias is not None, found.width)

    def _dtype(self, node: fx.Node) -> torch.dtype:
        """Of its parameters, not of `weight`: a look at a parametrized one may change it."""
        return next(self.products[node].layer.parameters()).dtype

    def _why_left(self, node: fx.Node) -> str:
        users = list(node.users)
        acts = [user for user in users if user in self.applied]
        if acts and len(users) > 1:
            others = [self._where(user) for user in users if user is not acts[0]]
            return f"its pre-activation is used elsewhere: by {', '.join(others)}"
        if acts:
            return f"{name_of(acts[0])}: {self.applied[acts[0]].why}"
        if len(users) != 1:
            return f"no activation follows: {'several operations take' if users else 'nothing takes'} its output"
        after = users[0]
        act = next((n for n in after.users if n in self.applied), None)
        between = called(self.module, after)
        if act is not None and isinstance(between, _NORMS):
            return f"{type(between).__name__} ({name_of(after)}) stands between it and {self._label(act)}"
        if act is not None and name_of(after) in _RESHAPES:
            return f"a reshape ({name_of(after)}) stands between it and {self._label(act)}"
        goes = "is the result" if after.op == "output" else f"goes to {name_of(after)}"
        return f"no activation follows: its output {goes}"

    def _where(self, node: fx.Node) -> str:
        return "the result" if node.op == "output" else name_of(node)

    # Names and nodes

    def _label(self, node: fx.Node) -> str:
        if node in self.products:
            return describe(self.products[node].layer)
        return self.applied[node].entry.name if node in self.applied else name_of(node)

    def _note(self, kind: str, parts: list[fx.Node], label: str, why: str | None, width: int, saves: Saves) -> None:
        names = tuple(
            ".".join(filter(None, (self.path, str(node.target)))) if node.op == "call_module" else name_of(node)
            for node in parts
        )
        itemsize = next((self._dtype(node).itemsize for node in parts if node in self.products), 4)
        site = Site(self.path, names, kind, label, why, width, itemsize, *saves)
        self.found.append((self.order[parts[0]], site))

    def _live(self, node: fx.Node | None) -> str | None:
        """The path of the module that a node calls."""
        return str(node.target) if node is not None and node.op == "call_module" else None

    def _replace(self, nodes: list[fx.Node], at: fx.Node, target: Callable[..., Any], *args: Any) -> None:
        """One call, where `at` was, instead of the nodes, the value of whose last one it gives."""
        with self.graph.inserting_before(at):
            given = [self.graph.create_node("get_attr", arg) if isinstance(arg, str) else arg for arg in args]
            new = self.graph.call_function(target, tuple(given))
        nodes[-1].replace_all_uses_with(new)
        for node in reversed(nodes):
            self.graph.erase_node(node)
        self.done.update(nodes)
        self.order[new] = self.order[at]
