"""What losses answer where numbers end: nothing to add up, infinities, NaN, labels out of range, far addresses."""

import math

import pytest
import torch
from samples.losses import pair, stock, stock_of

import fusedact
from fusedact import functional as F
from fusedact.kernels import cross_entropy

BACKENDS = ["torch", "triton"]
MODULE = pytest.param("module", marks=pytest.mark.exhaustive)
each_backend = pytest.mark.parametrize("name", BACKENDS)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(d, marks=pytest.mark.exhaustive) for d in (torch.float16, torch.bfloat16, torch.float64)),
    ],
    ids=str,
)
row = pytest.mark.contract
INF, NAN = math.inf, math.nan
each_way = pytest.mark.parametrize(
    ("loss", "way"),
    [
        ("cross_entropy", "function"),
        ("cross_entropy", "head"),
        ("nll_loss", "function"),
        pytest.param("cross_entropy", "module", marks=pytest.mark.exhaustive),
        pytest.param("nll_loss", "module", marks=pytest.mark.exhaustive),
    ],
)


def pulled_back(function, *inputs, **options):
    """The loss and the gradients of those inputs that are floating."""
    inputs = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    value = function(*inputs, **options)
    return value.detach(), *torch.autograd.grad(value.sum(), [t for t in inputs if t.requires_grad])


def expected(function, dtype, *inputs, **options):
    """Stock's, of what a kernel adds up in: float32 at least, rounded at the end."""
    wide = [t.to(torch.float32) if t.is_floating_point() and t.dtype != torch.float64 else t for t in inputs]
    options = {k: v.to(wide[0].dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return [t.to(dtype) for t in pulled_back(function, *wide, **options)]


def alike(ours, theirs, rounding=8):
    for own, their in zip(ours, theirs, strict=True):
        eps = rounding * torch.finfo(their.dtype).eps
        torch.testing.assert_close(own, their, rtol=eps, atol=eps, equal_nan=True)


# Rows 37 to 40: nothing to add up


@row(37)
@each_backend
@each_dtype
@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize(("reduction", "value"), [("mean", NAN), ("sum", 0.0)])
@each_way
def test_no_rows(loss, way, reduction, value, classes, dtype, name, device, launches):
    if way == "head" and not classes:
        pytest.skip("a layer of nothing")
    x = torch.rand(0, classes, dtype=dtype, device=device)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    with fusedact.use_backend(name):
        ours, grad = pulled_back(pair(loss, way)[0], x, target, reduction=reduction)
    assert ours.dtype == dtype and grad.shape == x.shape
    assert ours.item() == pytest.approx(value, nan_ok=True)


@row(38)
@each_backend
@each_dtype
@pytest.mark.parametrize(("reduction", "value"), [("mean", NAN), ("sum", 0.0), ("none", 0.0)])
@each_way
def test_all_rows_ignored(loss, way, reduction, value, dtype, name, device):
    x, target = torch.rand(4, 3, dtype=dtype, device=device), torch.full((4,), -100, device=device)
    with fusedact.use_backend(name):
        ours, grad = pulled_back(pair(loss, way)[0], x, target, reduction=reduction)
    assert ours.flatten().tolist() == pytest.approx([value] * ours.numel(), nan_ok=True)
    assert torch.equal(grad, torch.zeros_like(x))


@row(38)
@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_head_learns_nothing_of_ignored_rows(reduction, name, device):
    x, w, b = (torch.rand(shape, device=device, requires_grad=True) for shape in ((4, 5), (3, 5), (3,)))
    target = torch.full((4,), -100, device=device)
    with fusedact.use_backend(name):
        loss = F.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction).sum()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(loss, (x, w, b)))


@row(39)
@each_backend
@each_dtype
@each_way
def test_a_mean_of_rows_without_weight(loss, way, dtype, name, device):
    x, target = torch.rand(4, 3, dtype=dtype, device=device), torch.tensor([0, 0, 2, -100], device=device)
    weight = torch.tensor([0.0, 1.0, 0.0], dtype=dtype, device=device)
    for options in [{}, {"label_smoothing": 0.1}] if loss == "cross_entropy" else [{}]:
        with fusedact.use_backend(name):
            ours, grad = pulled_back(pair(loss, way)[0], x, target, weight=weight, **options)
        assert ours.isnan() and grad[:3].isnan().any(1).all() and not grad[3].any()


