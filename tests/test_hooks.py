"""Hooks, those that raise among them, and backwards within backwards, on every op."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fusedact import functional as F
from fusedact import nn


@pytest.mark.contract(56)
def test_reentrant_checkpointing(every_op):
    inputs = every_op.inputs()
    plain = every_op.gradients(inputs)
    y = checkpoint(every_op.run, *inputs, use_reentrant=True)
    y.backward(every_op.dy(y))
    for a, t in zip(plain, inputs, strict=True):
        assert torch.equal(a, t.grad)


class Inner(torch.autograd.Function):
    """run(*inputs) summed, its gradients by a backward of their own, inside the backward of the whole."""

    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs).sum()

    @staticmethod
    def backward(ctx, dy):
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            (ctx.run(*leaves).sum() * dy).backward()
        return None, *(leaf.grad for leaf in leaves)


@pytest.mark.contract(56)
def test_a_backward_within_a_backward(every_op):
    inputs = every_op.inputs()
    plain = torch.autograd.grad(every_op.run(*inputs).sum(), inputs)
    within = torch.autograd.grad(Inner.apply(every_op.run, *inputs), inputs)
    for a, b in zip(plain, within, strict=True):
        assert torch.equal(a, b)


@pytest.mark.contract(56)
def test_tensor_and_accumulation_hooks(every_op):
    inputs, told = every_op.inputs(), []
    plain = every_op.gradients(inputs)
    y = every_op.run(*inputs)
    y.register_hook(lambda dy: dy * 2)
    for i, t in enumerate(inputs):
        t.register_hook(lambda g: g / 2)
        t.register_post_accumulate_grad_hook(lambda t, i=i: told.append((i, t.grad is not None)))
    y.backward(every_op.dy(y))
    assert sorted(told) == [(i, True) for i in range(len(inputs))]
    for a, t in zip(plain, inputs, strict=True):
        torch.testing.assert_close(t.grad, a)


class Told(Exception):
    """What a hook raises."""


def tell(*_):
    raise Told("by a hook")


RAISING = {
    "result": lambda y, x: y.register_hook(tell),
    "node": lambda y, x: y.grad_fn.register_hook(tell),
    "before node": lambda y, x: y.grad_fn.register_prehook(tell),
    "input": lambda y, x: x.register_hook(tell),
    "accumulated": lambda y, x: x.register_post_accumulate_grad_hook(tell),
}


@pytest.mark.contract(56)
def test_a_hook_that_raises(every_op):
    """The user gets what it raised, and with the hook gone the retained graph and the next step are right."""
    inputs = every_op.inputs()
    plain = every_op.gradients(inputs)
    y = every_op.run(*inputs)
    dy = every_op.dy(y)
    for register in RAISING.values():
        hook = register(y, inputs[0])
        with pytest.raises(Told, match="by a hook"):
            y.backward(dy, retain_graph=True)
        hook.remove()
    for again in (torch.autograd.grad(y, inputs, dy), every_op.gradients(inputs)):
        for a, b in zip(plain, again, strict=True):
            assert torch.equal(a, b)


def test_a_hook_that_raises_under_the_profiler_leaves_no_range_open(triton_backend, device):
    x, w = torch.randn(5, 3, device=device, requires_grad=True), torch.randn(4, 3, device=device, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        y = F.linear(x, w, activation="relu")
        w.register_hook(tell)
        with pytest.raises(Told):
            y.sum().backward()
        torch.ones(3).neg()
    names = {event.name: event for event in found.events()}
    assert names["fusedact::linear_act_backward"].time_range.end <= names["aten::neg"].time_range.start


def network(kinds, device):
    torch.manual_seed(0)
    layers = kinds.Linear(5, 8), kinds.ReLU(), kinds.Linear(8, 4), kinds.LogSoftmax(1)
    return kinds.Sequential(*layers).to(device)


@pytest.mark.contract(56)
def test_full_backward_hooks_see_what_stocks_see(either_backend, device):
    x, seen = torch.randn(6, 5, device=device), {}
    for kinds in (torch.nn, nn):
        model, told = network(kinds, device), seen.setdefault(kinds, [])
        for module in model.modules():
            module.register_full_backward_hook(lambda m, dx, dy, told=told: told.append((type(m).__name__, *dx, *dy)))
        model(x).square().sum().backward()
        told.append(("weight", model[0].weight.grad))
    for ours, stock in zip(seen[nn], seen[torch.nn], strict=True):
        assert ours[0] == stock[0]
        torch.testing.assert_close(ours[1:], stock[1:])


@pytest.mark.contract(56)
def test_a_full_backward_hook_that_raises(either_backend, device):
    model, x = network(nn, device), torch.randn(6, 5, device=device)
    hook = model[2].register_full_backward_hook(tell)
    with pytest.raises(Told):
        model(x).sum().backward()
    hook.remove()
    model.zero_grad()
    model(x).square().sum().backward()
    twin = network(torch.nn, device)
    twin(x).square().sum().backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.contract(57)
@pytest.mark.parametrize("hooked", [0, 1])
@pytest.mark.parametrize("kinds", [torch.nn, nn], ids=["stock", "ours"])
def test_a_full_backward_hook_and_an_inplace_relu(kinds, hooked, either_backend, device):
    model = kinds.Sequential(kinds.Linear(3, 2), kinds.ReLU(inplace=True)).to(device)
    model[hooked].register_full_backward_hook(lambda *_: None)
    x = torch.randn(4, 3, device=device, requires_grad=True)
    message = "Output 0 of BackwardHookFunction(Backward)? is a view and is being modified inplace"
    with pytest.raises(RuntimeError, match=message):
        model(x).sum().backward()
