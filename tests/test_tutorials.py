"""The tutorials' own programs, with torch.nn read as fusedact.nn and no other change.

Each is run twice, as written and with the names read anew: the same costs on the fallback, and the stated number
of fused calls a forward through the kernels. Only how long they train is set by the test.
"""

import sys
import types
from ast import literal_eval
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
import torch

import fusedact
from fusedact import data

TABLE = """
import torch
import pandas as pd
from torch import nn
from torch import optim
from torch.utils.data import Dataset, DataLoader, random_split


class CustomDataset(Dataset):
    def __init__(self, file_path):
        df = pd.read_csv(file_path)
        self.x = [df.iloc[:, i].values for i in range(COLUMNS)]
        self.y = df.iloc[:, COLUMNS].values
        self.length = len(df)

    def __getitem__(self, index):
        x = torch.FloatTensor([x[index] for x in self.x])
        y = torch.FloatTensor([self.y[index]])
        return x, y

    def __len__(self):
        return self.length
"""
LOOP = """
device = "cuda" if torch.cuda.is_available() else "cpu"
model = CustomModel().to(device)
criterion = nn.BCELoss().to(device)
optimizer = optim.SGD(model.parameters(), lr=LR)

for epoch in range(EPOCHS):
    cost = 0.0

    for x, y in train_dataloader:
        x = x.to(device)
        y = y.to(device)

        output = model(x)
        loss = criterion(output, y)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        cost += loss

    cost = cost / len(train_dataloader)
    print(f"{cost:.9f}")
"""
S1 = (
    TABLE
    + """
class CustomModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(
            nn.Linear(3, 1),
            nn.Sigmoid()
        )

    def forward(self, x):
        x = self.layer(x)
        return x


dataset = CustomDataset(CSV)
dataset_size = len(dataset)
train_size = int(dataset_size * 0.8)
validation_size = int(dataset_size * 0.1)
test_size = dataset_size - train_size - validation_size
train_dataset, validation_dataset, test_dataset = random_split(
    dataset, [train_size, validation_size, test_size], torch.manual_seed(4)
)
train_dataloader = DataLoader(train_dataset, batch_size=64, shuffle=True, drop_last=True)
"""
    + LOOP
)
S3 = (
    TABLE
    + """
class CustomModel(nn.Module):
    def __init__(self):
        super().__init__()

        self.layer1 = nn.Sequential(
            nn.Linear(2, 2),
            nn.Sigmoid()
        )
        self.layer2 = nn.Sequential(
            nn.Linear(2, 1),
            nn.Sigmoid()
        )

    def forward(self, x):
        x = self.layer1(x)
        x = self.layer2(x)
        return x


torch.manual_seed(3)
train_dataset = CustomDataset(CSV)
train_dataloader = DataLoader(train_dataset, batch_size=64, shuffle=True, drop_last=True)
"""
    + LOOP
)
MNIST = """
import torch
import torchvision.datasets as dsets
import torchvision.transforms as transforms
import random

device = 'cuda' if torch.cuda.is_available() else 'cpu'
random.seed(777)
torch.manual_seed(777)

mnist_train = dsets.MNIST(root='MNIST_data/', train=True, transform=transforms.ToTensor(), download=True)
data_loader = torch.utils.data.DataLoader(dataset=mnist_train, batch_size=100, shuffle=True, drop_last=True)
"""
MNIST_LOOP = """
criterion = torch.nn.CrossEntropyLoss().to(device)
optimizer = torch.optim.Adam(model.parameters(), lr=0.001)

total_batch = len(data_loader)
for epoch in range(EPOCHS):
    avg_cost = 0

    for X, Y in data_loader:
        X = X.view(-1, 28 * 28).to(device)
        Y = Y.to(device)

        optimizer.zero_grad()
        hypothesis = model(X)
        cost = criterion(hypothesis, Y)
        cost.backward()
        optimizer.step()

        avg_cost += cost.item()

    avg_cost /= total_batch
    print('{:.9f}'.format(avg_cost))
"""
S5 = (
    MNIST
    + """
linear = torch.nn.Linear(784, 10, bias=True).to(device)
torch.nn.init.normal_(linear.weight)
model = linear
"""
    + MNIST_LOOP
)
S6 = (
    MNIST
    + """
linear1 = torch.nn.Linear(784, 256, bias=True)
linear2 = torch.nn.Linear(256, 256, bias=True)
linear3 = torch.nn.Linear(256, 10, bias=True)
relu = torch.nn.ReLU()

torch.nn.init.normal_(linear1.weight)
torch.nn.init.normal_(linear2.weight)
torch.nn.init.normal_(linear3.weight)

model = torch.nn.Sequential(linear1, relu, linear2, relu, linear3).to(device)
"""
    + MNIST_LOOP
)
S7 = """
import torch
import torch.nn as nn
import torch.nn.functional as F


class MyModel(nn.Module):

    def __init__(self):
        super(MyModel, self).__init__()
        self.conv1 = nn.Conv2d(1, 10, 7, padding = 3)
        self.conv2 = nn.Conv2d(10, 50, 7, padding = 3)
        self.conv3 = nn.Conv2d(50, 120, 7, padding = 3)
        self.conv4 = nn.Conv2d(120, 100, 5)
        self.conv5 = nn.Conv2d(100, 20, 5)
        self.conv6 = nn.Conv2d(20, 10, 5)
        self.conv7 = nn.Conv2d(10, 10, 3)
        self.pool = nn.MaxPool2d(2,2)
        self.fc1 = nn.Linear(10 * 8 * 8, 120)
        self.fc2 = nn.Linear(120, 360)
        self.fc3 = nn.Linear(360, 50)
        self.fc4 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x)) # 28 28
        x = F.relu(self.conv2(x)) # 28 28
        x = F.relu(self.conv3(x)) # 28 28
        x = F.relu(self.conv4(x)) # 24 24
        x = F.relu(self.conv5(x)) # 20 20
        x = self.pool(F.relu(self.conv6(x))) # 8 8
        x = x.view(-1, 10 * 8 * 8)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        x = self.fc4(x)

        return x


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = MyModel().to(device)
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
images = torch.rand(2, 1, 28, 28, device=device)
labels = torch.tensor([3, 7], device=device)
for epoch in range(EPOCHS):
    optimizer.zero_grad()
    cost = criterion(model(images), labels)
    cost.backward()
    optimizer.step()
    print(f"{cost:.9f}")
"""
# program, its settings, the shape of one input row, and the fused calls of one forward with its loss
PROGRAMS = {
    "S1": (S1, {"COLUMNS": 3, "LR": 0.0001}, (3,), ["linear_act"]),
    "S3": (S3, {"COLUMNS": 2, "LR": 0.01}, (2,), ["linear_act", "linear_act"]),
    "S5": (S5, {}, (784,), ["cross_entropy"]),
    "S6": (S6, {}, (784,), ["linear_chain", "cross_entropy"]),
    "S7": (S7, {}, (1, 28, 28), ["cross_entropy"]),
}


