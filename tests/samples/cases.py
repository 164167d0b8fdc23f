"""A case: what became of the samples of one op or module under one kind of check; and which samples go to torch."""

from dataclasses import dataclass, field
from typing import Any

import torch
from samples.outcomes import Outcome
from torch.testing._internal.common_methods_invocations import DecorateInfo, SampleInput
from torch.utils._pytree import tree_leaves

import fusedact

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = (torch.float32, torch.float64, torch.bfloat16)
SHOWN = 5  # failures of a case that are told


@dataclass
class Case:
    name: str
    kind: str
    dtype: str = ""
    samples: int = 0
    fused: int = 0
    empty: int = 0
    left: dict[str, int] = field(default_factory=dict)  # by reason
    skipped: str = ""
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    other_strides: int = 0

    def judge(self, sample: Any, problem: str | None) -> bool:
        """Whether the sample passed."""
        self.samples += 1
        if problem:
            self.failed += 1
            if self.failed <= SHOWN:
                told = sample.summary() if isinstance(sample, SampleInput) else sample
                self.failures.append(f"{told}: {problem}"[:1500])
        return not problem

    def count(self, ours: Outcome, expected: int | None) -> str | None:
        """Through the kernels: no launch where the sample is left to torch, else as many as stated, or some."""
        reason = LEFT_TO_TORCH.get(self.name)
        if fusedact.get_backend() != "triton" or ours.error is not None:
            return None
        expected = 0 if reason else max(1, ours.launches) if expected is None else expected
        if ours.launches != expected:
            return f"{ours.launches} launches, expected {expected}" + (f" since {reason}" if reason else "")
        if reason:
            self.left[reason] = self.left.get(reason, 0) + 1
        self.fused += ours.launches > 0
        self.empty += not reason and not ours.launches
        return None


CONVOLUTIONS = [
    f"{name}{dims}d" for name in ("conv", "conv_transpose", "nn.Conv", "nn.ConvTranspose") for dims in (1, 2, 3)
]
# By name, what is none of the kernels' and why. All other samples are fused.
LEFT_TO_TORCH = dict.fromkeys(("linear", "nn.Linear", *CONVOLUTIONS), "a product without an activation is torch's")


def launches_of(y: Any, grads: tuple = (), linear: bool = False) -> int:
    """One forward unless the result is empty, one backward unless all gradients are.

    A linear layer's backward has a product for each gradient of x and W more.
    """
    forward = any(t.numel() for t in tree_leaves(y))
    given = [grad is not None and grad.numel() > 0 for grad in grads]
    return forward + (forward + sum(given[:2]) if linear and grads else any(given))


def skips(info: Any, suite: str, test: str, dtype: torch.dtype) -> bool:
    """Whether torch's own suite skips that test for the entry on this device, or expects it to fail."""
    for decorate in info.decorators:
        if isinstance(decorate, DecorateInfo) and decorate.is_active(suite, test, DEVICE, dtype, {}):
            for decorator in decorate.decorators:
                marked = decorator(lambda self: None)
                if getattr(marked, "__unittest_skip__", False):
                    return True
                if getattr(marked, "__unittest_expecting_failure__", False):
                    return True
    return False
