"""A small network for fuse(), and what is asked of it."""

import torch
import torch.nn.functional as F
from torch import nn

import fusedact


class Network(nn.Module):
    """A convolution, a linear layer and a gated pair, each with its activation: (N, 3, 6, 6) -> (N, 2)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.5)
        self.gate = nn.Linear(5, 4)
        self.up = nn.Linear(5, 4)
        self.silu = nn.SiLU()
        self.down = nn.Linear(4, 2)

    def forward(self, x, scale=1.0):
        x = F.relu(self.conv(x)).mean((2, 3)) * scale
        x = self.drop(self.act(self.fc(x)))
        return self.down(self.silu(self.gate(x)) * self.up(x))


class Low(nn.Linear):
    """A linear layer with a low-rank addition to its product, as LoRA's."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, device=base.weight.device)
        self.load_state_dict(base.state_dict())
        self.down, self.up = (nn.Linear(*io, bias=False) for io in ((base.in_features, 2), (2, base.out_features)))

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


def kinds(model):
    """The kinds of the fused sites."""
    return sorted(site.kind for site in fusedact.report(model).sites if site.fused)


def reasons(model):
    return [site.reason for site in fusedact.report(model).sites if not site.fused]


def answers(model, x, call=None):
    """The output, and the gradients of its squares with respect to the input and all parameters that want one."""
    x = x.detach().requires_grad_()
    y = (model if call is None else call)(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)]


def alike(ours, stock):
    for a, b in zip(ours, stock, strict=True):
        torch.testing.assert_close(a, b)


def both(change, models):
    for model in models:
        torch.manual_seed(1)
        change(model)
