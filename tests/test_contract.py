"""How the ops attach to PyTorch: backends, doors, modes, autocast, errors."""

import copy

import numpy as np
import pytest
import torch

import fusedact
from fusedact import backend, nn
from fusedact import functional as F
from fusedact.activations import ACTIVATIONS


def network(device, activation=None):
    torch.manual_seed(0)
    last = nn.Linear(6, 3, activation=activation)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.GELU(), last).to(device)


def batch(device, rows=11):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 5, generator=generator).to(device)
    return x, torch.randint(0, 3, (rows,), generator=generator).to(device)


def loss_and_gradients(model, x, target, loss=F.cross_entropy):
    value = loss(model(x), target)
    return [value, *torch.autograd.grad(value, list(model.parameters()))]


# ---- the backend


def test_auto_is_torch_on_a_cpu(launches, monkeypatch):
    monkeypatch.delenv("FUSEDACT_BACKEND", raising=False)
    monkeypatch.setattr(backend, "_chosen", None)
    x, w = torch.randn(3, 4), torch.randn(2, 4)
    assert fusedact.get_backend() == "auto"
    F.linear(x, w, activation="relu")
    assert launches.count == 0


def test_context_manager_restores_what_was(triton_backend):
    with fusedact.use_backend("torch"):
        assert fusedact.get_backend() == "torch"
    assert fusedact.get_backend() == "triton"


def test_set_backend_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="unknown backend 'cuda', expected one of auto, triton, torch"):
        fusedact.set_backend("cuda")


def test_environment_variable_chooses(monkeypatch):
    for value, expected in (("torch", "torch"), ("triton", "triton")):
        monkeypatch.setenv("FUSEDACT_BACKEND", value)
        monkeypatch.setattr(backend, "_chosen", None)
        assert fusedact.get_backend() == expected
    monkeypatch.setenv("FUSEDACT_BACKEND", "tritn")
    monkeypatch.setattr(backend, "_chosen", None)
    with pytest.raises(ValueError, match="'tritn'"):
        fusedact.get_backend()


def test_triton_asked_for_and_impossible_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "_triton_problem", lambda device: "no driver")
    with fusedact.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run on cpu: no driver"):
        F.linear(torch.randn(2, 3), torch.randn(4, 3), activation="relu")


def test_float32_products_follow_torchs_setting():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert backend.dot_precision(torch.float32) == expected
            assert backend.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


# ---- the doors


