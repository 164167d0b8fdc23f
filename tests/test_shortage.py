"""More memory than there is: torch's own error, and all as before that step."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from fusedact import functional as F


@pytest.mark.contract(60)
def test_more_memory_than_there_is_is_torchs_error(either_backend, launches, device):
    """Before anything is launched."""
    asked = r"DefaultCPUAllocator: can't allocate memory: .* \d+ bytes|CUDA out of memory. Tried to allocate [\d.]+ \w+"
    x, w, told = torch.zeros(1, 4, device=device).expand(2**48, 4), torch.zeros(4, 4, device=device), []
    for function in (F.linear, torch.nn.functional.linear):
        with pytest.raises(RuntimeError, match=asked) as caught:
            function(x, w)
        told.append((caught.type, re.search(asked, str(caught.value))[0]))
    assert told[0] == told[1] and launches.count == 0


SHORTAGE = """
import resource, json, torch, fusedact
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


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc, and no limit of the address space")
@pytest.mark.exhaustive
@pytest.mark.contract(60, 83)
def test_a_shortage_of_memory_is_torchs_error_and_leaves_all_as_before_that_step():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back
    done = subprocess.run(
        [sys.executable, "-c", SHORTAGE], capture_output=True, text=True, check=False, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    message = r"RuntimeError: .*DefaultCPUAllocator: can't allocate memory"
    assert re.match(message, told["forward"]) and told["after it"]
    (backward, untouched), (fit, as_before, calls) = told["backward"], told["fit"]
    assert re.match(message, backward) and untouched
    assert re.match(message, fit) and as_before and calls == 3
