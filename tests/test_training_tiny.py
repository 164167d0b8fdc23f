"""Small networks trained in one launch, against autograd and torch.optim in float64; and the loop's machine code.

The tests replace the compiler: run as a program, this file prints the machine code that they read.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, bce, training, training_tiny

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

ADAM_NUMBERS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
NESTEROV_NUMBERS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
RULES = {  # ours, torch's, its numbers, its names of the moments
    "sgd": (training.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, ()),
    "momentum": (training.MOMENTUM, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, ("momentum_buffer",)),
    "nesterov": (training.NESTEROV, torch.optim.SGD, NESTEROV_NUMBERS, ("momentum_buffer",)),
    "adam": (training.ADAM, torch.optim.Adam, ADAM_NUMBERS, ("exp_avg", "exp_avg_sq")),
    "adamw": (training.ADAMW, torch.optim.AdamW, ADAM_NUMBERS, ("exp_avg", "exp_avg_sq")),
}
LOSSES = {  # ours, torch's, the activation before it
    "probabilities": (bce.PROBABILITIES, F.binary_cross_entropy, "sigmoid"),
    "logits": (bce.LOGITS, F.binary_cross_entropy_with_logits, "identity"),
    "squared_error": (training.SQUARED_ERROR, F.mse_loss, "tanh"),
    "cross_entropy": (None, F.cross_entropy, "identity"),
}
ROWS = 23
ROOT = Path(__file__).parent.parent


class Network:
    """Layers of these widths, as the kernel and as torch compute them."""

    def __init__(self, widths, names, biased=None):
        biased = biased or [True] * len(names)
        places, self.size = training.places(widths, biased)
        self.names = names
        self.layers = tuple(
            training.Layer(inputs, outputs, *place, *pair(name))
            for place, inputs, outputs, name in zip(places, widths[:-1], widths[1:], names, strict=True)
        )

    def draw(self, networks, device):
        """Flat parameters (networks, P), 0 between them."""
        flat = torch.zeros(networks, self.size)
        for parameters in map(self.split, flat):
            for t in parameters:
                t.copy_(torch.randn(t.shape))
        return flat.to(device)

    def split(self, flat: Tensor) -> list[Tensor]:
        """W and b of each layer, views."""
        views = []
        for layer in self.layers:
            views.append(flat[layer.weight :][: layer.outputs * layer.inputs].view(layer.outputs, layer.inputs))
            if layer.bias is not None:
                views.append(flat[layer.bias :][: layer.outputs])
        return views

    def __call__(self, x: Tensor, parameters: list[Tensor]) -> Tensor:
        left = iter(parameters)
        for layer, name in zip(self.layers, self.names, strict=True):
            x = F.linear(x, next(left), None if layer.bias is None else next(left))
            if name != "identity":
                x = ACTIVATIONS[name].reference(x, *layer.act_params)
        return x


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


def data(network, loss, device):
    """Rows, and targets as the loss takes them."""
    inputs, outputs = network.layers[0].inputs, network.layers[-1].outputs
    x = torch.randn(ROWS, inputs)
    y = torch.randint(outputs, (ROWS,)) if loss == "cross_entropy" else torch.rand(ROWS, outputs)
    return x.to(device), y.to(device)


def order_of(steps, batch, device, rows=ROWS):
    """Rows drawn anew for each pass, whose last batch may be shorter: (steps, batch)."""
    visited = torch.full((steps, batch), -1, dtype=torch.int32)
    per_pass = -(-rows // batch)
    for step in range(steps):
        if step % per_pass == 0:
            parts = torch.randperm(rows).split(batch)
        part = parts[step % per_pass]
        visited[step, : len(part)] = part
    return visited.to(device)


def rates_of(numbers, networks, device):
    beta1, beta2 = numbers.get("betas", (numbers.get("momentum", 0.0), 0.0))
    rates = [numbers["lr"], numbers.get("weight_decay", 0.0), beta1, beta2, numbers.get("eps", 0.0), 1.0, 1.0]
    return torch.tensor([rates] * networks, dtype=torch.float64, device=device)


class Run:
    """What a launch takes and leaves; launched again it goes on."""

    def __init__(self, network, loss, rule, flat, mean=True):
        ours, _, numbers, names = RULES[rule]
        self.network, self.rule = network, ours
        self.objective = training.Objective(LOSSES[loss][0], mean)
        self.flat = flat.clone()
        self.moments = flat.new_zeros(len(flat), len(names), network.size)
        self.rates = rates_of(numbers, len(flat), flat.device)

    def train(self, x, y, order):
        losses = self.flat.new_empty(len(self.flat), order.shape[-2])
        training_tiny.train(
            x, y, order, self.flat, self.moments, self.rates, losses,
            self.network.layers, self.objective, self.rule, training_tiny.tile(order.shape[-1]),
        )  # fmt: skip
        return losses


def by_torch(network, loss, rule, flat, x, y, order, mean=True):
    """Flat parameters, moments and losses after autograd and torch.optim, in flat's dtype and on its device."""
    _, kind, numbers, names = RULES[rule]
    parameters = [t.clone().requires_grad_() for t in network.split(flat)]
    optimizer = kind(parameters, **numbers)
    losses = []
    for visited in order:
        rows = visited[visited >= 0].long()
        target = y[rows] if loss == "cross_entropy" else y[rows].to(flat.dtype)
        optimizer.zero_grad()
        value = LOSSES[loss][1](
            network(x[rows].to(flat.dtype), parameters), target, reduction="mean" if mean else "sum"
        )
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    result, moments = torch.zeros_like(flat), flat.new_zeros(len(names), len(flat))
    states = ([optimizer.state[p][name] for p in parameters] for name in names)
    for place, values in zip((result, *moments), (parameters, *states), strict=True):
        for view, value in zip(network.split(place), values, strict=True):
            view.copy_(value.detach())
    return result, moments, torch.stack(losses)