@row(40)
@each_backend
@each_dtype
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
@each_way
def test_an_ignored_row_may_hold_anything(odd, loss, way, dtype, name, device):
    """Its gradient is 0 from the kernels; torch's log-softmax, of the fallback, makes it NaN."""
    x = torch.tensor([[odd, odd, 0.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], device=device).to(dtype)
    if way == "head":
        x[0] = odd
    target = torch.tensor([-100, 0, 2], device=device)
    ours, theirs = pair(loss, way)
    with fusedact.use_backend(name):
        value, grad = pulled_back(ours, x, target)
        alike([ours(x, target, reduction="sum")], [theirs(x, target, reduction="sum")])
    stocks, stock_grad = expected(theirs, dtype, x, target)
    assert value.isfinite()
    alike((value, grad[1:]), (stocks, stock_grad[1:]))
    if name == "triton":
        assert not grad[0].any()
    elif math.isnan(odd) and loss == "cross_entropy":
        assert grad[0].isnan().all() and stock_grad[0].isnan().all()


# Rows 41 and 42: numbers that are none, and the largest


MOST, LEAST = "the largest", "the smallest"
ROWS = {
    "inf at the label": ([0, INF, 0], NAN),
    "-inf at the label": ([0, -INF, 0], INF),
    "-inf elsewhere": ([-INF, 0, -INF], 0.0),
    "all -inf": ([-INF] * 3, NAN),
    "nan at the label": ([0, NAN, 0], NAN),
    "nan elsewhere": ([NAN, 0, 0], NAN),
    "inf elsewhere": ([INF, 0, 0], NAN),
    "inf and -inf": ([INF, -INF, 0], NAN),
    "wrong by most": ([MOST, LEAST, 0], INF),
    "right by most": ([LEAST, MOST, 0], 0.0),
    "all most": ([MOST] * 3, math.log(3)),
    "all least": ([LEAST] * 3, math.log(3)),
    "denormal": ([1e-45, 0, 1e-40], math.log(3)),
    "signed zeros": ([0.0, -0.0, 0.0], math.log(3)),
    "an ordinary one": ([1.0, 2.0, 3.0], 1.4076059644),
}
TARGETS = {
    "label": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": [1.0, 2.0, 0.5]},
    "zero weight": {"weight": [1.0, 0.0, 0.5]},
    "negative weight": {"weight": [1.0, -1.0, 0.5]},
    "infinite weight": {"weight": [1.0, INF, 0.5]},
    "nan weight": {"weight": [1.0, NAN, 0.5]},
    "probability 1": {"target": [0.0, 1.0, 0.0]},
    "probabilities": {"target": [0.2, 0.6, 0.2]},
    "no probabilities": {"target": [0.0, 0.0, 0.0]},
    "nan probability": {"target": [NAN, 0.6, 0.2]},
}


def odd_rows(dtype, device, options):
    """All rows above each other, label 1 or these probabilities, the options."""
    most = torch.finfo(dtype).max
    numbers = [[{MOST: most, LEAST: -most}.get(x, x) for x in odd] for odd, _ in ROWS.values()]
    x = torch.tensor(numbers, dtype=torch.float64, device=device).to(dtype)
    options = {k: torch.tensor(v, device=device).to(dtype) if isinstance(v, list) else v for k, v in options.items()}
    target = options.pop("target", None)
    target = torch.ones(len(x), dtype=torch.int64, device=device) if target is None else target.expand_as(x)
    return x, target, options


@row(41, 42)
@each_backend
@each_dtype
@pytest.mark.parametrize("kind", TARGETS)
def test_rows_of_no_numbers_and_of_the_largest(kind, dtype, name, device):
    x, target, options = odd_rows(dtype, device, TARGETS[kind])
    theirs = pulled_back if name == "torch" else expected
    stocks = theirs(stock.cross_entropy, *[dtype] * (name != "torch"), x, target, reduction="none", **options)
    with fusedact.use_backend(name):
        ours = pulled_back(F.cross_entropy, x, target, reduction="none", **options)
    if name == "triton" and "probabilit" in kind:  # a sum of 0 times what overflows or not, by its order
        truths = (t.to(dtype) for t in pulled_back(stock.cross_entropy, x.double(), target.double(), reduction="none"))
        stocks = [
            torch.where(own == truth, truth, their) for own, truth, their in zip(ours, truths, stocks, strict=True)
        ]
    alike(ours, stocks)
    if kind == "label":
        assert ours[0].tolist() == pytest.approx([value for _, value in ROWS.values()], rel=1e-2, nan_ok=True)


@row(41)
@each_backend
@pytest.mark.parametrize("way", ["function", "head", MODULE])
@pytest.mark.parametrize(
    ("odd", "options", "value"),
    [
        ([0.0, INF, 0.0], {}, NAN),
        ([0.0, -INF, 0.0], {}, INF),
        ([-INF, 0.0, -INF], {}, 0.0),
        ([-INF, 0.0, -INF], {"label_smoothing": 0.1}, INF),
        ([-INF] * 3, {}, NAN),
        ([-INF, 0.0, -INF], {"target": torch.tensor([[0.0, 1.0, 0.0]])}, NAN),
    ],
    ids=["inf at the label", "-inf at the label", "-inf elsewhere", "smoothed", "all -inf", "probabilities"],
)
def test_the_loss_of_infinities(odd, options, value, way, name, device):
    arguments = {"input": torch.tensor([odd], device=device), "target": torch.tensor([1], device=device)} | options
    arguments["target"] = arguments["target"].to(device)
    ours, theirs = pair("cross_entropy", way)
    with fusedact.use_backend(name):
        if way == "head":  # whose product makes NaN of infinities beside a 0
            assert ours(**arguments).isnan() and theirs(**arguments).isnan()
        else:
            assert ours(**arguments).item() == pytest.approx(value, nan_ok=True)


@row(42)
@each_backend
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e38), (torch.float16, 65504.0)], ids=str)
@pytest.mark.parametrize("way", ["function", "head", MODULE])
def test_the_largest_logits_overflow_to_infinity(way, dtype, most, name, device):
    x = torch.tensor([[most, -most, 0.0]], dtype=dtype, device=device)
    with fusedact.use_backend(name):
        assert pair("cross_entropy", way)[0](x, torch.tensor([1], device=device)).item() == INF


