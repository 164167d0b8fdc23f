"""Forwards that a trace would get wrong: each gives stock's answers, again and again, fused or named in the report."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from samples.networks import alike, kinds, reasons
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fusedact

pytestmark = pytest.mark.usefixtures("triton_backend")


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.drop, self.other = nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4)
        self.calls, self.power, self.last, self.many = 0, 2.0, None, [1.0, 2.0]

    def one(self, x):
        return self.act(self.fc(x))


class Counting(Owner):
    def forward(self, x):
        self.calls += 1
        return self.one(x) * self.calls


class Keeping(Owner):
    def forward(self, x):
        self.last = self.fc(x)
        return self.act(self.last)


class Branching(Owner):
    def forward(self, x):
        return self.one(x) if x.sum() > 0 else x


class OnShape(Owner):
    def forward(self, x):
        return self.one(x) if x.shape[0] > 2 else x


class OnMode(Owner):
    def forward(self, x):
        return self.one(x) if self.training else self.fc(x)


class OnAttribute(Owner):
    def forward(self, x):
        return self.one(x) if self.power == 2.0 else x


class ReadingAnAttribute(Owner):
    def forward(self, x):
        return self.one(x) * self.power


class ReadingAList(Owner):
    def forward(self, x):
        return self.one(x) * self.many[0]


class OnChance(Owner):
    def forward(self, x):
        return self.one(x) if random.random() < 0.5 else x


class Noisy(Owner):
    def forward(self, x):
        return self.one(x) + torch.rand(4, device=x.device)


class NoisyByItself(Owner):
    def forward(self, x):
        return self.one(x) + torch.rand(())  # of a number, any device takes a CPU's


class OnGradMode(Owner):
    def forward(self, x):
        return self.one(x) if torch.is_grad_enabled() else x


class ReadingAGlobal(Owner):
    def forward(self, x):
        return self.one(x) * SETTINGS["scale"]


class InPlace(Owner):
    def forward(self, x):
        z = self.fc(x)
        y = self.act(z)
        z.add_(1)
        return y + z


class UsedTwice(Owner):
    def forward(self, x):
        z = self.fc(x)
        return self.act(z) + z


class Writing(Owner):
    def forward(self, x):
        z = self.fc(x)
        z += 1
        return self.act(z)


class WritingThroughAView(Owner):
    def forward(self, x):
        z = self.fc(x)
        z[:, 0] = 0.0
        return self.act(z)


class WeightInForward(Owner):
    def forward(self, x):
        return self.one(x) @ self.fc.weight


class Constant(Owner):
    def forward(self, x):
        return self.one(x) + torch.ones(4, device=x.device, dtype=x.dtype)


class Handed(Owner):
    def forward(self, x):
        return {"y": self.one(x), "kept": [x, None]}["y"]


class NoGrad(Owner):
    def forward(self, x):
        with torch.no_grad():
            y = self.one(x)
        return y + self.fc(x)


class Casting(Owner):
    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.one(x)


class InTheMiddle(Owner):
    def forward(self, x):
        y = self.fc(x)
        assert y.dim() == 2
        return self.drop(self.act(y))


class Checked(Owner):
    def forward(self, x):
        if x.shape[-1] != self.fc.in_features:
            raise ValueError("another width")
        return self.one(x)


class InsideALoop(Owner):
    def forward(self, x):
        for _ in range(int(self.power)):
            x = self.one(x)
        return x


class DetachedBetween(Owner):
    def forward(self, x):
        return self.act(self.fc(x).detach())


class Inherited(Constant):
    def forward(self, x):
        return super().forward(x) * self.power


class OfTheChildsForward(Owner):
    def forward(self, x):
        return self.act(self.fc.forward(x))


class WritingInItsPlace(Owner):
    def forward(self, x):
        z = self.fc(x)
        F.relu_(z)
        return z


class ActivatedInItsPlace(Owner):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        z = self.fc(x)
        return self.act(z), z


class ActivatedInPart(Owner):
    def forward(self, x):
        z = self.fc(x)
        torch.relu_(z[:, :2])
        return self.act(z - 1)


class WritingToAnAlias(Owner):
    def forward(self, x):
        z = self.fc(x)
        z.view(-1).mul_(-1)
        return self.act(z)


class GatedInPlace(Owner):
    def __init__(self):
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x):
        y = self.act(self.fc(x))
        y *= self.other(x)
        return y


class GatedWithAWriteBetween(Owner):
    def __init__(self):
        super().__init__()
        self.fc.requires_grad_(False)

    def forward(self, x):
        x = x * 1
        y = self.act(self.fc(x))
        x.mul_(2)
        return y * self.other(x)


class GatedByItself(Owner):
    def forward(self, x):
        z = self.fc(x)
        return self.act(z) * z


class GatedByHalves(Owner):
    def forward(self, x):
        gate, up = self.fc(x).chunk(2, dim=-1)
        return self.act(gate) * up


class BetweenEqualBounds(Owner):
    def forward(self, x):
        return F.hardtanh(self.fc(x), 0.0, 0.0)


class WritingToItsInput(Owner):
    def forward(self, x):
        return self.one(x.mul_(2))


class WithoutGradients(Owner):
    @torch.no_grad()
    def forward(self, x):
        return self.one(x)


class WithAProperty(Owner):
    @property
    def factor(self):
        return self.power if self.training else self.many[0]

    def forward(self, x):
        return self.one(x) * self.factor


class ByName(Owner):
    def forward(self, x):
        for name in ("fc", "act", "other"):
            x = getattr(self, name)(x)
        return x


class OwnCall(Owner):
    def forward(self, x):
        return self.one(x)

    def __call__(self, x):
        return super().__call__(x) + 1


class OwnAttributes(Owner):
    def forward(self, x):
        return self.one(x) * self.missing

    def __getattr__(self, name):
        return self.power if name == "missing" else super().__getattr__(name)


class Several(Owner):
    def forward(self, x):
        return {"y": self.one(x), "pair": (x, self.many[0])}


class Optional(Owner):
    def forward(self, x, mask=None):
        y = self.one(x)
        return y if mask is None else y * mask


class Checkpointed(Owner):
    def forward(self, x):
        return checkpoint(self.one, x, use_reentrant=False)


class Local(Owner):
    def forward(self, x):
        def inner(z):
            return self.act(z) * self.power

        return inner(self.fc(x))


class Cast(Owner):
    def forward(self, x):
        return self.act(self.fc(x.to(self.fc.weight.dtype))).to(torch.float64)


SETTINGS = {"scale": 1.0}
OWNERS = [Inherited, *Owner.__subclasses__()]


def wherever(model, x):
    """What it gives, and its parameters' gradients, in both modes, the second after all that it reads has changed."""
    random.seed(0)
    torch.manual_seed(5)
    results = []
    for training in (True, False):
        model.train(training)
        for given in (x, -x):
            tensors = [t for t in tree_leaves(model(given.clone())) if isinstance(t, torch.Tensor)]
            results += tensors
            if tensors[0].requires_grad:
                wanted = [p for p in model.parameters() if p.requires_grad]
                results += torch.autograd.grad(tensors[0].sum(), wanted, allow_unused=True)
        with torch.no_grad():
            results += tree_leaves(model(x[:2].clone()))
        model.power, model.many[0], SETTINGS["scale"] = 3.0, 4.0, 2.0
    return [*results, model.calls, model.last]


