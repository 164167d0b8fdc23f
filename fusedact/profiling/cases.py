"""The cases table, one line each, with what each promises."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

MATRIX_OPS = ("linear_act", "linear_chain", "convolution_act", "linear_cross_entropy", "fused_block")
TINY = 40  # of a dimension, which no block divides


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype.

    shape: linear_act (M, N, K), linear_chain the same and a layer of K after it, convolution_act (batch, channels in,
        channels out, its sizes, kernel), gated (rows, features), fused_block, a gated block that fuse() was given,
        (rows, features, hidden features), of classes (rows, classes, ...), of yes and no
        (elements,) or (rows, classes), of a head (rows, features, classes) or, of yes and no, (rows, features),
        of an activation alone any
    precision: torch's float32 matmul precision
    chunk: the rows of logits that a head holds at once, None for its own choice
    threshold: the least ratio to stock eager, in device time of each phase and in wall time of both
    target: the least ratio of both phases together, in device time
    least_share: the least share of the copy ceiling in forward
    most_ms: the most device time of both phases together
    most_gib: the most memory of both phases together, beyond inputs and gradients
    """

    op: str
    shape: tuple[int, ...]
    dtype: str
    activation: str = ""
    precision: str = "highest"
    chunk: int | None = None
    threshold: float = 0.97
    target: float | None = None
    least_share: float | None = None
    most_ms: float | None = None
    most_gib: float | None = None

    @property
    def name(self) -> str:
        shape = "x".join(map(str, self.shape))
        high = self.precision if self.precision != "highest" else None
        chunk = f"chunks of {self.chunk}" if self.chunk else None
        return " ".join(filter(None, (self.op, self.activation, shape, self.dtype, high, chunk)))

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def matrix_rate(self) -> str | None:
        """The ceiling that its FLOPs meet, or None where only bytes count."""
        if self.op not in MATRIX_OPS:
            return None
        high = self.precision == "high" or self.op == "convolution_act"  # cuDNN's default
        kind = "bf16" if self.torch_dtype.itemsize == 2 else "tf32" if high else "fp32"
        return f"{kind}, TFLOP/s"

    def tiny(self, most: int = TINY) -> "Case":
        """The same code at a shape for a dry run, or of dimensions up to `most`."""
        chunk = min(self.chunk, 2 * most // 5) if self.chunk else None
        small = replace(self, chunk=chunk, target=None, least_share=None, most_ms=None, most_gib=None)
        if self.op == "convolution_act":  # in 16 bits torch rounds before it adds b on a GPU, but not on a CPU
            return replace(small, shape=tuple(min(n, 8) for n in self.shape), dtype="float32")
        of_each = most**2 if len(self.shape) == 1 else most
        return replace(small, shape=tuple(min(n, of_each) for n in self.shape))


@dataclass(frozen=True)
class Step:
    """A whole training step of a trainer, optimizer included, on stock and on fused layers."""

    system: str
    trainer: str
    threshold: float = 0.97

    @property
    def name(self) -> str:
        return f"{self.system} {self.trainer}"


# In order of worth: where time is short, the last are skipped. A loss of 1,000 classes cannot have more than twice
# stock's speed, BCE more than 4.4 times, a gated pair more than 1.75 times: their targets are nine tenths of that.
# fmt: off
CASES = (
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", threshold=1.8),
    Case("cross_entropy", (4096, 32000), "bfloat16", target=2.0, least_share=0.9),
    Case("cross_entropy", (4096, 32000), "float32", target=2.0, least_share=0.9),
    Case("bce_with_logits", (2**26,), "float32", target=3.96),
    Case("linear_cross_entropy", (4096, 4096, 128256), "bfloat16", chunk=2048, most_ms=18.0, most_gib=2.6),
    Case("linear_act", (100, 256, 784), "float32", "relu"),
    Case("linear_act", (64, 1, 3), "float32", "sigmoid"),
    Case("linear_act", (8192, 8192, 8192), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", "high"),
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "gelu"),
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "silu"),
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "sigmoid"),
    Case("linear_chain", (4096, 4096, 4096), "bfloat16", "relu"),
    Case("linear_chain", (4096, 4096, 4096), "bfloat16", "gelu"),
    Case("cross_entropy", (4096, 128256), "bfloat16", target=2.0, least_share=0.9),
    Case("cross_entropy", (4096, 128256), "float32", target=2.0, least_share=0.9),
    Case("cross_entropy", (16384, 4096), "bfloat16", target=2.0, least_share=0.9),
    Case("cross_entropy", (16384, 4096), "float32", target=2.0, least_share=0.9),
    Case("cross_entropy", (8192, 32768), "bfloat16", target=2.0, least_share=0.9),
    Case("cross_entropy", (8192, 32768), "float32", target=2.0, least_share=0.9),
    Case("cross_entropy_grad_in_forward", (4096, 32000), "bfloat16", target=2.0),
    Case("cross_entropy_grad_in_forward", (4096, 32000), "float32", target=2.0),
    Case("cross_entropy_grad_in_forward", (4096, 128256), "bfloat16", target=2.0),
    Case("cross_entropy_grad_in_forward", (4096, 128256), "float32", target=2.0),
    Case("bce_with_logits", (2**26,), "bfloat16", target=3.96),
    # The bound on memory is that of 4,096 rows: one chunk's logits (0.5 GiB) and dW's sum in float32 (2 GiB).
    Case("linear_cross_entropy", (16384, 4096, 128256), "bfloat16", chunk=2048, most_gib=2.6),
    Case("linear_cross_entropy", (4096, 4096, 128256), "bfloat16", chunk=1024, most_gib=2.4),
    Case("linear_cross_entropy", (4096, 1024, 32000), "float32"),
    Case("linear_bce", (65536, 1000), "float32"),
    Case("linear_bce", (16384, 8192), "bfloat16"),
    Case("linear_bce", (64, 3), "float32"),
    Case("linear_act", (2048, 1024, 1024), "bfloat16", "relu"),
    Case("linear_act", (2048, 1024, 1024), "float32", "relu"),
    Case("linear_act", (100, 256, 784), "bfloat16", "relu"),
    Case("linear_act", (64, 1, 3), "bfloat16", "sigmoid"),
    Case("linear_act", (1, 4096, 4096), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float16", "relu"),
    Case("linear_act", (4090, 4090, 4090), "bfloat16", "relu"),
    Case("linear_act", (4090, 4090, 4090), "float32", "relu"),
    Case("linear_chain", (4096, 1024, 1024), "float32", "relu"),
    Case("linear_chain", (100, 256, 784), "float32", "relu"),
    Case("cross_entropy", (32768, 1000), "bfloat16", target=1.8),
    Case("cross_entropy", (32768, 1000), "float32", target=1.8),
    Case("cross_entropy_grad_in_forward", (32768, 1000), "float32", target=2.0),
    Case("cross_entropy", (32768, 32000), "bfloat16", target=2.0, least_share=0.9),
    Case("softmax", (4096, 32000), "bfloat16", least_share=0.9),
    Case("softmax", (32768, 1000), "float32", least_share=0.9),
    Case("log_softmax", (4096, 32000), "bfloat16", least_share=0.9),
    Case("cross_entropy", (4096, 10), "float32"),
    Case("cross_entropy", (4096, 10), "bfloat16"),
    Case("cross_entropy", (4096, 1000), "float32"),
    Case("cross_entropy", (4096, 1000), "bfloat16"),
    Case("cross_entropy", (32768, 10), "float32"),
    Case("cross_entropy", (32768, 10), "bfloat16"),
    Case("bce_with_logits", (2**12,), "float32"),
    Case("bce_with_logits", (2**12,), "bfloat16"),
    Case("cross_entropy", (32768, 32000), "float32", target=2.0, least_share=0.9),
    Case("cross_entropy", (32768, 128256), "bfloat16", target=2.0, least_share=0.9),
    Case("cross_entropy", (32768, 128256), "float32", target=2.0, least_share=0.9),
    Case("linear_act", (8192, 8192, 8192), "float32", "relu", "high"),
    Case("linear_act", (8192, 8192, 8192), "float32", "relu", threshold=1.8),
    Case("cross_entropy_smoothed", (4096, 32000), "bfloat16", target=2.0, least_share=0.9),
    Case("cross_entropy_smoothed", (32768, 1000), "float32", target=1.8),
    Case("cross_entropy_probabilities", (32768, 1000), "bfloat16", target=1.8),
    Case("cross_entropy", (16, 21, 65536), "bfloat16", target=1.8),
    Case("vocab_parallel_cross_entropy", (4096, 16032), "bfloat16", target=1.8, least_share=0.8),
    Case("vocab_parallel_cross_entropy", (4096, 16032), "float32", target=1.8, least_share=0.8),
    Case("nll_loss", (32768, 1000), "float32"),
    Case("bce_with_logits_weighted", (2**16, 1000), "float32", target=3.9),
    Case("bce", (2**26,), "float32"),
    Case("multilabel_soft_margin", (2**16, 1000), "float32", target=3.9),
    Case("prelu", (2**15, 1024), "bfloat16"),
    Case("gated", (8192, 14336), "bfloat16", "silu", threshold=1.5, target=1.57, least_share=0.9),
    Case("fused_block", (4096, 4096, 14336), "bfloat16", "silu", threshold=1.0),
    Case("convolution_act", (64, 64, 256, 56, 56, 1), "bfloat16", "relu"),
    Case("convolution_act", (16, 50, 120, 28, 28, 7), "float32", "relu"),
    Case("convolution_act", (32, 80, 512, 3000, 3), "bfloat16", "gelu"),
    Case("convolution_act", (2, 32, 64, 64, 64, 64, 3), "bfloat16", "relu"),
    Case("activation", (2**26,), "bfloat16", "tanhshrink"),
    Case("activation", (2**26,), "float32", "tanhshrink"),
    Case("activation", (2**26,), "bfloat16", "softsign"),
    Case("activation", (2**26,), "float32", "softsign"),
    Case("activation", (2**26,), "bfloat16", "squared_relu"),
    Case("activation", (2**26,), "float32", "squared_relu"),
    Case("activation", (2**26,), "bfloat16", "step"),
    Case("activation", (2**26,), "float32", "step"),
    Case("activation", (2**26,), "bfloat16", "logsigmoid"),
    Case("activation", (2**26,), "float32", "logsigmoid"),
    Case("activation", (2**26,), "bfloat16", "mish"),
    Case("activation", (2**26,), "float32", "mish"),
)

