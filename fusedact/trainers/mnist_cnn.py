"""S7: MNIST by the convolutional network of tutorial 001, trained as 002's are."""

from types import ModuleType

import torch
from torch import Tensor

from fusedact.trainers.loop import Evaluation, Settings
from fusedact.trainers.mnist_softmax import MnistSoftmax

SIZE = (1, 28, 28)  # of an image
FEATURES = 10 * 8 * 8  # that the convolutions leave of it


class MyModel(torch.nn.Module):
    """Seven convolutions, the last never called, a max-pool and four linear layers, ReLU after each but the last.

    Input (N, 1, 28, 28) -> logits (N, 10); ValueError for images of another size, which the tutorial's
    `view(-1, 640)` would take for another number of images. Parameters, their names and draws are the tutorial's.
    """

    def __init__(self, nn: ModuleType) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 7, padding=3)
        self.conv2 = nn.Conv2d(10, 50, 7, padding=3)
        self.conv3 = nn.Conv2d(50, 120, 7, padding=3)
        self.conv4 = nn.Conv2d(120, 100, 5)
        self.conv5 = nn.Conv2d(100, 20, 5)
        self.conv6 = nn.Conv2d(20, 10, 5)
        self.conv7 = nn.Conv2d(10, 10, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(FEATURES, 120)
        self.fc2 = nn.Linear(120, 360)
        self.fc3 = nn.Linear(360, 50)
        self.fc4 = nn.Linear(50, 10)

        relu = nn.ReLU()
        convolutions = (self.conv1, self.conv2, self.conv3, self.conv4, self.conv5, self.conv6)
        linears = (self.fc1, self.fc2, self.fc3)
        # A tuple's modules are no children: the layers keep the tutorial's names, and each stands beside its ReLU.
        self._parts = (
            nn.Sequential(*(module for layer in convolutions for module in (layer, relu)), self.pool),
            nn.Sequential(*(module for layer in linears for module in (layer, relu)), self.fc4),
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 4) or x.shape[-3:] != SIZE:
            raise ValueError(f"expected images (N, {', '.join(map(str, SIZE))}), received {tuple(x.shape)}")
        features, classifier = self._parts
        return classifier(features(x).reshape(-1, FEATURES))


class MnistCnn(MnistSoftmax):
    """`MyModel` by cross-entropy and Adam on `data.mnist`, 42.6 GFLOP a step; the tutorial trains nothing."""

    name = "mnist-cnn"
    defaults = Settings(epochs=1, batch_size=16, lr=1e-3, seed=777)

    def network(self, nn: ModuleType) -> torch.nn.Module:
        return MyModel(nn)

    def build(self, nn: ModuleType) -> None:
        super().build(nn)
        self.x, self.x_test = self.x.view(-1, *SIZE), self.x_test.view(-1, *SIZE)

    @torch.no_grad()
    def evaluate(self) -> Evaluation:
        self.model.eval()
        predictions = torch.cat([self.model(images).argmax(1) for images in self.x_test.split(100)])
        accuracy = (predictions == self.y_test).float().mean().item()
        return Evaluation(accuracy, f"Learning finished\nAccuracy: {accuracy}")
