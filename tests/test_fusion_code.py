"""What the code of a forward may do that no graph shows: fused, it answers as stock does, before and after a change."""

import contextlib
import copy
import dataclasses
import functools
import warnings

import pytest
import torch
import torch.nn.functional as F
from samples.networks import alike
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedact

SETTINGS = {"scale": 1.0}
SCALE = 2.0
ACT = nn.LeakyReLU(0.1)
PARTIAL = functools.partial(F.leaky_relu, negative_slope=0.3)


class Settings:
    scale = 1.0


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.fc2 = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)
        self.head, self.kept, self.scale, self.call = None, [], 1.0, functools.partial(F.leaky_relu, negative_slope=0.1)

    def one(self, x):
        return self.act(self.fc(x))

    def post(self, x):
        return x


def helper(x):
    return x * SETTINGS["scale"]


def as_told(x):
    return isinstance(x, torch.Tensor)


class WithoutAutocast(Owner):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.one(x)


class DecoratedByTorch(Owner):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x):
        return self.one(x)


class Checkpointed(Owner):
    def forward(self, x):
        return checkpoint(self.one, x, use_reentrant=False)


class Seeded(Owner):
    def forward(self, x):
        torch.manual_seed(7)
        return F.dropout(self.one(x), 0.5)


class Trying(Owner):
    def forward(self, x):
        try:
            scale = float(x.max())
        except Exception:
            scale = 1.0
        return self.one(x) / scale


class Suppressing(Owner):
    def forward(self, x):
        scale = 1.0
        with contextlib.suppress(Exception):
            scale = float(x.max())
        return self.one(x) * scale


class AskingInAHelper(Owner):
    def forward(self, x):
        return self.one(x) if as_told(x) else x


class AskingInside(Owner):
    def forward(self, x):
        return self.one(next(iter([t for t in (x,) if isinstance(t, torch.Tensor)])))


class AskingTypes(Owner):
    def forward(self, x):
        y = self.one(x)
        y = y.logits if hasattr(y, "logits") else y
        return y * getattr(y, "scale", 2.0) if type(y) is torch.Tensor and torch.is_tensor(x) else x


class TextOfAShape(Owner):
    def forward(self, x):
        return self.one(x) if str(tuple(x.shape)) == "(3, 4)" else x


class ToTheWeightsDevice(Owner):
    def forward(self, x):
        return self.one(x.to(self.fc.weight.device, self.fc.weight.dtype))


class Keeping(Owner):
    def forward(self, x):
        y = self.one(x)
        self.kept.append(y.sum())
        return y


class OfAChild(Owner):
    def forward(self, x):
        y = self.one(x)
        return y if self.head is None else self.head(y)


class OnAChildsClass(Owner):
    def forward(self, x):
        return self.one(x) if isinstance(self.fc2, nn.Linear) else x


class TheSameTwice(Owner):
    def __init__(self):
        super().__init__()
        self.fc2 = self.fc

    def forward(self, x):
        y = self.one(x)
        return y if self.fc is self.fc2 else self.act(self.fc2(y))


class CallingAMethod(Owner):
    def forward(self, x):
        return self.post(self.one(x))


class CallingAPartial(Owner):
    def forward(self, x):
        return self.call(self.fc(x))


class ReadingAClass(Owner):
    def forward(self, x):
        return self.one(x) * Settings.scale


class ReadingANumber(Owner):
    def forward(self, x):
        return self.one(x) * SCALE


class ReadingInAHelper(Owner):
    def forward(self, x):
        return helper(self.one(x))


class Parent(Owner):
    def forward(self, x):
        return self.one(x) * SETTINGS["scale"]


class ReadingInAParent(Parent):
    def forward(self, x):
        return super().forward(x) + 1


class CallingAGlobalModule(Owner):
    def forward(self, x):
        return ACT(self.fc(x))


class CallingAGlobalPartial(Owner):
    def forward(self, x):
        return PARTIAL(self.fc(x))


class HalfOfTheInput(Owner):
    def forward(self, x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate, inplace=True) * up


class Importing(Owner):
    def forward(self, x):
        from torch.nn.functional import relu

        return relu(self.fc(x))


@dataclasses.dataclass
class Answer:
    y: torch.Tensor

    def __post_init__(self):
        self.y = 2 * self.y


class MakingADataclass(Owner):
    def forward(self, x):
        return Answer(self.one(x)).y


class WithANamedSoftmax(Owner):
    def forward(self, x, softmax):
        return torch.softmax(input=self.one(x) * softmax, dim=1)


class AskingForNone(Owner):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        y, weights = self.attention(x, x, x, need_weights=False)
        return self.one(y) if weights is None else y


class Middle(Owner):
    def forward(self, x):
        return self.one(x)


class Left(Middle):
    def forward(self, x):
        return super().forward(x) + 1


class Right(Middle):
    def forward(self, x):
        return super().forward(x) * SETTINGS["scale"]


class Diamond(Left, Right):
    pass


class CollectingInADefault(Owner):
    def forward(self, x, *, seen=[]):  # noqa: B006
        seen.append(1)
        return self.one(x) + 0 * len(seen)


class WritingAHalf(Owner):
    """Which autograd forbids; it is run without."""

    def forward(self, x):
        halves = self.fc(x).chunk(2, -1)
        gate = halves[0]
        a = F.silu(gate)
        halves[0].add_(1.0)
        return a * halves[1]


