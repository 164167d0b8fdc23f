"""The check of a fused model against float64: what it finds, what it lets pass, and that it leaves no trace."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedact.fusion.checking import compare


@dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    tokens: torch.Tensor


class Network(nn.Module):
    """Two layers, an embedding and a dropout between; `fused` is what it computes outside `stock`."""

    def __init__(self, fused=F.gelu, form=tuple):
        super().__init__()
        self.embedding = nn.Embedding(7, 16)
        self.first = nn.Linear(16, 24)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(24)
        self.unused = nn.Linear(2, 2)
        self.second = nn.Linear(24, 5)
        self.active, self.form = fused, form

    def forward(self, x, tokens):
        hidden = self.norm(self.dropout(self.active(self.first(x + self.embedding(tokens)))))
        return self.form(self.second(hidden), (hidden,), tokens)


def as_tuple(logits, hidden, tokens):
    return logits, hidden, tokens


def as_dict(logits, hidden, tokens):
    return {"logits": logits, "hidden": hidden, "tokens": tokens}


@contextmanager
def stock(model):
    fused, model.active = model.active, F.gelu
    yield
    model.active = fused


def inputs(dtype=torch.float32):
    return torch.randn(40, 16, dtype=dtype), torch.randint(7, (40,))


def tanh_formula(x):
    return F.gelu(x, approximate="tanh")


def erf_formula(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx, dy):
        return dy * torch.sigmoid(1.702 * ctx.saved_tensors[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [as_tuple, as_dict, Output])
def test_the_same_function_passes(form, dtype):
    model = Network(erf_formula if dtype != torch.bfloat16 else F.gelu, form).to(dtype)
    compare(model, stock, inputs(dtype))
    x, tokens = inputs(dtype)
    compare(model, stock, {"tokens": tokens, "x": x})


@pytest.mark.parametrize(
    ("form", "path"), [(as_tuple, r"output\[0\]"), (as_dict, r"output\['logits'\]"), (Output, r"output\.logits")]
)
def test_another_function_is_named_by_the_first_output(form, path):
    with pytest.raises(RuntimeError, match=rf"{path} of the fused model errs from float64 by .* stock's by \d"):
        compare(Network(tanh_formula, form), stock, inputs())


def test_a_wrong_gradient_is_named():
    with pytest.raises(RuntimeError, match=r"the gradient of inputs\[0\] of the fused model errs .* by norm"):
        compare(Network(WrongBackward.apply, as_tuple), stock, inputs())
    x, tokens = inputs()
    with pytest.raises(RuntimeError, match=r"the gradient of inputs\['x'\] of the fused model errs"):
        compare(Network(WrongBackward.apply, as_tuple), stock, {"x": x, "tokens": tokens})


class Scaled(nn.Module):
    """A matrix product whose weight's gradient is right, `factor` times what it is, or not there."""

    def __init__(self, active):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.active = active

    def forward(self, x):
        return x @ (self.weight.detach() if self.active is None else self._scaled())

    def _scaled(self):
        factor = 1.0 if self.active is F.gelu else self.active
        return self.weight.detach() + factor * (self.weight - self.weight.detach())


@pytest.mark.parametrize(
    ("factor", "message"), [(1.001, r"errs from float64 by 1\.00e-03 by norm, stock's by \d"), (None, "is missing")]
)
def test_a_wrong_gradient_of_a_parameter_is_named(factor, message):
    compare(Scaled(1.0), stock, torch.randn(9, 16))
    with pytest.raises(RuntimeError, match=f"the gradient of weight of the fused model {message}"):
        compare(Scaled(factor), stock, torch.randn(9, 16))


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (lambda x: F.gelu(x).double(), r"is torch.float64 \(40, 24\), not torch.float32"),
        (lambda x: F.gelu(x).where(x < 2, torch.nan), "has NaN or infinities in other places"),
        (lambda x: F.gelu(x).where(x < 2, torch.inf), "has NaN or infinities in other places"),
    ],
)
def test_another_dtype_and_other_infinities_are_named(active, message):
    model = Network(active, lambda logits, hidden, tokens: hidden)
    model.second, model.norm, model.dropout = nn.Identity(), nn.Identity(), nn.Identity()
    with pytest.raises(RuntimeError, match=rf"output\[0\] of the fused model {message}"):
        compare(model, stock, inputs())


