"""A fused model among what PyTorch does with models: compiled, exported, transformed, hooked, copied."""

import copy
import io
import pickle

import pytest
import torch
from samples.networks import Network, alike, answers, kinds
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

import fusedact

pytestmark = pytest.mark.usefixtures("triton_backend")


@pytest.fixture
def two(device):
    """The network fused, and its stock twin."""
    stock = Network().to(device).eval()
    return fusedact.fuse(copy.deepcopy(stock)), stock


@pytest.fixture
def x(device):
    return torch.randn(5, 3, 6, 6, device=device)


def test_all_three_are_fused(two, x, launches):
    ours, stock = two
    assert {"convolution", "gated"} <= set(kinds(ours)) and len(kinds(ours)) >= 3
    launches.reset()
    alike(answers(ours, x), answers(stock, x))
    assert launches.count >= 6


# Compiled, exported, traced


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_compiled_whole(backend, two, x, launches):
    torch._dynamo.reset()
    ours, stock = two
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    alike(answers(ours, x, compiled), answers(stock, x))
    assert launches.count >= 6


def test_its_own_compile(two, x, launches):
    ours, stock = two
    ours.compile(backend="eager", fullgraph=True)
    alike(answers(ours, x), answers(stock, x))
    assert launches.count >= 6


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict, two, x):
    ours, stock = two
    batch = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(ours, (x,), dynamic_shapes=batch, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum(target.startswith("fusedact.") for target in targets) >= 3
    more = torch.cat([x, x])
    torch.testing.assert_close(program.module()(more), stock(more))
    assert program.state_dict.keys() == stock.state_dict().keys()


def test_traced(two, x):
    """By torch.fx and torch.jit: what the trace gives computes the same."""
    ours, stock = two
    torch.testing.assert_close(torch.fx.symbolic_trace(ours)(x), stock(x))
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(ours, (x,), check_trace=False)(x), stock(x))


def test_fake_and_meta_tensors(two, x):
    from torch._subclasses import FakeTensorMode

    ours, _ = two
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert ours(mode.from_tensor(x)).shape == (5, 2)
    assert ours.to("meta")(x.to("meta")).shape == (5, 2)


# Precision, transforms, memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, two, x, launches):
    """Stock's dtypes, and its numbers within a few roundings of the lower precision."""
    ours, stock = two
    launches.reset()
    with torch.autocast(x.device.type, dtype):
        results = answers(ours, x), answers(stock, x)
    assert launches.count >= 6
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_another_dtype(dtype, two, x, launches, as_accurate_as_torch):
    ours, stock = (model.to(dtype) for model in two)
    truth = answers(copy.deepcopy(stock).double(), x.to(dtype).double())
    launches.reset()
    for values in zip(answers(ours, x.to(dtype)), answers(stock, x.to(dtype)), truth, strict=True):
        as_accurate_as_torch(*values)
    assert launches.count >= 6


def test_functional_call(two, x):
    """Other weights for one call, of which the model keeps none."""
    ours, stock = two
    other = {name: 2 * p.detach() for name, p in stock.named_parameters()}
    with torch.no_grad():
        results = [torch.func.functional_call(model, other, (x,), {"scale": 0.5}) for model in two]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(ours(x), stock(x))


def test_gradients_per_sample(two, x):
    def per_sample(model):
        def loss(parameters, one):
            return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

        parameters = {name: p.detach() for name, p in model.named_parameters()}
        return torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)

    ours, stock = map(per_sample, two)
    assert ours.keys() == stock.keys()
    alike(ours.values(), stock.values())


def test_an_ensemble(x, device):
    """Several models as one, by vmap over their stacked state."""
    stock = [Network().to(device).eval() for _ in range(2)]
    results = []
    for models in ([fusedact.fuse(copy.deepcopy(model)) for model in stock], stock):
        state, base = torch.func.stack_module_state(models), copy.deepcopy(models[0]).to("meta")
        call = lambda state, x, base=base: torch.func.functional_call(base, state, (x,))  # noqa: E731
        results.append(torch.vmap(call, in_dims=((0, 0), None))(state, x))
    alike(results[:1], results[1:])


def test_tangents_and_second_derivatives(two, x):
    ours, stock = two
    torch.testing.assert_close(*(torch.func.jvp(model, (x,), (torch.ones_like(x),))[1] for model in two))

    def penalty(model):
        first = torch.autograd.grad(model(x).sum(), list(model.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters()), allow_unused=True)

    alike(penalty(ours), penalty(stock))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, two, x):
    """In training: the masks of dropout are drawn again as they were."""
    results = []
    for model in two:
        torch.manual_seed(2)
        checkpointed = lambda x, m=model: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
        if reentrant:  # torch.autograd.grad is not for it
            model.train().zero_grad()
            y = checkpointed(x.detach().requires_grad_())
            y.square().sum().backward()
            results.append([y, *(p.grad for p in model.parameters())])
        else:
            results.append(answers(model.train(), x, checkpointed))
    alike(*results)


