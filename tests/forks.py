"""First calls at once, forks, loaders, queues, in a process that has only imported: `python tests/forks.py`.

Run by tests/test_concurrency.py. Without a GPU, kernels are interpreted.
"""

import os
import random
import sys
import threading
import warnings

os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

import numpy
import torch


def states():
    return random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()


SEEDED = states()

import fusedact  # noqa: E402  after those states, which it must leave
from fusedact import functional as F  # noqa: E402
from fusedact import nn  # noqa: E402

BACKENDS = ("torch", "triton")
THREADS = 8
SECONDS = 60


def gradients():
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator, requires_grad=True) for s in ((5, 7), (4, 7), (4,)))
    loss = F.cross_entropy(F.softmax(F.linear(x, w, b, activation="gelu"), 1), torch.arange(5) % 4)
    return [loss.detach(), *torch.autograd.grad(loss, [x, w, b])]


def equal(ours, theirs):
    return all(map(torch.equal, ours, theirs))


def forked(run):
    """A fork in which run() must end without an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, "the fork failed"


def all_at_once():
    """Eight threads that start together: each gets what one alone then gets."""
    for backend in BACKENDS:
        barrier, found = threading.Barrier(THREADS), []

        def run(barrier=barrier, found=found):
            barrier.wait(SECONDS)
            found.append(gradients())

        with fusedact.use_backend(backend):
            threads = [threading.Thread(target=run) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            alone = gradients()
        assert len(found) == THREADS and all(equal(each, alone) for each in found), backend


def amid_use_backend():
    """After calls and backwards."""
    for backend in BACKENDS:
        with fusedact.use_backend(backend):
            expected = gradients()

            def the_same(backend=backend, expected=expected):
                assert fusedact.get_backend() == backend
                assert equal(gradients(), expected)

            forked(the_same)
            the_same()
    assert fusedact.get_backend() == "auto"


def amid_launches():
    """While other threads are in the middle of kernels."""
    stop, expected = threading.Event(), gradients()

    def busy():
        while not stop.is_set():
            gradients()

    def the_same():
        assert equal(gradients(), expected)

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            forked(the_same)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.full((3,), float(i) - 2)


def collate(rows):
    return F.activate(torch.stack(rows), "squared_relu")


def loaders():
    loader = torch.utils.data.DataLoader(Rows(), 2, collate_fn=collate, num_workers=2, multiprocessing_context="fork")
    assert torch.cat(list(loader))[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 4.0, 9.0]


def work(inbox, outbox):
    model, x = inbox.get(timeout=SECONDS)
    model(x).sum().backward()
    outbox.put([p.grad for p in model.parameters()])
    inbox.get(timeout=SECONDS)  # until what was put is read


def queues(method):
    """A module and its input go to a process, its gradients come back."""
    context = torch.multiprocessing.get_context(method)
    inbox, outbox = context.Queue(), context.Queue()
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.PReLU()), torch.randn(5, 3)
    process = context.Process(target=work, args=(inbox, outbox))
    process.start()
    inbox.put((model, x))
    found = outbox.get(timeout=SECONDS)
    model(x).sum().backward()
    inbox.put(None)
    process.join()
    for ours, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)  # the spawned one is in the fallback


def main(methods):
    assert states() == SEEDED, "importing drew random numbers"
    warnings.simplefilter("ignore")  # the interpreter's, of what it computes beside a mask
    torch.set_num_threads(1)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change often
    forked(all_at_once)  # the first calls of all
    sys.setswitchinterval(before)
    amid_use_backend()
    with fusedact.use_backend("triton"):
        loaders()
        if methods:
            amid_launches()
        for method in methods:
            queues(method)
    print("whole")


if __name__ == "__main__":
    main(sys.argv[1:])
