"""What a float32 product on tensor cores errs by, emulated on a CPU: the record bench/results/precision.json, and
the tables of docs/numbers.md from it. Nothing here runs on a tensor core.

python -m bench.precision [--page-only]

tf32x3 splits each float32 operand, x = leading + rest / REST, and takes x Wᵀ by three products of tf32 numbers:
Σ x_leading w_leading + Σ (x_rest w_leading + x_leading w_rest) / REST. The kernel, kernels/products.py, begins the
first sum anew every BLOCK_K of K and adds these up outside the core; the second stays in one accumulator, and counts
as 0 where it is NaN, as ∞ - ∞ makes it. Errors are against the product in float64.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from bench.report import between
from fusedact.kernels.products import LEADING, REST

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "results" / "precision.json"
PAGE = ROOT / "docs" / "numbers.md"
OPEN, CLOSE = "<!-- precision-table -->", "<!-- /precision-table -->"
ROWS = 64  # of x and of w
DEPTHS = (64, 784, 4096, 16384)
DROPPED = ~LEADING.value  # the bits of a float32's mantissa that a tf32 number lacks

# What becomes of a core's float32 operands


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~DROPPED).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """To the nearest tf32 number, of two as near to the even one."""
    bits = x.view(torch.int32)
    return ((bits + (DROPPED >> 1) + (bits >> 13 & 1)) & ~DROPPED).view(torch.float32)


# What becomes of a float64 sum in a core's float32 accumulator


def to_nearest(z: Tensor) -> Tensor:
    return z.float()


def cut_off(z: Tensor) -> Tensor:
    """Toward 0, but to nearest among float32's denormals."""
    return (z.view(torch.int64) & ~(2**29 - 1)).view(torch.float64).float()


class Core(NamedTuple):
    """A tensor core as emulated; it adds `at_once` products to its accumulator as if exactly."""

    operand: Callable[[Tensor], Tensor]
    accumulate: Callable[[Tensor], Tensor]
    at_once: int

    def dot(self, x: Tensor, w: Tensor, z: Tensor) -> Tensor:
        """z (*, M, N) + x (*, M, K) @ w (*, N, K)ᵀ -> (*, M, N)."""
        x, w = (self.operand(a).double().split(self.at_once, -1) for a in (x, w))
        for x_k, w_k in zip(x, w, strict=True):
            z = self.accumulate(z.double() + x_k @ w_k.mT)
        return z


CORES = {
    f"operands {operands}, sums {sums}, {at_once} products at once": Core(operand, accumulate, at_once)
    for (operands, operand), (sums, accumulate), at_once in product(
        {"truncated": truncated, "rounded": rounded}.items(),
        {"cut off": cut_off, "rounded": to_nearest}.items(),
        (8, 4),
    )
}

# Products, x (*, M, K) @ w (*, N, K)ᵀ -> (*, M, N)


def in_order(x: Tensor, w: Tensor) -> Tensor:
    """By float32 multiply-adds in the order of k, as one thread of a GPU sums."""
    z = torch.zeros(*x.shape[:-1], w.shape[-2])
    for x_k, w_k in zip(x.double().unbind(-1), w.double().unbind(-1), strict=True):
        z = (z.double() + x_k[..., :, None] * w_k[..., None, :]).float()
    return z


def tf32(x: Tensor, w: Tensor, core: Core) -> Tensor:
    return core.dot(x, w, torch.zeros(*x.shape[:-1], w.shape[-2]))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """(leading, rest): x = leading + rest / REST exactly, and leading is a tf32 number."""
    leading = truncated(x)
    return leading, (x - leading) * REST.value


def tf32x3(x: Tensor, w: Tensor, core: Core, block_k: int) -> Tensor:
    """As `_multiplied` and `_whole` take it, `block_k` of K a step."""
    z = rest = zero = torch.zeros(*x.shape[:-1], w.shape[-2])
    for x_k, w_k in zip(x.split(block_k, -1), w.split(block_k, -1), strict=True):
        (x_leading, x_rest), (w_leading, w_rest) = split(x_k), split(w_k)
        rest = core.dot(x_rest, w_leading, rest)
        rest = core.dot(x_leading, w_rest, rest)
        z = z + core.dot(x_leading, w_leading, zero)
    return z + torch.where(rest.isnan(), 0, rest / REST.value)


