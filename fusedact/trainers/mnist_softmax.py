"""S5: MNIST by softmax regression, from tutorial 002."""

from random import Random
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusedact import data
from fusedact.trainers.loop import Epoch, Evaluation, Settings, Trainer


class MnistSoftmax(Trainer):
    """784 → 10 with N(0, 1) weights, cross-entropy and Adam on `data.mnist`."""

    name = "mnist-softmax"
    defaults = Settings(epochs=15, batch_size=100, lr=1e-3, seed=777)
    cost_dtype = torch.float64  # the tutorial adds up Python's numbers
    sample_seed: ClassVar[int] = 777

    def network(self, nn: ModuleType) -> torch.nn.Module:
        linear = nn.Linear(784, 10)
        nn.init.normal_(linear.weight)
        return linear

    def build(self, nn: ModuleType) -> None:
        mnist = data.mnist(self.settings.data, download=self.settings.download)
        self.source = mnist.source
        device = self.settings.device
        rows = self.settings.rows
        self.x, self.y = _pixels(mnist.train_images[:rows]).to(device) / 255, mnist.train_labels[:rows].to(device)
        self.x_test, self.y_test = _pixels(mnist.test_images).to(device), mnist.test_labels.to(device)
        if not self.settings.raw_pixels:
            self.x_test /= 255

        torch.manual_seed(self.settings.seed)
        self.model = self.network(nn).to(device)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.settings.lr)

    def row(self, x: Any, y: Any) -> tuple[Any, Any]:
        """An image as torchvision's ToTensor leaves it, without the way through PIL."""
        return torch.tensor(x), int(y)

    def report(self, epoch: Epoch) -> str:
        return f"Epoch: {epoch.number:04d} cost = {epoch.cost:.9f}"

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self.model.eval()
        predictions = self.model(self.x_test).argmax(1)
        accuracy = (predictions == self.y_test).float().mean().item()
        r = Random(self.sample_seed).randint(0, len(self.y_test) - 1)
        lines = [
            "Learning finished",
            f"Accuracy: {accuracy}",
            f"Label:  {self.y_test[r].item()}",
            f"Prediction:  {predictions[r].item()}",
        ]
        return Evaluation(accuracy, "\n".join(lines))


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1).float()  # (rows, 784)
