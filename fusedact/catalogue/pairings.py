"""Which output goes with which loss, for each kind of task, and the usual mistakes."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def _as_they_are(targets: Tensor) -> Tensor:
    return targets


@dataclass(frozen=True)
class Pairing:
    """The last layer's output function, none for logits, with a loss, both by their class in torch.nn.

    encode: the targets as this loss is given them, of which `targets` tells. launches: of kernels from the logits to
    the cost, and back; None for a wrong pairing.
    """

    output: str
    loss: str
    why: str
    right: bool = False
    targets: str = ""
    encode: Callable[[Tensor], Tensor] = _as_they_are
    launches: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.output or 'logits'} + {self.loss}" + (f", {self.targets}" if self.targets else "")

    def layers(self, nn: ModuleType) -> list[torch.nn.Module]:
        """The output function, if there is one."""
        return [getattr(nn, self.output)(*() if self.output == "Sigmoid" else (1,))] if self.output else []


@dataclass(frozen=True)
class Task:
    """outputs: of the model. exclusive: exactly one class is true of a row; else each is, or is not, by itself."""

    name: str
    outputs: int
    exclusive: bool
    targets: str  # dtype and shape
    decision: str
    pairings: tuple[Pairing, ...]


TASKS = (
    Task(
        "binary",
        outputs=1,
        exclusive=False,
        targets="float32 (N, 1)",
        decision="p ≥ 0.5",
        pairings=(
            Pairing(
                "",
                "BCEWithLogitsLoss",
                "The sigmoid is inside the loss; the gradient of a logit is sigmoid(z) - y.",
                right=True,
                launches=(1, 1),
            ),
            Pairing(
                "Sigmoid", "BCELoss", "The same cost from the probability, in two steps.", right=True, launches=(2, 2)
            ),
            Pairing(
                "Sigmoid",
                "BCEWithLogitsLoss",
                "The loss takes a sigmoid of the probability: no row costs less than ln(1 + 1/e) = 0.313 where y is 1, "
                "ln 2 = 0.693 where it is 0. Where the chance is under 0.5 the best output is 0, above 0.73 it is 1: "
                "too sure, and from 0.5 to 0.62 the answer is no where yes is likelier.",
            ),
            Pairing(
                "Softmax",
                "BCELoss",
                "Softmax of one output is 1 whatever the logit: no gradient, and BCELoss's 100 for each row of 0.",
            ),
            Pairing("", "BCELoss", "A logit is no probability: it can be below 0 and above 1."),
            Pairing("Sigmoid", "BCELoss", "Labels 0 and 1 must be floating too.", targets="int64", encode=Tensor.long),
            Pairing(
                "", "BCEWithLogitsLoss", "Targets have the outputs' shape, (N, 1).", targets="(N)", encode=Tensor.ravel
            ),
        ),
    ),
    Task(
        "multi-label",
        outputs=4,
        exclusive=False,
        targets="float32 (N, C)",
        decision="each p ≥ 0.5",
        pairings=(
            Pairing(
                "",
                "MultiLabelSoftMarginLoss",
                "BCE on each label's logit, a mean over labels, then over rows.",
                right=True,
                launches=(1, 1),
            ),
            Pairing("Sigmoid", "BCELoss", "The same cost from each probability.", right=True, launches=(2, 2)),
            Pairing("", "BCEWithLogitsLoss", "The same mean at once.", right=True, launches=(1, 1)),
            Pairing("Sigmoid", "MultiLabelSoftMarginLoss", "A second sigmoid, as in the binary task."),
            Pairing(
                "Softmax",
                "BCELoss",
                "Probabilities that sum to 1: two labels cannot both be likely, nor all of them unlikely.",
            ),
            Pairing(
                "",
                "CrossEntropyLoss",
                "It takes the labels for class probabilities, which sum to 1; here they sum to 0 to 4. It ranks a "
                "row's labels and is blind to a shift of all its logits, so a row without labels teaches nothing.",
            ),
        ),
    ),
    Task(
        "multi-class",
        outputs=3,
        exclusive=True,
        targets="int64 (N)",
        decision="argmax",
        pairings=(
            Pairing(
                "",
                "CrossEntropyLoss",
                "The softmax is inside the loss; the gradient is softmax(z) - onehot(y).",
                right=True,
                launches=(1, 1),
            ),
            Pairing("LogSoftmax", "NLLLoss", "The same cost in two steps.", right=True, launches=(2, 2)),
            Pairing(
                "",
                "CrossEntropyLoss",
                "Class probabilities: the same cost from C numbers a row where one would do.",
                right=True,
                targets="float32 (N, C)",
                encode=lambda y: F.one_hot(y, 3).float(),
                launches=(1, 1),
            ),
            Pairing(
                "LogSoftmax",
                "CrossEntropyLoss",
                "Log-softmax of log-probabilities is themselves: a needless step.",
                right=True,
                launches=(2, 2),
            ),
            Pairing(
                "Softmax",
                "CrossEntropyLoss",
                "The loss takes a softmax of probabilities: no row costs less than ln(1 + 2/e) = 0.551. It ranks the "
                "classes well, slower at first; but what suits it best is not the chances: it ends too sure.",
            ),
            Pairing(
                "Softmax",
                "NLLLoss",
                "Without the log the cost is -p, at least -1, the expected share of right answers: it ranks well and "
                "drives the likeliest class to 1, too sure.",
            ),
            Pairing(
                "",
                "NLLLoss",
                "The cost is the negated logit itself: each row raises its own class's, lowers no other, without end.",
            ),
            Pairing(
                "",
                "CrossEntropyLoss",
                "Whole numbers of the logits' shape are no class indices, and no probabilities.",
                targets="one-hot int64",
                encode=lambda y: F.one_hot(y, 3),
            ),
            Pairing(
                "",
                "CrossEntropyLoss",
                "Class indices are int64 or uint8.",
                targets="float32 (N)",
                encode=Tensor.float,
            ),
        ),
    ),
)