def check(compare, network, loss, rule, device, batch=9, steps=7, mean=True, networks=1):
    """Each network's parameters, moments and losses."""
    x, y = data(network, loss, device)
    order, flat = order_of(steps, batch, device), network.draw(networks, device)
    run = Run(network, loss, rule, flat, mean)
    losses = run.train(x, y, order)
    for i, start in enumerate(flat):
        stock = by_torch(network, loss, rule, start, x, y, order, mean)
        truth = by_torch(network, loss, rule, *(t.cpu() for t in (start.double(), x, y, order)), mean)
        for ours, torchs, true in zip((run.flat[i], run.moments[i], losses[i]), stock, truth, strict=True):
            compare(ours, torchs, true)


NETWORKS = {
    "1-1": Network((1, 1), ["sigmoid"], [False]),
    "2-1": Network((2, 1), ["sigmoid"]),
    "3-1": Network((3, 1), ["sigmoid"]),
    "2-2-1": Network((2, 2, 1), ["sigmoid", "sigmoid"]),
    "2-3-2": Network((2, 3, 2), ["relu", "sigmoid"], [True, False]),
    "3-4-2-3": Network((3, 4, 2, 3), ["gelu", "leaky_relu", "sigmoid"], [False, True, True]),
    "2-2-2-2-1": Network((2, 2, 2, 2, 1), ["silu", "elu", "softplus", "sigmoid"]),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["3-1", "2-2-1"])
def test_rules(name, rule, device, as_accurate_as_torch):
    check(as_accurate_as_torch, NETWORKS[name], "probabilities", rule, device)


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_objectives(loss, mean, device, as_accurate_as_torch):
    network = Network((2, 2, 3), ["tanh", LOSSES[loss][2]])
    check(as_accurate_as_torch, network, loss, "sgd", device, steps=4, mean=mean)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, device, as_accurate_as_torch):
    check(as_accurate_as_torch, NETWORKS[name], "probabilities", "adam", device, steps=4)


@pytest.mark.parametrize("batch", [1, 2, 7, 23, 64])
def test_batches(batch, device, as_accurate_as_torch):
    """A last batch of one row, of a few, and batches wider than the data."""
    check(as_accurate_as_torch, NETWORKS["2-2-1"], "probabilities", "momentum", device, batch, steps=4)


@pytest.mark.parametrize("name", [name for name, a in ACTIVATIONS.items() if not a.learned])
def test_activations(name, device, as_accurate_as_torch):
    check(as_accurate_as_torch, Network((1, 1, 1), [name, "identity"]), "logits", "sgd", device, steps=2)


