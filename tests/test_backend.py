"""What backend.py answers, each question by itself, for GPUs that are not here too."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad, profiler
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fusedact
from fusedact import backend

GPU = torch.device("cuda", 1)


class OnGpu:
    """As much of a tensor on the second GPU as the questions ask about."""

    is_cuda, is_meta, device = True, False, GPU

    def get_device(self):
        return self.device.index


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Transparent(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl


class Opaque(torch.Tensor):
    pass


@pytest.fixture
def on_gpu(monkeypatch):
    """tell(capability=, hip=, ...): what torch is to say of the GPUs."""

    def tell(capability=(9, 0), hip=None, current=0, capturing=False, **properties):
        told = {"warp_size": 32, "multi_processor_count": 7, "shared_memory_per_block": 1024, "name": "a GPU"}
        told |= {"major": capability[0], "minor": capability[1]} | properties
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(**told))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        for cached in (backend.chip, backend.multiprocessors, backend.is_ampere, backend._checks):
            cached.cache_clear()

    yield tell
    for cached in (backend.chip, backend.multiprocessors, backend.is_ampere, backend._checks):
        cached.cache_clear()


# ---- which implementation


@pytest.mark.parametrize(
    ("name", "x", "problem", "expected"),
    [
        ("auto", torch.ones(1), None, False),
        ("auto", OnGpu(), None, True),
        ("torch", torch.ones(1), None, False),
        ("torch", OnGpu(), None, False),
        ("triton", torch.ones(1), None, True),
        ("triton", OnGpu(), None, True),
        ("triton", torch.ones(1, device="meta"), None, False),
        ("torch", OnGpu(), "it is broken", False),
        ("auto", torch.ones(1), "it is broken", False),
    ],
)
def test_which_tensors_triton_takes(name, x, problem, expected, monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: problem)
    with warnings.catch_warnings(), fusedact.use_backend(name):
        warnings.simplefilter("error")
        assert backend.uses_triton(x) is expected


def test_the_choice_of_the_environment_is_asked_for_at_the_first_tensor(monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    for name in ("triton", "torch"):
        monkeypatch.setenv("FUSEDACT_BACKEND", name)
        monkeypatch.setattr(backend, "_chosen", None)
        assert backend.uses_triton(torch.ones(1)) is (name == "triton")


def test_where_no_kernel_can_be_launched_only_its_name_has_one_tried(monkeypatch):
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    monkeypatch.setattr(backend, "_broken", "no compiler")
    found = {}
    for name in backend.BACKENDS:
        with fusedact.use_backend(name):
            found[name] = backend.uses_triton(OnGpu())
    assert found == {"auto": False, "triton": True, "torch": False}


def test_where_triton_cannot_run_on_a_gpu_torch_answers_with_one_warning(monkeypatch):
    problem = "the moon is full"
    monkeypatch.setattr(backend, "triton_problem", lambda device: problem)
    monkeypatch.setattr(backend, "_warned", set())
    with fusedact.use_backend("auto"):
        with pytest.warns(RuntimeWarning, match=f"fusedact runs stock PyTorch operations: {problem}"):
            assert not backend.uses_triton(OnGpu())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not backend.uses_triton(OnGpu())
    with (
        fusedact.use_backend("triton"),
        pytest.raises(RuntimeError, match=f"'triton' was asked for, but cannot run on cuda:1: {problem}"),
    ):
        backend.uses_triton(OnGpu())


@pytest.mark.parametrize(
    ("interpret", "device", "capability", "hip", "expected"),
    [
        (True, "cpu", (9, 0), None, None),
        (True, "cuda", (9, 0), None, None),
        (True, "xpu", (9, 0), None, "the interpreter takes CPU tensors"),
        (False, "cpu", (9, 0), None, "Triton runs on GPUs"),
        (False, "cuda", (7, 5), None, "compute capability 8.0"),
        (False, "cuda", (8, 0), None, None),
        (False, "cuda", (12, 0), None, None),
        (False, "cuda", (6, 0), "6.4", None),
    ],
)
def test_why_triton_cannot_run(interpret, device, capability, hip, expected, on_gpu, monkeypatch):
    import triton

    on_gpu(capability, hip)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    monkeypatch.setattr(backend, "_driver_problem", lambda: None)
    problem = backend._triton_problem.__wrapped__(torch.device(device))
    assert problem is None if expected is None else expected in problem


def test_the_former_backend_comes_back_after_an_error_too():
    before = fusedact.get_backend()
    with pytest.raises(KeyError), fusedact.use_backend("torch"):
        raise KeyError
    assert fusedact.get_backend() == before
    with pytest.raises(ValueError, match="unknown backend 'cuda'"), fusedact.use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        fusedact.set_backend("cuda")
    assert fusedact.get_backend() == before


# ---- chips


@pytest.mark.parametrize(
    ("capability", "hip", "kind"),
    [
        ((8, 0), None, "sm_80"),
        ((8, 9), None, "sm_80"),
        ((9, 0), None, "sm_90"),
        ((10, 0), None, "sm_100"),
        ((12, 0), None, "sm_80"),
        ((9, 4), "6.4", "gfx942"),
    ],
)
def test_a_gpu_is_one_of_the_kinds(capability, hip, kind, on_gpu):
    on_gpu(capability, hip, shared_memory_per_block_optin=2048)
    chip = backend.chip(GPU)
    assert (chip.kind, chip.shared_memory, chip.warp_size, chip.multiprocessors) == (kind, 2048, 32, 7)
    assert (chip.library, chip.name, chip.interpreted) == (True, "a GPU", False)
    assert not backend.chip(GPU, library=False).library
    assert backend.multiprocessors(GPU) == 7
    assert backend.is_ampere(GPU) is (capability[0] == 8)


def test_a_torch_that_tells_less_of_a_gpu(on_gpu):
    on_gpu()
    assert backend.chip(GPU).shared_memory == 1024


def test_amds_chips_are_no_ampere(on_gpu):
    on_gpu((8, 0), "6.4")
    assert not backend.is_ampere(GPU)


def test_the_interpreter_plays_a_hopper_of_one_program_at_a_time(on_gpu):
    on_gpu((8, 0))
    cpu = torch.device("cpu")
    chip = backend.chip(cpu)
    assert (chip.kind, chip.shared_memory, chip.warp_size, chip.multiprocessors) == ("sm_90", 227 * 1024, 32, 132)
    assert (chip.interpreted, chip.library, chip.copies) == (True, False, False)
    assert backend.multiprocessors(cpu) == 1
    assert not backend.is_ampere(cpu)


@pytest.mark.parametrize("current", [0, 1, 2])
def test_launches_go_to_the_tensors_gpu(current, on_gpu):
    on_gpu(current=current)
    there = backend.on_device(OnGpu())
    assert backend.elsewhere(OnGpu()) is (current != 1)
    assert isinstance(there, torch.cuda.device) is (current != 1)
    assert not isinstance(there, torch.cuda.device) or there.idx == 1
    assert not backend.elsewhere(torch.ones(1))
    assert not isinstance(backend.on_device(torch.ones(1)), torch.cuda.device)


# ---- values


@pytest.mark.parametrize(
    ("checks", "capturing", "expected"), [("0", False, False), ("1", False, True), ("1", True, False)]
)
def test_values_on_a_gpu_are_looked_at_when_asked_for(checks, capturing, expected, on_gpu, monkeypatch):
    on_gpu(capturing=capturing)
    monkeypatch.setenv("FUSEDACT_CHECKS", checks)
    monkeypatch.setattr(backend, "PLAIN", backend.PLAIN | {OnGpu})
    assert backend.looks_at_values(OnGpu()) is expected
    monkeypatch.delenv("FUSEDACT_CHECKS")
    backend._checks.cache_clear()
    assert not backend.looks_at_values(OnGpu())


def test_an_unknown_wish_for_checks(on_gpu, monkeypatch):
    on_gpu()
    monkeypatch.setenv("FUSEDACT_CHECKS", "yes")
    with pytest.raises(ValueError, match="FUSEDACT_CHECKS is 'yes', expected 0 or 1"):
        backend._checks()


def test_values_are_not_looked_at_where_they_may_not_be():
    x = torch.ones(3)
    assert backend.looks_at_values(x) and backend.looks_at_values(torch.nn.Parameter(x))
    assert not backend.looks_at_values(x.as_subclass(Transparent))
    seen = []
    torch.func.grad(lambda t: (seen.append(backend.looks_at_values(x)), t.sum())[1])(x)
    with Seen():
        seen.append(backend.looks_at_values(x))
    assert seen == [False, False]


# ---- precision


def test_float32_products(monkeypatch):
    monkeypatch.delenv("FUSEDACT_FLOAT32", raising=False)
    monkeypatch.setattr(backend, "_float32", None)
    assert (backend.get_float32(), backend.dot_precision(torch.float32)) == ("auto", "ieee")
    backend.set_float32("ieee")
    assert (backend.get_float32(), backend.dot_precision(torch.float32)) == ("ieee", "forced ieee")
    assert backend.dot_precision(torch.float16) == "ieee"
    monkeypatch.setattr(backend, "_float32_precision", lambda *asked: "tf32" if asked == ("cuda", "matmul") else "")
    assert [backend.dot_precision(t) for t in (torch.float32, torch.float64)] == ["tf32", "ieee"]
    with pytest.raises(ValueError, match="unknown float32 arithmetic 'tf32', expected one of auto, ieee"):
        backend.set_float32("tf32")
    assert backend.get_float32() == "ieee"


@pytest.mark.parametrize("name", ["auto", "ieee"])
def test_float32_products_by_the_environment(name, monkeypatch):
    monkeypatch.setenv("FUSEDACT_FLOAT32", name)
    monkeypatch.setattr(backend, "_float32", None)
    assert backend.dot_precision(torch.float32) == {"auto": "ieee", "ieee": "forced ieee"}[name]
    assert backend.get_float32() == name


def test_an_unknown_float32_arithmetic_in_the_environment(monkeypatch):
    monkeypatch.setenv("FUSEDACT_FLOAT32", "fast")
    monkeypatch.setattr(backend, "_float32", None)
    with pytest.raises(ValueError, match="unknown float32 arithmetic 'fast'"):
        backend.get_float32()


def test_losses_are_added_up_in_float32_or_wider():
    wide = {dtype: backend.wide(dtype) for dtype in backend.KERNEL_DTYPES}
    narrow = (torch.float16, torch.bfloat16, torch.float32)
    assert wide == dict.fromkeys(narrow, torch.float32) | {torch.float64: torch.float64}


def test_autocast_is_the_tensors_devices():
    x = torch.ones(1)
    assert backend.autocast_dtype(x) is None
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", low):
            assert backend.autocast_dtype(x) is low
            assert backend.autocast_dtype(OnGpu()) is None
            with torch.autocast("cpu", enabled=False):
                assert backend.autocast_dtype(x) is None


# ---- torch's state


def test_dispatch_modes_count_unless_they_are_overlooked():
    counts = [backend.dispatching()]
    with Seen():
        counts.append(backend.dispatching())
        with pytest.raises(KeyError), backend.overlooking():
            counts.append(backend.dispatching())
            raise KeyError
        counts.append(backend.dispatching())
    assert counts == [0, 1, 0, 1]


def test_autograd_records_in_the_body_of_an_op_for_as_long_as_it_is_asked_to():
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        recorded = [(2 * x).requires_grad]
        with pytest.raises(KeyError), backend.recording():
            recorded.append((2 * x).requires_grad)
            raise KeyError
        recorded.append((2 * x).requires_grad)
    assert recorded == [False, True, False]


def test_transforms_are_seen():
    x, seen = torch.ones(3), [backend.transforming()]
    for transform in (torch.vmap, torch.func.grad):
        transform(lambda t: (seen.append(backend.transforming()), t.sum())[1])(x)
    with forward_ad.dual_level():
        seen.append(backend.transforming())
    assert [*seen, backend.transforming()] == [False, True, True, True, False]


def test_gradients_that_no_kernel_reads():
    x, seen = torch.ones(3, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda dy: seen.append(backend.unreadable(dy)))
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    others = None, torch.ones(3).to_sparse(), torch._efficientzerotensor((3,))
    assert [*seen, *map(backend.unreadable, others)] == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.ones(2), False),
        (torch.ones(2).as_subclass(Transparent), True),
        (torch.ones(2).as_subclass(Opaque), False),
        (TwoTensor(torch.ones(2), torch.ones(2)), False),
    ],
    ids=["tensor", "without a function of its own", "with torch's", "of two tensors"],
)
def test_subclasses_that_a_kernel_may_read(x, expected):
    assert backend.is_transparent(x) is expected


def test_ranges_are_recorded_under_a_profiler():
    seen = [backend.profiling()]
    with profiler.profile() as profile:
        seen.append(backend.profiling())
        assert backend.named("fusedact::here", lambda *args: args)(1, 2) == (1, 2)
    assert [*seen, backend.profiling()] == [False, True, False]
    assert [event.name for event in profile.function_events].count("fusedact::here") == 1


def test_a_function_is_applied_without_the_look_for_functorch():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    x = torch.ones(3, requires_grad=True)
    y = backend.apply_of(Twice)(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))
    assert not hasattr(backend.apply_of(Twice), "__func__")  # torch._C's own, not the class method in Python
