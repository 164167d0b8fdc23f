"""What every test file shares: where kernels run, what memory nobody wrote holds, one oracle, a launch counter."""

import json
import os
import sys
from types import FunctionType, SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from samples import offline

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which reads it
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS is not deterministic

import fusedact
from fusedact import backend
from fusedact import functional as F
from fusedact.autograd.given_up import GIVEN_UP

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sys.addaudithook(offline.refuse)
settings.register_profile(
    "kernels",
    max_examples=10 if DEVICE == "cuda" else 40,  # on a GPU most examples are a compilation
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("kernels")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The rows of docs/contract.md that a test holds, into its reports, from which tools/contract.py reads them."""
    for item in items:
        rows = {row for mark in item.iter_markers("contract") for row in mark.args}
        item.user_properties += [("contract", row) for row in sorted(rows)]


def pytest_terminal_summary(terminalreporter) -> None:
    """What several processes gave beside one, as tests/test_distributed.py found it."""
    reports = (r for reports in terminalreporter.stats.values() for r in reports if getattr(r, "when", "") == "call")
    found = [json.loads(value) for r in reports for name, value in r.user_properties if name == "equality"]
    if not found:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "processes", "error", "of one process", title="several processes against float64")
    for row in sorted(found, key=lambda row: (row["what"], row["world"])):
        table.add_row(row["what"], str(row["world"]), f"{row['error']:.1e}", f"{row['of one process']:.1e}")
    Console(width=120).print(table)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every run, whoever draws them."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_given_up():
    """No kernel fails to compile unseen behind torch's answer. Tests of that clear up by themselves: `auto`."""
    yield
    found = [*GIVEN_UP, *filter(None, [backend._broken])]
    GIVEN_UP.clear()
    backend._broken = None
    assert not found


@pytest.fixture(autouse=DEVICE == "cpu")
def patched_once(monkeypatch):
    """The interpreter rewrites triton.language once for all launches of a test: half of its time or more."""
    from triton.runtime import interpreter

    kept = {}

    def patch(fn, own=interpreter._patch_lang):
        if fn not in kept:
            kept[fn] = own(fn)
        return SimpleNamespace(restore=lambda: None)

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    yield
    for scope in reversed(kept.values()):
        scope.restore()


@pytest.fixture
def one_thread():
    """On tiny networks torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: compiled on a GPU, interpreted on a CPU."""
    return DEVICE


@pytest.fixture
def triton_backend():
    """Kernels, asked for by name, over memory that is NaN until somebody writes it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with fusedact.use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _labels(x):
    return torch.arange(len(x), device=x.device) % 3


def _weights(x, dim=0):
    return torch.linspace(0.5, 1.5, x.shape[dim], dtype=x.dtype, device=x.device)


# Every op: a function, and the shapes of the numbers that it takes, of which each may want a gradient.
EVERY_OP = {
    "linear": (lambda x, w, b: F.linear(x, w, b), [(5, 7), (4, 7), (4,)]),
    "linear relu": (lambda x, w, b: F.linear(x, w, b, activation="relu"), [(5, 7), (4, 7), (4,)]),
    "linear gelu": (lambda x, w, b: F.linear(x, w, b, activation="gelu"), [(2, 3, 7), (4, 7), (4,)]),
    "linear prelu": (lambda x, w, s: F.linear(x, w, activation="prelu", slope=s), [(5, 7), (4, 7), (4,)]),
    "linear_chain": (
        lambda x, v, a, w, b: F.linear_chain(x, ((v, a, "relu"), (w, b, "gelu"))),
        [(5, 7), (6, 7), (6,), (4, 6), (4,)],
    ),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, activation="tanh"), [(2, 3, 6), (4, 3, 3), (4,)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, activation="silu"), [(2, 3, 5, 4), (4, 3, 3, 3), (4,)]),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, activation="relu"), [(2, 3, 4, 3), (3, 4, 2, 2), (4,)],
    ),
    "relu": (F.relu, [(5, 7)]),
    "gelu": (F.gelu, [(5, 7)]),
    "softsign": (F.softsign, [(5, 7)]),
    "prelu": (F.prelu, [(5, 7), (7,)]),
    "squared_relu": (F.squared_relu, [(5, 7)]),
    "gated": (lambda gate, up: F.gated(gate, up), [(5, 7), (5, 7)]),
    "softmax": (lambda x: F.softmax(x, 1), [(5, 7)]),
    "log_softmax": (lambda x: F.log_softmax(x, 0), [(5, 7)]),
    "softmin": (lambda x: F.softmin(x, 1), [(5, 7, 3)]),
    "cross_entropy": (lambda x: F.cross_entropy(x, _labels(x)), [(5, 7)]),
    "cross_entropy early": (lambda x: F.cross_entropy(x, _labels(x), grad_in_forward=True), [(5, 7)]),
    "cross_entropy none": (
        lambda x: F.cross_entropy(x, _labels(x), _weights(x, 1), reduction="none", label_smoothing=0.1), [(5, 7)],
    ),
    "cross_entropy of all": (
        lambda x: F.cross_entropy(x, _labels(x), z_loss=0.1, softcap=5.0, sample_weight=_weights(x)), [(5, 7)],
    ),
    "probabilities": (lambda x, t: F.cross_entropy(x, t), [(5, 7), (5, 7)]),
    "nll_loss": (lambda x: F.nll_loss(x, _labels(x), _weights(x, 1)), [(5, 7)]),
    "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), torch.full_like(x, 0.25)), [(5, 7)]),
    "bce with logits": (
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, pos_weight=_weights(x, 1)), [(5, 7), (5, 7)],
    ),
    "bce with logits none": (
        lambda x, t: F.binary_cross_entropy_with_logits(x, t, reduction="none"), [(5, 7), (5, 7)],
    ),
    "multilabel": (lambda x: F.multilabel_soft_margin_loss(x, torch.full_like(x, 0.75)), [(5, 7)]),
    "linear_cross_entropy": (
        lambda x, w, b: F.linear_cross_entropy(x, w, _labels(x), linear_bias=b), [(5, 7), (4, 7), (4,)],
    ),
    "linear_cross_entropy none": (
        lambda x, w: F.linear_cross_entropy(x, w, _labels(x), reduction="none"), [(5, 7), (4, 7)],
    ),
    "linear_bce": (
        lambda x, w, b: F.linear_binary_cross_entropy_with_logits(x, w, _weights(x)[:, None], linear_bias=b),
        [(5, 7), (1, 7), (1,)],
    ),
}  # fmt: skip


EACH_WAY = ("linear gelu", "relu", "cross_entropy early", "linear_bce")  # one of each way into autograd


class EveryOp:
    """One op of that table: run(*inputs()), of which each input is the same in every call and wants a gradient."""

    def __init__(self, name, backend, device) -> None:
        self.name, self.backend, self.device = name, backend, device
        self.run, self.shapes = EVERY_OP[name]

    def inputs(self, dtype=torch.float32, grad=True):
        generator = torch.Generator().manual_seed(1)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return [t.to(self.device, dtype).requires_grad_(grad) for t in drawn]

    def gradients(self, inputs):
        """Those of the inputs, where the result's is not the same everywhere."""
        y = self.run(*inputs)
        return torch.autograd.grad(y, inputs, self.dy(y))

    def dy(self, y):
        return torch.linspace(0.5, 2.0, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)


@pytest.fixture(
    params=[
        pytest.param((name, backend), id=f"{name}-{backend}", marks=[] if name in EACH_WAY else pytest.mark.exhaustive)
        for name in EVERY_OP
        for backend in ("torch", "triton")
    ]
)
def every_op(request, device):
    """In the PyTorch fallback, and as kernels. Those of EACH_WAY in every run, the others where all is run."""
    name, backend = request.param
    with fusedact.use_backend(backend):
        yield EveryOp(name, backend, device)


@pytest.fixture(params=["torch", "triton"])
def either_backend(request):
    """The PyTorch fallback; kernels."""
    with fusedact.use_backend(request.param):
        yield request.param


@pytest.fixture
def as_accurate_as_torch():
    """check(ours, torch's, truth): our error against float64 is at most twice torch's own in the same dtype.

    By norm and by its maximum, each relative to the truth's, plus 1e-6 (1e-12 in float64, whose truth is as rounded
    as it is). A maximum is one draw, in which torch may be lucky: a rounding of the result more. A handful of numbers
    is no norm but a few such draws: a few roundings more.
    """

    def errors(x, truth):
        x, truth = x.detach().double().cpu(), truth.detach().double().cpu()
        assert x.shape == truth.shape
        assert torch.equal(x.isnan(), truth.isnan()), "NaN in other places than the truth's"
        finite = truth.isfinite()
        infinite = ~finite & ~truth.isnan()
        assert torch.equal(x[infinite], truth[infinite]), "infinities in other places than the truth's"
        x, truth = x[finite], truth[finite]
        if not x.numel():
            return 0.0, 0.0
        return tuple(
            (size(x - truth) / (size(truth) or 1.0)).item() for size in (torch.linalg.norm, lambda t: t.abs().max())
        )

    def check(ours, stock, truth):
        assert ours.dtype == stock.dtype
        slack = 1e-12 if ours.dtype == torch.float64 else 1e-6
        rounding = torch.finfo(ours.dtype).eps
        few = 4 * rounding if truth.numel() < 32 else 0.0
        (norm, maximum), (stock_norm, stock_maximum) = errors(ours, truth), errors(stock, truth)
        assert norm <= 2 * stock_norm + slack + few, "norm"
        assert maximum <= 2 * stock_maximum + slack + max(few, rounding / 2), "maximum"

    return check


@pytest.fixture
def loss_as_accurate_as_torch(as_accurate_as_torch):
    """check(ours, stock, x, target, **options): a loss and the gradients of input and target, as that rule has it."""

    def check(ours, stock, x, target, **options):
        truth = stock, x.cpu().double(), target.cpu().double()
        three = []
        for function, *tensors in ((ours, x, target), (stock, x, target), truth):
            x_, target_ = (t.detach().requires_grad_() for t in tensors)
            given = {k: v.to(x_) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            value = function(x_, target_, **given)
            dy = torch.linspace(0.5, 2.0, value.numel(), dtype=x_.dtype, device=x_.device).view(value.shape)
            three.append((value, *torch.autograd.grad(value, (x_, target_), dy)))
        for results in zip(*three, strict=True):
            as_accurate_as_torch(*results)

    return check


@pytest.fixture
def far_rows(device, tmp_path):
    """float16 (4, 16), a row stride of 2**30: the third row's address needs 64 bits. The rest is never touched."""
    size = 3 * 2**30 + 16
    if device == "cpu":
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float16)
    else:
        storage = torch.empty(size, dtype=torch.float16, device=device)
    return storage.as_strided((4, 16), (2**30, 1)).copy_(torch.randn(4, 16))


class Launches:
    """Kernel launches since the last `reset`."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        self.count = 0


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """Counts every launch, compiled or interpreted."""
    if DEVICE == "cuda":
        from triton.runtime.jit import JITFunction as launcher

        from fusedact.kernels import launch

        method = "run"
        monkeypatch.setattr(launch, "_watched", lambda kernel: True)  # every launch goes by Triton's own way
    else:
        from triton.runtime.interpreter import GridExecutor as launcher

        method = "__call__"
    counter, original = Launches(), getattr(launcher, method)

    def counted(self, *args, **kwargs):
        counter.count += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(launcher, method, counted)
    return counter


@pytest.fixture
def auto(monkeypatch):
    """`auto` on a machine where Triton runs, and where nothing has failed yet."""
    monkeypatch.setattr(backend, "_broken", None)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    asks, on_gpu = backend.uses_triton, SimpleNamespace(is_cuda=True, is_meta=False, device=torch.device("cuda"))
    monkeypatch.setattr(backend, "uses_triton", lambda x: asks(on_gpu))
    with fusedact.use_backend("auto"):
        yield
    GIVEN_UP.clear()


def _raise(error):
    raise error


class Refused:
    """Which launches are refused, by the kernel's name, and how often that was."""

    def __init__(self) -> None:
        self.kernels, self.count = "none", 0
        self.error: Exception = RuntimeError("no luck\nwith this kernel")
        self.refuse = self.compiling = FunctionType(_raise.__code__, {"__name__": "triton.compiler.here"})
        self.launching = _raise


@pytest.fixture
def refused(monkeypatch):
    """Launches that raise an error, by default as it comes out of Triton's compiler."""
    if DEVICE == "cuda":
        from triton.runtime.jit import JITFunction as launcher

        from fusedact.kernels import launch

        method = "run"
        monkeypatch.setattr(launch, "_watched", lambda kernel: True)
    else:
        from triton.runtime.interpreter import GridExecutor as launcher

        method = "__call__"
    found, original = Refused(), getattr(launcher, method)

    def run(self, *args, **kwargs):
        if found.kernels in ("all", self.fn.__name__):
            found.count += 1
            found.refuse(found.error)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(launcher, method, run)
    return found
