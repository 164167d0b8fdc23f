"""What the tutorials' snippets print, on torch.nn and on fusedact.nn."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact import nn as fused


@dataclass(frozen=True)
class Snippet:
    """A few lines of a tutorial: value(nn, *inputs) on the layers of `nn`, and how the tutorial prints it.

    inputs: by the tutorial's names; integers are int64. stated: what its text says of the value, numbers that it shows,
    or else what holds(nn, value, *inputs) looks for.
    """

    tutorial: str
    name: str
    inputs: dict[str, list]
    value: Callable[..., Tensor]
    printed: Callable[[Tensor], str]
    stated: str = ""
    holds: Callable[..., bool] | None = None

    def is_as_stated(self, nn: ModuleType, value: Tensor, *inputs: Tensor) -> bool:
        """Numbers to one unit of their last of four digits: the inputs that the text shows are rounded too."""
        if self.holds:
            return self.holds(nn, value, *inputs)
        numbers = torch.tensor([float(number) for number in re.findall(r"-?\d\.\d+", self.stated)])
        return torch.allclose(value.cpu().view(-1), numbers, rtol=0, atol=1e-4)

    def tensors(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        made = [torch.tensor(numbers, device=device) for numbers in self.inputs.values()]
        return [t.to(dtype) if t.is_floating_point() else t for t in made]


class Values(NamedTuple):
    """A snippet's value by torch.nn and by fusedact.nn in float32, both as printed, and by torch.nn in float64.

    is_as_stated: both are; None where the text states nothing.
    """

    snippet: Snippet
    stock: Tensor
    ours: Tensor
    truth: Tensor
    stock_printed: str
    ours_printed: str
    is_as_stated: bool | None

    def differences(self) -> tuple[float, float, float]:
        """The largest of |ours - stock|, |ours - truth| and |stock - truth|."""
        ours, stock = self.ours.double(), self.stock.double()
        pairs = (ours - stock, ours - self.truth, stock - self.truth)
        return tuple(pair.abs().max().item() for pair in pairs)  # type: ignore[return-value]

    def record(self) -> dict[str, object]:
        """A line of a table."""
        names = ("ours_from_stock", "ours_from_float64", "stock_from_float64")
        return {
            "tutorial": self.snippet.tutorial,
            "name": self.snippet.name,
            "inputs": str(self.snippet.inputs),
            "stock": self.stock_printed,
            "ours": self.ours_printed,
            "stated": self.snippet.stated,
            "is_as_stated": self.is_as_stated,
            **dict(zip(names, self.differences(), strict=True)),
        }


def _vector(decimals: int, start: str = "") -> Callable[[Tensor], str]:
    """As torch prints a vector of that precision."""

    def printed(value: Tensor) -> str:
        numbers = [f"{number:.{decimals}f}" for number in value.tolist()]
        width = max(map(len, numbers))
        return f"{start}tensor([{', '.join(number.rjust(width) for number in numbers)}])"

    return printed


def _loss(name: str, form: str = "") -> Callable[[Tensor], str]:
    return lambda value: f"{name}: {value.item():{form}}"


def _near(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-6)


def _entropy(nn: ModuleType, logits: Tensor, targets: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()(logits, targets)


LOGITS: dict[str, list] = {"logits": [2.0, 1.0, 0.1]}
BINARY: dict[str, list] = {"raw_outputs": [0.5, -1.0, 2.0], "targets": [1.0, 0.0, 1.0]}
CLASSES: dict[str, list] = {"raw_outputs": [[1.0, 2.0, 3.0], [1.0, 2.0, 0.0], [0.0, 2.0, 1.0]], "targets": [2, 0, 1]}
SNIPPETS = (
    Snippet(
        "004",
        "sigmoid",
        {"logits": [2.0, -1.0, 0.5]},
        lambda nn, x: nn.functional.sigmoid(x),
        _vector(2, "Sigmoid outputs: "),
        "between 0 and 1",
        lambda nn, y, x: bool(((y > 0) & (y < 1)).all()),
    ),
    Snippet(
        "004",
        "softmax",
        LOGITS,
        lambda nn, x: nn.functional.softmax(x, dim=-1),
        _vector(2, "softmax_outputs="),
        "sums to 1.0",
        lambda nn, y, x: _near(y.sum(), y.new_tensor(1.0)),
    ),
    Snippet(
        "004",
        "Softmax",
        LOGITS,
        lambda nn, x: nn.Softmax(dim=-1)(x),
        _vector(2, "softmax_outputs="),
        "as softmax",
        lambda nn, y, x: torch.equal(y, nn.functional.softmax(x, dim=-1)),
    ),
    Snippet(
        "004",
        "log_softmax",
        LOGITS,
        lambda nn, x: nn.functional.log_softmax(x, dim=0),
        _vector(2, "LogSoftmax outputs: "),
        "log of softmax",
        lambda nn, y, x: _near(y, nn.functional.softmax(x, dim=0).log()),
    ),
    Snippet(
        "004",
        "BCELoss",
        {"outputs": [0.7, 0.2, 0.9], "targets": [1.0, 0.0, 1.0]},
        lambda nn, x, t: nn.BCELoss()(nn.functional.sigmoid(x), t),
        _loss("BCELoss"),
    ),
    Snippet(
        "004",
        "BCEWithLogitsLoss",
        BINARY,
        lambda nn, x, t: nn.BCEWithLogitsLoss()(x, t),
        _loss("BCEWithLogitsLoss", ".4f"),
        "Sigmoid + BCELoss",
        lambda nn, y, x, t: _near(y, nn.BCELoss()(nn.Sigmoid()(x), t)),
    ),
    Snippet(
        "004",
        "targets of CrossEntropyLoss",
        {"targets": CLASSES["targets"]},
        lambda nn, t: t,
        lambda t: str(t.dtype),
        "long, which is int64",
        lambda nn, y, t: y.dtype == torch.long == torch.int64,
    ),
    Snippet(
        "004",
        "CrossEntropyLoss",
        CLASSES,
        _entropy,
        _loss("CrossEntropyLoss", ".2f"),
        "Softmax inside",
        lambda nn, y, x, t: _near(y, -nn.Softmax(1)(x).log().gather(1, t[:, None]).mean()),
    ),
    Snippet(
        "004",
        "NLLLoss",
        {"logits": [[0.1, 0.2, 0.7], [0.8, 0.1, 0.1], [0.3, 0.5, 0.2]], "targets": [2, 0, 1]},
        lambda nn, x, t: nn.NLLLoss()(nn.functional.log_softmax(x, dim=1), t),
        _loss("NLLLoss with LogSoftmax", ".2f"),
        "as CrossEntropyLoss",
        lambda nn, y, x, t: _near(y, _entropy(nn, x, t)),
    ),
    Snippet(
        "004*",
        "CrossEntropyLoss",
        CLASSES,
        lambda nn, x, t: _entropy(nn, x, F.one_hot(t, 3).to(x)),
        _loss("of class probabilities", ".2f"),
        "labels may be probabilities",
        lambda nn, y, x, t: _near(y, _entropy(nn, x, t)),
    ),
    Snippet(
        "004*",
        "MultiLabelSoftMarginLoss",
        BINARY,
        lambda nn, x, t: nn.MultiLabelSoftMarginLoss()(x[None], t[None]),
        _loss("MultiLabelSoftMarginLoss", ".4f"),
        "of a logit vector",
        lambda nn, y, x, t: _near(y, nn.BCEWithLogitsLoss()(x, t)),
    ),
    Snippet(
        "001",
        "Sigmoid",
        {"tensor": [-0.8475, 0.2985]},
        lambda nn, x: nn.Sigmoid()(x),
        _vector(4),
        "tensor([0.2999, 0.5741])",
    ),
    Snippet(
        "001",
        "Tanh",
        {"tensor": [0.2847, -0.8942]},
        lambda nn, x: nn.Tanh()(x),
        _vector(4),
        "tensor([ 0.2772, -0.7135])",
    ),
    Snippet(
        "001",
        "ReLU",
        {"tensor": [-0.7185, 2.8861, -0.1147, -0.5199]},
        lambda nn, x: nn.ReLU()(x),
        _vector(4),
        "tensor([0.0000, 2.8861, 0.0000, 0.0000])",
    ),
    Snippet(
        "003",
        "Sigmoid",
        {"z": [0.6478, 0.7225, -0.3415]},
        lambda nn, x: nn.Sigmoid()(x),
        _vector(4),
        "tensor([0.6565, 0.6732, 0.4154])",
    ),
    Snippet(
        "003",
        "BCELoss",
        {"output": [0.4154], "y": [0.0]},
        lambda nn, x, t: nn.BCELoss()(x, t),
        lambda value: f"{value.item():.4f}",
        "0.5368",
    ),
)


def values(snippet: Snippet, device: str = "cpu") -> Values:
    """Runs a snippet on torch.nn, on fusedact.nn and in float64."""
    inputs, exact = (snippet.tensors(device, dtype) for dtype in (torch.float32, torch.float64))
    stock, ours = snippet.value(torch.nn, *inputs), snippet.value(fused, *inputs)
    truth = snippet.value(torch.nn, *exact)
    stated = None
    if snippet.stated:
        stated = all(snippet.is_as_stated(nn, y, *inputs) for nn, y in ((torch.nn, stock), (fused, ours)))
    return Values(snippet, stock, ours, truth, snippet.printed(stock), snippet.printed(ours), stated)
