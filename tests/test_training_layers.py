"""Multi-layer perceptrons trained in one launch, against autograd and torch.optim in float64.

The interpreter runs one program after the other, so several cannot wait for each other there: a kernel of this file
takes the phases of all of them in turn, forwards or backwards, which no program may notice.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, bce, training, training_layers

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ADAM_NUMBERS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
MOMENTUM_NUMBERS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
RULES = {  # ours, torch's, its numbers, its names of the moments
    "sgd": (training.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, ()),
    "momentum": (training.MOMENTUM, torch.optim.SGD, MOMENTUM_NUMBERS, ("momentum_buffer",)),
    "nesterov": (training.NESTEROV, torch.optim.SGD, MOMENTUM_NUMBERS | {"nesterov": True}, ("momentum_buffer",)),
    "adam": (training.ADAM, torch.optim.Adam, ADAM_NUMBERS, ("exp_avg", "exp_avg_sq")),
    "adamw": (training.ADAMW, torch.optim.AdamW, ADAM_NUMBERS, ("exp_avg", "exp_avg_sq")),
}
LOSSES = {  # ours, torch's, the activation before it
    "cross_entropy": (None, F.cross_entropy, "identity"),
    "logits": (bce.LOGITS, F.binary_cross_entropy_with_logits, "identity"),
    "probabilities": (bce.PROBABILITIES, F.binary_cross_entropy, "sigmoid"),
    "squared_error": (training.SQUARED_ERROR, F.mse_loss, "tanh"),
}
ROWS = 37
TILE = training_layers.Tile(16, 16, 16, 32, 32, num_warps=4, num_stages=2, registers=None, programs=1)


class Network(nn.Module):
    """Layers of these widths, as torch computes them and as the kernel is told of them."""

    def __init__(self, widths, names, biased=None):
        super().__init__()
        biased = biased or [True] * len(names)
        shapes = zip(widths, widths[1:], biased, strict=False)
        self.linears = nn.ModuleList([nn.Linear(*shape) for shape in shapes])
        self.names = names
        places, self.size = training.places(widths, biased)
        self.layers = tuple(
            training.Layer(linear.in_features, linear.out_features, *place, *pair(name))
            for linear, place, name in zip(self.linears, places, names, strict=True)
        )

    def forward(self, x):
        for linear, layer, name in zip(self.linears, self.layers, self.names, strict=True):
            x = linear(x)
            if name != "identity":
                x = ACTIVATIONS[name].reference(x, *layer.act_params)
        return x

    def flat(self, values):
        """The values of each parameter in one tensor, 0 between them."""
        flat = torch.zeros(self.size, dtype=values[0].dtype, device=values[0].device)
        places = [at for layer in self.layers for at in (layer.weight, layer.bias) if at is not None]
        for at, value in zip(places, values, strict=True):
            flat[at : at + value.numel()] = value.detach().flatten()
        return flat


def pair(name):
    """What a Layer says of its activation."""
    if name == "identity":
        return activations.identity, training.identity_grad, (), False
    params = ACTIVATIONS[name].default_values
    from_output = ACTIVATIONS[name].from_output(torch.float32, *params)
    gradient = getattr(activations, f"{name}_grad")
    if from_output:
        gradient = getattr(activations, f"{name}_grad_from_output", gradient)
    return getattr(activations, name), gradient, params, from_output


def draw(network, loss, device):
    """Rows, and targets as the loss takes them."""
    outputs = network.layers[-1].outputs
    y = torch.randint(outputs, (ROWS,)) if loss == "cross_entropy" else torch.rand(ROWS, outputs)
    return torch.randn(ROWS, network.layers[0].inputs).to(device), y.to(device)


def order_of(steps, batch, device):
    """Passes over the rows, each drawn anew, whose last batch may be shorter: (steps, batch)."""
    per_pass = -(-ROWS // batch)
    visited = torch.full((-(-steps // per_pass), per_pass * batch), -1, dtype=torch.int32)
    for rows in visited:
        rows[:ROWS] = torch.randperm(ROWS)
    return visited.view(-1, batch)[:steps].contiguous().to(device)


class Run:
    """What a launch takes and leaves; launched again it goes on."""

    def __init__(self, network, loss, rule, mean=True):
        self.rule, _, numbers, moments = RULES[rule]
        self.layers = network.layers
        self.objective = training.Objective(LOSSES[loss][0], mean)
        self.flat = network.flat(list(network.parameters()))
        self.moments = self.flat.new_zeros(len(moments), network.size)
        beta1, beta2 = numbers.get("betas", (numbers.get("momentum", 0.0), 0.0))
        rates = [numbers["lr"], numbers["weight_decay"], beta1, beta2, numbers.get("eps", 0.0), 1.0, 1.0]
        self.rates = torch.tensor(rates, dtype=torch.float64, device=self.flat.device)
        self.failed = torch.zeros(1, dtype=torch.int32, device=self.flat.device)

    def train(self, x, y, order, precision="ieee", config=TILE):
        losses = self.flat.new_empty(len(order))
        training_layers.train(
            x, y, order, self.flat, self.moments, self.rates, losses, self.failed,
            self.layers, self.objective, self.rule, precision, config,
        )  # fmt: skip
        return losses

    @property
    def state(self):
        return torch.cat([self.flat.double(), self.moments.double().flatten(), self.rates])


def by_torch(network, loss, rule, x, y, order, dtype, mean=True):
    """Parameters, moments and losses after autograd and torch.optim, in that dtype."""
    _, kind, numbers, names = RULES[rule]
    network = copy.deepcopy(network).to(dtype)
    optimizer = kind(network.parameters(), **numbers)
    losses = []
    for visited in order:
        rows = visited[visited >= 0].long()
        target = y[rows] if loss == "cross_entropy" else y[rows].to(dtype)
        optimizer.zero_grad()
        value = LOSSES[loss][1](network(x[rows].to(dtype)), target, reduction="mean" if mean else "sum")
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    moments = [network.flat([optimizer.state[p][name] for p in network.parameters()]) for name in names]
    flat = network.flat(list(network.parameters()))
    return flat, torch.stack(moments) if names else flat.new_zeros(0, network.size), torch.stack(losses)


def check(compare, network, loss, rule, device, batch=18, steps=3, mean=True):
    """Parameters, moments and losses are as accurate as torch's."""
    network = network.to(device)
    batches = *draw(network, loss, device), order_of(steps, batch, device)
    run = Run(network, loss, rule, mean)
    losses = run.train(*batches)
    stock = by_torch(network, loss, rule, *batches, torch.float32, mean)
    truth = by_torch(network, loss, rule, *batches, torch.float64, mean)
    for ours, torchs, true in zip((run.flat, run.moments, losses), stock, truth, strict=True):
        compare(ours, torchs, true)
    assert not run.failed


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, device, as_accurate_as_torch):
    check(as_accurate_as_torch, Network((20, 17, 5), ["relu", "identity"]), "cross_entropy", rule, device)


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_objectives(loss, mean, device, as_accurate_as_torch):
    check(as_accurate_as_torch, Network((5, 7, 3), ["tanh", LOSSES[loss][2]]), loss, "sgd", device, mean=mean)


