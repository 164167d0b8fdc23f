"""S1: is a row of three numbers true? Logistic regression, from tutorials 000 and 003 (batch 4 there)."""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, random_split

from fusedact import data
from fusedact.trainers.loop import Epoch, Evaluation, Settings, Trainer


class Binary(Trainer):
    """3 → 1 Sigmoid, BCE and SGD on the rows of `data.binary`, split 80/10/10.

    With 1,000 rows the default seed draws weights that saturate: every output is 0, its gradient falls under
    BCELoss's clamp, and the cost stays at 13.6 to 13.7. From `start=(0.01, 0.02, -0.01, 0.1)` it learns. So does BCE
    on the logits, `logits=True`, from those weights too: its gradient is σ(z) - y, however far z is. On raw inputs at
    this lr both end where every answer is no; on `standardize=True` ones both find the plane that divides best.
    """

    name = "binary"
    defaults = Settings(epochs=10_000, batch_size=64, lr=1e-4, seed=4)
    report_every = 1000

    def build(self, nn: ModuleType) -> None:
        x, y = data.binary(path=self.settings.data)
        if len(x) < 10:
            raise ValueError(f"expected at least 10 rows, to split 80/10/10, received {len(x)}")
        self.source = f"{len(x):,} rows of three numbers"
        train_size, validation_size = int(len(x) * 0.8), int(len(x) * 0.1)
        train, validation, _ = random_split(
            TensorDataset(x, y),
            [train_size, validation_size, len(x) - train_size - validation_size],
            torch.manual_seed(self.settings.seed),  # the global generator: it decides the weights too
        )
        device = self.settings.device
        self.x, self.y = x[train.indices].to(device), y[train.indices].to(device)
        self.x_validation, self.y_validation = (
            x[validation.indices].to(device),
            y[validation.indices].to(device),
        )

        if self.settings.standardize:
            mean, deviation = self.x.mean(0), self.x.std(0)
            self.x, self.x_validation = (self.x - mean) / deviation, (self.x_validation - mean) / deviation

        logits = self.settings.logits
        self.model = nn.Sequential(nn.Linear(3, 1), *([] if logits else [nn.Sigmoid()])).to(device)
        self.criterion = nn.BCEWithLogitsLoss() if logits else nn.BCELoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.settings.lr)

    def report(self, epoch: Epoch) -> str | None:
        if epoch.number % 1000 == 0:
            parameters = list(self.model.parameters())
            return f"Epoch : {epoch.number:4d}, Model : {parameters}, Cost : {epoch.cost:.3f}"
        return None

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self.model.eval()
        lines = []
        visited = self.visited(len(self.x_validation)).to(self.x.device)
        for batch in self.x_validation[visited[: len(visited) // 4 * 4]].split(4):
            outputs = self._outputs(batch)
            lines += [f"{outputs}", f"{outputs >= 0.5}", "-------------------"]
        right = (self._outputs(self.x_validation) >= 0.5) == self.y_validation.bool()
        return Evaluation(right.float().mean().item(), "\n".join(lines))

    def _outputs(self, x: Tensor) -> Tensor:
        return self.model(x).sigmoid() if self.settings.logits else self.model(x)
