"""S2: XOR with a single layer, which cannot learn it, from tutorial 003."""

from types import ModuleType

import torch

from fusedact import data
from fusedact.trainers.loop import Epoch, Evaluation, Settings, Trainer

ROWS = [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]


class Perceptron(Trainer):
    """2 → 1 Sigmoid, BCE and SGD on the rows of `data.xor`; cost stays near ln 2, outputs near 0.5."""

    name = "perceptron"
    defaults = Settings(epochs=10_000, batch_size=64, lr=0.01, seed=1)
    report_every = 1000

    def network(self, nn: ModuleType) -> torch.nn.Module:
        return nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())

    def build(self, nn: ModuleType) -> None:
        x, y = data.xor(path=self.settings.data)
        self.source = f"{len(x):,} random rows of the XOR table"
        self.x, self.y = x.to(self.settings.device), y.to(self.settings.device)

        torch.manual_seed(self.settings.seed)
        self.model = self.network(nn).to(self.settings.device)
        self.criterion = nn.BCELoss()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.settings.lr)

    def report(self, epoch: Epoch) -> str | None:
        return f"Epoch : {epoch.number:4d}, Cost : {epoch.cost:.3f}" if epoch.number % 1000 == 0 else None

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self.model.eval()
        rows = torch.tensor(ROWS, device=self.x.device)
        outputs = self.model(rows)
        right = (outputs >= 0.5) == (rows.sum(1, keepdim=True) == 1)
        return Evaluation(right.float().mean().item(), f"{outputs}\n{outputs >= 0.5}")
