"""The head without its logits: linear_cross_entropy and LinearCrossEntropyLoss, against PyTorch in float64."""

import importlib
import itertools
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fusedact
from fusedact import autograd, nn, tuning
from fusedact import functional as F
from fusedact.autograd.linear_cross_entropy import chunk_rows
from fusedact.functional import heads

pytestmark = pytest.mark.usefixtures("triton_backend")
stock = torch.nn.functional

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIONS = [
    {},
    {"linear_bias": True, "weight": True},
    {"linear_bias": True, "weight": True, "label_smoothing": 0.1},
    {"probabilities": True, "linear_bias": True, "label_smoothing": 0.2},
    {"z_loss": 0.05, "softcap": 3.0, "sample_weight": True},
]


class Chunk:
    """Options that say how many rows a chunk has."""

    def __init__(self, rows):
        self.batch_chunk_size = rows


def sample(options, shape=(11, 37, 19), dtype=torch.float32, device="cpu"):
    """x (M, K), W (C, K), the target and the options, of which True stands for a tensor to be drawn."""
    M, C, K = shape
    generator = torch.Generator().manual_seed(0)
    options = dict(options)
    drawn = {name: torch.randn(size, generator=generator) for name, size in {"x": (M, K), "w": (C, K)}.items()}
    target = torch.randint(0, C, (M,), generator=generator)
    if options.pop("probabilities", False):
        target = torch.randn(M, C, generator=generator).softmax(1).to(device, dtype)
    elif M > 2:
        target[M // 2] = -100
    for name, size in (("linear_bias", C), ("weight", C), ("sample_weight", M)):
        if options.get(name):
            options[name] = torch.rand(size, generator=generator).to(device, dtype)
    return *((t / K**0.25).to(device, dtype) for t in drawn.values()), target.to(device), options


def formula(x, w, target, linear_bias=None, options=None, **others):
    return F.cross_entropy(stock.linear(x, w, linear_bias), target, **others)


def results(function, x, w, target, options, dloss=None):
    """The loss and the gradients of x, W and the bias where there is one."""
    leaves = {name: t.detach().requires_grad_() for name, t in (("x", x), ("w", w))}
    if options.get("linear_bias") is not None:
        leaves["linear_bias"] = options["linear_bias"].detach().requires_grad_()
        options = options | {"linear_bias": leaves["linear_bias"]}
    loss = function(leaves["x"], leaves["w"], target, **options)
    if dloss is None:
        dloss = torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, tuple(leaves.values()), dloss)]


def double(t):
    return t.detach().cpu().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def check(x, w, target, options, compare, rows=None, function=F.linear_cross_entropy):
    ours = results(function, x, w, target, options | ({} if rows is None else {"options": Chunk(rows)}))
    with fusedact.use_backend("torch"):
        torchs = results(formula, x, w, target, options)
        doubles = {name: double(value) for name, value in options.items()}
        truth = results(formula, double(x), double(w), double(target.cpu()), doubles)
    for three in zip(ours, torchs, truth, strict=True):
        compare(*three)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_in_chunks(options, reduction, backend, device, as_accurate_as_torch):
    with fusedact.use_backend(backend):
        check(*sample(options | {"reduction": reduction}, device=device), as_accurate_as_torch, rows=4)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[4]], ids=str)
def test_every_dtype(options, dtype, backend, device, as_accurate_as_torch):
    with fusedact.use_backend(backend):
        check(*sample(options, dtype=dtype, device=device), as_accurate_as_torch, rows=5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows", [1, 3, 11, 100])
def test_chunks_of_any_size(rows, backend, device, as_accurate_as_torch):
    with fusedact.use_backend(backend):
        check(*sample({"linear_bias": True}, device=device), as_accurate_as_torch, rows=rows)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (70, 300, 40), (33, 65, 129)], ids=str)
def test_shapes(shape, device, as_accurate_as_torch):
    check(*sample({"linear_bias": True}, shape, device=device), as_accurate_as_torch)


def test_strides(device, as_accurate_as_torch):
    x, w, target, options = sample({"linear_bias": True, "weight": True, "sample_weight": True}, device=device)
    sliced = {name: torch.stack([t, t], -1)[..., 0] for name, t in options.items()}
    arguments = x.t().contiguous().t(), torch.stack([w, w], -1)[..., 0], torch.stack([target, target], 1)[:, 0]
    check(*arguments, sliced, as_accurate_as_torch, rows=4)
    with torch.no_grad():
        torch.testing.assert_close(
            F.linear_cross_entropy(*arguments, **sliced), F.linear_cross_entropy(x, w, target, **options)
        )


