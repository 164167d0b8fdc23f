"""cross_entropy with every option, and nll_loss, against float64 PyTorch; test_cross_entropy.py has the plain form."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusedact
from fusedact import functional as F
from fusedact import nn

pytestmark = pytest.mark.usefixtures("triton_backend")
stock = torch.nn.functional

SHAPES = [(5,), (7, 10), (1, 1), (3, 21, 5), (2, 4, 3, 3), (9, 70, 65), (4, 1000), (6, 3, 1), (2, 3, 130)]
WIDE = [(2, 40_000), (2, 17_000, 2)]  # more than 32,768 numbers a row, of logits alone and with probabilities
OPTIONS = [
    {"weight": True},
    {"label_smoothing": 0.1},
    {"weight": True, "label_smoothing": 0.3},
    {"probabilities": True},
    {"probabilities": True, "weight": True, "label_smoothing": 0.2},
    {"z_loss": 0.05, "softcap": 4.0, "sample_weight": True, "return_lse": True},
    {"z_loss": 0.05, "weight": True, "label_smoothing": 1.0, "return_lse": True},
    {"probabilities": True, "z_loss": 0.05, "softcap": 4.0, "sample_weight": True},
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def rows_of(shape):
    return shape[: min(1, len(shape) - 1)] + shape[2:]


def sample(shape, options, dtype=torch.float64, device="cpu", seed=0):
    """Logits, target and the options, of which True stands for a tensor to be drawn."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(options)
    dim, rows = min(1, len(shape) - 1), rows_of(shape)
    logits = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, shape[dim], rows, generator=generator)
    if options.pop("probabilities", False):
        target = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(dim).to(device, dtype)
    elif target.numel() > 2:
        target.view(-1)[target.numel() // 2] = -100
    for name, size in (("weight", shape[dim]), ("sample_weight", rows)):
        if options.get(name):
            options[name] = torch.rand(size, generator=generator, dtype=torch.float64).to(device, dtype)
    return logits.to(device, dtype), target.to(device), options


def double(t):
    return t.detach().cpu().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def results(function, logits, target, options):
    """The loss, the log-sum-exp where it is asked for, and the gradients of all that is differentiable."""
    inputs = [t.detach().requires_grad_() for t in (logits, target) if t.is_floating_point()]
    values = function(inputs[0], inputs[-1] if len(inputs) > 1 else target, **options)
    values = values if isinstance(values, tuple) else (values,)
    dys = [torch.linspace(0.5, 2.0, v.numel(), dtype=v.dtype, device=v.device).view(v.shape) for v in values]
    return [*values, *torch.autograd.grad(values, inputs, dys)]


def on_the_fallback(*arguments):
    with fusedact.use_backend("torch"):
        return results(*arguments)


def check(function, logits, target, options, compare):
    doubles = {name: double(value) for name, value in options.items()}
    target_64 = double(target) if target.is_floating_point() else target.cpu()
    three = (
        results(function, logits, target, options),
        on_the_fallback(function, logits, target, options),
        on_the_fallback(function, double(logits), target_64, doubles),
    )
    for ours, torchs, truth in zip(*three, strict=True):
        compare(ours, torchs, truth)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("shape", "reduction"),
    [*itertools.product(SHAPES, ["mean"]), *itertools.product([(7, 10), (3, 21, 5)], ["sum", "none"])],
    ids=str,
)
def test_every_option_at_odd_shapes(shape, options, reduction, device, as_accurate_as_torch):
    logits, target, options = sample(shape, options, torch.float32, device)
    check(F.cross_entropy, logits, target, options | {"reduction": reduction}, as_accurate_as_torch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_in_every_dtype(options, dtype, device, as_accurate_as_torch):
    check(F.cross_entropy, *sample((13, 37), options, dtype, device), as_accurate_as_torch)


@pytest.mark.parametrize(("shape", "options"), [*zip(WIDE * 4, OPTIONS, strict=True), (WIDE[0], {})], ids=str)
def test_wider_than_the_registers(shape, options, device, as_accurate_as_torch):
    check(F.cross_entropy, *sample(shape, options, torch.float32, device), as_accurate_as_torch)


@pytest.mark.parametrize("options", [{}, {"weight": True}], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype", "reduction"),
    [
        *itertools.product(SHAPES, [torch.float32], ["mean", "sum", "none"]),
        *itertools.product([(13, 37)], DTYPES, ["mean"]),
    ],
    ids=str,
)
def test_nll_loss(shape, dtype, reduction, options, device, as_accurate_as_torch):
    logits, target, options = sample(shape, options, dtype, device)
    logp = logits.log_softmax(min(1, logits.dim() - 1))
    check(F.nll_loss, logp, target, options | {"reduction": reduction}, as_accurate_as_torch)


LAYOUTS = {
    "classes last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, function, device, as_accurate_as_torch, launches):
    logits, target, options = sample((4, 6, 9), {"weight": True}, torch.float32, device)
    options["weight"] = torch.stack([options["weight"]] * 2, 1)[:, 0]
    check(function, LAYOUTS[layout](logits), LAYOUTS["sliced"](target), options, as_accurate_as_torch)
    assert launches.count == 2


@pytest.mark.parametrize("function", [F.cross_entropy, F.nll_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 5, 0), (0, 5, 2)], ids=str)
def test_empty(shape, reduction, function, device, launches):
    logits, target = torch.randn(shape, device=device), torch.zeros(rows_of(shape), dtype=torch.int64, device=device)
    options = {"reduction": reduction, "weight": torch.ones(5, device=device)}
    for a, b in zip(
        results(function, logits, target, options), on_the_fallback(function, logits, target, options), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert launches.count == 0


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 0.1}, {"weight": torch.tensor([1.0, 0.0, 2.0])}, {"probabilities": True}], ids=str
)
@pytest.mark.parametrize(
    "row",
    [
        [0.0, math.inf, 0.0],
        [0.0, -math.inf, 0.0],
        [-math.inf, 0.0, -math.inf],
        [-math.inf] * 3,
        [0.0, math.nan, 0.0],
        [3e38, -3e38, 0.0],
    ],
    ids=str,
)
def test_extreme_rows_as_torch(row, options, device):
    """The other row is an ordinary one and must stay so."""
    logits = torch.tensor([row, [1.0, 2.0, 3.0]], device=device)
    target = torch.tensor([1, 2], device=device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    if options.pop("probabilities", False):
        target = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]], device=device)
    ours = F.cross_entropy(logits, target, reduction="none", **options)
    torch.testing.assert_close(ours, stock.cross_entropy(logits, target, reduction="none", **options), equal_nan=True)