KERNEL = {f"tf32x3 as the kernel takes it, BLOCK_K {block_k}": partial(tf32x3, block_k=block_k) for block_k in (32, 16)}
ONE_ACCUMULATOR = "tf32x3 in one accumulator"
ON_CORES: dict[str, Callable[..., Tensor]] = {
    **KERNEL,
    ONE_ACCUMULATOR: partial(tf32x3, block_k=max(DEPTHS)),
    "tf32": tf32,
}
PLAIN, NO_CORE = "sgemm in the order of k", "no core"
SGEMM = {"sgemm of torch": lambda x, w: x @ w.mT, PLAIN: in_order}
PRODUCTS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    **{name: {NO_CORE: taken} for name, taken in SGEMM.items()},
    **{name: {on: partial(taken, core=core) for on, core in CORES.items()} for name, taken in ON_CORES.items()},
}


# Inputs


def _power_of_10(most: float, *shape: int) -> Tensor:
    return 10 ** (most * (2 * torch.rand(shape) - 1))


def _badly_scaled(K: int) -> Tensor:
    return torch.randn(ROWS, K) * _power_of_10(15, ROWS, 1) * _power_of_10(3, 1, K)


INPUTS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "normal": lambda K: (torch.randn(ROWS, K), torch.randn(ROWS, K)),
    "uniform from 0 to 1": lambda K: (torch.rand(ROWS, K), torch.rand(ROWS, K)),
    "rows times 10^±15, columns 10^±3": lambda K: (_badly_scaled(K), _badly_scaled(K)),
    "normal, x times 1e-37": lambda K: (torch.randn(ROWS, K) * 1e-37, torch.randn(ROWS, K)),
    "uniform from -1e18 to 1e18": lambda K: tuple((2 * torch.rand(2, ROWS, K) - 1) * 1e18),
}
DENORMAL = (1e-38, 1e-39, 1e-40)  # what a normal x is multiplied by


def made(K: int) -> tuple[Tensor, Tensor]:
    """x and w (inputs, ROWS, K) of all INPUTS."""
    torch.manual_seed(K)
    x, w = zip(*(inputs(K) for inputs in INPUTS.values()), strict=True)
    return torch.stack(x), torch.stack(w)


def denormal() -> tuple[Tensor, Tensor]:
    """x and w (DENORMAL, ROWS, 64)."""
    torch.manual_seed(0)
    shape = len(DENORMAL), ROWS, 64
    return torch.randn(shape) * torch.tensor(DENORMAL)[:, None, None], torch.randn(shape)


def not_finite() -> tuple[Tensor, Tensor]:
    """x (5, 64), a row each with ∞, -∞, NaN, ∞ and -∞, and ordinary numbers; w (3, 64), a row each as x's, 0 and ∞."""
    x, w = torch.randn(5, 64), torch.randn(3, 64)
    x[0, 3] = x[3, 3] = torch.inf
    x[1, 3] = x[3, 4] = -torch.inf
    x[2, 3] = torch.nan
    w[1], w[2, 7] = 0, torch.inf
    return x, w


# Errors


class Errors(NamedTuple):
    """‖error‖ / ‖truth‖, max |error| / max |truth|, and the first once every row of x and of w has length 1."""

    norm: float
    maximum: float
    evened: float


Found = dict[str, dict[str, Errors]]  # by product and core


def worst(errors: Iterable[Errors]) -> Errors:
    return Errors(*map(max, zip(*errors, strict=True)))


def keeps(errors: Errors, found: Found, sgemm: str = PLAIN) -> bool:
    """The rule: each error at most twice sgemm's plus 1e-6."""
    return all(error <= 2 * plain + 1e-6 for error, plain in zip(errors, found[sgemm][NO_CORE], strict=True))


def errors(x: Tensor, w: Tensor) -> list[Found]:
    """Of each product on each core, for each x (M, K) and w (N, K) of x (*, M, K) and w (*, N, K)."""
    truth = x.double() @ w.double().mT
    lengths = x.double().norm(dim=-1)[..., None] * w.double().norm(dim=-1)[..., None, :]

    def norm(z: Tensor) -> Tensor:
        return z.norm(dim=(-2, -1))

    def of(z: Tensor) -> list[Errors]:
        error = z.double() - truth
        maximum = error.abs().amax((-2, -1)) / truth.abs().amax((-2, -1))
        three = norm(error) / norm(truth), maximum, norm(error / lengths) / norm(truth / lengths)
        return [Errors(*(float(f"{e:.3g}") for e in of_one)) for of_one in torch.stack(three, -1).tolist()]

    found = {name: {on: of(taken(x, w)) for on, taken in cores.items()} for name, cores in PRODUCTS.items()}
    return [
        {name: {on: listed[i] for on, listed in cores.items()} for name, cores in found.items()} for i in range(len(x))
    ]