@pytest.mark.parametrize(
    ("options", "reduction", "dtype"),
    [
        *itertools.product(OPTIONS, ["mean", "none"], [torch.float32]),
        *itertools.product([OPTIONS[1], OPTIONS[4]], ["sum"], DTYPES),
    ],
    ids=str,
)
def test_without_gradients(options, reduction, dtype, device, as_accurate_as_torch, launches):
    x, w, target, options = sample(options | {"reduction": reduction}, dtype=dtype, device=device)
    ours = F.linear_cross_entropy(x, w, target, **options)
    assert launches.count == 2 and not ours.requires_grad
    doubles = {name: double(value) for name, value in options.items()}
    with fusedact.use_backend("torch"):
        as_accurate_as_torch(
            ours,
            formula(x, w, target, **options),
            formula(double(x), double(w), double(target.cpu()), **doubles),
        )


@pytest.mark.parametrize("many", [1, 3, 70])
def test_tiles_of_classes_without_gradients(many, device):
    """None but one class possible, one tile of nothing but -inf, and more tiles than are combined at once."""
    C = 64 * many
    x, w, target, _ = sample({}, (5, C, 3), device=device)
    bias = torch.full((C,), -float("inf"), device=device).index_fill(0, target[0], 0.5)
    with torch.no_grad():
        loss = F.linear_cross_entropy(x, w, target, linear_bias=bias, reduction="none")
        torch.testing.assert_close(loss, formula(x, w, target, bias, reduction="none"))
        loss = F.linear_cross_entropy(x, w, target, label_smoothing=0.1, reduction="none")
        torch.testing.assert_close(loss, formula(x, w, target, label_smoothing=0.1, reduction="none"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers(value, device):
    x, w, target, _ = sample({}, (5, 70, 3), device=device)
    bias = torch.zeros(70, device=device).index_fill(0, target[1], value)
    truth = formula(x, w, target, bias, reduction="none")
    for grad in (False, True):
        ours = F.linear_cross_entropy(x.requires_grad_(grad), w, target, linear_bias=bias, reduction="none")
        torch.testing.assert_close(ours.detach(), truth.detach(), equal_nan=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows_and_all_ignored(reduction, backend, device):
    with fusedact.use_backend(backend):
        for M, options in itertools.product((0, 5), ({}, {"sample_weight": True})):
            x, w, _, options = sample(options | {"linear_bias": True}, (M, 7, 3), device=device)
            target = torch.full((M,), -100, device=device)
            options |= {"reduction": reduction, "options": Chunk(2)}
            loss, *gradients = results(F.linear_cross_entropy, x, w, target, options)
            torch.testing.assert_close(loss, formula(x, w, target, **options), equal_nan=True)
            assert not any(g.isnan().any() or g.any() for g in gradients)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_wanted_gradients(wanted, reduction, device):
    x, w, target, options = sample({"linear_bias": True, "reduction": reduction}, device=device)
    tensors = [t.requires_grad_(want) for t, want in zip((x, w, options.pop("linear_bias")), wanted, strict=True)]
    leaves = [t for t in tensors if t.requires_grad]
    x, w, bias = tensors
    ours = F.linear_cross_entropy(x, w, target, linear_bias=bias, options=Chunk(4), **options)
    truth = formula(x, w, target, bias, **options)
    for own, theirs in zip(
        torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(truth.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_backward_twice_and_with_any_dloss(dtype, backend, device):
    with fusedact.use_backend(backend):
        x, w, target, _ = sample({}, dtype=dtype, device=device)
        x, w = x.requires_grad_(), w.requires_grad_()
        loss, truth = F.linear_cross_entropy(x, w, target, options=Chunk(4)), formula(x, w, target)
        tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.float16 else {}
        for dloss in (1.0, 3.0, 0.25):
            dloss = torch.tensor(dloss, dtype=dtype, device=device)
            ours = torch.autograd.grad(loss, (x, w), dloss, retain_graph=True)
            torchs = torch.autograd.grad(truth, (x, w), dloss, retain_graph=True)
            for own, theirs in zip(ours, torchs, strict=True):
                torch.testing.assert_close(own, theirs, **tolerance)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("scale", [1 / 255, 255.0], ids=["small", "large"])
def test_float16_gradients_stay_in_range(scale, backend, device):
    """A row's alone vanish where a mean divides them at once; their sum overflows where it does so at the end."""
    x = (scale * torch.rand(1000, 8, device=device)).half()
    w, target = torch.zeros(4, 8, device=device, dtype=torch.float16), torch.zeros(1000, dtype=int, device=device)
    dloss = torch.tensor(0.5 if scale > 1 else 4096.0, device=device)
    tensors = [t.requires_grad_() for t in (x, w)]
    with fusedact.use_backend(backend):
        loss = F.linear_cross_entropy(*tensors, target, options=Chunk(500))
        gradients = torch.autograd.grad(loss, tensors, dloss.half())
    doubles = [double(t).requires_grad_() for t in (x, w)]
    truths = torch.autograd.grad(formula(*doubles, target.cpu()), doubles, dloss.cpu().double())
    for gradient, truth in zip(gradients, truths, strict=True):
        assert (gradient.cpu().double() - truth).norm() <= 5e-3 * truth.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative(reduction, device):
    x, w, target, _ = sample({}, (4, 5, 3), torch.float64, device)
    x, w = x.requires_grad_(), w.requires_grad_()

    def loss(x, w):
        return F.linear_cross_entropy(x, w, target, reduction=reduction, z_loss=0.1, options=Chunk(3))

    assert torch.autograd.gradcheck(loss, (x, w), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (x, w), fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_bitwise_the_same_from_run_to_run(backend, device):
    arguments = sample({"linear_bias": True, "weight": True, "options": Chunk(16)}, (50, 130, 20), device=device)
    with fusedact.use_backend(backend):
        runs = [results(F.linear_cross_entropy, *arguments) for _ in range(2)]
        assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
        with torch.no_grad():
            assert torch.equal(*(F.linear_cross_entropy(*arguments[:3], **arguments[3]) for _ in range(2)))


class Widest(TorchDispatchMode):
    """The most rows among all results that are as wide as the logits."""

    def __init__(self, classes):
        super().__init__()
        self.classes, self.rows = classes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dim() == 2 and output.shape[1] == self.classes:
            self.rows = max(self.rows, len(output))
        return output


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_chunks_logits_are_the_widest(grad, backend, device):
    x, w, target, _ = sample({}, (64, 301, 8), device=device)
    with fusedact.use_backend(backend), torch.no_grad():
        arguments = x, w, None, target, None, None, -100, "mean", 0.0, 0.0, 0.0, 16, [grad] * 2 + [False]
        with Widest(301) as seen:
            from fusedact.autograd.linear_cross_entropy import _launch

            _launch(backend == "triton", *arguments)
    assert seen.rows == (0 if backend == "triton" and not grad else 16)


@pytest.mark.parametrize(
    ("rows", "classes", "asked", "expected"),
    [(100, 10, 0, 128), (4096, 2**17, 0, 128), (3000, 2**14, 0, 1024), (5, 2**30, 0, 1), (0, 5, 0, 1), (9, 5, 4, 4)],
)
def test_rows_of_a_chunk_on_a_cpu(rows, classes, asked, expected):
    assert chunk_rows(torch.empty(rows, 1), classes, asked) == expected


@pytest.mark.parametrize("function", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_transforms(function, device):
    x, w, target, _ = sample({}, (4, 5, 3), device=device)
    torch.testing.assert_close(
        function(lambda x: F.linear_cross_entropy(x, w, target))(x), function(lambda x: formula(x, w, target))(x)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled(reduction, device):
    torch.compiler.reset()
    x, w, target, options = sample({"linear_bias": True, "reduction": reduction}, device=device)
    compiled = torch.compile(F.linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(
        results(compiled, x, w, target, options), results(F.linear_cross_entropy, x, w, target, options), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False], [False, False, False]])
@pytest.mark.parametrize(
    ("reduction", "dtype"), [("mean", torch.float16), ("sum", torch.float32), ("none", torch.float32)]
)
def test_opcheck(reduction, dtype, wanted, device):
    x, w, target, options = sample({"linear_bias": True}, dtype=dtype, device=device)
    tensors = [t.requires_grad_(want) for t, want in zip((x, w, options["linear_bias"]), wanted, strict=True)]
    arguments = *tensors, target, None, None, -100, reduction, 0.0, 0.0, 0.0, 4, wanted
    torch.library.opcheck(
        torch.ops.fusedact.linear_cross_entropy.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad, device):
    """The product in bfloat16, the loss in float32, gradients as the parameters."""
    x, w, target, options = sample({"linear_bias": True, "weight": True}, device=device)
    x, w = x.requires_grad_(grad), w.requires_grad_(grad)
    with torch.autocast(device, torch.bfloat16):
        ours = F.linear_cross_entropy(x, w, target, **options)
        truth = stock.cross_entropy(stock.linear(x, w, options["linear_bias"]).float(), target, options["weight"])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-2, atol=0)
    if grad:
        for own, theirs in zip(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(truth, (x, w)), strict=True):
            assert own.dtype == theirs.dtype
            torch.testing.assert_close(own, theirs, rtol=2e-2, atol=2e-3)


def test_one_row(device):
    x, w, target, options = sample({"linear_bias": True, "sample_weight": True}, (1, 7, 3), device=device)
    weight = options.pop("sample_weight")
    for reduction in ("mean", "none"):
        one = F.linear_cross_entropy(
            x[0], w, target[0], reduction=reduction, sample_weight=weight[0], softcap=5.0, **options
        )
        rows = F.linear_cross_entropy(x, w, target, reduction=reduction, sample_weight=weight, softcap=5.0, **options)
        assert one.shape == () and torch.equal(one, rows.view(()))


def test_more_dimensions(device):
    x, w, _, _ = sample({}, (6, 20, 3), device=device)
    target, bias = torch.randint(0, 5, (6, 2, 2), device=device), torch.randn(5, 2, 2, device=device)
    loss = F.linear_cross_entropy(x, w.view(5, 2, 2, 3), target, linear_bias=bias, z_loss=0.1)
    logits = stock.linear(x, w, bias.flatten()).view(6, 5, 2, 2)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, z_loss=0.1))


WRONG = {
    "dimensionality 1 or 2, got 3": lambda: ((2, 3, 3), (2, 3), (3, 2), {}),
    "linear_weight with dimensionality at least 2, got 1": lambda: ((2, 3), (2,), (2, 2), {}),
    "equal input and linear_weight last dimensions [(]in_features[)], got 3 and 4": lambda: (
        (2, 3),
        (2, 4),
        (2, 2),
        {},
    ),
    "expected linear_bias shape [(]2,[)], got [(]3,[)]": lambda: (
        (2, 3),
        (2, 3),
        (2, 2),
        {"linear_bias": torch.ones(3)},
    ),
    "ignore_index cannot be specified": lambda: ((2, 3), (2, 3), (2, 2), {"ignore_index": 0}),
    "K-dimensional loss defined by linear_weight shape [(]2, 4, 3[)] requires": lambda: ((3,), (2, 4, 3), (2, 4), {}),
}


@pytest.mark.contract(49)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("here", [True, False], ids=["torch has it", "torch does not"])
@pytest.mark.parametrize("match", WRONG)
def test_torchs_errors(match, here, backend, device, monkeypatch, launches):
    """In its own words, where it has the function to say them."""
    with torch.device(device):
        x, w, target, options = WRONG[match]()
        tensors = [torch.randn(shape) for shape in (x, w, target)]
    stocks = getattr(stock, "linear_cross_entropy", None)
    if not here:
        monkeypatch.delattr(stock, "linear_cross_entropy", raising=False)
    with fusedact.use_backend(backend), pytest.raises(RuntimeError, match=match) as ours:
        F.linear_cross_entropy(*tensors, **options)
    assert launches.count == 0
    if stocks is not None:
        with pytest.raises(RuntimeError) as theirs:
            stocks(*tensors, **options)
        assert (ours.type, str(ours.value)) == (theirs.type, str(theirs.value))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reduction": "foo"}, ValueError, "foo is not a valid value for reduction"),
        ({"z_loss": -1.0}, ValueError, "z_loss must not be negative"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"sample_weight": torch.ones(3)}, ValueError, "sample_weight must have one number for each row"),
        ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing must be between 0.0 and 1.0"),
        ({"weight": torch.ones(4)}, RuntimeError, "weight tensor should be defined either for all 5"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_other_errors(options, error, match, device):
    x, w, target, _ = sample({}, (4, 5, 3), device=device)
    options = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    with pytest.raises(error, match=match):
        F.linear_cross_entropy(x, w, target.clamp(min=0), **options)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_class_out_of_range(backend, device, monkeypatch):
    if device == "cuda" and backend == "torch":
        pytest.skip("the answer is stock's, of which the context dies")
    monkeypatch.setattr(fusedact.backend, "_checks", lambda: True)
    x, w, target, _ = sample({}, (4, 5, 3), device=device)
    target[0] = 5
    with fusedact.use_backend(backend), pytest.raises(IndexError, match="Target 5 is out of bounds"):
        F.linear_cross_entropy(x, w, target, options=Chunk(2))


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch has none")
def test_module_is_torchs(device):
    given = {"bias": True, "weight": torch.rand(7), "label_smoothing": 0.1, "ignore_index": 2, "device": device}
    theirs, ours = (
        cls(5, 7, **given).to(device) for cls in (torch.nn.LinearCrossEntropyLoss, nn.LinearCrossEntropyLoss)
    )
    ours.load_state_dict(theirs.state_dict())
    assert repr(ours) == repr(theirs) and isinstance(ours, torch.nn.LinearCrossEntropyLoss)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x, target = torch.randn(6, 5, device=device), torch.randint(0, 7, (6,), device=device)
    torch.testing.assert_close(ours(x, target), theirs(x, target))
    with pytest.raises(RuntimeError, match=r"expected weight shape to be [(]7,[)], got [(]6,[)]"):
        nn.LinearCrossEntropyLoss(5, 7, weight=torch.rand(6))
    with pytest.raises(RuntimeError, match="expected label_smoothing to be in range"):
        nn.LinearCrossEntropyLoss(5, 7, label_smoothing=1.5)


def test_module_with_more(device):
    head = nn.LinearCrossEntropyLoss(5, 7, out_features=(2,), z_loss=0.1, softcap=4.0).to(device)
    x, target = torch.randn(6, 5, device=device), torch.randint(0, 7, (6, 2), device=device)
    weight = torch.rand(6, 2, device=device)
    logits = stock.linear(x, head.linear.weight).view(6, 7, 2)
    truth = F.cross_entropy(logits, target, z_loss=0.1, softcap=4.0, sample_weight=weight)
    torch.testing.assert_close(head(x, target, sample_weight=weight), truth)


def test_a_small_head_on_a_cpu_is_torchs_own(monkeypatch):
    x, w, target, _ = sample({})
    with fusedact.use_backend("torch"), warnings.catch_warnings():
        monkeypatch.setattr(autograd, "linear_cross_entropy", None)
        assert torch.equal(F.linear_cross_entropy(x, w, target), stock.cross_entropy(stock.linear(x, w), target))


@pytest.mark.parametrize("measured", [0, 3, None], ids=["rule", "rows", "torch's own"])
def test_the_chunks_are_those_that_were_measured(measured, monkeypatch):
    if measured is None and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunks of its own")
    monkeypatch.setattr(tuning, "choose", lambda *problem: measured)
    x, w, target = torch.randn(7, 5, requires_grad=True), torch.randn(11, 5, requires_grad=True), torch.arange(7)
    options = {"options": SimpleNamespace(batch_chunk_size=7)}
    monkeypatch.setattr(heads, "SMALL", 0)
    with fusedact.use_backend("auto"):
        asked, op = [], importlib.import_module("fusedact.autograd.linear_cross_entropy")
        monkeypatch.setattr(
            op, "chunk_rows", lambda x, classes, chunk: asked.append(chunk) or chunk_rows(x, classes, chunk)
        )
        losses = [F.linear_cross_entropy(x, w, target, **given) for given in ({}, options)]
        smoothed = F.linear_cross_entropy(x, w, target, label_smoothing=0.1)
    torch.testing.assert_close(*losses)
    assert asked == ([7, 0] if measured is None else [measured, 7, measured])
    gradients = [torch.autograd.grad(loss, (x, w)) for loss in losses]
    torch.testing.assert_close(*gradients)
    assert smoothed.isfinite()