@pytest.mark.parametrize(
    ("widths", "names", "biased"),
    [
        ((1, 1, 1), ["relu", "identity"], None),
        ((33, 18, 33, 17), ["relu", "relu", "identity"], None),
        ((4, 17, 3, 2, 18), ["gelu", "leaky_relu", "silu", "identity"], [True, False, True, False]),
        ((3, 2, 5), ["elu", "tanh"], [False, False]),
    ],
    ids=str,
)
def test_networks(widths, names, biased, device, as_accurate_as_torch):
    """Widths around those of a tile, two to four layers, derivatives from the output and from the pre-activation."""
    check(as_accurate_as_torch, Network(widths, names, biased), "cross_entropy", "adam", device)


@pytest.mark.parametrize("batch", [1, 37, 50])
def test_batches(batch, device, as_accurate_as_torch):
    check(as_accurate_as_torch, Network((5, 7, 3), ["relu", "identity"]), "logits", "momentum", device, batch)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_run_goes_on_where_it_stopped(rule, device):
    network = Network((5, 7, 3), ["relu", "identity"]).to(device)
    x, y = draw(network, "logits", device)
    order = order_of(6, 18, device)
    whole, parts = (Run(network, "logits", rule) for _ in range(2))
    losses = whole.train(x, y, order)
    assert torch.equal(torch.cat([parts.train(x, y, order[:3]), parts.train(x, y, order[3:])]), losses)
    assert torch.equal(parts.state, whole.state)


