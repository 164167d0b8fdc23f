"""fuse() on real architectures, built from configurations without weights, and on the tutorials' models: stock's step.

The last test prints a table of what was fused in each.
"""

import copy

import pytest
import torch
from samples.architectures import ARCHITECTURES, TUTORIALS, answer, bert, gpt2, llama, resnet, t5
from torch import nn

import fusedact

each = pytest.mark.parametrize("name", ARCHITECTURES)


def step(model, inputs, optimizer):
    """Logits, loss, all gradients in a row, all parameters in a row after the step, and each gradient."""
    optimizer.zero_grad()
    logits, loss = answer(model, inputs)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    together = [torch.cat([t.detach().flatten() for t in tensors]) for tensors in (gradients, model.parameters())]
    return [logits, loss, *together, *gradients]


def steps_of(model, inputs):
    """A step of the model, fused after its optimizer was made; of a stock copy; and of a copy in float64."""
    models = model, copy.deepcopy(model), copy.deepcopy(model).double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    fusedact.fuse(model)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    steps = []
    for one, given, optimizer in zip(models, (inputs, inputs, wide), optimizers, strict=True):
        torch.manual_seed(0)
        steps.append(step(one, given, optimizer))
    return steps


def not_rounding(steps):
    """(ours, stock's, the truth) of all but gradients that are zero in truth, as that of an attention's key bias is."""
    _, _, truths = steps
    largest = max(t.norm() for t in truths[4:])
    kept = [at for at, truth in enumerate(truths) if at < 4 or truth.norm() > 1e-6 * largest]
    assert len(kept) > 0.8 * len(truths)
    return [tuple(values[at] for values in steps) for at in kept]


@each
def test_steps_as_stock(name, device, triton_backend, launches, as_accurate_as_torch):
    model, inputs = ARCHITECTURES[name].on(device)
    for values in not_rounding(steps_of(model, inputs)):
        as_accurate_as_torch(*values)
    fused = [site for site in fusedact.report(model).sites if site.fused]
    assert launches.count >= 2 * len(fused)


@pytest.mark.parametrize("build", [bert, t5], ids=lambda build: build.__name__)
def test_draws_stocks_dropout(build, device, triton_backend):
    """From one seed the same masks."""
    model, inputs = build(dropout=0.2)
    ours, stock, _ = steps_of(model.to(device).train(), {key: value.to(device) for key, value in inputs.items()})
    for a, b in zip(ours[:4], stock[:4], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build", [gpt2, *(pytest.param(build, marks=pytest.mark.exhaustive) for build in (llama, t5))])
def test_generates_stocks_tokens(build, device, triton_backend):
    """Greedily, with a cache: a token at a time."""
    model, inputs = build()
    stock = model.to(device).eval()
    ours, prompt = fusedact.fuse(copy.deepcopy(stock)), inputs["input_ids"][:, :4].to(device)
    tokens = [m.generate(prompt, max_new_tokens=2, do_sample=False, pad_token_id=0) for m in (ours, stock)]
    assert torch.equal(*tokens)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_checkpoints_its_blocks(device, triton_backend):
    """transformers' gradient checkpointing, through the layers' own __call__."""
    stock, inputs = bert()
    inputs, gradients = {key: value.to(device) for key, value in inputs.items()}, []
    for model in (fusedact.fuse(copy.deepcopy(stock)), stock):
        model.to(device).train().gradient_checkpointing_enable()
        answer(model, inputs)[1].backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def held(model):
    """Every module's class and what it holds, each thing by its identity."""
    contents = [(type(module), key, value) for module in model.modules() for key, value in vars(module).items()]
    inner = [(key, id(v)) for _, _, value in contents if isinstance(value, dict) for key, v in value.items()]
    return [(kind, key, id(value)) for kind, key, value in contents], inner


def seen(model):
    """What a user sees of it: the state's shapes and places in memory, names, representation."""
    state = {key: (t.shape, t.data_ptr()) for key, t in model.state_dict().items()}
    return state, [(name, type(m).__name__) for name, m in model.named_modules()], repr(model)


@each
def test_round_trip(name, device, triton_backend):
    """Fused it looks as it did, and on the fallback gives the same bits; unfused it is as if nothing had been."""
    model, inputs = ARCHITECTURES[name].on(device)
    model.eval()
    contents, looks, before = held(model), seen(model), answer(model, inputs)
    assert fusedact.fuse(model) is model and seen(model) == looks
    with fusedact.use_backend("torch"):
        assert all(map(torch.equal, answer(model, inputs), before))
    answer(model, inputs)
    assert fusedact.unfuse(model) is model and seen(model) == looks
    assert held(model) == contents
    assert all(map(torch.equal, answer(model, inputs), before))


@each
def test_every_block_has_a_fused_site(name, device):
    architecture = ARCHITECTURES[name]
    sites = fusedact.report(fusedact.fuse(architecture.on(device)[0])).sites
    for block in architecture.blocks:
        inside = [site for site in sites if f"{site.module}.".startswith(f"{block}.")]
        assert [site for site in inside if site.fused and architecture.kind in (None, site.kind)], (block, inside)


def test_resnets_sites_behind_batch_norm_are_named(device):
    model = fusedact.fuse(resnet()[0].to(device))
    behind = {
        path
        for path, module in model.named_modules()
        if isinstance(getattr(module, "normalization", None), nn.BatchNorm2d)
        and isinstance(getattr(module, "activation", None), nn.ReLU)
    }
    named = {site.module for site in fusedact.report(model).sites if "batch" in (site.reason or "").lower()}
    assert behind and behind <= named


def costs(model, loss, x, target):
    """Of three steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        cost = loss(model(x), target)
        cost.backward()
        optimizer.step()
        values.append(cost.item())
    return values


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_pair_of_the_tutorials_is_fused(name, device):
    build, _, _, layers = TUTORIALS[name]
    sites = fusedact.report(fusedact.fuse(build().to(device))).sites
    assert layers <= {part for site in sites if site.fused for part in site.parts}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.exhaustive] * (name in ("S6", "S7"))) for name in TUTORIALS]
)
def test_tutorials_train_as_stock(name, device, triton_backend):
    build, loss, shape, _ = TUTORIALS[name]
    model, x = build().to(device), torch.rand(*shape, device=device)
    stock = copy.deepcopy(model)
    target = torch.rand_like(model(x)) if isinstance(loss, nn.BCELoss) else torch.arange(len(x), device=device)
    fusedact.fuse(model)
    assert costs(model, loss, x, target) == pytest.approx(costs(stock, loss, x, target), rel=1e-5)
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_table(device, capsys):
    """Of each model: sites fused, gated pairs among them, sites left, and launches saved in a step of training."""
    pytest.importorskip("transformers")
    models = {name: architecture.build()[0] for name, architecture in ARCHITECTURES.items()}
    models |= {name: build() for name, (build, *_) in TUTORIALS.items()}
    lines = [f"{'architecture':<14}{'fused':>7}{'gated':>7}{'left':>7}{'launches saved a step':>24}"]
    for name, model in models.items():
        sites = fusedact.report(fusedact.fuse(model.to(device))).sites
        fused = [site for site in sites if site.fused]
        gated = sum(site.kind == "gated" for site in fused)
        saved = sum(sum(site.launches) for site in fused)
        assert saved >= len(fused)
        lines.append(f"{name:<14}{len(fused):>7}{gated:>7}{len(sites) - len(fused):>7}{saved:>24}")
    with capsys.disabled():
        print("", *lines, sep="\n")
