"""What a launch may fail of, and what the user sees of it: the right answer and one warning, or the cause."""

import json
import re
import subprocess
import sys
import warnings
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

import fusedact
from fusedact import autograd, backend
from fusedact import functional as F
from fusedact.autograd.given_up import GIVEN_UP
from fusedact.fitting import training
from fusedact.fitting.loop import Loop
from fusedact.fitting.persistent import Persistent
from fusedact.kernels.faults import LaunchError

WARNING = "fusedact runs stock PyTorch operations: kernel .* cannot be compiled or loaded: .*no luck"


@pytest.fixture
def auto(monkeypatch):
    """`auto` on a machine where Triton runs, and where nothing has failed yet."""
    monkeypatch.setattr(backend, "_broken", None)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "uses_triton", lambda x: backend._broken is None and backend.get_backend() != "torch")
    before = GIVEN_UP.copy()
    with fusedact.use_backend("auto"):
        yield
    GIVEN_UP.intersection_update(before)


class Refused:
    """Which launches are refused, by the kernel's name, and how often that was."""

    def __init__(self) -> None:
        self.kernels, self.count = "none", 0
        self.error: Exception = RuntimeError("no luck\nwith this kernel")


@pytest.fixture
def refused(monkeypatch, device):
    if device == "cuda":
        from triton.runtime.jit import JITFunction as launcher

        method = "run"
    else:
        from triton.runtime.interpreter import GridExecutor as launcher

        method = "__call__"
    found, original = Refused(), getattr(launcher, method)

    def run(self, *args, **kwargs):
        if found.kernels in ("all", self.fn.__name__):
            found.count += 1
            raise found.error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(launcher, method, run)
    return found


def drawn(*shape, positive=False):
    return (torch.rand(shape) if positive else torch.randn(shape)).requires_grad_()


def labels(rows=6, classes=5):
    return torch.arange(rows) % classes


def linear(activation):
    return lambda x, w, b, slope=None: autograd.linear_act(x, w, b, slope, activation, ())


def chain(x, w, b, v, c):
    if autograd.can_be_chained(x, (w, b, v, c)):
        return autograd.linear_chain(x, (("gelu", ()), None), (w, b, None, v, c, None))
    return torch.nn.functional.linear(autograd.linear_act(x, w, b, None, "gelu", ()), v, c)


def head(reduction):
    def loss(x, w, b):
        return F.linear_cross_entropy(x, w, labels(), linear_bias=b, reduction=reduction)

    return loss


def every_row(x):
    loss, lse = F.cross_entropy(x, labels(), reduction="none", z_loss=0.1, return_lse=True)
    return loss + 2 * lse


OPS = {
    "linear": (linear("relu"), (6, 4), (5, 4), (5,)),
    "linear, from the pre-activation": (linear("gelu"), (2, 3, 4), (5, 4), (5,)),
    "linear, a slope": (linear("prelu"), (6, 4), (5, 4), (5,), (5,)),
    "chain": (chain, (6, 4), (5, 4), (5,), (3, 5), (3,)),
    "activation": (lambda x: autograd.activation(x, None, "gelu", ()), (6, 4)),
    "activation, from its output": (lambda x: autograd.activation(x, None, "tanh", ()), (6, 4)),
    "prelu": (lambda x, slope: autograd.activation(x, slope, "prelu", ()), (6, 4), (4,)),
    "gated": (lambda gate, up: autograd.gated(gate, up, "silu", ()), (6, 4), (6, 4)),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, activation="relu"), (2, 3, 6, 6), (4, 3, 3, 3), (4,)),
    "softmax": (lambda x: F.softmax(x, 1), (6, 5)),
    "log_softmax": (lambda x: F.log_softmax(x, 0), (6, 5)),
    "softmin": (lambda x: F.softmin(x, 1), (6, 5)),
    "cross_entropy": (lambda x: F.cross_entropy(x, labels(), label_smoothing=0.1), (6, 5)),
    "cross_entropy of rows": (every_row, (6, 5)),
    "cross_entropy, early": (lambda x: F.cross_entropy(x, labels(), grad_in_forward=True), (6, 5)),
    "nll_loss": (lambda x: F.nll_loss(x, labels()), (6, 5)),
    "bce": (lambda x: F.binary_cross_entropy(x.sigmoid(), torch.full((6, 5), 0.3)), (6, 5)),
    "bce with logits": (lambda x: F.binary_cross_entropy_with_logits(x, torch.full((6, 5), 0.3)), (6, 5)),
    "multilabel": (lambda x: F.multilabel_soft_margin_loss(x, torch.full((6, 5), 0.3), reduction="none"), (6, 5)),
    "head": (head("mean"), (6, 4), (5, 4), (5,)),
    "head of rows": (head("none"), (6, 4), (5, 4), (5,)),
    "binary head": (
        lambda x, w, b: F.linear_binary_cross_entropy_with_logits(x, w, torch.full((6, 1), 0.3), linear_bias=b),
        (6, 4), (1, 4), (1,),
    ),
}  # fmt: skip
every_op = pytest.mark.parametrize("name", OPS)