@pytest.mark.parametrize("activation", [None, "prelu", "squared_relu"])
def test_model_and_loss_equal_stock(activation, device, triton_backend):
    model, (x, target) = network(device, activation), batch(device)
    ours = loss_and_gradients(model, x, target)
    with fusedact.use_backend("torch"):
        stock = loss_and_gradients(model, x, target)
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_whole_and_only_once_more(device, triton_backend):
    """No graph break, and no new graph after the second batch size."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network(device)

    def step(x, target):
        return F.cross_entropy(model(x), target)

    compiled = torch.compile(step, fullgraph=True)
    for rows in (11, 17, 23, 31):
        x, target = batch(device, rows)
        value = compiled(x, target)
        grads = torch.autograd.grad(value, list(model.parameters()))
        ours = loss_and_gradients(model, x, target)
        for a, b in zip([value, *grads], ours, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_exported_program_holds_the_registered_op(device, triton_backend):
    model, (x, _) = network(device), batch(device)
    program = torch.export.export(model, (x,))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(torch.ops.fusedact.linear_act.default) == 2
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "jacrev", "hessian", "forward_ad"])
def test_transforms_take_torchs_formula(transform, device, triton_backend):
    weight, bias = torch.randn(4, 3, device=device), torch.randn(4, device=device)
    x = torch.randn(5, 3, device=device)

    def ours(x):
        return F.linear(x, weight, bias, activation="tanh")

    def stock(x):
        return torch.tanh(torch.nn.functional.linear(x, weight, bias))

    def forward_ad(f):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(f(dual)).tangent

    apply = {
        "vmap": lambda f: torch.vmap(f)(x),
        "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
        "jacrev": lambda f: torch.func.jacrev(f)(x),
        "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
        "forward_ad": forward_ad,
    }[transform]
    torch.testing.assert_close(apply(ours), apply(stock))


def test_fake_tensors_take_the_op(device, triton_backend):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), torch.device(device):
        model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
        loss = F.cross_entropy(model(torch.empty(7, 5)), torch.zeros(7, dtype=torch.int64))
        loss.backward()
    assert loss.shape == () and model[0].weight.grad.shape == (8, 5)


def test_activation_checkpointing(device, triton_backend):
    model, (x, target) = network(device), batch(device)
    plain = loss_and_gradients(model, x, target)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    value = F.cross_entropy(checkpointed(x), target)
    again = [value, *torch.autograd.grad(value, list(model.parameters()))]
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_a_function_mode_does_not_unfuse(device, triton_backend, launches):
    x, w = torch.randn(3, 4, device=device), torch.randn(2, 4, device=device)
    with torch.device(device):
        F.linear(x, w, activation="relu")
    assert launches.count == 1


def test_a_subclass_with_its_own_torch_function_is_left_to_torch(device, triton_backend, launches):
    class Logged(torch.Tensor):
        pass

    x = torch.randn(3, 4, device=device).as_subclass(Logged)
    y = F.linear(x, torch.randn(2, 4, device=device), activation="relu")
    assert type(y) is Logged and launches.count == 0


def linear_sample(name):
    def make(device):
        x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 7), (5, 7), (5,)))
        slope = torch.rand(5, device=device, requires_grad=True) if ACTIVATIONS[name].learned else None
        parameters = [v for _, v in ACTIVATIONS[name].defaults]
        return torch.ops.fusedact.linear_act.default, (x, w, b, slope, name, parameters, True)

    return make


def activation_sample(name):
    def make(device):
        x = torch.randn(4, 5, 6, device=device).transpose(0, 1).requires_grad_()
        slope = torch.rand(4, device=device, requires_grad=True) if ACTIVATIONS[name].learned else None
        return torch.ops.fusedact.activation.default, (x, slope, name, list(ACTIVATIONS[name].parameters({})), True)

    return make


def cross_entropy_sample(device):
    x = torch.randn(6, 4, device=device, requires_grad=True)
    target = torch.randint(0, 4, (6,), device=device)
    return torch.ops.fusedact.cross_entropy.default, (
        x, target, None, None, -100, "mean", 0.0, 0.0, 0.0, False, True
    )  # fmt: skip


def probabilities_sample(device):
    x = torch.randn(6, 4, 3, device=device).transpose(0, 2).requires_grad_()
    target = torch.rand(3, 4, 6, device=device, requires_grad=True)
    weight, sample_weight = torch.rand(4, device=device), torch.rand(3, 6, device=device)
    return torch.ops.fusedact.cross_entropy.default, (
        x, target, weight, sample_weight, -100, "none", 0.1, 0.01, 5.0, True, True
    )  # fmt: skip


def nll_sample(device):
    logp = torch.randn(6, 4, 3, device=device, requires_grad=True)
    target = torch.randint(0, 4, (6, 3), device=device)
    return torch.ops.fusedact.nll_loss.default, (logp, target, torch.rand(4, device=device), -100, "mean", True)


def binary_sample(name, reduction):
    def make(device):
        x = torch.rand(4, 6, device=device).t().requires_grad_()
        target = torch.rand(6, 4, device=device, requires_grad=reduction == "none")
        pos_weight = torch.rand(6, 1, device=device) if name == "bce_with_logits" else None
        op = getattr(torch.ops.fusedact, name).default
        return op, (x, target, torch.rand(4, device=device), pos_weight, reduction, True)

    return make


def softmax_sample(kind, dim, dtype):
    def make(device):
        x = torch.randn(4, 5, 6, device=device).transpose(0, 2).requires_grad_()
        return torch.ops.fusedact.softmax.default, (x, kind, dim, dtype, True)

    return make


@pytest.mark.parametrize(
    "sample",
    [
        *map(linear_sample, ("relu", "gelu", "prelu", "leaky_relu")),
        *map(activation_sample, ("relu", "gelu", "prelu", "leaky_relu")),
        cross_entropy_sample,
        probabilities_sample,
        nll_sample,
        *map(
            binary_sample,
            ("bce_with_logits", "binary_cross_entropy", "multilabel_soft_margin"),
            ("mean", "none", "none"),
        ),
        softmax_sample("softmax", 2, torch.float32),
        softmax_sample("log_softmax", 1, torch.float64),
        softmax_sample("softmin", 0, torch.bfloat16),
    ],
    ids=[
        "relu",
        "gelu",
        "prelu",
        "leaky_relu",
        "relu alone",
        "gelu alone",
        "prelu alone",
        "leaky_relu alone",
        "cross_entropy",
        "probabilities",
        "nll_loss",
        "bce_with_logits",
        "binary_cross_entropy",
        "multilabel_soft_margin",
        "softmax",
        "log_softmax",
        "softmin",
    ],
)
def test_opcheck(sample, device, triton_backend):
    torch.library.opcheck(*sample(device))


def test_many_gradients_at_once(device, triton_backend):
    model, (x, target) = network(device, "prelu"), batch(device)
    losses = torch.nn.functional.cross_entropy(model(x), target, reduction="none")
    ours = F.cross_entropy(model(x), target, reduction="none")
    basis = torch.eye(len(losses), device=device)
    with fusedact.use_backend("torch"):
        stock = torch.nn.functional.cross_entropy(model(x), target, reduction="none")
    for value in (losses, ours):
        grads = torch.autograd.grad(value, list(model.parameters()), basis, is_grads_batched=True)
        truth = torch.autograd.grad(stock, list(model.parameters()), basis, is_grads_batched=True, retain_graph=True)
        for a, b in zip(grads, truth, strict=True):
            torch.testing.assert_close(a, b)


def test_jit_trace_records_torchs_operations(device, triton_backend):
    model, (x, _) = network(device), batch(device)
    traced = torch.jit.trace(model, (x,))
    more, _ = batch(device, rows=23)
    torch.testing.assert_close(traced(more), model(more))


def test_dtensors_are_left_to_torch(device, triton_backend, tmp_path):
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.tensor import Replicate, distribute_tensor

    kind = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(kind, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh(device, (1,))
        x, w = torch.randn(3, 4, device=device), torch.randn(2, 4, device=device)
        tensors = [distribute_tensor(t, mesh, [Replicate()]) for t in (x, w)]
        y = F.linear(*tensors, activation="relu").full_tensor()
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w).relu())


def test_a_saved_tensor_may_come_back_in_another_layout(device, triton_backend):
    x, w = torch.randn(6, 4, device=device), torch.randn(5, 4, device=device, requires_grad=True)
    dy = torch.randn(6, 5, device=device)
    (plain,) = torch.autograd.grad(F.linear(x, w, activation="gelu"), w, dy)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.t().contiguous(), lambda t: t.t()):
        y = F.linear(x, w, activation="gelu")
    assert torch.equal(torch.autograd.grad(y, w, dy)[0], plain)


@pytest.mark.parametrize("lead", [(), (3,), (3, 2)], ids=str)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_an_output_may_be_changed_in_place(mode, lead, device, triton_backend):
    x, w = torch.randn(*lead, 4, device=device), torch.randn(5, 4, device=device, requires_grad=True)
    with mode():
        y = F.linear(x, w, activation="gelu")
        assert not y._is_view()
        y += 1
    if y.requires_grad:
        y.sum().backward()


def test_an_output_that_is_saved_may_not(device, triton_backend):
    """As stock's relu, sigmoid and tanh."""
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device, requires_grad=True)
    y = F.linear(x, w, activation="relu")
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- modes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu", "softplus"])
def test_autocast_gives_stocks_dtype(activation, dtype, device, triton_backend):
    x, w, b = (torch.randn(s, device=device, requires_grad=True) for s in ((4, 7), (5, 7), (5,)))
    with torch.autocast(device, dtype=dtype):
        ours = F.linear(x, w, b, activation=activation)
        stock = ACTIVATIONS[activation].reference(torch.nn.functional.linear(x, w, b))
    assert ours.dtype == stock.dtype
    torch.testing.assert_close(ours, stock, rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(ours.sum(), [x, w, b]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_graph_without_gradients(mode, device, triton_backend):
    model, (x, target) = network(device), batch(device)
    with mode():
        assert not F.cross_entropy(model(x), target).requires_grad


def test_backward_twice_is_torchs_error(device, triton_backend):
    model, (x, target) = network(device), batch(device)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_weight_changed_in_place_is_torchs_error(device, triton_backend):
    model, (x, target) = network(device), batch(device)
    loss = F.cross_entropy(model(x), target)
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradient_penalty_in_the_style_of_wgan_gp(device, triton_backend):
    model, (x, _) = network(device), batch(device)
    x.requires_grad_()

    def penalty():
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return torch.autograd.grad((g.norm(dim=1) - 1).square().mean(), list(model.parameters()), allow_unused=True)

    ours = penalty()
    with fusedact.use_backend("torch"):
        stock = penalty()
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


# ---- what stock raises


@pytest.mark.parametrize("name", ["triton", "torch"])
@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: (torch.ones(4, 3).long(), torch.ones(2, 3)), RuntimeError, "the same dtype"),
        (lambda: (torch.ones(4, 5), torch.ones(2, 3)), RuntimeError, "shapes cannot be multiplied"),
        (lambda: (torch.ones(()), torch.ones(2, 3)), RuntimeError, "at least 1D"),
        (lambda: (torch.ones(4, 3), torch.ones(2, 3, 1)), RuntimeError, "2 dimensions|2-D|at most 2"),
        (lambda: (torch.ones(4, 3), torch.ones(2, 3), torch.ones(3)), RuntimeError, "expanded size|match"),
        (lambda: ([1.0, 2.0, 3.0], torch.ones(2, 3)), TypeError, "must be Tensor, not list"),
    ],
    ids=["dtype", "in_features", "0-d", "3-D weight", "bias length", "list"],
)
def test_bad_input_is_torchs_error(make, kind, message, name, device, launches):
    with torch.device(device):
        tensors = make()
    with fusedact.use_backend(name), pytest.raises(kind, match=message):
        F.linear(*tensors, activation="relu")
    assert launches.count == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: (torch.randn(4, 3), torch.randn(3)),
        lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(1)),
        lambda: (torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)),
        lambda: (torch.randn(4, 3).to_sparse(), torch.randn(2, 3)),
    ],
    ids=["1-D weight", "bias (1,)", "bias (4, 2)", "sparse"],
)
def test_what_stock_accepts_is_accepted(make, device, triton_backend):
    with torch.device(device):
        tensors = make()
    torch.testing.assert_close(F.linear(*tensors, activation="relu"), torch.nn.functional.linear(*tensors).relu())