@row(43)
@each_backend
@each_dtype
@pytest.mark.parametrize("way", ["function", "head", MODULE])
def test_probabilities_get_their_gradient(way, dtype, name, device):
    x, target = torch.randn(4, 3, device=device).to(dtype), torch.rand(4, 3, device=device).softmax(1).to(dtype)
    ours, theirs = pair("cross_entropy", way)
    with fusedact.use_backend(name):
        alike(pulled_back(ours, x, target), expected(theirs, dtype, x, target))


# Rows 44 and 48: yes or no


@row(44)
@each_backend
@each_dtype
@pytest.mark.parametrize("way", ["function", MODULE])
def test_the_ends_of_probabilities(way, dtype, name, device):
    p = torch.tensor([0.0, 1.0, 0.0, 1.0], device=device, dtype=dtype)
    target = torch.tensor([1.0, 0.0, 0.0, 1.0], device=device, dtype=dtype)
    ours, theirs = pair("binary_cross_entropy", way)
    with fusedact.use_backend(name):
        value, *grads = pulled_back(ours, p, target, reduction="none")
        assert value.tolist() == [100.0, 100.0, 0.0, 0.0]
        theirs_grads = (
            pulled_back(theirs, p, target, reduction="none")[1:]
            if name == "torch"
            else expected(theirs, dtype, p, target, reduction="none")[1:]
        )
        alike(grads, theirs_grads, 8 if dtype != torch.float64 else 2**26)  # interpreted, 1e-12 is a float32


@row(48)
@each_backend
@each_dtype
@pytest.mark.parametrize("way", ["function", "head", MODULE])
def test_infinite_logits_of_yes_or_no(way, dtype, name, device):
    """Of the right label NaN; of the wrong one inf, but NaN of -inf."""
    x = torch.tensor([INF, -INF, INF, -INF, NAN, 3.0], device=device, dtype=dtype)[:, None]
    target = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0], device=device, dtype=dtype)[:, None]
    ours, theirs = pair("binary_cross_entropy_with_logits", way)
    with fusedact.use_backend(name):
        value, *_ = pulled_back(ours, x, target, reduction="none")
        assert value.flatten().tolist()[:5] == pytest.approx([NAN, NAN, INF, NAN, NAN], nan_ok=True)
        alike(pulled_back(ours, x, target, reduction="none"), expected(theirs, dtype, x, target, reduction="none"))