def with_gradients(function, tensors, between=lambda: None):
    y = function(*tensors)
    between()
    dy = torch.linspace(0.5, 2.0, y.numel()).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


def without_gradients(function, tensors, between=lambda: None):
    with torch.no_grad():
        return [function(*tensors)]


def under_a_mode(function, tensors, between=lambda: None):
    with FlopCounterMode(display=False):
        return with_gradients(function, tensors, between)


def compiled(function, tensors, between=lambda: None):
    torch._dynamo.reset()
    return with_gradients(torch.compile(function, backend="aot_eager", fullgraph=True), tensors, between)


WAYS = [
    pytest.param(with_gradients, id="with gradients"),
    pytest.param(without_gradients, id="without", marks=pytest.mark.exhaustive),
    pytest.param(under_a_mode, id="under a mode", marks=pytest.mark.exhaustive),
    pytest.param(compiled, id="compiled", marks=pytest.mark.exhaustive),
]


@pytest.mark.contract(80)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fails", ["forward", "backward"])
@every_op
def test_what_cannot_be_compiled_is_torchs_with_one_warning(name, fails, way, auto, refused):
    function, *shapes = OPS[name]
    tensors = [drawn(*shape) for shape in shapes]
    with fusedact.use_backend("torch"):
        expected = with_gradients(function, tensors)
    refused.count = 0

    def refuse():
        refused.kernels = "all"

    if fails == "forward":
        refuse()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            found = way(function, tensors, refuse)
            for ours, stock in zip(found, expected, strict=False):
                torch.testing.assert_close(ours, stock)
    told = [text for text in (str(warning.message) for warning in told) if "fusedact" in text]
    assert all(re.search(WARNING, text) for text in told)
    assert len(told) == (0 if fails == "backward" and way is without_gradients else 1), told


@pytest.mark.contract(80)
@pytest.mark.parametrize("kernels", ["_forward_kernel", "_backward_kernel"])
def test_asked_for_by_name_it_is_an_error_with_its_cause(kernels, auto, refused):
    """Also where `auto` has given it up already: it is tried again."""
    x = drawn(6, 4)
    refused.kernels = kernels
    with pytest.warns(RuntimeWarning, match=WARNING):
        autograd.activation(x, None, "gelu", ()).sum().backward()
    with fusedact.use_backend("triton"):
        tried = refused.count
        with pytest.raises(RuntimeError, match=r"kernel elementwise.* cannot be compiled or loaded: .*no luck") as told:
            autograd.activation(x, None, "gelu", ()).sum().backward()
    assert isinstance(told.value, LaunchError) and str(told.value.__cause__).startswith("no luck")
    assert refused.count == tried + 1