def test_saved_tensor_hooks(two, x):
    seen = []
    results = []
    for model in two:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
            results.append(answers(model, x))
    with torch.autograd.graph.save_on_cpu():
        results.append(answers(two[0], x))
    assert seen
    alike(results[0], results[1])
    alike(results[2], results[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs CUDA")
def test_graphed_callable(two, x):
    ours, stock = two
    graphed = torch.cuda.make_graphed_callables(ours, (x.clone().requires_grad_(),))
    alike(answers(ours, x, graphed), answers(stock, x))


# Hooks


def doubling(kind, seen):
    """A hook that notes all that it is given, and doubles what it may change."""

    def hook(module, *given):
        seen.extend(tree_leaves(given))
        changed = given[0] if kind == "full_backward" else given[-1]
        return tree_map(lambda t: 2 * t if isinstance(t, torch.Tensor) else t, changed)

    return hook


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("path", ["", "conv", "fc", "act", "gate", "silu", "up"])
def test_hooks(path, kind, before, device, x):
    """Registered before fuse() or after it, a hook is given what it was given, and its changes count."""
    stock = Network().to(device).eval()
    ours, seen = copy.deepcopy(stock), ([], [])
    if not before:
        fusedact.fuse(ours)
    for model, noted in zip((ours, stock), seen, strict=True):
        getattr(model.get_submodule(path), f"register_{kind}_hook")(doubling(kind, noted))
    if before:
        fusedact.fuse(ours)
    alike(answers(ours, x), answers(stock, x))
    assert seen[1]
    alike(*seen)


def test_a_hook_removed_is_forgotten(two, x, launches):
    ours, stock = two
    handle = ours.fc.register_forward_hook(lambda module, given, output: output + 1)
    answers(ours, x)
    handle.remove()
    launches.reset()
    alike(answers(ours, x), answers(stock, x))
    assert launches.count >= 6


def test_global_hooks_see_every_module(two, x):
    seen = {True: [], False: []}
    for model, ours in zip(two, (True, False), strict=True):
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *_, ours=ours: seen[ours].append(type(module).__name__)
        )
        try:
            model(x)
        finally:
            handle.remove()
    assert seen[True] == seen[False] and len(seen[True]) == 9


# Copies


def test_deepcopy(two, x, launches):
    ours, stock = two
    twin = copy.deepcopy(ours)
    assert kinds(twin) == kinds(ours)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    launches.reset()
    alike(answers(twin, x), answers(stock, x))
    assert launches.count >= 6
    fusedact.unfuse(ours)
    assert kinds(twin) and type(ours) is type(fusedact.unfuse(twin)) is Network


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [lambda model: pickle.loads(pickle.dumps(model)), saved], ids=["pickle", "save"])
def test_pickled(clone, two, x, launches):
    ours, stock = two
    twin = clone(ours)
    assert kinds(twin) == kinds(ours) and isinstance(twin, Network)
    launches.reset()
    alike(answers(twin, x), answers(stock, x))
    assert launches.count >= 6


def test_state_passes_between_fused_and_stock(two, x):
    ours, stock = two
    for p in stock.parameters():
        nn.init.normal_(p, std=0.3)
    assert not ours.load_state_dict(stock.state_dict(), strict=True).missing_keys
    alike(answers(ours, x), answers(stock, x))
    ours.load_state_dict(stock.state_dict(), assign=True)
    alike(answers(ours, x), answers(stock, x))


# Devices and processes


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, over a file."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(two, x, one_process):
    ours, stock = two
    for model in (nn.parallel.DistributedDataParallel(ours), stock):
        model(x).square().sum().backward()
    alike((p.grad for p in ours.parameters()), (p.grad for p in stock.parameters()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo shards what is on a CPU")
def test_fully_sharded(two, x, one_process):
    from torch.distributed.fsdp import fully_shard

    ours, stock = two
    fully_shard(ours.fc)
    fully_shard(ours)
    for model in two:
        model(x).square().sum().backward()
    alike((p.grad.full_tensor() for p in ours.parameters()), (p.grad for p in stock.parameters()))


def replica(module):
    """As nn.parallel.replicate: modules whose parameters are plain tensors among their attributes."""
    twin = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        twin._modules[name] = replica(child)
        setattr(twin, name, twin._modules[name])
    for name, p in module._parameters.items():
        setattr(twin, name, None if p is None else p * 1)
    return twin


def test_replica_for_data_parallel(two, x):
    ours, stock = two
    alike(answers(ours, x, replica(ours)), answers(stock, x, replica(stock)))