@pytest.mark.parametrize("weights", [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]], ids=str)
def test_weights_of_nothing(weights, device):
    """A mean divides by what the present classes weigh: by 0, NaN, as torch."""
    logits, target = torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    weight = torch.tensor(weights, device=device)
    for function in (F.cross_entropy, F.nll_loss):
        assert function(logits, target, weight).isnan()


def test_ignored_rows_have_a_log_sum_exp_and_no_loss(device):
    logits = torch.randn(3, 4, device=device, requires_grad=True)
    target = torch.tensor([-100, 1, -100], device=device)
    loss, lse = F.cross_entropy(logits, target, reduction="none", z_loss=0.1, return_lse=True)
    torch.testing.assert_close(lse, logits.logsumexp(1))
    assert loss[0] == 0 and loss[2] == 0
    (grad,) = torch.autograd.grad(lse.sum(), logits)
    torch.testing.assert_close(grad, logits.softmax(1))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_log_sum_exp_has_its_gradient_where_the_loss_counts_nothing(backend, device):
    logits, target = (
        torch.randn(3, 4, device=device, requires_grad=True),
        torch.zeros(3, dtype=torch.int64, device=device),
    )
    with fusedact.use_backend(backend):
        _, lse = F.cross_entropy(logits, target, sample_weight=torch.zeros(3, device=device), return_lse=True)
    torch.testing.assert_close(torch.autograd.grad(lse.sum(), logits)[0], logits.softmax(1))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_nan_that_weighs_an_ignored_row_is_ignored(backend, device):
    logits, target = torch.randn(3, 4, device=device), torch.tensor([1, -100, 2], device=device)
    weight = torch.tensor([0.5, math.nan, 2.0], device=device)
    truth = (stock.cross_entropy(logits, target, reduction="none")[::2] * weight[::2]).sum() / 2.5
    with fusedact.use_backend(backend):
        torch.testing.assert_close(F.cross_entropy(logits, target, sample_weight=weight), truth)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", [{"z_loss": 0.1}, {"softcap": 5.0}, {"return_lse": True}], ids=str)
def test_autocast_widens_the_extensions_too(options, backend, device):
    logits, target = torch.randn(3, 4, device=device).bfloat16(), torch.zeros(3, dtype=torch.int64, device=device)
    with fusedact.use_backend(backend), torch.autocast(device, torch.bfloat16):
        value = F.cross_entropy(logits, target, **options)
    assert {t.dtype for t in (value if isinstance(value, tuple) else (value,))} == {torch.float32}


