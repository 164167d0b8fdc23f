"""One training step of a random network with its loss: as stock, through `fuse`, and of fusedact.nn's classes."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from samples.outcomes import DRAWS, difference, outcome
from torch import Tensor, nn

import fusedact
from fusedact.activations import ACTIVATIONS

MODULES = sorted({a.module.__name__ for a in ACTIVATIONS.values() if a.module is not None} - {"Threshold"})
EXACT = [name for name in MODULES if name != "Hardsigmoid"]  # whose derivative torch has in float32
SMOOTH = ["Sigmoid", "Tanh", "GELU", "SiLU", "Mish", "Softplus", "ELU", "CELU", "SELU", "LogSigmoid", "Tanhshrink"]
LOSSES = {  # the last module, its loss, and its arguments
    "CrossEntropyLoss": [{}, {"label_smoothing": 0.1}, {"reduction": "sum"}, {"ignore_index": 1}],
    "NLLLoss": [{}, {"reduction": "sum"}, {"ignore_index": 0}],
    "BCEWithLogitsLoss": [{}, {"reduction": "sum"}],
    "BCELoss": [{}, {"reduction": "sum"}],
    "MultiLabelSoftMarginLoss": [{}, {"reduction": "sum"}],
    "MSELoss": [{}],
}
WAYS = ("fuse", "fuse with its loss", "nn")


@dataclass(frozen=True)
class Network:
    """widths[0] features in, a linear layer to each next width, the activation between; `loss` with its arguments."""

    widths: tuple[int, ...]
    activations: tuple[str, ...]
    loss: str
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 4
    way: str = "fuse"
    dtype: str = "float32"
    seed: int = 0
    bias: bool = True

    def problem(self) -> str | None:
        """What our step does otherwise than stock's."""
        model, loss = self._built(nn)
        x, target = self._data()
        stock = outcome(_step, model, loss, x, target)
        with fusedact.use_backend("triton"):
            ours = outcome(_step, *self._ours(), x, target)
        truth = self._truth(0)

        def again() -> tuple[Any, Any]:
            nonlocal at
            at += 1
            if self.dtype == "float64":
                return self._truth(at), truth
            torch.manual_seed(at)
            near = x * (1 - torch.rand_like(x) / 32)
            wide = target.double() if target.is_floating_point() else target
            built, doubled = self._built(nn), self._built(nn)
            return _step(*built, near, target), _step(*(part.double() for part in doubled), near.double(), wide)

        at = 0
        return difference(ours, stock, truth, again, some=2**16)

    def _truth(self, nudge: int) -> Any:
        model, loss = (part.double() for part in self._built(nn))
        x, target = self._data()
        torch.manual_seed(nudge)
        x = x.double() * (1 + nudge * 4 / DRAWS * (torch.rand(x.shape).double() - 0.5) * 2**-52)
        return _step(model, loss, x, target.double() if target.is_floating_point() else target)

    def _built(self, namespace: Any) -> tuple[nn.Sequential, nn.Module]:
        torch.manual_seed(self.seed)
        layers: list[nn.Module] = []
        for at, (features, channels) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            layers.append(namespace.Linear(features, channels, bias=self.bias))
            if at < len(self.activations):
                layers.append(getattr(namespace, self.activations[at])())
        if self.loss == "NLLLoss":
            layers.append(namespace.LogSoftmax(dim=1))
        elif self.loss == "BCELoss":
            layers.append(namespace.Sigmoid())
        dtype = getattr(torch, self.dtype)
        return namespace.Sequential(*layers).to(dtype), getattr(namespace, self.loss)(**self.options).to(dtype)

    def _ours(self) -> tuple[Any, Any]:
        if self.way == "nn":
            return self._built(fusedact.nn)
        model, loss = copy.deepcopy(self._built(nn))
        if self.way == "fuse":
            return fusedact.fuse(model), loss
        fused: tuple[Any, Any] = fusedact.fuse(model, loss)
        return fused

    def _data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)
        x = torch.randn(self.rows, self.widths[0], generator=generator, dtype=torch.float64).to(dtype)
        shape = (self.rows, self.widths[-1])
        if self.loss in ("CrossEntropyLoss", "NLLLoss"):
            return x, torch.randint(self.widths[-1], shape[:1], generator=generator)
        return x, torch.rand(shape, generator=generator, dtype=torch.float64).round(decimals=1).to(dtype)


def _step(model: Any, loss: Any, x: Tensor, target: Tensor) -> tuple[Any, ...]:
    """The loss, the gradients, the parameters after one step of SGD, and what the model then says."""
    value = loss(model(x), target)
    value.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with torch.no_grad():
        return value, grads, [p.detach().clone() for p in model.parameters()], model.eval()(x)


@st.composite
def networks(draw: Any) -> Network:
    widths = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 7, 15, 16, 17, 33]), min_size=2, max_size=5)))
    loss = draw(st.sampled_from(list(LOSSES)))
    dtype = draw(st.sampled_from(["float32", "float32", "float64", "bfloat16", "float16"]))
    usable = {"float32": MODULES, "float64": EXACT}.get(dtype, SMOOTH)
    return Network(
        widths,
        tuple(draw(st.sampled_from(usable)) for _ in range(draw(st.integers(0, len(widths) - 1)))),
        loss,
        draw(st.sampled_from(LOSSES[loss])),
        draw(st.sampled_from([1, 2, 5, 16, 33])),
        draw(st.sampled_from(WAYS if loss != "BCELoss" else (WAYS[0], WAYS[2]))),
        dtype,
        draw(st.integers(0, 99)),
        draw(st.booleans()),
    )