# Of a size for a CPU, what CASES has in larger ones alone.
SMALL = (
    Case("linear_act", (128, 512, 512), "float32", "gelu"),
    Case("linear_act", (128, 512, 512), "float32", "silu"),
    Case("linear_act", (128, 512, 512), "float32", "tanh"),
    Case("linear_chain", (128, 512, 512), "float32", "gelu"),
    Case("convolution_act", (8, 16, 32, 28, 28, 3), "float32", "relu"),
    Case("convolution_act", (8, 16, 32, 256, 3), "float32", "gelu"),
    Case("convolution_act", (2, 8, 16, 8, 8, 8, 3), "float32", "relu"),
    Case("cross_entropy", (512, 8192), "float32"),
    Case("cross_entropy", (4, 21, 4096), "float32"),
    Case("cross_entropy_grad_in_forward", (4096, 1000), "float32"),
    Case("cross_entropy_smoothed", (1024, 1000), "float32"),
    Case("cross_entropy_probabilities", (1024, 1000), "float32"),
    Case("vocab_parallel_cross_entropy", (1024, 1000), "float32"),
    Case("nll_loss", (4096, 1000), "float32"),
    Case("softmax", (1024, 1000), "float32"),
    Case("log_softmax", (1024, 1000), "float32"),
    Case("bce_with_logits", (2**20,), "float32"),
    Case("bce_with_logits_weighted", (1024, 1000), "float32"),
    Case("bce", (2**20,), "float32"),
    Case("multilabel_soft_margin", (1024, 1000), "float32"),
    Case("linear_cross_entropy", (256, 128, 4096), "float32"),
    Case("linear_cross_entropy", (256, 128, 4096), "float32", chunk=64),
    Case("linear_bce", (4096, 1000), "float32"),
    Case("gated", (1024, 1024), "float32", "silu"),
    Case("fused_block", (128, 256, 512), "float32", "silu"),
    Case("prelu", (1024, 1024), "float32"),
    Case("activation", (2**20,), "float32", "tanhshrink"),
    Case("activation", (2**20,), "float32", "softsign"),
    Case("activation", (2**20,), "float32", "squared_relu"),
    Case("activation", (2**20,), "float32", "step"),
    Case("activation", (2**20,), "float32", "logsigmoid"),
    Case("activation", (2**20,), "float32", "mish"),
    Case("activation", (2**20,), "float32", "gelu"),
)
# fmt: on

# Beside others' kernels as well, `peers`.
PEERED = tuple(
    case for case in CASES if case.op == "linear_cross_entropy" or (case.op == "cross_entropy" and len(case.shape) == 2)
)

# Against max-autotune as well, which takes its time to compile.
AUTOTUNED = (
    Case("linear_act", (4096, 4096, 4096), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", threshold=1.8),
    Case("linear_act", (8192, 8192, 8192), "bfloat16", "relu"),
    Case("linear_act", (4096, 4096, 4096), "float32", "relu", "high"),
    Case("linear_act", (2048, 1024, 1024), "bfloat16", "relu"),
)

STEPS = (Step("S1", "binary"), Step("S3", "xor"), Step("S5", "mnist-softmax"), Step("S6", "mnist-mlp"))


def by_name(cases: Iterable[Case], dry: bool) -> dict[str, Case]:
    return {case.name: case for case in ((case.tiny() for case in cases) if dry else cases)}