def test_a_network_for_each_program(device, as_accurate_as_torch):
    check(as_accurate_as_torch, NETWORKS["2-2-1"], "probabilities", "adam", device, steps=4, networks=3)


def test_each_network_with_its_own_order_and_rates(device):
    """The same, bit for bit, as one launch for each."""
    network = NETWORKS["2-2-1"]
    x, y = data(network, "logits", device)
    orders, flat = torch.stack([order_of(3, 5, device) for _ in range(3)]), network.draw(3, device)
    together = Run(network, "logits", "adamw", flat)
    together.rates[:, 0] *= torch.tensor([1.0, 0.1, 3.0], device=device)
    rates = together.rates.clone()
    losses = together.train(x, y, orders)
    for i in range(3):
        alone = Run(network, "logits", "adamw", flat[i : i + 1])
        alone.rates.copy_(rates[i])
        assert torch.equal(alone.train(x, y, orders[i])[0], losses[i])
        for name in ("flat", "moments", "rates"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i])


@pytest.mark.parametrize("rule", RULES)
def test_a_run_goes_on_where_it_stopped(rule, device):
    network = NETWORKS["2-2-1"]
    x, y = data(network, "probabilities", device)
    order, flat = order_of(6, 9, device), network.draw(1, device)
    whole, parts = (Run(network, "probabilities", rule, flat) for _ in range(2))
    losses = whole.train(x, y, order)
    assert torch.equal(torch.cat([parts.train(x, y, order[:3]), parts.train(x, y, order[3:])], 1), losses)
    for name in ("flat", "moments", "rates"):
        assert torch.equal(getattr(whole, name), getattr(parts, name))
    beta1, beta2 = rates_of(RULES[rule][2], 1, device)[0, 2:4].tolist()
    assert whole.rates[0, -2:].tolist() == pytest.approx([beta1**6, beta2**6], rel=1e-14)


def test_a_saturated_sigmoid_has_no_gradient(device):
    """Its output is 1 in float32, so the derivative of BCE is clamped and the sigmoid's is 0: nothing moves."""
    network = NETWORKS["2-1"]
    x = torch.tensor([[30.0, 1.0], [20.0, 5.0]], device=device)
    y, order = torch.zeros(2, 1, device=device), order_of(2, 2, device, rows=2)
    run = Run(network, "probabilities", "momentum", torch.tensor([[1.0, 1, 0, 0, 1, 0, 0, 0]], device=device))
    before = run.flat.clone()
    assert run.train(x, y, order).tolist() == [[100.0, 100.0]]
    assert torch.equal(run.flat, before) and not run.moments.any()


def test_a_lane_without_a_row_adds_nothing(device):
    """Though its hidden unit be NaN: a logarithm of the bias alone, which is negative."""
    network = Network((2, 2, 1), ["softsign", "sigmoid"])
    hidden, last = network.layers
    network.layers = (hidden._replace(act=logarithm, act_grad=logarithm_grad), last)
    x, y = torch.rand(4, 2, device=device) + 1, torch.rand(4, 1, device=device)
    flat = network.draw(1, device).abs()
    network.split(flat[0])[1].fill_(-0.5)
    network.split(flat[0])[0].fill_(1.0)
    wide, exact = (Run(network, "probabilities", "sgd", flat) for _ in range(2))
    rows = torch.tensor([[0, 1, 2, 3], [3, 1, 0, 2]], dtype=torch.int32, device=device)
    missing = rows.new_full((2, 3), -1)
    losses = exact.train(x, y, rows)
    assert losses.isfinite().all()
    torch.testing.assert_close(wide.train(x, y, torch.cat([rows, missing], 1)), losses)
    torch.testing.assert_close(wide.flat, exact.flat)


@triton.jit
def logarithm(z):
    return tl.log(z)


@triton.jit
def logarithm_grad(dy, z):
    return dy / z