def test_infinities_where_stock_has_them_pass():
    x = torch.tensor([[-300.0, 0.0, 300.0, torch.inf, torch.nan]])
    model = nn.Module()
    model.forward, model.active = lambda x: model.active(x), lambda x: F.gelu(x)

    @contextmanager
    def exact(copied):
        yield

    compare(model, exact, x)


def test_a_gradient_that_is_zero_but_for_rounding_passes():
    """The bias of an attention's keys: softmax does not see it."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
            self.active = F.gelu

        def forward(self, x):
            scores = self.query(x) @ self.key(x).mT
            if self.active is not F.gelu:  # the same, summed in another order
                scores = self.query(x).flip(-1) @ self.key(x).flip(-1).mT
            return scores.softmax(-1) @ self.value(x)

    model = Attention()
    model.active = None
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        compare(model.to(dtype), stock, torch.randn(3, 8, 16, dtype=dtype))


def test_a_pre_activation_that_is_zero_but_for_rounding_passes():
    """On either side of a kink: torch's clamp passes a gradient where relu has none, at 0 exactly."""

    class Kink(nn.Module):
        def __init__(self, active):
            super().__init__()
            self.linear, self.active = nn.Linear(1, 40), active
            self.linear.bias.data = -self.linear.weight.data[:, 0]

        def forward(self, x):
            z = self.linear(x)
            return F.relu(z) if self.active is F.gelu else self.active(z)

    compare(Kink(lambda z: z.clamp(min=0)), stock, torch.ones(1, 1))
    with pytest.raises(RuntimeError, match=r"the gradient of inputs\[0\] of the fused model errs"):
        compare(Kink(lambda z: z.clamp(min=0) + 8 * (z - z.detach())), stock, torch.ones(1, 1))


@pytest.mark.parametrize("active", [erf_formula, tanh_formula, None], ids=["passes", "differs", "raises"])
def test_nothing_is_left_behind(active):
    model = Network(active, as_tuple)
    model.norm.eval()
    model.second.weight.requires_grad_(False)
    model.first.weight.grad = torch.ones_like(model.first.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, tokens = inputs()
    random, given = torch.get_rng_state(), x.clone()
    try:
        with torch.no_grad():
            compare(model, stock, (x, tokens))
    except (RuntimeError, TypeError):
        assert active is not erf_formula
    else:
        assert active is erf_formula
    assert model.training and model.dropout.training and not model.norm.training
    assert model.first.weight.grad.equal(torch.ones_like(model.first.weight)) and model.first.bias.grad is None
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(random) and x.equal(given) and not x.requires_grad


class Counting(nn.Module):
    """Computes with what its buffers have counted."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        for name in ("added", "replaced", "written"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("removed", torch.ones(2), persistent=False)
        self.register_buffer("expanded", torch.arange(3).expand(2, -1))
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.active = F.gelu

    def forward(self, x):
        self.added += 1
        self.replaced = self.replaced + 1
        self.written.data.mul_(2).add_(1)
        self.sparse *= 2
        self.removed = None
        return self.linear(x) * self.added[0] * self.replaced[1] + self.written[0]


def test_each_run_starts_from_the_same_buffers_and_leaves_them():
    model = Counting()
    buffers, kept = dict(model.named_buffers()), copy.deepcopy(dict(model.named_buffers()))
    compare(model, stock, torch.randn(3, 4))
    after = dict(model.named_buffers())
    assert after.keys() == buffers.keys() and list(model.state_dict()) == list(Counting().state_dict())
    assert all(after[name] is buffer for name, buffer in buffers.items())
    assert all(after[name].to_dense().equal(kept[name].to_dense()) for name in kept)


def test_a_model_that_writes_into_its_input_and_one_without_gradients():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    model.active = F.gelu
    compare(model, stock, torch.randn(3, 4))
    frozen = nn.Embedding(5, 4).requires_grad_(False)
    frozen.active = F.gelu
    compare(frozen, stock, torch.tensor([1, 2]))


def test_what_fails_in_float64_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.active = F.gelu
    model[1].register_forward_pre_hook(lambda module, inputs: tuple(x.float() for x in inputs))
    with pytest.raises(RuntimeError) as raised:
        compare(model, stock, torch.randn(3, 4))
    assert "copy in float64" in raised.value.__notes__[0]


def test_inputs_are_a_tensor_a_tuple_or_a_dict():
    with pytest.raises(TypeError, match="a tuple of arguments or a dict of keywords, not list"):
        compare(nn.Linear(2, 2), stock, [torch.randn(2, 2)])
