"""Which errors of a launch count as a kernel that cannot be compiled, and what torch does in its place under a mode."""

import errno
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

import fusedact
from fusedact import autograd, backend
from fusedact import functional as F
from fusedact.kernels import faults

WARNING = "fusedact runs stock PyTorch operations: kernel .* cannot be compiled or loaded: .*no luck"


@pytest.fixture
def x(device):
    return torch.randn(6, 4, device=device, requires_grad=True)


def gelu(x):
    return autograd.activation(x, None, "gelu", ())


@pytest.mark.contract(80)
def test_a_backward_under_torch_is_torchs_too(x, auto, refused):
    y = gelu(x).sum()
    refused.kernels = "_backward_kernel"
    with fusedact.use_backend("torch"), pytest.warns(RuntimeWarning, match=WARNING):
        (dx,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(dx, *torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x))


@pytest.mark.contract(80)
def test_by_name_the_backward_of_a_forward_once_given_up_is_tried(x, auto, refused):
    refused.kernels = "all"
    with pytest.warns(RuntimeWarning, match=WARNING):
        autograd.gated(x, x, "silu", ())
    refused.kernels = "none"
    with fusedact.use_backend("triton"):
        y = autograd.gated(x, x, "silu", ()).sum()
        refused.kernels = "all"
        with pytest.raises(faults.LaunchError, match="no luck"):
            y.backward()


@pytest.mark.parametrize(
    ("where", "error"),
    [
        pytest.param("launching", TypeError("missing 1 required positional argument"), id="an argument"),
        pytest.param("launching", ValueError("Pointer argument cannot be accessed from Triton"), id="a pointer"),
        pytest.param("launching", RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), id="the launch"),
        pytest.param("compiling", RuntimeError("Triton Error [CUDA]: device-side assert triggered"), id="an assert"),
        pytest.param("compiling", torch.AcceleratorError("CUDA error: launch failure"), id="another kernel"),
        pytest.param("compiling", OSError(errno.EMFILE, "Too many open files"), id="open files"),
        pytest.param("compiling", OSError(errno.ENOMEM, "Cannot allocate memory"), id="memory"),
    ],
)
def test_what_is_no_fault_of_compiling_or_may_pass_is_raised_as_it_is(where, error, x, auto, refused):
    refused.kernels, refused.error, refused.refuse = "all", error, getattr(refused, where)
    with pytest.raises(type(error), match=re.escape(str(error))) as told:
        gelu(x)
    assert told.value is error and refused.count == 1 and not backend._warned
    refused.kernels = "none"
    gelu(x)
    assert not backend._warned


@pytest.mark.contract(80)
@pytest.mark.parametrize(
    ("error", "tried"),
    [
        pytest.param(RuntimeError("Triton Error [CUDA]: unsupported toolchain of this PTX"), 1, id="an old driver"),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), 2, id="a full disk"),
    ],
)
def test_what_no_kernel_escapes_is_asked_for_by_the_next_op_no_more(error, tried, x, auto, refused):
    refused.kernels, refused.error = "all", error
    with pytest.warns(RuntimeWarning, match="fusedact runs stock") as told:
        gelu(x)
        F.softmax(x, 1)
    assert len(told) == 1 and refused.count == tried and backend._broken


def test_a_warning_is_of_the_users_line(x, auto, refused):
    y = gelu(x).sum()
    refused.kernels = "all"
    with pytest.warns(RuntimeWarning, match=WARNING) as told:
        autograd.activation(x, None, "relu", ())
        backend._warned.clear()
        if x.is_cpu:  # a GPU's backward runs in a thread in which there is no such line
            y.backward()
    assert {warning.filename for warning in told} == {__file__}


def test_a_warning_in_a_compiled_graph_is_no_error(monkeypatch):
    monkeypatch.setattr(backend, "_warned", set())

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x):
        backend._warn_once("an old GPU", "an old GPU")
        return x + 1

    with pytest.warns(RuntimeWarning, match="stock PyTorch operations: an old GPU"):
        compiled(torch.ones(3))


@pytest.mark.parametrize("softcap", [5.0, None], ids=["softcap", "probabilities"])
def test_a_head_by_torch_under_a_mode(softcap, x, auto, refused):
    """Its formula is recorded inside the registered op too, whose dispatch keys of autograd are left out."""
    w = torch.randn(5, 4, device=x.device, requires_grad=True)
    target = torch.arange(6, device=x.device) % 5 if softcap else torch.full((6, 5), 0.2, device=x.device)

    def gradients():
        return torch.autograd.grad(F.linear_cross_entropy(x, w, target, softcap=softcap), (x, w))

    with fusedact.use_backend("torch"):
        expected = gradients()
    refused.kernels = "all"
    with pytest.warns(RuntimeWarning, match=WARNING), FlopCounterMode(display=False):
        found = gradients()
    torch.testing.assert_close(found, expected)


def test_threads_whose_kernels_are_damaged_leave_the_compilers_knobs_as_they_were(refused, monkeypatch):
    monkeypatch.setattr(faults, "_WARNED", {"_anew"})
    seen = []

    def launch(begins):
        time.sleep(begins)
        try:
            refused.compiling(KeyError("cubin"))
        except KeyError as fault:
            faults.run_again(lambda: (time.sleep(0.1), seen.append(knobs.compilation.always_compile)), fault)

    with ThreadPoolExecutor(2) as threads:
        [*threads.map(launch, (0, 0.05))]
    assert seen == [True, True]
    assert not knobs.compilation.always_compile and "TRITON_ALWAYS_COMPILE" not in os.environ


def test_a_forked_child_leaves_its_parents_kernels(tmp_path):
    faults._remove(str(tmp_path), os.getpid() + 1)
    assert tmp_path.exists()
    faults._remove(str(tmp_path), os.getpid())
    assert not tmp_path.exists()
