"""torch.compile, torch.export and the functorch transforms over models and losses made of the fused ops."""

import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn

pytestmark = pytest.mark.usefixtures("triton_backend")


class Network(nn.Module):
    """Linear layers, and an activation and a normalization that stand alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6, activation="gelu"))
        self.alone = nn.PReLU(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.alone(self.body(x)))


def classes(rows, device):
    return torch.randint(0, 3, (rows,), device=device)


def probabilities(rows, device):
    return torch.rand(rows, 3, device=device).softmax(1)


LOSSES = {
    "cross_entropy": (F.cross_entropy, classes),
    "smoothed, by class": (
        lambda x, t: F.cross_entropy(x, t, weight=x.new_tensor([1.0, 2.0, 3.0]), label_smoothing=0.1),
        classes,
    ),
    "probabilities": (lambda x, t: F.cross_entropy(x, t, reduction="sum"), probabilities),
    "z_loss": (
        lambda x, t: sum(v.sum() for v in F.cross_entropy(x, t, z_loss=0.1, softcap=5.0, return_lse=True)),
        classes,
    ),
    "nll of log_softmax": (lambda x, t: F.nll_loss(F.log_softmax(x, 1), t), classes),
    "softmax": (lambda x, t: (F.softmax(x, -1) - t).square().mean(), probabilities),
    "bce with logits": (
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, pos_weight=x.new_tensor([1.0, 2.0, 3.0])),
        probabilities,
    ),
    "bce": (lambda x, t: F.binary_cross_entropy(F.sigmoid(x), t), probabilities),
    "multilabel": (F.multilabel_soft_margin_loss, probabilities),
}
loss_and_target = pytest.mark.parametrize(("loss", "draw"), LOSSES.values(), ids=LOSSES)


def loss_and_gradients(step, model, x, target):
    value = step(x, target)
    return [value, *torch.autograd.grad(value, list(model.parameters()))]


@loss_and_target
def test_compiled_whole_and_only_once_more(loss, draw, device):
    """No graph break, and no new graph after the second batch size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Network().to(device)

    def step(x, target):
        return loss(model(x), target)

    compiled = torch.compile(step, fullgraph=True)
    for rows in (11, 17, 23, 31):
        x, target = torch.randn(rows, 5, device=device), draw(rows, device)
        ours = loss_and_gradients(compiled, model, x, target)
        with fusedact.use_backend("torch"):
            stock = loss_and_gradients(step, model, x, target)
        for a, b in zip(ours, stock, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_any_batch(strict, device):
    model, x = Network().to(device).eval(), torch.randn(11, 5, device=device)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.fusedact.linear_act.default) == 2
    more = torch.randn(23, 5, device=device)
    torch.testing.assert_close(program.module()(more), model(more))


def per_sample(f, x, target):
    return torch.vmap(torch.func.grad(lambda x, t: f(x[None], t[None])))(x, target)


def tangent(f, x, target):
    return torch.func.jvp(lambda x: f(x, target), (x,), (torch.ones_like(x),))[1]


def hessian(f, x, target):
    return torch.func.hessian(lambda x: f(x, target))(x)


@pytest.mark.parametrize("transform", [per_sample, tangent, hessian])
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("smoothed, by class", "bce with logits")])
def test_transforms_of_losses(name, transform, device):
    loss, draw = LOSSES[name]
    x, target = torch.randn(4, 3, device=device), draw(4, device)
    ours = transform(loss, x, target)
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(ours, transform(loss, x, target))


@loss_and_target
def test_fake_tensors(loss, draw, device):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(7, 3, device=device, requires_grad=True)
        value = loss(x, draw(7, device))
        value.backward()
    assert value.shape == () and x.grad.shape == (7, 3)


@loss_and_target
def test_a_gradient_penalty(loss, draw, device):
    """Second derivatives in the style of WGAN-GP, through a model and its loss."""
    model, x, target = Network().to(device), torch.randn(6, 5, device=device, requires_grad=True), draw(6, device)

    def penalty():
        (g,) = torch.autograd.grad(loss(model(x), target), x, create_graph=True)
        return torch.autograd.grad((g.norm(dim=1) - 1).square().mean(), list(model.parameters()), allow_unused=True)

    ours = penalty()
    with fusedact.use_backend("torch"):
        stock = penalty()
    for a, b in zip(ours, stock, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@loss_and_target
def test_nothing_is_saved_where_no_gradient_is_wanted(loss, draw, device):
    kept = []
    x, target = torch.randn(6, 3, device=device, requires_grad=True), draw(6, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            loss(x, target)
        loss(x.detach(), target)
        with torch.inference_mode():
            loss(x, target)
    assert not kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@loss_and_target
def test_autocast_gives_stocks_dtype(loss, draw, dtype, device):
    if device == "cuda" and loss is LOSSES["bce"][0]:
        pytest.skip("banned under CUDA autocast, as stock")
    x, target = torch.randn(6, 3, device=device, dtype=dtype, requires_grad=True), draw(6, device)
    with torch.autocast(device, dtype=dtype):
        ours = loss(x, target)
        with fusedact.use_backend("torch"):
            stock = loss(x, target)
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(ours, x)[0].dtype == dtype