@pytest.mark.contract(80)
def test_what_was_given_up_is_not_tried_again_and_nothing_else_is(auto, refused):
    """Others are other activations and dtypes; another number is none."""
    refused.kernels = "_forward_kernel"
    x = drawn(6, 4)
    with pytest.warns(RuntimeWarning, match=WARNING):
        for slope in (0.1, 0.2):
            autograd.activation(x, None, "leaky_relu", (slope,))
    assert refused.count == 1
    autograd.activation(x, None, "relu", ())
    autograd.activation(x.half(), None, "leaky_relu", (0.1,))
    assert refused.count == 3


@pytest.mark.contract(80)
def test_no_op_is_tried_where_none_can_be_compiled(auto, refused, monkeypatch):
    refused.kernels, refused.error = "all", OSError("no space left")
    with pytest.warns(RuntimeWarning, match="no space left") as told:
        for _ in range(2):
            F.softmax(drawn(6, 5), 1)
            F.linear(drawn(6, 4), drawn(5, 4), activation="relu")
    assert len(told) == 1 and not backend.uses_triton(torch.empty(0))


@pytest.mark.contract(80)
def test_a_second_derivative_of_what_was_given_up(auto, refused):
    x, w, b = drawn(6, 4), drawn(5, 4), drawn(5)
    refused.kernels = "all"
    with pytest.warns(RuntimeWarning, match=WARNING):
        assert torch.autograd.gradcheck(linear("gelu"), [t.detach().double().requires_grad_() for t in (x, w, b)])
        assert torch.autograd.gradgradcheck(linear("gelu"), [t.detach().double().requires_grad_() for t in (x, w, b)])


# Triton that is there and does not start


class Raising(ModuleType):
    """As an installation of which a part is missing, or that this system's libraries are too old for."""

    def __init__(self, error):
        super().__init__("triton")
        self.error = error

    def __getattr__(self, name):
        raise self.error


