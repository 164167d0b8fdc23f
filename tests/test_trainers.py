"""The trainers against the tutorials' own programs, against what those print, and on fused layers."""

import os
import pickle
import random
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset, random_split

import fusedact
from fusedact import data
from fusedact.trainers import LAYERS, TRAINERS, load_checkpoint, save_checkpoint
from fusedact.trainers.worked import ANSWERS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def mnist_folder():
    folder = Path(os.environ.get("FUSEDACT_DATA", Path(__file__).parents[2] / "shared/data/mnist"))
    if not folder.is_dir():
        pytest.skip(f"the full MNIST is neither in FUSEDACT_DATA nor in {folder}")
    return folder


def make(name, layers="stock", **options):
    trainer = TRAINERS[name]
    return trainer(LAYERS[layers], replace(trainer.defaults, **options))


def costs(trainer):
    return [epoch.cost for epoch in trainer.epochs()]


def step_costs(trainer, steps):
    batches = trainer.visited(len(trainer.x)).to(trainer.x.device).split(trainer.settings.batch_size)
    return [trainer.step(trainer.x[rows], trainer.y[rows]).item() for rows in batches[:steps]]


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x.numpy(), y.numpy()

    def __getitem__(self, index):
        return torch.FloatTensor(self.x[index]), torch.FloatTensor(self.y[index])

    def __len__(self):
        return len(self.x)


def tutorial_000(epochs):
    dataset = Rows(*data.binary())
    train_size, validation_size = int(len(dataset) * 0.8), int(len(dataset) * 0.1)
    test_size = len(dataset) - train_size - validation_size
    train_dataset, validation_dataset, _ = random_split(
        dataset, [train_size, validation_size, test_size], torch.manual_seed(4)
    )
    train_dataloader = DataLoader(train_dataset, batch_size=64, shuffle=True, drop_last=True)
    validation_dataloader = DataLoader(validation_dataset, batch_size=4, shuffle=True, drop_last=True)
    model = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    costs = tutorial_sgd(train_dataloader, model, 0.0001, epochs)
    printed = []
    with torch.no_grad():
        for x, _ in validation_dataloader:
            outputs = model(x)
            printed += [f"{outputs}", f"{outputs >= torch.FloatTensor([0.5])}", "-------------------"]
    return costs, model, "\n".join(printed)


def tutorial_003(epochs):
    train_dataloader = DataLoader(Rows(*data.xor()), batch_size=64, shuffle=True, drop_last=True)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 1), nn.Sigmoid())
    costs = tutorial_sgd(train_dataloader, model, 0.1, epochs)
    with torch.no_grad():
        outputs = model(torch.FloatTensor([[0, 0], [0, 1], [1, 0], [1, 1]]))
    return costs, model, f"{outputs}\n{outputs >= 0.5}"