def test_bfloat16_operands(device, as_accurate_as_torch, monkeypatch):
    """Of all products, as those of what they are compared with."""
    network = Network((5, 7, 9, 3), ["relu", "tanh", "identity"]).to(device)
    x, y = draw(network, "squared_error", device)
    order = order_of(3, 18, device)
    run = Run(network, "squared_error", "sgd")
    losses = run.train(x, y, order, precision="bf16")
    monkeypatch.setattr(F, "linear", lambda x, w, b: RoundedProduct.apply(x, w) + b)
    stock, truth = (by_torch(network, "squared_error", "sgd", x, y, order, d) for d in (torch.float32, torch.float64))
    as_accurate_as_torch(run.flat, stock[0], truth[0])
    as_accurate_as_torch(losses, stock[2], truth[2])


class RoundedProduct(torch.autograd.Function):
    """x Wᵀ, and the two products of its backward, of operands as bfloat16 has them."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w).t()

    @staticmethod
    def backward(ctx, dz):
        x, w = map(rounded, ctx.saved_tensors)
        return rounded(dz) @ w, rounded(dz).t() @ x


def rounded(t):
    return t.bfloat16().to(t.dtype)


# Several programs


@triton.jit
def _in_turn_kernel(
    steps,
    run,
    layers,
    code,
    programs,
    BACKWARDS: tl.constexpr,
):  # fmt: skip
    first = programs - 1 if BACKWARDS else 0
    sign = -1 if BACKWARDS else 1
    for i in range(programs):
        training_layers.gather(first + sign * i, programs, 0, steps, run, layers, code)
    for step in range(steps):
        for PHASE in tl.static_range(2 * code.layers - 1):
            for i in range(programs):
                training_layers.phase(PHASE, first + sign * i, programs, step, steps, run, layers, code)


class InTurn:
    """In place of the kernel: all programs' phases in one."""

    def __init__(self, backwards):
        self.backwards = backwards

    def __getitem__(self, grid):
        def launch(counter, failed, steps, run, layers, code, POLLS, **options):
            _in_turn_kernel[(1,)](steps, run, layers, code, *grid, self.backwards, num_stages=1)

        return launch


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("programs", [3, 13])
def test_programs_that_take_turns(programs, backwards, device, monkeypatch):
    """As many as there are, whoever comes first, the parameters are the same bit for bit."""
    network = Network((33, 18, 17, 5), ["relu", "gelu", "identity"]).to(device)
    batches = *draw(network, "cross_entropy", device), order_of(3, 18, device)
    alone, shared = (Run(network, "cross_entropy", "adam") for _ in range(2))
    losses = alone.train(*batches)
    monkeypatch.setattr(training_layers, "_train_kernel", InTurn(backwards))
    assert torch.equal(shared.train(*batches, config=TILE._replace(programs=programs)), losses)
    assert torch.equal(shared.state, alone.state)