class Matching(Owner):
    def forward(self, x):
        match self.fc(x):
            case (a, b):
                return a + b
            case y:
                return self.act(y)


class Warning(Owner):
    def forward(self, x):
        warnings.warn("slow", stacklevel=1)
        return self.one(x)


class SumOfALoop(Owner):
    def forward(self, x):
        return sum(self.act(layer(x)) for layer in (self.fc, self.fc2))


class AfterARest(Owner):
    def forward(self, x, *rest, flag=None):
        return self.one(x) * (1 + len(rest))


def set_item(name, value):
    return lambda model, patch: patch.setitem(SETTINGS, name, value)


def set_global(name, value):
    return lambda model, patch: patch.setitem(globals(), name, value)


def set_attribute(name, value):
    return lambda model, patch: setattr(model, name, value())


def nothing(model, patch):
    pass


CASES = {
    WithoutAutocast: nothing,
    DecoratedByTorch: nothing,
    Checkpointed: nothing,
    Seeded: nothing,
    Trying: nothing,
    Suppressing: nothing,
    AskingInAHelper: nothing,
    AskingInside: nothing,
    AskingTypes: nothing,
    TextOfAShape: nothing,
    ToTheWeightsDevice: nothing,
    Keeping: lambda model, patch: model.kept.clear(),
    OfAChild: set_attribute("head", nn.Tanh),
    OnAChildsClass: set_attribute("fc2", nn.Tanh),
    TheSameTwice: set_attribute("fc2", lambda: nn.Linear(4, 4, False)),
    CallingAMethod: set_attribute("post", lambda: torch.sin),
    CallingAPartial: lambda model, patch: model.call.keywords.update(negative_slope=0.9),
    ReadingAClass: lambda model, patch: patch.setattr(Settings, "scale", 3.0),
    ReadingANumber: set_global("SCALE", 5.0),
    ReadingInAHelper: set_item("scale", 3.0),
    ReadingInAParent: set_item("scale", 3.0),
    CallingAGlobalModule: set_global("ACT", nn.LeakyReLU(0.7)),
    CallingAGlobalPartial: set_global("PARTIAL", functools.partial(F.leaky_relu, negative_slope=0.7)),
    HalfOfTheInput: nothing,
    Importing: nothing,
    MakingADataclass: nothing,
    AskingForNone: nothing,
    Diamond: set_item("scale", 3.0),
    CollectingInADefault: nothing,
    WritingAHalf: nothing,
    Matching: nothing,
    Warning: nothing,
    SumOfALoop: nothing,
    AfterARest: nothing,
}
FUSED = (SumOfALoop, AfterARest, ToTheWeightsDevice, OfAChild, OnAChildsClass, TheSameTwice, CallingAMethod, CallingAPartial, ReadingAClass, ReadingANumber, AskingInAHelper, AskingInside)  # fmt: skip  # noqa: E501


def outcome(model, x):
    """The result and what the call did to its input and its module."""
    torch.manual_seed(0)
    x = x.clone()
    low = isinstance(model, WithoutAutocast | DecoratedByTorch)
    with torch.autocast("cpu", torch.bfloat16, low), torch.set_grad_enabled(not isinstance(model, WritingAHalf)):
        y = model(x, None) if isinstance(model, AfterARest) else model(x)
    return [y, x, torch.tensor(float(len(model.kept)))]


@pytest.mark.filterwarnings("ignore:slow")
@pytest.mark.parametrize("owner", CASES, ids=lambda owner: owner.__name__)
def test_as_stock_before_and_after_a_change(owner, triton_backend, monkeypatch):
    stock, x = owner(), torch.randn(3, 4)
    ours = fusedact.fuse(copy.deepcopy(stock))
    assert ours.kept == []
    alike(outcome(ours, x), outcome(stock, x))
    torch.manual_seed(1)
    CASES[owner](ours, monkeypatch)
    torch.manual_seed(1)
    CASES[owner](stock, monkeypatch)
    alike(outcome(ours, x), outcome(stock, x))


@pytest.mark.parametrize("owner", CASES, ids=lambda owner: owner.__name__)
def test_what_is_fused_of_these(owner):
    fused = any(site.fused for site in fusedact.report(fusedact.fuse(owner())).sites)
    assert fused == (owner in FUSED)


def test_checkpointing_inside_saves_as_stock_does(triton_backend):
    saved, x = [], torch.randn(3, 4, requires_grad=True)
    for model in (Checkpointed(), fusedact.fuse(Checkpointed())):
        saved.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved[-1].append(t.shape) or t, lambda t: t):
            model(x)
    assert saved[0] == saved[1]


def test_arguments_named_as_functions(triton_backend):
    stock, x = WithANamedSoftmax(), torch.randn(3, 4)
    ours = fusedact.fuse(copy.deepcopy(stock))
    alike([ours(x, x)], [stock(x, x)])


@pytest.mark.parametrize("make", [lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(1, 4)), lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))])  # fmt: skip  # noqa: E501
def test_modules_that_torch_made_are_left(make, triton_backend):
    model, x = make(), torch.randn(3, 4)
    before = model(x)
    torch.testing.assert_close(fusedact.fuse(model)(x), before)


def test_the_dtype_may_change_after(triton_backend):
    stock, x = ToTheWeightsDevice(), torch.randn(3, 4)
    ours = fusedact.fuse(copy.deepcopy(stock))
    alike([ours.double()(x.double())], [stock.double()(x.double())])
