"""Every kind of tensor in every place of every loss: torch's answer, or its exception before any launch."""

import warnings

import pytest
import torch
from samples.losses import BINARY, CLASSES, KINDS, TORCH_HAS_THE_HEAD, arguments_of, losses, problem, stock_of

import fusedact
from fusedact import functional as F

BACKENDS = ["torch", "triton"]
PLACES = [(loss, place) for loss in losses() for place in arguments_of(loss)]
PLACES += [("cross_entropy", "probabilities"), ("linear_cross_entropy", "probabilities")]
USUAL = [(loss, place) for loss, place in PLACES if "linear" not in loss or place in ("linear_weight", "target")]


def test_every_loss_is_here():
    assert {loss for loss in losses() if "linear" not in loss} == {*CLASSES, *BINARY}
    assert all(arguments_of(loss) for loss in losses())


def kinds_of(t):
    """Those kinds that there are of such a tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, make in KINDS.items():
            try:
                yield kind, make(t)
            except (RuntimeError, IndexError):  # of a vector there is no such kind
                continue


@pytest.mark.parametrize(
    ("reduction", "name"),
    [
        ("mean", "triton"),
        *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in (("none", "triton"), ("sum", "torch"))),
    ],
)
@pytest.mark.parametrize(
    ("loss", "place"),
    [pytest.param(*each, id=" ".join(each), marks=[] if each in USUAL else pytest.mark.exhaustive) for each in PLACES],
)
def test_every_kind_of_tensor_is_taken_as_torch_takes_it(loss, place, reduction, name, device, launches):
    if loss == "linear_cross_entropy" and not TORCH_HAS_THE_HEAD:
        pytest.skip("this torch has no such loss")
    arguments = {k: t.to(device) for k, t in arguments_of(loss).items()} | {"reduction": reduction}
    if place == "probabilities":
        place = "target"
        arguments[place] = torch.rand(4, 4, device=device).softmax(1)
    problems, tried = {}, 0
    for kind, t in kinds_of(arguments[place]):
        tried += 1
        if (kind, place) == ("meta", "linear_weight"):  # torch answers with memory that nobody wrote
            continue
        with fusedact.use_backend(name):
            found = problem(getattr(F, loss), stock_of(loss), launches, arguments | {place: t})
        problems |= {kind: found} if found else {}
    assert not problems and tried >= 20


@pytest.mark.contract(13)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("loss", [loss for loss in losses() if "linear" in loss])
def test_a_head_without_numbers_is_refused(loss, name, device, launches):
    arguments = {k: t.to(device) for k, t in arguments_of(loss).items()}
    arguments["linear_weight"] = arguments["linear_weight"].to("meta")
    with fusedact.use_backend(name), pytest.raises(RuntimeError, match=r"^Expected all tensors to be on the same"):
        getattr(F, loss)(**arguments)
    assert launches.count == 0