class Frame:
    """As much of a pandas table as the tutorials use."""

    def __init__(self, path):
        self.table = np.loadtxt(path, delimiter=",", skiprows=1, converters=lambda cell: float(literal_eval(cell)))
        self.iloc = self

    def __getitem__(self, key):
        column = types.SimpleNamespace(values=self.table[key])
        return column

    def __len__(self):
        return len(self.table)


class Images(torch.utils.data.Dataset):
    """The first images of the embedded subset, as torchvision's MNIST with ToTensor gives them."""

    def __init__(self, **options):
        mnist = data.mnist()
        self.images, self.labels = mnist.train_images[:300], mnist.train_labels[:300]

    def __getitem__(self, index):
        return self.images[index][None].float() / 255, int(self.labels[index])

    def __len__(self):
        return len(self.images)


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(name, fused, epochs) -> the program's namespace and the costs that it printed."""
    pandas = types.ModuleType("pandas")
    pandas.read_csv = Frame
    torchvision, datasets, transforms = map(
        types.ModuleType, ("torchvision", "torchvision.datasets", "torchvision.transforms")
    )
    datasets.MNIST, transforms.ToTensor = Images, lambda: None
    torchvision.datasets, torchvision.transforms = datasets, transforms
    for module in (pandas, torchvision, datasets, transforms):
        module.__spec__ = ModuleSpec(module.__name__, None)  # torch asks for it where it loads more of itself
        monkeypatch.setitem(sys.modules, module.__name__, module)
    tables = {"S1": data.binary, "S3": data.xor}

    def execute(name, fused, epochs, rows=1000):
        source, settings, *_ = PROGRAMS[name]
        if fused:
            source = "import fusedact\n" + source.replace("torch.nn.functional", "fusedact.functional").replace(
                "torch.nn", "fusedact.nn"
            ).replace("from torch import nn", "from fusedact import nn")
        namespace = {"EPOCHS": epochs, "CSV": str(tmp_path / f"{name}-{rows}.csv"), **settings}
        if name in tables:
            tables[name](rows=rows, path=namespace["CSV"])
        exec(compile(source, f"<{name}>", "exec"), namespace)
        return namespace, [float(line) for line in capsys.readouterr().out.split()]

    return execute


@pytest.mark.parametrize("name", PROGRAMS)
def test_trains_with_stocks_costs(name, run):
    epochs = 5 if name in ("S1", "S3") else 2
    (_, ours), (_, stock) = run(name, True, epochs), run(name, False, epochs)
    assert len(ours) == epochs and ours == pytest.approx(stock, rel=1e-3 if torch.cuda.is_available() else 0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] if name == "S6" else []) for name in PROGRAMS]
)
def test_fused_calls_of_a_forward(name, run, monkeypatch, triton_backend):
    """Through the kernels: stock's costs to 1e-4, and how many calls of one forward and loss are fused."""
    namespace, ours = run(name, True, 1, rows=200)
    with fusedact.use_backend("torch"):
        _, stock = run(name, False, 1, rows=200)
    assert ours == pytest.approx(stock, rel=1e-4)
    calls = []
    for op in ("linear_act", "linear_chain", "cross_entropy", "bce_with_logits"):
        original = getattr(fusedact.autograd, op)
        monkeypatch.setattr(
            fusedact.autograd, op, lambda *args, op=op, original=original: calls.append(op) or original(*args)
        )
    *_, shape, expected = PROGRAMS[name]
    output = namespace["model"](torch.rand(2, *shape, device=namespace["device"]))
    target = torch.rand_like(output) if name in ("S1", "S3") else output.argmax(1)
    namespace["criterion"](output, target)
    assert calls == expected