@pytest.mark.parametrize("owner", OWNERS)
def test_answers_as_stock(owner, device, monkeypatch):
    stock, x = owner().to(device), torch.randn(3, 4, device=device)
    ours = fusedact.fuse(copy.deepcopy(stock))
    assert ours.calls == 0 and ours.last is None
    results = []
    for model in (ours, stock):
        monkeypatch.setitem(SETTINGS, "scale", 1.0)
        results.append(wherever(model, x))
    alike(*results)


@pytest.mark.parametrize(
    "owner", [Counting, Keeping, Branching, OnShape, OnChance, NoisyByItself, InPlace, UsedTwice, Casting]
)
def test_the_report_says_why(owner):
    model = fusedact.fuse(owner())
    assert not kinds(model) and all(reasons(model))


@pytest.mark.parametrize(
    "owner", [ByName, GatedByHalves, Inherited, Local, OnMode, Optional, ReadingAnAttribute, WithAProperty]
)
def test_these_are_fused(owner):
    assert kinds(fusedact.fuse(owner()))


def test_an_argument_with_a_default(device):
    stock, x = Optional().to(device), torch.randn(3, 4, device=device)
    ours, mask = fusedact.fuse(copy.deepcopy(stock)), torch.tensor([0.0, 1.0, 0.0, 2.0], device=device)
    alike([ours(x), ours(x, mask), ours(x, mask=None)], [stock(x), stock(x, mask), stock(x, mask=None)])


def test_the_report_says_with_which_defaults():
    """A call that gives another one runs the original forward."""
    labels = [site.label for site in fusedact.report(fusedact.fuse(Optional())).sites if site.fused]
    assert labels and all("with the default of mask" in label for label in labels)
