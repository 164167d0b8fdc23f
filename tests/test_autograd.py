"""Every op in autograd's hands: graphs used twice, tensors changed behind it, modes, gradients, their derivatives."""

import re

import numpy
import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn

CHANGED = "one of the variables needed for gradient computation has been modified by an inplace operation"


def stocks_answer(call):
    """What the fallback does: the message of its error, or None."""
    try:
        with fusedact.use_backend("torch"):
            call()
    except RuntimeError as error:
        return str(error)
    return None


# ---- graphs used twice, tensors changed


@pytest.mark.contract(50)
def test_backward_twice_is_torchs_error(every_op):
    """Of a retained graph it gives the same."""
    inputs = every_op.inputs()
    y = every_op.run(*inputs)
    dy = every_op.dy(y)
    for a, b in zip(*(torch.autograd.grad(y, inputs, dy, retain_graph=again) for again in (True, False)), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        torch.autograd.grad(y, inputs, dy)


@pytest.mark.contract(51)
def test_what_is_saved_and_changed_is_an_error_and_never_a_wrong_gradient(every_op):
    """An error at least where stock's own operations give one: a fused op may keep its bias or logits too."""
    expected = every_op.gradients(every_op.inputs())
    for changed in (*range(len(expected)), "result"):

        def gradients(changed=changed):
            inputs = every_op.inputs()
            y = every_op.run(*inputs)
            with torch.no_grad():
                (y if changed == "result" else inputs[changed]).mul_(2)
            return torch.autograd.grad(y, inputs, every_op.dy(y))

        try:
            found = gradients()
        except RuntimeError as error:
            assert CHANGED in str(error)
        else:
            assert not stocks_answer(gradients), changed
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.contract(51)
def test_changed_by_its_data_is_no_error(every_op):
    inputs = every_op.inputs()
    y = every_op.run(*inputs)
    for t in (*inputs, y):
        t.data.mul_(2)
    y.sum().backward()


@pytest.mark.contract(52)
def test_what_cannot_start_a_backward(every_op):
    y = every_op.run(*every_op.inputs())
    if y.dim():
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
            y.backward()
    nothing = every_op.run(*every_op.inputs(grad=False))
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        nothing.sum().backward()


@pytest.mark.contract(52)
@pytest.mark.parametrize("make", [lambda n: n.Linear(3, 2, dtype=torch.int64), lambda n: n.PReLU(dtype=torch.int64)])
def test_integers_require_no_gradient(make, either_backend):
    with pytest.raises(RuntimeError) as stock:
        make(torch.nn)
    with pytest.raises(RuntimeError, match=r"(?i)only Tensors of floating point .*dtype can require gradients") as ours:
        make(nn)
    assert str(ours.value) == str(stock.value)
    with pytest.raises(RuntimeError, match=r"(?i)only Tensors of floating point .*dtype can require gradients"):
        F.relu(torch.arange(3)).requires_grad_()


@pytest.mark.contract(53)
def test_inference_tensors_in_training(every_op):
    """An error at least where stock's own operations give one, and else stock's values."""
    with torch.inference_mode():
        inferred = every_op.inputs(grad=False)
    for wanting in range(len(inferred)):

        def trained(wanting=wanting):
            inputs = list(inferred)
            inputs[wanting] = every_op.inputs()[wanting]
            every_op.run(*inputs).sum().backward()
            return inputs[wanting].grad

        try:
            found = trained()
        except RuntimeError as error:
            assert "Inference tensors cannot be saved for backward" in str(error)
        else:
            inputs = every_op.inputs()
            assert not stocks_answer(trained)
            torch.testing.assert_close(found, torch.autograd.grad(every_op.run(*inputs).sum(), inputs[wanting])[0])


@pytest.mark.contract(53)
def test_inference_tensors_changed_outside(every_op):
    with torch.inference_mode():
        y = every_op.run(*every_op.inputs())
        y += 1
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        y += 1


# ---- what a backward returns


def odd(t, layout):
    """The same numbers or fewer, in another layout."""
    if layout == "expanded":
        return t[:1].expand_as(t)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    return torch.stack([t, t], -1)[..., 0]


@pytest.mark.contract(26, 54)
@pytest.mark.parametrize("first", range(3), ids=["expanded", "transposed", "sliced"])
def test_gradients_are_as_their_inputs(first, every_op):
    """Whatever the layout of each input, and of the result's gradient, which `sum` expands."""
    layouts = ["expanded", "transposed", "sliced"] * 3
    leaves = zip(every_op.inputs(), layouts[first:], strict=False)
    inputs = [odd(leaf, layout).detach().requires_grad_() for leaf, layout in leaves]
    y = every_op.run(*inputs)
    dy = torch.ones((), device=y.device).expand_as(y) if first else odd(torch.ones_like(y), "sliced")
    found = torch.autograd.grad(y, inputs, dy)
    with fusedact.use_backend("torch"):
        stock = torch.autograd.grad(every_op.run(*inputs), inputs, torch.ones_like(y))
    for g, t, like in zip(found, inputs, stock, strict=True):
        assert (g.shape, g.dtype, g.device, g.layout) == (t.shape, t.dtype, t.device, t.layout)
        torch.testing.assert_close(g, like)


@pytest.mark.contract(54)
def test_gradients_of_no_rows(every_op):
    if every_op.name.startswith("conv"):
        every_op.shapes = [(0, *every_op.shapes[0][1:]), *every_op.shapes[1:]]
    else:
        rows = every_op.shapes[0][0]
        every_op.shapes = [(0, *shape[1:]) if shape[0] == rows else shape for shape in every_op.shapes]
    inputs = every_op.inputs()
    for g, t in zip(torch.autograd.grad(every_op.run(*inputs).sum(), inputs), inputs, strict=True):
        assert (g.shape, g.dtype, g.device) == (t.shape, t.dtype, t.device)
        assert not g.isinf().any()


class Broken(torch.autograd.Function):
    """The identity of the first, whose backward gives what `gradients` makes."""

    gradients = None

    @staticmethod
    def forward(ctx, x, other):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return Broken.gradients(dy)


BROKEN = {
    "shape": (lambda dy: (dy[:1], None), "returned an invalid gradient at index 0 - got [1, 4] but expected shape"),
    "too few": (lambda dy: dy, "returned an incorrect number of gradients (expected 2, got 1)"),
    "device": (lambda dy: (dy.to("meta"), None), "expected device DEVICE but got meta"),
    "array": (lambda dy: (dy.cpu().numpy(), None), "expected Variable or None"),
    "dtype": (lambda dy: (dy.double(), None), None),
    "extra Nones": (lambda dy: (dy, None, None), None),
}


@pytest.mark.contract(54)
@pytest.mark.parametrize("gradients, message", BROKEN.values(), ids=BROKEN)
def test_a_users_function_between_ours(gradients, message, either_backend, device, monkeypatch):
    """torch's own answers reach the user through our ops."""
    monkeypatch.setattr(Broken, "gradients", gradients)
    x, w = (torch.randn(shape, device=device, requires_grad=True) for shape in ((5, 3), (4, 3)))
    y = F.gelu(Broken.apply(F.linear(x, w, activation="relu"), x))
    if message is None:
        y.sum().backward()
        assert w.grad.dtype == torch.float32
    else:
        with pytest.raises((RuntimeError, TypeError), match=re.escape(message.replace("DEVICE", str(x.device)))):
            y.sum().backward()


NO_DERIVATIVES = {
    "shape": lambda dy, x: dy[:1],
    "dtype": lambda dy, x: dy.float(),
    "device": lambda dy, x: dy.to("meta"),
    "array": lambda dy, x: numpy.zeros(x.shape),
    "none": lambda dy, x: None,
    "two": lambda dy, x: (dy, dy),
}


@pytest.mark.contract(54)
@pytest.mark.parametrize("derivative", NO_DERIVATIVES.values(), ids=NO_DERIVATIVES)
def test_a_registered_activation_with_such_a_derivative_is_refused(derivative):
    with pytest.raises(ValueError, match="derivative of activation 'cubed' must keep its input's"):
        fusedact.register_activation(
            "cubed", reference=lambda x: x**3, derivative=derivative, device=lambda: (None, None)
        )
    assert "cubed" not in fusedact.activations.ACTIVATIONS


@pytest.mark.contract(55)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode_names_the_function(every_op):
    inputs = every_op.inputs()
    with torch.autograd.detect_anomaly():
        y = every_op.run(*inputs)
        name = type(y.grad_fn).__name__
        with pytest.raises(RuntimeError, match=r"Function '(\w+)' returned nan values in its \d+th output\.") as error:
            y.backward(torch.full_like(y, torch.nan))
    if every_op.backend == "triton" and every_op.name != "linear":  # which is torch's own addmm there
        assert name in str(error.value) and not re.search(r"Backward\d", name)


# ---- derivatives of derivatives, transforms


def scalar(op):
    def run(*inputs):
        y = op.run(*inputs)
        return (y * op.dy(y)).sum()

    return run


@pytest.mark.contract(59)
def test_double_backward_is_stocks(every_op):
    """Or refused aloud where stock refuses."""

    def second():
        inputs = every_op.inputs(torch.float64)
        first = torch.autograd.grad(scalar(every_op)(*inputs), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first)
        if not penalty.requires_grad:
            return [torch.zeros_like(t) for t in inputs]
        return torch.autograd.grad(penalty, inputs, materialize_grads=True)

    ours = second()
    with fusedact.use_backend("torch"):
        stock = second()
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


TRANSFORMS = {
    "grad": lambda f, xs: torch.func.grad(f, tuple(range(len(xs))))(*xs),
    "jvp": lambda f, xs: torch.func.jvp(f, tuple(xs), tuple(t * 0.5 + 1 for t in xs)),
    "vmap": lambda f, xs: torch.vmap(f)(*(torch.stack([t, 2 * t, -t]) for t in xs)),
    "hessian": lambda f, xs: torch.func.hessian(f)(*xs),
}


@pytest.mark.contract(59)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_stocks(transform, every_op, launches):
    """By torch's own formula: nothing is launched."""
    inputs = every_op.inputs(torch.float64, grad=False)
    ours = TRANSFORMS[transform](scalar(every_op), inputs)
    assert launches.count == 0
    with fusedact.use_backend("torch"):
        stock = TRANSFORMS[transform](scalar(every_op), inputs)
    torch.testing.assert_close(ours, stock)
