"""fuse(model, loss): what the model gives in training is what the returned loss takes; in eval nothing changes."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedact
from fusedact.fusion.cuts import Hidden


class Head(nn.Module):
    """A classifier that ends as the tutorials' do, in a function."""

    def __init__(self, dim=-1):
        super().__init__()
        self.hidden, self.out, self.dim = nn.Linear(5, 7), nn.Linear(7, 4), dim

    def forward(self, x):
        return F.log_softmax(self.out(F.relu(self.hidden(x))), dim=self.dim)


def mlp(*end):
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), *end)


def nested():
    return nn.Sequential(mlp(), mlp_out())


def mlp_out():
    return nn.Sequential(nn.Linear(7, 4), nn.LogSoftmax(dim=1))


def labels():
    return torch.tensor([0, 3, 1, 2, 3, -100])


JOINED = {
    "Linear + CrossEntropyLoss": (lambda: mlp(nn.Linear(7, 4)), lambda: nn.CrossEntropyLoss(label_smoothing=0.1)),
    "weighted": (lambda: mlp(nn.Linear(7, 4, False)), lambda: nn.CrossEntropyLoss(torch.rand(4), reduction="sum")),
    "other ignore_index": (lambda: mlp(nn.Linear(7, 4)), lambda: nn.CrossEntropyLoss(ignore_index=3, reduction="none")),
    "LogSoftmax + NLLLoss": (lambda: mlp(nn.Linear(7, 4), nn.Tanh(), nn.LogSoftmax(1)), nn.NLLLoss),
    "Linear + LogSoftmax + NLLLoss": (nested, lambda: nn.NLLLoss(torch.rand(4))),
    "log_softmax, a function": (Head, nn.NLLLoss),
}  # fmt: skip
RETURNS = {"LogSoftmax + NLLLoss": torch.Tensor}


def labels_for(loss):
    target = labels()
    return target if loss.ignore_index == -100 else target.clamp(min=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", JOINED)
def test_a_joined_loss_is_stocks(case, backend, as_accurate_as_torch):
    model, loss = (make() for make in JOINED[case])
    x, target = torch.randn(6, 5), labels_for(loss)
    stock, truth = (copy.deepcopy((model, loss)) for _ in range(2))
    truth = [part.double() for part in truth]
    before = dict(model.state_dict()), vars(loss).copy()
    fused, fused_loss = fusedact.fuse(model, loss)
    assert fused is model and fused_loss is loss and isinstance(loss, stock[1].__class__)
    with fusedact.use_backend(backend):
        for training in (True, False):
            values = []
            for (net, criterion), rows in (((fused, fused_loss), x), (stock, x), (truth, x.double())):
                value = criterion(net.train(training)(rows), target)
                values.append((value, *torch.autograd.grad(value.sum(), list(net.parameters()))))
            for ours, theirs, true in zip(*values, strict=True):
                as_accurate_as_torch(ours, theirs, true)
        fused.train()
        assert type(fused(x)) is RETURNS.get(case, Hidden)
        fused.eval()
        assert torch.equal(fusedact.unfuse(fused)(x), stock[0].eval()(x))
    assert vars(fusedact.unfuse(loss)) == before[1] and type(loss) is type(stock[1])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before[0].values(), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sigmoid_and_bce_join_only_where_asked(backend, as_accurate_as_torch):
    x, target = 3 * torch.randn(6, 5), torch.tensor([[0.0], [1], [1], [0], [1], [0]])
    model, loss = fusedact.fuse(nn.Sequential(nn.Linear(5, 1), nn.Sigmoid()), nn.BCELoss())
    assert "allow_different" in fusedact.report(model).text(400)
    stock = copy.deepcopy(fusedact.unfuse(model))
    model, loss = fusedact.fuse(model, fusedact.unfuse(loss), allow_different=True)
    assert "in training the model returns logits" in fusedact.report(model).text(400)
    with fusedact.use_backend(backend):
        logits, on_logits = stock[0](x), F.binary_cross_entropy_with_logits
        truth = on_logits(logits.double(), target.double())
        as_accurate_as_torch(loss(model(x), target), on_logits(logits, target), truth)
        assert loss(model(1e4 * x), target) > 1e3  # where torch's is clamped at 100
        model.eval()
        torch.testing.assert_close(loss(model(x), target), nn.BCELoss()(stock(x), target))
        with pytest.raises(RuntimeError, match="copy of one joined"):
            copy.deepcopy(loss)(model(x), target)
        fusedact.unfuse(model.train())
        torch.testing.assert_close(loss(model(x), target), nn.BCELoss()(stock(x), target))


APART = {
    "the model ends in Tanh": (lambda: mlp(nn.Linear(7, 4), nn.Tanh()), nn.CrossEntropyLoss),
    "the model ends in LogSoftmax": (lambda: mlp(nn.Linear(7, 4), nn.LogSoftmax(1)), nn.CrossEntropyLoss),
    "the model ends in a linear layer": (lambda: mlp(nn.Linear(7, 4)), nn.NLLLoss),
    "along dim 0, not 1": (lambda: Head(0), nn.NLLLoss),
    "no last layer joins with it": (lambda: mlp(nn.Linear(7, 4)), nn.BCEWithLogitsLoss),
    "more than one value": (lambda: Two(), nn.CrossEntropyLoss),
    "does more than to hand on": (lambda: Scaled(), nn.CrossEntropyLoss),
    "is called more than once": (lambda: Twice(), nn.CrossEntropyLoss),
}


class Two(Head):
    def forward(self, x):
        return self.out(self.hidden(x)), x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.loud = mlp(nn.Linear(7, 4)), False

    def forward(self, x):
        if self.loud:
            x = 2 * x
        return self.body(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 5))

    def forward(self, x):
        return self.body(self.body(x))


