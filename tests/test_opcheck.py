"""torch.library.opcheck on each registered op: schema, fakes, autograd, AOTAutograd."""

import pytest
import torch

import fusedact  # noqa: F401  registers them
from fusedact.activations import ACTIVATIONS


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


def gated_sample(name):
    def make(device):
        gate, up = torch.randn(4, 5, 12, device=device, requires_grad=True).transpose(0, 1).chunk(2, -1)
        return torch.ops.fusedact.gated.default, (gate, up, name, list(ACTIVATIONS[name].parameters({})), True)

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


def slice_sample(device):
    x, weight = torch.randn(6, 4, device=device, requires_grad=True), torch.rand(4, device=device)
    target = torch.randint(0, 4, (6,), device=device)
    options = -100, "mean", 0.1, 1e-2, 5.0, True, "", 0, 4
    return torch.ops.fusedact.vocab_parallel_cross_entropy.default, (x, target, weight, None, *options, True)


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


SAMPLES = {
    **{name: linear_sample(name) for name in ("relu", "gelu", "prelu", "leaky_relu")},
    **{f"{name} alone": activation_sample(name) for name in ("relu", "gelu", "prelu", "leaky_relu")},
    **{f"{name}, gated": gated_sample(name) for name in ("silu", "elu")},
    "cross_entropy": cross_entropy_sample,
    "probabilities": probabilities_sample,
    "vocab_parallel_cross_entropy": slice_sample,
    "nll_loss": nll_sample,
    "bce_with_logits": binary_sample("bce_with_logits", "mean"),
    "binary_cross_entropy": binary_sample("binary_cross_entropy", "none"),
    "multilabel_soft_margin": binary_sample("multilabel_soft_margin", "none"),
    "softmax": softmax_sample("softmax", 2, torch.float32),
    "log_softmax": softmax_sample("log_softmax", 1, torch.float64),
    "softmin": softmax_sample("softmin", 0, torch.bfloat16),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, device, triton_backend):
    torch.library.opcheck(*SAMPLES[name](device))