@pytest.mark.contract(80)
@pytest.mark.parametrize("error", [OSError("version GLIBC_2.38 not found"), AttributeError("knobs")], ids=repr)
def test_a_broken_triton_is_named(error, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", Raising(error))
    problem = backend._triton_problem.__wrapped__(torch.device("cuda"))
    assert problem == f"Triton does not import ({type(error).__name__}: {error})"


@pytest.mark.contract(72)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver starts")
def test_without_a_driver_no_op_is_tried_and_the_cause_is_told(monkeypatch):
    assert re.search(r"0 active drivers \(\[\]\). There should only be one.", backend._driver_problem())


@pytest.mark.contract(72)
def test_a_cpu_tensor_without_the_interpreter_is_torchs_or_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr(backend, "_triton_problem", backend._triton_problem.__wrapped__)
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    x = torch.randn(3)
    with fusedact.use_backend("auto"):
        torch.testing.assert_close(F.relu(x), x.relu())
    with fusedact.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run on cpu: Triton runs on GPUs"):
        F.relu(x)


# Memory


def test_a_kernels_own_shortage_of_memory_is_torchs_error(auto, refused):
    refused.kernels, refused.error = "all", RuntimeError("Triton Error [CUDA]: out of memory")
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        F.softmax(drawn(6, 5), 1)
    assert not backend._warned


SHORTAGE = """
import resource, sys, json, torch, fusedact
from fusedact import functional as F

def memory(more):
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = resource.RLIM_INFINITY if more is None else size + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

def refused(run):
    try:
        run()
    except RuntimeError as error:
        return type(error).__name__ + ": " + str(error)
    finally:
        memory(None)

def numbers():
    known = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*model.parameters(), *known)]

def loss(y, target):
    calls.append(1)
    if len(calls) == 3:
        left.extend(numbers())
        memory(2**22)
    return F.binary_cross_entropy_with_logits(y, target)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
x, y = torch.rand(2**18, 64), torch.rand(2**18, 1)
calls, left, told = [], [], {}
w, b = torch.rand(64, 64, requires_grad=True), torch.rand(64, requires_grad=True)
memory(2**22)
told["forward"] = refused(lambda: F.linear(x, w, b, activation="relu"))
z = F.linear(x, w, b, activation="relu").sum()
memory(2**22)
told["backward"] = refused(z.backward), w.grad is None and b.grad is None
F.linear(x, w, b, activation="relu").sum().backward()
fit = lambda epochs: fusedact.fit(
    model, x, y, loss=loss, optimizer=optimizer, epochs=epochs, batch_size=2**16, engine="loop", shuffle=False
)
told["fit"] = refused(lambda: fit(1)), all(map(torch.equal, numbers(), left)), len(calls)
told["after it"] = fit(1).costs[0] < 1
print(json.dumps(told))
"""


@pytest.mark.contract(60, 83)
def test_a_shortage_of_memory_is_torchs_error_and_leaves_all_as_before_that_step():
    done = subprocess.run([sys.executable, "-c", SHORTAGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    message = r"RuntimeError: .*DefaultCPUAllocator: can't allocate memory"
    assert re.match(message, told["forward"]) and told["after it"]
    (backward, untouched), (fit, as_before, calls) = told["backward"], told["fit"]
    assert re.match(message, backward) and untouched
    assert re.match(message, fit) and as_before and calls == 3


# Training


def small_job(engine=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sigmoid(), torch.nn.Linear(4, 1), torch.nn.Sigmoid())
    x, y = torch.rand(16, 3), torch.rand(16, 1)
    options = {"loss": torch.nn.BCELoss(), "optimizer": torch.optim.SGD(model.parameters(), 0.5), "batch_size": 4}
    return model, lambda: fusedact.fit(model, x, y, epochs=3, engine=engine, **options)


@pytest.mark.contract(80)
def test_fit_trains_by_the_next_engine(auto, refused, monkeypatch):
    expected, fit = small_job(engine="loop")
    with fusedact.use_backend("torch"):
        fit()
    monkeypatch.setitem(training.FASTEST_FIRST, "cpu", (Persistent, Loop))
    model, fit = small_job()
    refused.kernels = "_train_kernel"
    with pytest.warns(RuntimeWarning, match="training_tiny._train_kernel cannot be compiled or loaded") as told:
        fitted = fit()
    assert len(told) == 1 and fitted.engine == "loop" and "persistent: kernel training_tiny" in fitted.reason
    for ours, stock in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, stock)


@pytest.mark.contract(80)
def test_fit_by_an_engine_that_was_named_is_an_error_with_all_as_before(auto, refused):
    model, fit = small_job(engine="persistent")
    before = [p.clone() for p in model.parameters()]
    refused.kernels = "_train_kernel"
    with pytest.raises(RuntimeError, match=r"training_tiny._train_kernel cannot be compiled or loaded: .*no luck"):
        fit()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


@pytest.mark.contract(80)
def test_fit_many_trains_by_torchs_operations(auto, refused):
    def fit_many():
        model, x, y = torch.nn.Linear(3, 1), torch.rand(16, 3), torch.rand(16, 1)
        return fusedact.fit_many(
            model, x, y, loss=torch.nn.MSELoss(), optimizer=torch.optim.SGD(model.parameters(), 0.1), epochs=3,
            batch_size=4, seeds=range(3), generator=torch.Generator().manual_seed(3),
        )  # fmt: skip

    torch.manual_seed(0)
    with fusedact.use_backend("torch"):
        expected = fit_many()
    torch.manual_seed(0)
    refused.kernels = "_train_kernel"
    with pytest.warns(RuntimeWarning, match="training_tiny._train_kernel cannot be compiled or loaded"):
        found = fit_many()
    assert found.engine == "batched" and "no luck" in found.reason
    torch.testing.assert_close(found.costs, expected.costs)