@pytest.mark.parametrize(
    ("name", "parameters", "kind", "message"),
    [
        ("hardtanh", {"min_val": 2.0, "max_val": 1.0}, ValueError, "min_val cannot be greater than max_val"),
        ("softshrink", {"lambd": -1.0}, RuntimeError, "lambda must be"),
        ("celu", {"alpha": 0.0}, RuntimeError, "alpha"),
    ],
)
def test_parameters_that_stock_refuses(name, parameters, kind, message, device, triton_backend, launches):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    with pytest.raises(kind, match=message):
        F.linear(x, w, activation=name, **parameters)
    assert launches.count == 0


@pytest.mark.parametrize("slope", [np.float32(0.25), torch.tensor(0.25), 1])
def test_parameters_may_be_any_number(slope, device, triton_backend):
    x, layer = torch.randn(2, 3, device=device), torch.nn.LeakyReLU(slope)
    model = nn.Sequential(nn.Linear(3, 4), layer).to(device)
    torch.testing.assert_close(model(x), layer(model[0](x)))


def test_a_module_brings_its_own_parameters(device):
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device)
    with pytest.raises(TypeError, match="from its module"):
        F.linear(x, w, activation=torch.nn.LeakyReLU(), negative_slope=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bound", [0.1, 0.3, 0.7])
def test_bounds_that_rounding_moves(bound, dtype, device, triton_backend):
    """A saturated unit's output is the bound rounded: its derivative must be 0 all the same."""
    x = torch.tensor([[3.0], [-3.0], [0.05]], device=device, dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    for name, parameters, expected in (
        ("hardtanh", {"min_val": -bound, "max_val": bound}, [0, 0, 1]),
        ("threshold", {"threshold": bound, "value": bound}, [1, 0, 0]),
    ):
        y = F.linear(x, one, activation=name, **parameters)
        assert torch.autograd.grad(y.sum(), x)[0].flatten().tolist() == expected


@pytest.mark.parametrize("ignore_index", [-100.0, None, 2**63], ids=str)
def test_ignore_index_of_a_wrong_kind(ignore_index, device, triton_backend, launches):
    x, target = torch.randn(4, 3, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        F.cross_entropy(x, target, ignore_index=ignore_index)
    assert launches.count == 0


def test_autocast_leaves_float64_and_refuses_integers(device, triton_backend):
    logits, target = torch.randn(4, device=device, dtype=torch.float64), torch.ones(4, device=device).double()
    with torch.autocast(device, dtype=torch.bfloat16):
        assert F.binary_cross_entropy_with_logits(logits, target).dtype == torch.float64
        with pytest.raises(RuntimeError):
            F.binary_cross_entropy_with_logits(logits.float(), target.long())


def test_labels_of_a_wrong_kind_are_torchs_error(device, triton_backend):
    logits = torch.randn(4, 3, device=device)
    with pytest.raises(RuntimeError, match=r"expected target dtype to be Long or Byte|not implemented for 'Int'"):
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.int32, device=device))
    with pytest.raises(ValueError, match="foo is not a valid value for reduction"):
        F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64, device=device), reduction="foo")
    with pytest.raises(ValueError, match=r"batch_size \(4\) to match target batch_size \(3\)"):
        F.cross_entropy(logits, torch.zeros(3, dtype=torch.int64, device=device))


def test_deepcopy_of_a_trained_model(device, triton_backend):
    model, (x, target) = network(device, "prelu"), batch(device)
    F.cross_entropy(model(x), target).backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