def tutorial_sgd(train_dataloader, model, lr, epochs):
    criterion = nn.BCELoss()
    optimizer = optim.SGD(model.parameters(), lr=lr)
    costs = []
    for _ in range(epochs):
        cost = 0.0
        for x, y in train_dataloader:
            output = model(x)
            loss = criterion(output, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cost += loss
        costs.append((cost / len(train_dataloader)).item())
    return costs


class Images(Dataset):
    """torchvision's MNIST with ToTensor."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __getitem__(self, index):
        return self.images[index][None].to(torch.float32).div(255), int(self.labels[index])

    def __len__(self):
        return len(self.images)


def softmax_regression():
    linear = torch.nn.Linear(784, 10, bias=True)
    torch.nn.init.normal_(linear.weight)
    return linear


def relu_network():
    linear1 = torch.nn.Linear(784, 256, bias=True)
    linear2 = torch.nn.Linear(256, 256, bias=True)
    linear3 = torch.nn.Linear(256, 10, bias=True)
    relu = torch.nn.ReLU()
    torch.nn.init.normal_(linear1.weight)
    torch.nn.init.normal_(linear2.weight)
    torch.nn.init.normal_(linear3.weight)
    return torch.nn.Sequential(linear1, relu, linear2, relu, linear3)


def tutorial_002(network, sample_seed, epochs):
    random.seed(sample_seed)
    torch.manual_seed(777)
    mnist = data.mnist()
    mnist_train = Images(mnist.train_images, mnist.train_labels)
    data_loader = DataLoader(dataset=mnist_train, batch_size=100, shuffle=True, drop_last=True)
    model = network()
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    total_batch = len(data_loader)
    costs = []
    for _ in range(epochs):
        avg_cost = 0
        for X, Y in data_loader:
            X = X.view(-1, 28 * 28)
            optimizer.zero_grad()
            hypothesis = model(X)
            cost = criterion(hypothesis, Y)
            cost.backward()
            optimizer.step()
            avg_cost += cost.item()
        costs.append(avg_cost / total_batch)
    with torch.no_grad():
        X_test = mnist.test_images.view(-1, 28 * 28).float()
        prediction = model(X_test)
        accuracy = (torch.argmax(prediction, 1) == mnist.test_labels).float().mean()
        r = random.randint(0, len(X_test) - 1)
        single_prediction = model(X_test[r : r + 1])
    printed = [
        "Learning finished",
        f"Accuracy: {accuracy.item()}",
        f"Label:  {mnist.test_labels[r].item()}",
        f"Prediction:  {torch.argmax(single_prediction, 1).item()}",
    ]
    return costs, model, "\n".join(printed)


@pytest.mark.parametrize(
    ("name", "tutorial", "options"),
    [
        ("binary", tutorial_000, {"epochs": 5}),
        ("xor", tutorial_003, {"epochs": 5}),
        ("mnist-softmax", partial(tutorial_002, softmax_regression, 777), {"epochs": 2, "raw_pixels": True}),
        ("mnist-mlp", partial(tutorial_002, relu_network, 111), {"epochs": 2, "raw_pixels": True}),
    ],
)
@pytest.mark.parametrize("engine", ["loop", "tutorial"])
def test_stock_run_is_the_tutorials_bit_for_bit(name, tutorial, options, engine):
    trainer = make(name, engine=engine, **options)
    ours = costs(trainer)
    theirs, model, printed = tutorial(options["epochs"])
    assert ours == theirs
    for parameter, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
    assert trainer.evaluate().text == printed


@pytest.mark.parametrize("engine", ["loop", "tutorial", "steps"])
@pytest.mark.parametrize("layers", LAYERS)
def test_worked_pass_has_its_known_answers(layers, engine):
    trainer = make("worked", layers, engine=engine)
    [epoch] = trainer.epochs()
    assert {name: trainer.values[name] for name in ANSWERS} == pytest.approx(ANSWERS, rel=0, abs=1e-6)
    assert "known answers" in trainer.report(epoch)
    assert "output 0.244535, loss 0.280421" in trainer.evaluate().text


def test_worked_pass_refuses_a_wrong_answer():
    trainer = make("worked")
    [epoch] = trainer.epochs()
    trainer.values["dW5"] += 1e-5
    with pytest.raises(ArithmeticError, match=r"dW5 is 0\.27274\d+, expected 0\.272738"):
        trainer.report(epoch)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("binary", {"0.weight": [-0.4518, -0.3668, 0.1015], "0.bias": [0.2057]}),
        ("mnist-mlp", {"4.weight": [-0.6645, 0.6646, 0.7159]}),
    ],
)
@pytest.mark.parametrize("layers", LAYERS)
def test_initial_weights(name, expected, layers):
    state = make(name, layers).model.state_dict()
    for parameter, values in expected.items():
        assert state[parameter].flatten()[: len(values)].tolist() == pytest.approx(values, abs=5e-5)


def test_binary_is_stuck_from_its_seed():
    trainer = make("binary", epochs=1000)
    *_, last = trainer.epochs()
    assert last.cost == pytest.approx(13.623, abs=0.01)
    assert "Epoch : 1000, Model : [Parameter" in trainer.report(last)
    assert trainer.model(trainer.x[trainer.y[:, 0] == 1]).max() < 1e-6
    assert "True" not in trainer.evaluate().text


def test_binary_learns_from_small_weights():
    first, *_, last = costs(make("binary", epochs=300, start=(0.01, 0.02, -0.01, 0.1)))
    assert 0.6 < last < 0.68 < first < 1


def test_perceptron_fails_at_xor():
    trainer = make("perceptron", epochs=800, lr=0.1)
    assert costs(trainer)[-1] == pytest.approx(0.690, abs=0.003)
    outputs = trainer.model(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])).flatten()
    assert outputs.tolist() == pytest.approx([0.443, 0.461, 0.531, 0.549], abs=0.005)
    assert trainer.evaluate().accuracy == 0.5


def test_hidden_layer_learns_xor():
    trainer = make("xor")
    assert costs(trainer)[-1] < 0.01
    outputs = trainer.model(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])).flatten()
    assert outputs.tolist() == pytest.approx([0.003, 0.996, 0.997, 0.006], abs=0.001)
    assert trainer.evaluate().accuracy == 1


@pytest.mark.parametrize(
    ("name", "expected", "tolerance"),
    [("mnist-softmax", [5.728, 1.563], 1e-3), ("mnist-mlp", [128.771, 36.023], 0.01)],
)
def test_costs_on_the_full_mnist(mnist_folder, name, expected, tolerance):
    assert costs(make(name, epochs=2, data=mnist_folder)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", TRAINERS)
def test_fused_costs_are_stocks(name):
    few = {"rows": 16, "epochs": 1} if name == "mnist-cnn" else {"epochs": 1}
    options = {"epochs": 5} if name in ("binary", "perceptron", "xor", "worked") else few
    with fusedact.use_backend("torch"):
        stock, fused = (costs(make(name, layers, engine="loop", **options)) for layers in LAYERS)
    assert fused == pytest.approx(stock, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "engine"),
    [
        ("binary", {"epochs": 100}, "steps"),
        ("binary", {"epochs": 100, "start": (0.01, 0.02, -0.01, 0.1)}, "steps"),
        ("perceptron", {"epochs": 20}, "steps"),
        ("xor", {"epochs": 100}, "steps"),
        ("worked", {"epochs": 3}, "steps"),
        ("mnist-softmax", {"epochs": 2}, "steps"),
        ("mnist-mlp", {"epochs": 1}, "steps"),
    ],
)
def test_fitted_curves_are_stocks(name, options, engine):
    fitted, stock = make(name, **options), make(name, engine="loop", **options)
    assert fitted.engine == engine
    assert costs(fitted) == pytest.approx(costs(stock), rel=1e-4)
    for ours, theirs in zip(fitted.model.parameters(), stock.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_fused_mlp_steps_as_stock():
    with fusedact.use_backend("torch"):
        stock, fused = step_costs(make("mnist-mlp"), 20), step_costs(make("mnist-mlp", "fused"), 20)
    assert fused == pytest.approx(stock, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("binary", {}),
        ("perceptron", {}),
        ("xor", {}),
        ("worked", {}),
        ("mnist-softmax", {"batch_size": 8}),
        pytest.param("mnist-mlp", {"batch_size": 8}, marks=pytest.mark.exhaustive),
    ],
)
def test_kernels_step_as_stock(name, options, device, launches):
    stock = step_costs(make(name, device=device, **options), 3)
    with fusedact.use_backend("triton"):
        fused = step_costs(make(name, "fused", device=device, **options), 3)
    assert fused == pytest.approx(stock, rel=1e-4)
    assert launches.count > 0


def test_interleaved_runs_draw_as_if_alone():
    alone = costs(make("xor", epochs=4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    together = list(zip(make("xor", epochs=4).epochs(), make("xor", epochs=4).epochs(), strict=True))
    assert [epoch.cost for epoch, _ in together] == [epoch.cost for _, epoch in together] == alone
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 801}, "batch size 801 exceeds the 800 training rows"),
        ({"start": (1.0, 2.0, 3.0)}, "starts from 4 numbers, received 3"),
        ({"lr": -1.0}, "Invalid learning rate"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        make("binary", **options)


def test_few_rows_cannot_be_split(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("x,y,z,pass\n" + "1,2,3,False\n" * 9)
    with pytest.raises(ValueError, match="at least 10 rows"):
        make("binary", data=path)


def test_checkpoint_comes_back(tmp_path):
    state = make("mnist-softmax").model.state_dict() | {"step": torch.tensor(3), "empty": torch.empty(0, 2)}
    save_checkpoint(tmp_path / "a.pt", state)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-1],
        lambda whole: b"not a checkpoint",
        lambda whole: pickle.dumps(Malicious(), protocol=2),
        lambda whole: saved({"state_dict": {"w": 1}, "sha256": ""}),
        lambda whole: saved([1, 2]),
        lambda whole: saved(Malicious()),
    ],
    ids=["empty", "half", "one byte short", "text", "pickle", "no tensor", "list", "malicious"],
)
@pytest.mark.contract(64, 85)
def test_damaged_checkpoint_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    save_checkpoint(path, make("xor").model.state_dict())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="not a whole checkpoint") as fault:
        load_checkpoint(path)
    assert str(path) in str(fault.value)
    assert not Path("unpickled").exists()


def saved(content):
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
