"""S4: a forward and a backward pass worked by hand, from tutorial 003, in float64 against known answers."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from fusedact.trainers.loop import Epoch, Evaluation, Settings, Trainer

PARAMETERS = ("W1", "W2", "W3", "W4", "b1", "b2", "W5", "W6", "b3")

# To the digits a run of the tutorial's program in float64 was recorded to.
ANSWERS = {
    "z1": 0.6478,
    "z2": 0.7225,
    "sigma1": 0.6565145266,
    "sigma2": 0.6731572964,
    "z3": -0.3415492971,
    "output": 0.4154331834,
    "loss": 0.5368841906,
    "dW1": -0.016160,
    "dW2": -0.016160,
    "dW3": 0.010319,
    "dW4": 0.010319,
    "db1": -0.016160,
    "db2": 0.010319,
    "dW5": 0.272738,
    "dW6": 0.279652,
    "db3": 0.415433,
    "W1": 0.451360,
    "W2": 0.370660,
    "W3": 0.184781,
    "W4": 0.473181,
    "b1": -0.125740,
    "b2": 0.033581,
    "W5": -0.445238,
    "W6": -0.166752,
    "b3": -0.719733,
}


class Worked(Trainer):
    """2 → 2 → 1 Sigmoids with given weights, x = [1, 1], y = 0, BCE, one step of SGD at lr 1.

    `values` holds z, σ, output and loss of the last step, its gradients, and the weights it left.
    """

    name = "worked"
    defaults = Settings(
        epochs=1,
        batch_size=1,
        lr=1.0,
        seed=0,
        start=(0.4352, 0.3545, 0.1951, 0.4835, -0.1419, 0.0439, -0.1725, 0.1129, -0.3043),
    )

    values: dict[str, float]

    def build(self, nn: ModuleType) -> None:
        self.source = "x = [1, 1], y = 0"
        self.x = torch.ones(1, 2, dtype=torch.float64, device=self.settings.device)
        self.y = torch.zeros(1, 1, dtype=torch.float64, device=self.settings.device)
        torch.manual_seed(self.settings.seed)
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid()).to(self.x)
        self.criterion = nn.BCELoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.settings.lr)

    def slices(self, every: int | None = None) -> Iterator[list[Epoch]]:
        """An epoch, which is a step, at a time."""
        before = self._forward()
        gradients = self._gradients()
        for epochs in super().slices(1):
            weights = torch.cat([p.detach().flatten() for p in self.model.parameters()]).tolist()
            self.values = before | gradients | dict(zip(PARAMETERS, weights, strict=True))
            before, gradients = self._forward(), self._gradients()
            yield epochs

    def row(self, x: Any, y: Any) -> tuple[Any, Any]:
        return torch.tensor(x), torch.tensor(y)

    def report(self, epoch: Epoch) -> str | None:
        """The first step's values. ArithmeticError where one is not the answer to the tutorial's settings."""
        if epoch.number > 1:
            return None
        lines = [f"{name:6} {value:13.10f}" for name, value in self.values.items()]
        if (self.settings.start, self.settings.lr) == (self.defaults.start, self.defaults.lr):
            for name, answer in ANSWERS.items():
                if abs(self.values[name] - answer) > 1e-6:
                    raise ArithmeticError(f"{name} is {self.values[name]:.10f}, expected {answer}")
            lines.append("All are the known answers, to 6 digits.")
        return "\n".join(lines)

    def evaluate(self) -> Evaluation:
        after = self._forward()
        right = float(after["output"] < 0.5)
        return Evaluation(right, f"output {after['output']:.6f}, loss {after['loss']:.6f} after the step")

    def _gradients(self) -> dict[str, float]:
        loss = self.criterion(self.model(self.x), self.y)
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        values = torch.cat([gradient.flatten() for gradient in gradients]).tolist()
        return dict(zip((f"d{name}" for name in PARAMETERS), values, strict=True))

    @torch.no_grad()
    def _forward(self) -> dict[str, float]:
        linear1, sigmoid, linear2, _ = self.model.children()
        z = linear1(self.x)
        hidden = sigmoid(z)
        output = self.model(self.x)
        z1, z2 = z[0].tolist()
        sigma1, sigma2 = hidden[0].tolist()
        return {
            "z1": z1,
            "z2": z2,
            "sigma1": sigma1,
            "sigma2": sigma2,
            "z3": linear2(hidden).item(),
            "output": output.item(),
            "loss": self.criterion(output, self.y).item(),
        }