def same_pattern(z: Tensor, other: Tensor) -> bool:
    """NaN, ∞ and -∞ in the same places."""
    return all(torch.equal(f(z), f(other)) for f in (torch.isnan, torch.isposinf, torch.isneginf))


def as_float32s(x: Tensor, w: Tensor) -> dict[str, bool]:
    """Whether NaN, ∞ and -∞ stand where sgemm has them, on every core."""
    z = x @ w.mT
    return {name: all(same_pattern(f(x, w), z) for f in cores.values()) for name, cores in PRODUCTS.items()}


def measure() -> dict:
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    found: dict[str, dict] = {inputs: {} for inputs in INPUTS}
    for K in track(DEPTHS, "products emulated", transient=True):
        for inputs, measured in zip(INPUTS, errors(*made(K)), strict=True):
            found[inputs][K] = measured
    return {
        "kind": "precision",
        "emulated": "on a CPU; nothing here ran on a tensor core",
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "not finite as float32's": as_float32s(*not_finite()),
        "normal, x denormal": dict(zip(DENORMAL, errors(*denormal()), strict=True)),
        "an error is": Errors._fields,
        "errors": found,
    }


# The page's tables


def tables(record: dict) -> str:
    found = {
        (inputs, int(K)): _read(measured)
        for inputs, depths in record["errors"].items()
        for K, measured in depths.items()
    }
    lines = [
        f"An emulation on a CPU, {record['date']}, commit {record['commit']}, {record['machine']}:",
        "nothing in these tables ran on a tensor core. Record `bench/results/precision.json`, by",
        "`python -m bench.precision`. An error is ‖error‖ / ‖truth‖ against float64, on the worst of the cores below,",
        f"{ROWS} rows of x and of W; bold where that, max |error| / max |truth|, or the first once every row has",
        f"length 1, is more than twice what {PLAIN} errs by, plus 1e-6.",
        "",
        *_head("x and W", "K", *PRODUCTS),
    ]
    for (inputs, K), measured in found.items():
        cells = [f"{measured[name][NO_CORE].norm:.1e}" for name in SGEMM]
        for name in ON_CORES:
            most = worst(measured[name].values())
            cells.append(_cell(most, keeps(most, measured)))
        lines.append(_row(inputs, f"{K:,}", *cells))
    lines += ["", f"The worst of these x and W at K = {DEPTHS[-1]:,}, by core:", "", *_head("core", *ON_CORES)]
    deepest = [found[inputs, DEPTHS[-1]] for inputs in INPUTS]
    for core in CORES:
        cells = []
        for name in ON_CORES:
            kept = all(keeps(measured[name][core], measured) for measured in deepest)
            cells.append(_cell(worst(measured[name][core] for measured in deepest), kept))
        lines.append(_row(core, *cells))
    return "\n".join([*lines, "", *_sentences(record, found.values())])


def _sentences(record: dict, found: Iterable[Found]) -> list[str]:
    kept = [keeps(worst(measured[name].values()), measured, "sgemm of torch") for measured in found for name in KERNEL]
    denormals = [_read(measured) for measured in record["normal, x denormal"].values()]
    ours = (worst(errors for name in KERNEL for errors in measured[name].values()) for measured in denormals)
    plain = (measured[PLAIN][NO_CORE] for measured in denormals)
    same = record["not finite as float32's"].values()
    return [
        "Held against torch's sgemm on the CPU instead, which adds up in blocks, the kernel keeps that rule in",
        f"{sum(kept)} of {len(kept)}. Denormal x, below about 1e-38, lose digits, even on a core that takes them as",
        f"they are: normal x times {', '.join(record['normal, x denormal'])} make the kernel err by {_list(ours)}",
        f"and sgemm by {_list(plain)}. NaN, ∞ and -∞ stand where sgemm has them in {sum(same)} of {len(same)} columns.",
    ]


def _list(errors: Iterable[Errors]) -> str:
    return ", ".join(f"{of.norm:.0e}" for of in errors)


def _read(measured: dict) -> Found:
    return {name: {core: Errors(*errors) for core, errors in cores.items()} for name, cores in measured.items()}


def _head(*cells: str) -> tuple[str, str]:
    return _row(*cells), "|---" * len(cells) + "|"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(errors: Errors, kept: bool) -> str:
    return f"{errors.norm:.1e}" if kept else f"**{errors.norm:.1e}**"


def rendered(page: str) -> str:
    return between(page, OPEN, CLOSE, tables(json.loads(RECORD.read_text())))


if __name__ == "__main__":
    if "--page-only" not in sys.argv:
        RECORD.write_text(json.dumps(measure(), indent=1) + "\n")
    PAGE.write_text(rendered(PAGE.read_text()))
