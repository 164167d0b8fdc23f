"""S6: MNIST by a ReLU network, from tutorial 002."""

from types import ModuleType

import torch

from fusedact.trainers.mnist_softmax import MnistSoftmax


class MnistMlp(MnistSoftmax):
    """784 → 256 → 256 → 10 with one ReLU object at both places, trained as the softmax regression is."""

    name = "mnist-mlp"
    sample_seed = 111

    def network(self, nn: ModuleType) -> torch.nn.Module:
        linear1 = nn.Linear(784, 256)
        linear2 = nn.Linear(256, 256)
        linear3 = nn.Linear(256, 10)
        relu = nn.ReLU()
        for linear in (linear1, linear2, linear3):
            nn.init.normal_(linear.weight)
        return nn.Sequential(linear1, relu, linear2, relu, linear3)