@row(48)
@each_backend
@each_dtype
@pytest.mark.parametrize(("reduction", "value"), [("mean", NAN), ("sum", 0.0)])
@pytest.mark.parametrize("loss", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
def test_no_elements(loss, reduction, value, dtype, name, device):
    x = torch.rand(0, 1, device=device, dtype=dtype)
    for way in ("function", "module", *["head"] * ("logits" in loss)):
        with fusedact.use_backend(name):
            ours, *grads = pulled_back(pair(loss, way)[0], x, x, reduction=reduction)
        assert ours.item() == pytest.approx(value, nan_ok=True) and all(g.shape == x.shape for g in grads)


# Row 28 in the kernels: a label out of range makes NaN of its row, and nothing is read beside the logits


CANARY = 1e30


def between_canaries(t):
    """A view of it with numbers on either side that would show in any sum."""
    around = torch.full((len(t) + 4, *t.shape[1:]), CANARY, dtype=t.dtype, device=t.device)
    around[2:-2] = t
    return around, around[2:-2]


@row(28)
@pytest.mark.parametrize(
    "run",
    [
        lambda x, t, w: F.cross_entropy(x, t, w, reduction="none"),
        lambda x, t, w: F.cross_entropy(x, t, w, reduction="none", label_smoothing=0.1),
        lambda x, t, w: F.cross_entropy(x, t, w, reduction="sum", grad_in_forward=True),
        lambda x, t, w: F.nll_loss(x, t, w, reduction="none"),
        lambda x, t, w: F.linear_cross_entropy(x, torch.eye(3, device=x.device), t, weight=w, reduction="none"),
        lambda x, t, w: F.linear_cross_entropy(x, torch.eye(3, device=x.device), t, weight=w, reduction="sum"),
    ],
    ids=["none", "smoothed", "one launch", "nll", "head", "head in one"],
)
def test_a_label_out_of_range_is_nan_in_the_kernels(run, device, triton_backend, launches, monkeypatch):
    monkeypatch.setattr(fusedact.backend, "looks_at_values", lambda t: False)
    target = torch.tensor([0, 3, -1, 1, 2**40, 2**62, 2, -(2**63)], device=device)  # at 2**40 a read would be a fault
    inside = (target >= 0) & (target < 3)
    around, x = between_canaries(torch.linspace(-1, 1, 24, device=device).view(8, 3))
    of_class, weight = between_canaries(torch.tensor([0.5, 1.0, 2.0], device=device))
    before = around.clone(), of_class.clone()
    for rows in (slice(None), inside):
        own = x[rows].detach().requires_grad_()
        value = run(own, target[rows], weight)
        (grad,) = torch.autograd.grad(value.sum(), own)
        if isinstance(rows, slice):
            wrong, of_wrong = value, grad
            assert torch.equal(run(x, target, weight).isnan(), wrong.isnan())  # without a gradient too
    assert of_wrong[~inside].isnan().all() and torch.equal(of_wrong[inside], grad)
    assert torch.equal(wrong.isnan(), ~inside) if wrong.dim() else wrong.isnan()
    assert not wrong.dim() or torch.equal(wrong[inside], value)
    assert launches.count and torch.equal(around, before[0]) and torch.equal(of_class, before[1])


# Row 61: more numbers than 32 bits count


@row(61)
@pytest.mark.parametrize("turned", [False, True], ids=["rows apart", "classes apart"])
@pytest.mark.parametrize("loss", ["cross_entropy", "probabilities", "nll_loss", "multilabel_soft_margin_loss"])
def test_addresses_of_64_bits(loss, turned, far_rows, device, triton_backend):
    near = far_rows.clone()
    target = torch.arange(16 if turned else 4, device=device) % 4
    results = []
    for logits in (far_rows, near):
        logits = (logits.t() if turned else logits).detach().requires_grad_()
        if loss in ("probabilities", "multilabel_soft_margin_loss"):
            target = near.detach().sigmoid().t() if turned else near.detach().sigmoid()
        value = getattr(F, "cross_entropy" if loss == "probabilities" else loss)(logits, target, reduction="none")
        results.append((value, torch.autograd.grad(value.sum(), logits)[0]))
    assert all(torch.equal(far, close) for far, close in zip(*results, strict=True))
    theirs = stock_of("cross_entropy" if loss == "probabilities" else loss)
    stocks = theirs(near.t().float() if turned else near.float(), target.float() if loss[0] in "pm" else target,
                    reduction="none")  # fmt: skip
    torch.testing.assert_close(results[0][0].float(), stocks, rtol=2e-3, atol=2e-3)


@row(61)
def test_addresses_of_64_bits_of_a_gradient(far_rows, device, triton_backend):
    """Where the kernel writes: logits that their gradient replaces, and a gradient of its own."""
    near, target, losses = far_rows.clone(), torch.arange(4, device=device), torch.empty(2, 4, device=device)
    tile = cross_entropy.gradient_tile(16, 4, 2, 1, 32, 1)
    one = [
        cross_entropy.forward_with_gradient(x, target, None, None, -100, "sum", 0.0, 0.0, 0.0, tile)
        for x in (far_rows, near)
    ]
    assert all(torch.equal(*both) for both in zip(*one, strict=True))
    for x, own in zip((far_rows, near), losses, strict=True):
        cross_entropy.overwrite_with_gradient(x, target, None, None, own, None, -100, 0.0, 0.0, 0.0, tile)
    assert torch.equal(far_rows, near) and torch.equal(*losses)


@row(61)
def test_a_head_of_rows_far_apart(far_rows, device, triton_backend):
    w, target = torch.randn(5, 16, device=device).half(), torch.arange(4, device=device)
    far, near = (pulled_back_rows(x, w, target) for x in (far_rows, far_rows.clone()))
    assert all(torch.equal(*both) for both in zip(far, near, strict=True))


def pulled_back_rows(x, w, target):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    value = F.linear_cross_entropy(x, w, target)
    return F.linear_cross_entropy(x.detach(), w.detach(), target), value, *torch.autograd.grad(value, (x, w))
