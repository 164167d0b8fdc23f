"""What every test file shares: where kernels run, what memory nobody wrote holds, one oracle, a launch counter."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton, which reads it

import fusedact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every run, whoever draws them."""
    torch.manual_seed(0)


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