def test_nothing_is_read_beyond_the_last_step_nor_written_between_the_parameters(device):
    network = NETWORKS["3-1"]
    x, y = data(network, "probabilities", device)
    order = order_of(3, 5, device)
    beyond = torch.cat([order, torch.full_like(order, 2**30)])
    flat = network.draw(1, device)
    run, other = (Run(network, "probabilities", "adamw", flat) for _ in range(2))
    losses = run.train(x, y, beyond[:3])
    assert torch.equal(losses, other.train(x, y, order)) and torch.equal(run.flat, other.flat)
    between = torch.ones(network.size, dtype=torch.bool)
    for view in network.split(between):
        view.fill_(False)
    assert between.sum() == 4 and not run.flat[0, between].any() and not run.moments[0][:, between].any()


@pytest.mark.parametrize(
    ("widths", "batch", "rule", "answer"),
    [
        ((3, 1), 64, "adam", True),
        ((2, 2, 1), 128, "adam", True),
        ((2, 8, 1), 64, "adam", True),
        ((7, 8), 32, "sgd", True),
        ((7, 8), 32, "adam", False),
        ((16, 4), 128, "sgd", False),
        ((3, 1), 129, "sgd", False),
    ],
    ids=str,
)
def test_what_fits(widths, batch, rule, answer):
    network = Network(widths, ["sigmoid"] * (len(widths) - 1))
    assert training_tiny.fits(network.layers, batch, RULES[rule][0]) == answer


def test_one_launch(device, launches):
    network = NETWORKS["3-1"]
    run = Run(network, "probabilities", "adam", network.draw(2, device))
    batch = *data(network, "probabilities", device), order_of(4, 5, device)
    launches.reset()
    run.train(*batch)
    assert launches.count == 1


# Machine code

LOOPS = [("3x1", ""), ("3x1", " rule=ADAM"), ("2x1", ""), ("2x1", " rule=ADAM"), ("2x2x1", ""), ("2x2x1", " rule=ADAM")]
BATCH = 64
MEMORY = re.compile(
    r"(?P<load>LDG|(?:buffer|global)_load)|(?P<store>STG|(?:buffer|global)_store)|(?P<other>"
    r"LD[SL]?\b|LDSM|ST[SL]?\b|ATOM|RED\b|BAR|MEMBAR|ds_|scratch_|flat_|s_load|s_barrier|\w+_atomic)"
)
LABEL = re.compile(r"^(\.L\w+):", re.MULTILINE)
BRANCH = re.compile(r"\b(?:BRA|s_c?branch\w*)\b.*?(\.L\w+)")
INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?)?([A-Za-z][\w.]+)", re.MULTILINE)


def step_loop(code: str) -> list[str]:
    """The mnemonics from the first place that is branched back to, of the longest such way, to the branch."""
    labels = {match[1]: match.start() for match in LABEL.finditer(code)}
    spans = [(labels[match[1]], match.end()) for match in BRANCH.finditer(code) if labels[match[1]] < match.start()]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return INSTRUCTION.findall(code[first:last])


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory):
    """{(case, chip): text}"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(case, chip): code for case, chip, code in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "chip"), [(32, "sm_80"), (32, "sm_90"), (32, "sm_100"), (64, "gfx942")])
@pytest.mark.parametrize(("widths", "options"), LOOPS)
def test_a_step_touches_memory_only_for_its_rows_and_its_loss(machine_code, widths, options, chip, lanes):
    """And waits at no barrier. What it loads are the row numbers, inputs and targets of later steps."""
    loop = step_loop(machine_code[f"training_tiny_train fp32 {BATCH}x{widths}{options}", chip])
    counts = Counter(match.lastgroup for match in map(MEMORY.match, loop) if match)
    vectors = 1 + int(widths[0]) + int(widths[-1])
    assert len(loop) > 100
    assert counts == {"load": vectors * (BATCH // lanes), "store": 1}


def print_machine_code() -> None:
    from bench import assembly, codegen, codegen_cases

    named = {f"training_tiny_train fp32 {BATCH}x{widths}{options}" for widths, options in LOOPS}
    for case in codegen_cases.CASES:
        if str(case) in named:
            for name, chip in codegen.CHIPS.items():
                _, (launch,) = codegen.launches(chip, case)
                print(json.dumps((str(case), name, text_of(launch.kernel.asm, assembly.tool))))


def text_of(asm, tool) -> str:
    if "amdgcn" in asm:
        return asm["amdgcn"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        return tool("nvdisasm", "-ndf", "-c", cubin.name)


if __name__ == "__main__":
    print_machine_code()
