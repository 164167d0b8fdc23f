"""How the ops attach to PyTorch: backends, doors, modes, autocast."""

import copy

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


@pytest.mark.contract(59)
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


@pytest.mark.contract(51)
def test_an_output_that_is_saved_may_not(device, triton_backend):
    """As stock's relu, sigmoid and tanh."""
    x, w = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device, requires_grad=True)
    y = F.linear(x, w, activation="relu")
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_deepcopy_of_a_trained_model(device, triton_backend):
    model, (x, target) = network(device, "prelu"), batch(device)
    F.cross_entropy(model(x), target).backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))


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


@pytest.mark.contract(50)
def test_backward_twice_is_torchs_error(device, triton_backend):
    model, (x, target) = network(device), batch(device)
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.contract(51)
def test_weight_changed_in_place_is_torchs_error(device, triton_backend):
    model, (x, target) = network(device), batch(device)
    loss = F.cross_entropy(model(x), target)
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.contract(59)
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