@pytest.mark.parametrize("why", APART)
def test_what_cannot_be_joined_says_why_and_stays(why):
    model, loss = (make() for make in APART[why])
    x = torch.randn(4, 5)
    before = model(x)
    fused, fused_loss = fusedact.fuse(model, loss)
    assert why in fusedact.report(fused).text(400)
    torch.testing.assert_close(fused(x), before)
    assert isinstance(fused_loss, type(loss))


def test_a_function_and_a_foreign_loss():
    model = mlp(nn.Linear(7, 4))
    assert fusedact.fuse(model, F.cross_entropy)[1] is fusedact.functional.cross_entropy
    loss = nn.MSELoss()
    assert fusedact.fuse(model, loss)[1] is loss and type(loss) is nn.MSELoss
    assert "no loss of torch's" in fusedact.report(model).text(400)


def test_a_head_of_images_returns_logits(triton_backend):
    """A hidden state of more than two dims cannot go into the loss as it is."""
    model, loss = fusedact.fuse(mlp(nn.Linear(7, 4)), nn.CrossEntropyLoss())
    stock = copy.deepcopy(model)
    x, target = torch.randn(2, 3, 5), torch.randint(0, 4, (2, 3))
    ours = loss(model(x).transpose(1, 2), target)
    torch.testing.assert_close(ours, F.cross_entropy(fusedact.unfuse(stock)(x).transpose(1, 2), target))


def test_a_model_that_was_changed_since_is_refused():
    model, _ = fusedact.fuse(Head(), nn.NLLLoss())
    model.dim = 0
    with pytest.raises(RuntimeError, match="unfuse"):
        model(torch.randn(3, 5))
    assert model.eval()(torch.randn(3, 5)).shape == (3, 4)
    model, _ = fusedact.fuse(mlp(nn.Linear(7, 4)), nn.CrossEntropyLoss())
    model.append(nn.ReLU())
    assert "no longer ends" in fusedact.report(model).text(400)
    assert copy.deepcopy(model).eval()(torch.ones(2, 5)).min() >= 0


@pytest.mark.parametrize("end", [(), (nn.Linear(7, 4),), (nn.Linear(7, 4), nn.Tanh())], ids=["act", "linear", "tanh"])
def test_a_log_softmax_along_the_last_of_three_dims(end):
    """The loss's classes are then along dim 1, where the model's user brings them, or not."""
    model, loss = mlp(*end, nn.LogSoftmax(-1)), nn.NLLLoss()
    x, target = torch.randn(2, 3, 5), torch.randint(0, 3, (2, 3))
    before = model(x)
    model, loss = fusedact.fuse(model, loss)
    for ours, stock in ((model(x), before), (model(x).transpose(1, 2), before.transpose(1, 2))):
        labels = target[:, :1].expand(ours.shape[0], ours.shape[2])
        torch.testing.assert_close(loss(ours, labels), F.nll_loss(stock, labels))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.__setitem__(3, nn.Identity()),
        lambda model: setattr(model[3], "dim", 0),
        lambda model: model[3].register_forward_hook(lambda *seen: 2 * seen[2]),
    ],
    ids=["replaced", "dim", "hook"],
)
def test_a_softmax_that_changes_after_is_refused(change):
    model, _ = fusedact.fuse(mlp(nn.Linear(7, 4), nn.LogSoftmax(1)), nn.NLLLoss())
    change(model)
    with pytest.raises(RuntimeError, match="unfuse"):
        model(torch.randn(3, 5))


def test_another_loss_takes_the_place_of_one():
    model, _ = fusedact.fuse(mlp(nn.Linear(7, 4)), nn.CrossEntropyLoss())
    model, loss = fusedact.fuse(model, nn.MSELoss())
    assert loss(model(torch.ones(2, 5)), torch.ones(2, 4)).isfinite()


def test_a_copy_and_a_pickle_are_joined_too():
    model, loss = fusedact.fuse(nested(), nn.NLLLoss())
    x, target = torch.randn(6, 5), labels()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other(x)) is Hidden
        torch.testing.assert_close(pickle.loads(pickle.dumps(loss))(other(x), target), loss(model(x), target))
    assert isinstance(copy.deepcopy(fusedact.fuse(mlp(), nn.BCEWithLogitsLoss())[1]), nn.BCEWithLogitsLoss)


def test_a_loss_alone_is_pickled_as_it_is():
    _, loss = fusedact.fuse(mlp(nn.Tanh()), nn.NLLLoss())
    assert type(pickle.loads(pickle.dumps(loss))) is type(loss) is not nn.NLLLoss
