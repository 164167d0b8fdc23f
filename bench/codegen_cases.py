"""What the machine-code report compiles: each launcher at shapes that matter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.codegen_launchers import (
    PRECISIONS,
    Work,
    activation_backward,
    activation_forward,
    bias_activation_backward,
    chain_backward,
    channels_backward,
    channels_forward,
    gated_backward,
    gated_forward,
    linear_dw,
    linear_dx,
    linear_forward,
    scale_in_place,
    training_layers_train,
    training_single_train,
    training_tiny_train,
)
from bench.codegen_losses import (
    bce_backward,
    bce_forward,
    class_shards_backward,
    class_shards_combined,
    class_shards_statistics,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_forward_with_gradient,
    cross_entropy_overwrite_with_gradient,
    head_combined,
    head_statistics,
    linear_bce_backward,
    linear_bce_forward,
    multilabel_rows,
    nll_backward,
    nll_forward,
    softmax_backward,
    softmax_forward,
)
from fusedact.activations import ACTIVATIONS
from fusedact.tuning import Chip, Problem, candidates
from fusedact.tuning.candidates import RATES

SPLIT = ("sm_80", "sm_90", "sm_100")  # where float32 products are made of three


@dataclass(frozen=True)
class Case:
    launcher: Callable[..., Work]
    precision: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    chips: tuple[str, ...] = tuple(RATES)  # that it is for

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items())
        return " ".join((self.launcher.__name__, self.precision, "x".join(map(str, self.shape)), *options))


def cases_of_tiles(launcher, task, shape=(8192, 8192, 8192)):
    """Every tile that the copy engine or three tf32 products make, whatever the rule chooses.

    Of those whose warps specialize only one compiles on every Triton.
    """
    chips = {}
    for kind in RATES:
        there = Chip(kind, 227 * 1024, 32, multiprocessors=132)
        for precision in ("bf16", "tf32", "tf32x3"):
            p = PRECISIONS[precision]
            asked = "tf32" if p.dot == "tf32" else "ieee"
            for name, tile in candidates(Problem(task, *shape, p.dtype, asked, True, there)).items():
                if (
                    tile is None
                    or tile.precision != p.dot
                    or (tile.specialized and (tile.block_m, kind) != (64, "sm_90"))
                ):
                    continue
                if tile.programs or tile.precision == "tf32x3":
                    chips.setdefault((precision, name), []).append(kind)
    return tuple(Case(launcher, precision, shape, {"tile": name}, tuple(on)) for (precision, name), on in chips.items())


CASES = (
    *cases_of_tiles(linear_forward, "forward"),
    *cases_of_tiles(chain_backward, "backward"),
    Case(linear_forward, "tf32x3", (8192, 8192, 8192), chips=SPLIT),
    Case(linear_forward, "tf32x3", (8192, 8192, 8192), {"activation": "gelu", "save_z": True}, SPLIT),
    Case(linear_forward, "tf32x3", (8190, 8190, 8190), chips=SPLIT),
    Case(linear_dx, "tf32x3", (8192, 8192, 8192), chips=SPLIT),
    Case(linear_dw, "tf32x3", (8192, 8192, 8192), chips=SPLIT),
    Case(linear_dx, "tf32x3", (8190, 8190, 8190), chips=SPLIT),
    Case(linear_dw, "tf32x3", (8190, 8190, 8190), chips=SPLIT),
    Case(chain_backward, "bf16", (8192, 8192, 8192), {"activation": "gelu", "from_output": False}),
    Case(chain_backward, "bf16", (8192, 8192, 8192), {"activation": "prelu", "from_output": False}),
    Case(chain_backward, "tf32x3", (8192, 8192, 8192), {"activation": "mish", "from_output": False}, SPLIT),
    Case(chain_backward, "bf16", (100, 256, 784)),
    Case(linear_forward, "bf16", (8190, 8190, 8190)),
    Case(linear_forward, "bf16", (8192, 8192, 8192)),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "gelu", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "tanh"}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "prelu", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "mish", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "elu", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "logsigmoid", "save_z": True}),
    Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": "tanhshrink", "save_z": True}),
    Case(linear_forward, "bf16", (1024, 1024, 1024)),
    Case(linear_forward, "bf16", (1024, 512, 1024)),
    Case(linear_forward, "bf16", (100, 256, 784)),
    Case(linear_forward, "bf16", (64, 1, 3), {"activation": "sigmoid"}),
    Case(linear_forward, "fp16", (8192, 8192, 8192)),
    Case(linear_forward, "tf32", (8192, 8192, 8192)),
    Case(linear_forward, "tf32", (1024, 1024, 1024)),
    Case(linear_forward, "tf32", (100, 256, 784)),
    Case(linear_forward, "fp32", (8192, 8192, 8192)),
    Case(linear_forward, "fp32", (1024, 1024, 1024)),
    Case(linear_forward, "fp32", (100, 256, 784)),
    Case(linear_forward, "fp64", (1024, 1024, 1024)),
    Case(linear_dx, "bf16", (8192, 8192, 8192)),
    Case(linear_dx, "bf16", (100, 256, 784)),
    Case(linear_dx, "tf32", (8192, 8192, 8192)),
    Case(linear_dx, "fp32", (8192, 8192, 8192)),
    Case(linear_dx, "fp64", (1024, 1024, 1024)),
    Case(linear_dw, "bf16", (8192, 8192, 8192)),
    Case(linear_dw, "bf16", (100, 256, 784)),
    Case(linear_dw, "tf32", (8192, 8192, 8192)),
    Case(linear_dw, "fp32", (8192, 8192, 8192)),
    Case(linear_dw, "fp64", (1024, 1024, 1024)),
    Case(bias_activation_backward, "bf16", (8192, 8192)),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"db": False}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "gelu"}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "mish"}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "prelu"}),
    Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": "prelu", "slopes": 1}),
    Case(bias_activation_backward, "bf16", (100, 10)),
    Case(bias_activation_backward, "fp32", (8192, 8192)),
    Case(bias_activation_backward, "fp64", (1024, 1024), {"activation": "prelu"}),
    Case(bias_activation_backward, "fp64", (1024, 1024), {"activation": "gelu"}),
    Case(channels_forward, "bf16", (64, 256, 56, 56)),
    Case(channels_forward, "bf16", (64, 256, 56, 56), {"channels_last": True}),
    Case(channels_forward, "bf16", (64, 256, 56, 56), {"activation": "mish", "in_place": False}),
    Case(channels_forward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "in_place": False}),
    Case(channels_forward, "fp32", (16, 120, 28, 28)),
    Case(channels_forward, "fp64", (16, 128, 28, 28), {"activation": "gelu", "in_place": False}),
    Case(channels_backward, "bf16", (64, 256, 56, 56)),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"channels_last": True}),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"activation": "mish", "from_output": False}),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "from_output": False}),
    Case(channels_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "slopes": 1, "channels_last": True}),
    Case(channels_backward, "fp32", (16, 120, 28, 28)),
    Case(channels_backward, "fp64", (16, 128, 28, 28), {"activation": "gelu", "from_output": False}),
    Case(activation_forward, "bf16", (2**26,)),
    Case(activation_forward, "bf16", (2**26,), {"activation": "softsign"}),
    Case(activation_forward, "bf16", (64, 256, 56, 56), {"activation": "prelu"}),
    Case(activation_forward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "channels_last": True}),
    Case(activation_forward, "fp32", (2**26,), {"activation": "tanhshrink"}),
    Case(activation_forward, "fp64", (2**22,), {"activation": "gelu"}),
    Case(activation_backward, "bf16", (2**26,), {"activation": "squared_relu"}),
    Case(activation_backward, "bf16", (2**26,), {"activation": "mish"}),
    Case(activation_backward, "bf16", (2**26,), {"activation": "prelu", "slopes": 1}),
    Case(activation_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu"}),
    Case(activation_backward, "bf16", (64, 256, 56, 56), {"activation": "prelu", "channels_last": True}),
    Case(activation_backward, "bf16", (8192, 8192), {"activation": "prelu"}),
    Case(activation_backward, "fp32", (2**26,), {"activation": "softsign"}),
    Case(activation_backward, "fp32", (8192, 8192), {"activation": "prelu"}),
    Case(activation_backward, "fp64", (1024, 1024), {"activation": "prelu", "slopes": 1}),
    *(
        Case(launcher, precision, shape, options)
        for launcher in (gated_forward, gated_backward)
        for precision, shape, options in (
            ("bf16", (8192, 14336), {}),
            ("bf16", (8192, 14336), {"halves": True}),
            ("bf16", (8192, 14336), {"activation": "gelu", "halves": True}),
            ("bf16", (8191, 14320), {"activation": "gelu_tanh"}),
            ("fp32", (8192, 14336), {}),
            ("fp64", (1024, 1024), {"activation": "elu"}),
        )
    ),
    Case(cross_entropy_forward, "bf16", (32768, 10)),
    Case(cross_entropy_forward, "bf16", (32768, 1000)),
    Case(cross_entropy_forward, "bf16", (4096, 32000)),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"reduction": "none"}),
    Case(cross_entropy_forward, "bf16", (4096, 128256)),
    Case(cross_entropy_forward, "bf16", (4096, 128256), {"reduction": "none", "save": False}),
    Case(cross_entropy_forward, "fp32", (4096, 1000)),
    Case(cross_entropy_forward, "fp32", (4096, 32000)),
    Case(cross_entropy_forward, "fp32", (4096, 128256)),
    Case(cross_entropy_forward, "fp64", (4096, 8192)),
    Case(cross_entropy_backward, "bf16", (32768, 10)),
    Case(cross_entropy_backward, "bf16", (32768, 1000)),
    Case(cross_entropy_backward, "bf16", (4096, 128256)),
    Case(cross_entropy_backward, "fp32", (4096, 32000)),
    Case(cross_entropy_backward, "fp64", (4096, 8192)),
    Case(cross_entropy_forward, "bf16", (16, 21, 65536)),
    Case(cross_entropy_forward, "bf16", (16, 150, 65536), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"z_loss": 1e-4, "softcap": 30.0, "sample_weight": True}),
    Case(cross_entropy_forward, "bf16", (4096, 128256), {"z_loss": 1e-4, "softcap": 30.0}),
    Case(cross_entropy_forward, "bf16", (4096, 128256), {"smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (32768, 1000), {"probabilities": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "fp32", (4096, 16384), {"probabilities": True, "weight": True}),
    Case(cross_entropy_forward, "bf16", (4096, 32000), {"probabilities": True}),
    Case(cross_entropy_backward, "bf16", (16, 21, 65536)),
    Case(cross_entropy_backward, "bf16", (4096, 32000), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_backward, "bf16", (4096, 128256), {"z_loss": 1e-4, "softcap": 30.0}),
    Case(cross_entropy_backward, "bf16", (32768, 1000), {"probabilities": True, "smoothing": 0.1}),
    Case(cross_entropy_forward, "bf16", (4096, 4096)),
    Case(cross_entropy_forward, "fp32", (4096, 4096)),
    Case(cross_entropy_forward, "bf16", (4096, 32768)),
    Case(cross_entropy_forward, "fp32", (4096, 32768)),
    *(
        Case(launcher, precision, shape)
        for launcher in (cross_entropy_forward_with_gradient, cross_entropy_overwrite_with_gradient)
        for precision in ("bf16", "fp32")
        for shape in ((32768, 10), (32768, 1000), (4096, 4096), (4096, 32000), (4096, 32768), (4096, 128256))
    ),
    Case(cross_entropy_forward_with_gradient, "fp64", (4096, 8192)),
    Case(cross_entropy_forward_with_gradient, "bf16", (16, 21, 65536)),
    Case(cross_entropy_forward_with_gradient, "bf16", (4096, 32000), {"smoothing": 0.1}),
    Case(cross_entropy_overwrite_with_gradient, "bf16", (4096, 128256), {"weight": True, "smoothing": 0.1}),
    Case(cross_entropy_forward_with_gradient, "bf16", (4096, 32000), {"probabilities": True}),
    Case(cross_entropy_overwrite_with_gradient, "bf16", (4096, 128256), {"z_loss": 1e-4, "softcap": 30.0}),
    Case(class_shards_statistics, "bf16", (4096, 64128), {"first": 64128}),
    Case(class_shards_statistics, "bf16", (4096, 4000), {"first": 4000, "weight": True, "smoothing": 0.1}),
    Case(class_shards_statistics, "fp32", (4096, 16032), {"softcap": 30.0}),
    Case(class_shards_statistics, "fp64", (4096, 4096)),
    Case(class_shards_backward, "bf16", (4096, 64128), {"first": 64128}),
    Case(class_shards_backward, "bf16", (4096, 4000), {"first": 4000, "weight": True, "smoothing": 0.1}),
    Case(class_shards_backward, "fp32", (4096, 16032), {"softcap": 30.0, "z_loss": 1e-4}),
    Case(class_shards_combined, "bf16", (2, 4096)),
    Case(class_shards_combined, "fp32", (8, 4096), {"reduction": "none", "save": False}),
    Case(class_shards_combined, "bf16", (64, 4096), {"smoothing": 0.1, "z_loss": 1e-4, "weight": True}),
    Case(class_shards_combined, "fp64", (4, 4096)),
    *cases_of_tiles(head_statistics, "loss", (4096, 128256, 4096)),
    Case(head_statistics, "bf16", (4096, 128256, 4096)),
    Case(head_statistics, "bf16", (4096, 128256, 4096), {"bias": True, "softcap": 30.0}),
    Case(head_statistics, "bf16", (4096, 128256, 4096), {"smoothing": True, "weight": True}),
    Case(head_statistics, "bf16", (100, 10, 784), {"bias": True}),
    Case(head_statistics, "tf32", (4096, 128256, 4096)),
    Case(head_statistics, "tf32x3", (4096, 128256, 4096), {"bias": True, "softcap": 30.0}, SPLIT),
    Case(head_statistics, "fp32", (4096, 128256, 4096)),
    Case(head_statistics, "fp64", (1024, 1024, 1024)),
    Case(head_combined, "bf16", (4096, 128256)),
    Case(head_combined, "bf16", (4096, 128256), {"smoothing": 0.1, "z_loss": 1e-4, "reduction": "none"}),
    Case(nll_forward, "bf16", (32768, 1000)),
    Case(nll_forward, "fp32", (16, 21, 65536), {"reduction": "none"}),
    Case(nll_backward, "bf16", (32768, 1000)),
    Case(nll_backward, "fp32", (16, 21, 65536)),
    Case(bce_forward, "bf16", (2**26,)),
    Case(bce_forward, "bf16", (2**26,), {"reduction": "none"}),
    Case(bce_forward, "fp32", (2**26,)),
    Case(bce_forward, "fp64", (2**20,)),
    Case(bce_backward, "bf16", (2**26,)),
    Case(bce_backward, "fp32", (2**26,), {"reduction": "none"}),
    Case(bce_forward, "bf16", (65536, 1024), {"weight": True, "pos_weight": True}),
    Case(bce_forward, "fp32", (65536, 1024), {"weight": True, "pos_weight": True, "reduction": "none"}),
    Case(bce_forward, "fp64", (1024, 1024), {"weight": True, "pos_weight": True}),
    Case(bce_forward, "bf16", (2**26,), {"loss": "PROBABILITIES"}),
    Case(bce_forward, "fp32", (65536, 1024), {"loss": "PROBABILITIES", "weight": True}),
    Case(bce_backward, "bf16", (65536, 1024), {"weight": True, "pos_weight": True, "both": True}),
    Case(bce_backward, "fp64", (1024, 1024), {"weight": True, "pos_weight": True, "both": True}),
    Case(bce_backward, "bf16", (2**26,), {"loss": "PROBABILITIES", "both": True}),
    Case(bce_backward, "fp32", (65536, 1024), {"loss": "SOFT_MARGIN", "weight": True}),
    Case(linear_bce_forward, "bf16", (2**22, 16)),
    Case(linear_bce_forward, "bf16", (2**18, 1000)),
    Case(linear_bce_forward, "bf16", (65536, 8192)),
    Case(linear_bce_forward, "bf16", (65536, 16384)),
    Case(linear_bce_forward, "fp32", (64, 3)),
    Case(linear_bce_forward, "fp32", (65536, 1024)),
    Case(linear_bce_forward, "fp32", (65536, 8192)),
    Case(linear_bce_forward, "fp32", (65536, 16384)),
    Case(linear_bce_forward, "fp64", (65536, 4096)),
    Case(linear_bce_backward, "bf16", (65536, 8192)),
    Case(linear_bce_backward, "fp32", (65536, 1024)),
    Case(multilabel_rows, "bf16", (65536, 1024)),
    Case(multilabel_rows, "fp32", (65536, 1024), {"weight": True}),
    Case(multilabel_rows, "fp64", (1024, 1024), {"labels": True}),
    Case(softmax_forward, "bf16", (32768, 10)),
    Case(softmax_forward, "bf16", (32768, 1000)),
    Case(softmax_forward, "bf16", (32768, 1000), {"kind": "log_softmax"}),
    Case(softmax_forward, "bf16", (32768, 1000), {"kind": "softmin", "dtype": torch.float32}),
    Case(softmax_forward, "bf16", (4096, 32000)),
    Case(softmax_forward, "bf16", (4096, 128256)),
    Case(softmax_forward, "bf16", (16, 21, 65536), {"dim": 1}),
    Case(softmax_forward, "bf16", (16, 4096, 1024), {"dim": 1}),
    Case(softmax_forward, "fp32", (4096, 32000)),
    Case(softmax_forward, "fp32", (4096, 128256), {"kind": "log_softmax"}),
    Case(softmax_forward, "fp32", (16, 1000, 1024), {"dim": 1}),
    Case(softmax_forward, "fp64", (4096, 4096)),
    Case(softmax_forward, "fp64", (4096, 8192)),
    Case(softmax_backward, "bf16", (32768, 10)),
    Case(softmax_backward, "bf16", (32768, 1000)),
    Case(softmax_backward, "bf16", (32768, 1000), {"kind": "log_softmax"}),
    Case(softmax_backward, "bf16", (4096, 16384)),
    Case(softmax_backward, "bf16", (4096, 32000)),
    Case(softmax_backward, "bf16", (4096, 128256), {"kind": "log_softmax"}),
    Case(softmax_backward, "bf16", (16, 21, 65536), {"dim": 1}),
    Case(softmax_backward, "bf16", (16, 4096, 1024), {"dim": 1}),
    Case(softmax_backward, "fp32", (4096, 16384)),
    Case(softmax_backward, "fp32", (4096, 32000)),
    Case(softmax_backward, "fp64", (4096, 2048)),
    Case(softmax_backward, "fp64", (4096, 8192)),
    Case(scale_in_place, "bf16", (2**29,)),
    Case(scale_in_place, "fp32", (2**26,)),
    Case(scale_in_place, "fp64", (2**20 + 1,)),
    Case(training_tiny_train, "fp32", (64, 3, 1)),
    Case(training_tiny_train, "fp32", (64, 3, 1), {"rule": "ADAM"}),
    Case(training_tiny_train, "fp32", (64, 2, 1)),
    Case(training_tiny_train, "fp32", (64, 2, 1), {"rule": "ADAM"}),
    Case(training_tiny_train, "fp32", (64, 2, 2, 1)),
    Case(training_tiny_train, "fp32", (64, 2, 2, 1), {"rule": "ADAM"}),
    Case(training_tiny_train, "fp32", (4, 2, 2, 1), {"loss": "LOGITS", "last": "identity"}),
    Case(training_tiny_train, "fp32", (64, 2, 8, 1), {"rule": "ADAM", "hidden": "gelu"}),
    Case(training_tiny_train, "fp32", (128, 3, 4, 3), {"rule": "NESTEROV", "last": "identity", "loss": None}),
    Case(training_layers_train, "fp32", (100, 784, 256, 256, 10)),
    Case(training_layers_train, "tf32", (100, 784, 256, 256, 10)),
    Case(training_layers_train, "bf16", (100, 784, 256, 256, 10)),
    Case(training_layers_train, "fp32", (128, 300, 100, 32), {"rule": "SGD", "loss": "LOGITS"}),
    Case(training_layers_train, "fp32", (96, 784, 512, 256, 128, 10), {"hidden": "gelu", "from_output": False}),
    Case(training_single_train, "fp32", (100, 10, 784)),
    Case(training_single_train, "tf32", (100, 10, 784)),
    Case(training_single_train, "fp32", (64, 1, 1024), {"rule": "SGD", "loss": "LOGITS"}),
    Case(training_single_train, "fp32", (128, 32, 4096), {"rule": "ADAMW"}),
    Case(training_single_train, "fp32", (128, 16, 8192), {"loss": "LOGITS"}),
    Case(training_single_train, "fp32", (160, 7, 1001), {"rule": "SGD", "loss": "PROBABILITIES", "last": "sigmoid"}),
)  # fmt: skip

EVERY_ACTIVATION = tuple(
    case
    for name in ACTIVATIONS
    for case in (
        Case(linear_forward, "bf16", (8192, 8192, 8192), {"activation": name}),
        Case(linear_forward, "fp32", (8192, 8192, 8192), {"activation": name}),
        Case(bias_activation_backward, "bf16", (8192, 8192), {"activation": name}),
    )
)