@pytest.mark.parametrize("programs", [1, 2, 7, 16, 32, 132])
def test_programs_at_once(programs, device):
    """In a hundred runs the parameters are bit for bit those of a program alone."""
    if device != "cuda":
        pytest.skip("needs programs that run at once")
    config = TILE._replace(programs=min(programs, torch.cuda.get_device_properties(0).multi_processor_count))
    network = Network((784, 256, 256, 10), ["relu", "relu", "identity"]).to(device)
    batches = *draw(network, "cross_entropy", device), order_of(30, 18, device)
    alone = Run(network, "cross_entropy", "adam")
    losses = alone.train(*batches)
    for _ in range(100):
        run = Run(network, "cross_entropy", "adam")
        assert torch.equal(run.train(*batches, config=config), losses)
        assert torch.equal(run.state, alone.state) and not run.failed


def test_a_program_that_waits_in_vain_gives_up(device, monkeypatch):
    """In the interpreter the second program starts when the first has ended."""
    if device == "cuda":
        pytest.skip("there both run at once")
    network = Network((5, 7, 3), ["relu", "identity"])
    run = Run(network, "logits", "sgd")
    monkeypatch.setattr(training_layers, "POLLS", 3)
    run.train(*draw(network, "logits", device), order_of(50, 18, device), config=TILE._replace(programs=2))
    assert run.failed.tolist() == [1]


# Rows, memory, launches


def test_a_row_that_is_not_there_adds_nothing(device):
    """Though its hidden units be infinite and their derivative NaN: logarithms of a bias that is 0."""
    network = Network((2, 3, 2), ["softsign", "identity"]).to(device)
    hidden, last = network.layers
    network.layers = (hidden._replace(act=logarithm, act_grad=logarithm_grad), last)
    nn.init.constant_(network.linears[0].weight, 1.0)
    nn.init.zeros_(network.linears[0].bias)
    x, y = (t.abs() + 1 for t in draw(network, "squared_error", device))
    order = order_of(2, 3, device)
    wide, exact = (Run(network, "squared_error", "sgd") for _ in range(2))
    losses = exact.train(x, y, order)
    assert losses.isfinite().all()
    torch.testing.assert_close(wide.train(x, y, torch.cat([order, torch.full_like(order, -1)], 1)), losses)
    torch.testing.assert_close(wide.flat, exact.flat)


@triton.jit
def logarithm(z):
    return tl.log(z)


@triton.jit
def logarithm_grad(dy, z):
    return dy / z


def test_nothing_is_read_beyond_the_last_step_nor_written_between_the_parameters(device):
    network = Network((5, 7, 3), ["relu", "identity"]).to(device)
    x, y = draw(network, "logits", device)
    order = order_of(2, 18, device)
    beyond = torch.cat([order, torch.full_like(order, 2**30)])
    run, other = (Run(network, "logits", "adamw") for _ in range(2))
    assert torch.equal(run.train(x, y, beyond[:2]), other.train(x, y, order)) and torch.equal(run.state, other.state)
    between = network.flat([torch.ones_like(p) for p in network.parameters()]) == 0
    assert between.sum() == 6 and not run.flat[between].any() and not run.moments[:, between].any()


def test_rows_of_bytes(device):
    network = Network((5, 7, 3), ["relu", "identity"]).to(device)
    _, y = draw(network, "logits", device)
    x = torch.randint(256, (ROWS, 5), dtype=torch.uint8, device=device)
    narrow, wide = (Run(network, "logits", "adam") for _ in range(2))
    order = order_of(2, 18, device)
    assert torch.equal(narrow.train(x, y, order), wide.train(x.float(), y, order))
    assert torch.equal(narrow.state, wide.state)


def test_one_launch(device, launches):
    network = Network((5, 7, 3), ["relu", "identity"]).to(device)
    batches = *draw(network, "logits", device), order_of(2, 18, device)
    launches.reset()
    Run(network, "logits", "adam").train(*batches)
    assert launches.count == 1