def test_a_nan_in_an_ignored_row_is_ignored_with_z_loss(device):
    logits = torch.tensor([[math.nan, 0.0], [1.0, 2.0]], device=device, requires_grad=True)
    target = torch.tensor([-100, 1], device=device)
    loss = F.cross_entropy(logits, target, z_loss=0.1)
    loss.backward()
    assert loss.isfinite() and not logits.grad[0].any() and logits.grad[1].isfinite().all()
    with fusedact.use_backend("torch"):
        torch.testing.assert_close(F.cross_entropy(logits, target, z_loss=0.1), loss)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_launch_forward_and_one_backward(options, device, launches):
    logits, target, options = sample((40, 10, 7), options, torch.float32, device)
    logits.requires_grad_()
    if target.is_floating_point():
        target.requires_grad_()
    before = logits.detach().clone()
    values = F.cross_entropy(logits, target, **options)
    assert launches.count == 1
    loss = sum(v.sum() for v in values) if isinstance(values, tuple) else values
    loss.backward()
    assert launches.count == 2
    assert torch.equal(logits, before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bitwise_the_same_from_run_to_run(options, device):
    arguments = sample((3000, 10), options, torch.float32, device)
    for a, b in zip(results(F.cross_entropy, *arguments), results(F.cross_entropy, *arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_first_and_second_derivatives(options, backend, device):
    logits, target, options = sample((1, 3, 2), options, torch.float64, device)
    inputs = [logits.requires_grad_()]
    if target.is_floating_point():
        inputs.append(target.requires_grad_())
    with fusedact.use_backend(backend):

        def f(x, *probabilities):
            return F.cross_entropy(x, *(probabilities or (target,)), **options)

        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nll_first_and_second_derivatives(backend, device):
    logits, target, options = sample((1, 3, 2), {"weight": True}, torch.float64, device)
    with fusedact.use_backend(backend):

        def f(x):
            return F.nll_loss(x.log_softmax(1), target, **options)

        assert torch.autograd.gradcheck(f, logits.requires_grad_(), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, logits, fast_mode=True)


def test_a_gradient_of_the_weights_is_torchs(device, launches):
    logits, target, options = sample((6, 4), {"probabilities": True, "weight": True}, torch.float32, device)
    weight = options["weight"].requires_grad_()
    F.cross_entropy(logits, target, weight).backward()
    assert weight.grad is not None and launches.count == 0
    sample_weight = torch.rand(6, device=device, requires_grad=True)
    F.cross_entropy(logits, target, sample_weight=sample_weight).backward()
    assert sample_weight.grad is not None


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"weight": torch.ones(4)}, RuntimeError, "weight tensor should be defined either for all 3"),
        ({"weight": torch.ones(3, dtype=torch.float64)}, RuntimeError, "expected scalar type Float but found Double"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0. Got: 1.5"),
        ({"reduction": "foo"}, ValueError, "foo is not a valid value for reduction"),
        ({"target": torch.rand(5, 3), "ignore_index": 2}, RuntimeError, "not supported for floating point target"),
        ({"target": torch.ones(5, 3).long()}, RuntimeError, "Expected floating point type for target with class"),
        ({"target": torch.ones(5, 2)}, RuntimeError, "multi-target not supported"),
        ({"target": torch.full((5,), 3)}, IndexError, "Target 3 is out of bounds"),
        ({"z_loss": -1.0}, ValueError, "z_loss must not be negative, infinite or NaN, got -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, got 0.0"),
        ({"sample_weight": torch.ones(4)}, ValueError, r"that is \(5,\), got \(4,\)"),
        ({"reduction": "foo", "z_loss": 0.1}, ValueError, "foo is not a valid value for reduction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(change, kind, message, backend, device, launches):
    arguments = {"input": torch.randn(5, 3), "target": torch.zeros(5, dtype=torch.int64)} | change
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    if device == "cuda" and kind is IndexError:
        pytest.skip("on a GPU that row's loss is NaN")
    with fusedact.use_backend(backend), pytest.raises(kind, match=message):
        F.cross_entropy(**arguments)
    assert launches.count == 0


def test_checks_asked_for_raise_on_a_gpu(device, monkeypatch):
    monkeypatch.setattr(fusedact.backend, "_checks", lambda: True)
    logits, target = torch.randn(5, 3, device=device), torch.full((5,), 3, device=device)
    for function in (F.cross_entropy, F.nll_loss):
        with pytest.raises(IndexError, match="Target 3 is out of bounds"):
            function(logits, target)


def test_negative_smoothing_is_torchs(device):
    logits, target, _ = sample((6, 4), {}, torch.float32, device)
    assert torch.equal(
        F.cross_entropy(logits, target, label_smoothing=-0.1),
        stock.cross_entropy(logits, target, label_smoothing=-0.1),
    )


def test_modules_take_the_options(device, launches):
    logits, target, _ = sample((6, 4), {}, torch.float32, device)
    loss = nn.CrossEntropyLoss(label_smoothing=0.1, z_loss=0.01, softcap=5.0, return_lse=True)
    values = loss(logits, target, sample_weight=torch.ones(6, device=device))
    assert len(values) == 2 and launches.count == 1
    nll = nn.NLLLoss(reduction="sum")(logits.log_softmax(1), target)
    torch.testing.assert_close(nll, torch.nn.NLLLoss(reduction="sum")(logits.log_softmax(1), target))
    assert launches.count == 2


@given(
    shape=st.tuples(st.integers(0, 20), st.integers(1, 40), st.integers(1, 20)),
    options=st.sampled_from(OPTIONS),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    layout=st.sampled_from(list(LAYOUTS)[:3]),
    seed=st.integers(0, 9),
)
def test_any_shape(shape, options, dtype, reduction, layout, seed, device, as_accurate_as_torch):
    logits, target, options = sample(shape, options, dtype, device, seed)
    check(F.cross_entropy, LAYOUTS[layout](logits), target, options | {"reduction": reduction}, as_accurate_as_torch)
