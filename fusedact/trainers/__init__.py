"""The tutorials' programs, each on stock or fused layers.

trainer = TRAINERS["xor"](LAYERS["fused"], Xor.defaults)
for epoch in trainer.epochs():
    print(epoch.number, epoch.cost)
print(trainer.evaluate().text)
"""

import torch.nn

import fusedact.nn
from fusedact.trainers.binary import Binary as Binary
from fusedact.trainers.checkpoint import load_checkpoint as load_checkpoint
from fusedact.trainers.checkpoint import save_checkpoint as save_checkpoint
from fusedact.trainers.loop import Epoch as Epoch
from fusedact.trainers.loop import Evaluation as Evaluation
from fusedact.trainers.loop import Settings as Settings
from fusedact.trainers.loop import Trainer as Trainer
from fusedact.trainers.mnist_cnn import MnistCnn as MnistCnn
from fusedact.trainers.mnist_mlp import MnistMlp as MnistMlp
from fusedact.trainers.mnist_softmax import MnistSoftmax as MnistSoftmax
from fusedact.trainers.perceptron import Perceptron as Perceptron
from fusedact.trainers.worked import Worked as Worked
from fusedact.trainers.xor import Xor as Xor

LAYERS = {"stock": torch.nn, "fused": fusedact.nn}

TRAINERS: dict[str, type[Trainer]] = {
    trainer.name: trainer for trainer in (Binary, Perceptron, Xor, Worked, MnistSoftmax, MnistMlp, MnistCnn)
}
