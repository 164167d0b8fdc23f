"""What can take a product on a chip, and, until it was measured there, a written rule for which of them does.

The rule adds up times: of a launch, and of the larger of the bytes and of the FLOPs, these at the chip's rate times the
share of it that a tile reaches, in whole waves of tiles. Rates are of data sheets, and the H200's own where one was
measured; shares are of the machine-code report, where the instructions beside the matrix instructions are counted, and
of what others published (the library 1, the copy engine 0.97, pointers 0.8 to 0.88). The smallest time is chosen.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

LIBRARY = "library"
# Of a product: with bias and activation after it; with the derivative of the layer before; bare; its rows' statistics
# alone. The passes over its result that the library's product leaves to one more launch:
PASSES = {"forward": 2, "backward": 3, "dx": 0, "dw": 0, "loss": 0}
HEAD = "head"  # the task of a head with its loss, forward with backward: M rows, N classes, K features
RULE, TORCH = "rule", "torch"  # its candidates: as the head itself shares its rows into chunks, torch's own chunks,
CHUNKS = (1024, 2048, 4096)  # and so many rows
LAUNCH_S = 2e-6
LEAST_DESCRIBED = 2**30  # multiply-adds
LEAST_ALIGNED = 2**24  # from which on the host's time to look whether operands are is worth it


class Rates(NamedTuple):
    """FLOPs a second of the library's products, by what they are taken in, and bytes a second of a copy."""

    half: float
    tf32: float
    single: float
    double: float
    copy: float


RATES = {
    "sm_80": Rates(260e12, 130e12, 19e12, 19e12, 1.6e12),  # A100
    "sm_90": Rates(790e12, 395e12, 52e12, 60e12, 4.3e12),  # H200
    "sm_100": Rates(1600e12, 800e12, 70e12, 35e12, 7e12),  # B200
    "gfx942": Rates(650e12, 320e12, 120e12, 70e12, 4.3e12),  # MI300X
}


@dataclass(frozen=True, eq=False)
class Chip:
    """A device as the rule sees it.

    kind: the target whose tables hold for it. interpreted: a CPU plays it. library: whose products may be chosen too.
    """

    kind: str
    shared_memory: int
    warp_size: int
    multiprocessors: int
    interpreted: bool = False
    library: bool = True
    name: str = ""

    @property
    def copies(self) -> bool:
        """Whether it has a copy engine that reads tiles by descriptors."""
        return self.kind in ("sm_90", "sm_100") and not self.interpreted


class Problem(NamedTuple):
    """A product (M, K) by (K, N).

    precision: torch's for float32, or forced. aligned: each operand's lines run along one dimension, from 16 bytes on.
    """

    task: str
    M: int
    N: int
    K: int
    dtype: torch.dtype
    precision: str
    aligned: bool
    chip: Chip

    @property
    def described(self) -> bool:
        """Whether the copy engine can read the operands, and the host's time for describing them is hidden."""
        return self.aligned and self.chip.copies and self.M * self.N * self.K >= LEAST_DESCRIBED


class Shape(NamedTuple):
    """A tile, its warps, and the share of the chip's rate that it reaches where it fills the chip.

    aligned: it needs operands that are, since a pointer for each element takes more registers than a thread has.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    share: float
    aligned: bool = False


BY_POINTERS = {  # by bytes of an element
    2: (
        Shape(128, 256, 64, 8, 0.85, aligned=True),
        Shape(128, 128, 64, 8, 0.80),
        Shape(64, 128, 64, 4, 0.65, aligned=True),
        Shape(64, 64, 64, 4, 0.50),
        Shape(32, 32, 64, 4, 0.20),
        Shape(16, 32, 64, 4, 0.15),
    ),
    4: (
        Shape(128, 128, 16, 8, 0.85),
        Shape(64, 64, 32, 4, 0.65),
        Shape(32, 32, 64, 4, 0.35),
        Shape(16, 32, 64, 4, 0.30),
    ),
    8: (Shape(32, 32, 16, 4, 0.50),),
}
BY_DESCRIPTORS = {
    2: (Shape(128, 256, 64, 8, 0.96), Shape(128, 128, 64, 8, 0.90)),
    4: (Shape(128, 128, 32, 8, 0.90),),
}
# Of a third of tf32's rate: the products' cycles over these and those that issue what splits and adds up.
TF32X3 = {
    "sm_80": (Shape(128, 128, 16, 8, 0.64, aligned=True), Shape(128, 64, 32, 8, 0.63), Shape(64, 64, 32, 4, 0.60)),
    "sm_90": (Shape(128, 128, 32, 8, 0.75, aligned=True), Shape(128, 64, 32, 8, 0.67), Shape(64, 64, 32, 4, 0.55)),
    "sm_100": (Shape(128, 64, 32, 8, 0.39), Shape(64, 64, 32, 4, 0.36)),
}
WIDEST_TF32X3_DESCRIBED = 128 * 64  # elements of a tile: a larger one takes more registers than a thread has
WIDEST_BACKWARD_DESCRIBED = 128  # columns, for the same reason
LEAST_BLOCK_K_OF_LOSS = 32  # of three tf32 products; a smaller one spills there
SPECIALIZED = (Shape(128, 256, 64, 4, 0.96), Shape(128, 128, 64, 4, 0.90), Shape(64, 128, 64, 4, 0.70))


def candidates(problem: Problem) -> dict[str, Any]:
    """Every way to take this product, by name; the library's is None.

    Of a head, the rows of a chunk, 0 by rule, None in torch's own way, which not every torch has.
    """
    if problem.task == HEAD:
        own = {RULE: 0} | {f"{rows} rows": rows for rows in CHUNKS}
        return own | ({TORCH: None} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {})
    return {_name(tile): tile for tile, _ in _tiles(problem)} | ({LIBRARY: None} if problem.chip.library else {})


def _name(tile: Any) -> str:
    by = "specialized" if tile.specialized else "descriptors" if tile.programs else "pointers"
    return f"{by} {tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps} warps {tile.precision}"


def _tiles(problem: Problem) -> Iterator[tuple[Any, float]]:
    """Each tile that the chip has room for, and its share."""
    chip, itemsize, precision = problem.chip, problem.dtype.itemsize, problem.precision
    single = problem.dtype == torch.float32
    for shape in BY_POINTERS[itemsize]:
        if chip.interpreted and shape.block_m < 32:
            continue  # nothing runs beside it there
        yield from _fitted(problem, shape, "ieee" if precision == "forced ieee" else precision)
    if single and precision == "ieee" and not chip.interpreted:
        for shape in TF32X3.get(chip.kind, ()):
            if problem.task == "loss" and shape.block_k < LEAST_BLOCK_K_OF_LOSS:
                continue
            yield from _fitted(problem, shape, "tf32x3")
            if problem.described and shape.block_m * shape.block_n <= WIDEST_TF32X3_DESCRIBED:
                yield from _fitted(problem, shape, "tf32x3", chip.multiprocessors)
    if problem.described and (not single or precision == "tf32"):
        for shape in BY_DESCRIPTORS.get(itemsize, ()):
            if problem.task != "backward" or shape.block_n <= WIDEST_BACKWARD_DESCRIBED:
                yield from _fitted(problem, shape, precision, chip.multiprocessors)
        if itemsize == 2 and problem.task != "backward" and chip.kind == "sm_90":
            for shape in _specialized():
                yield from _fitted(problem, shape, precision, chip.multiprocessors, specialized=True)


def _specialized() -> Iterator[Shape]:
    """Those that this Triton compiles."""
    import triton

    return (shape for shape in SPECIALIZED if shape.block_m == 64 or triton.__version__.startswith("3.6."))


def _fitted(
    problem: Problem, shape: Shape, precision: str, programs: int = 0, specialized: bool = False
) -> Iterator[tuple[Any, float]]:
    """The tile with as many stages as its shared memory has room for, two at least unless it is the smallest."""
    from fusedact.kernels.linear import Tile
    from fusedact.kernels.workspace import power_of_2

    smallest = shape.block_m * shape.block_n <= 32 * 32
    block_k = shape.block_k if programs else min(shape.block_k, max(16, power_of_2(problem.K)))
    stage = (shape.block_m + shape.block_n) * block_k * problem.dtype.itemsize
    scratch = shape.block_m * shape.block_n * problem.dtype.itemsize if specialized else 0  # the epilogue's
    held = 2 if precision == "tf32x3" else 0  # operands as split, beside those that arrive
    stages = min(4, (problem.chip.shared_memory - scratch) // stage - held)
    within = shape.block_m <= max(32, power_of_2(problem.M)) and shape.block_n <= max(32, power_of_2(problem.N))
    if (within and stages >= 2 and shape.aligned <= problem.aligned) or smallest:
        tile = Tile(
            shape.block_m, shape.block_n, block_k, shape.num_warps, max(1, stages), precision, programs, specialized
        )
        yield tile, shape.share


def estimate(problem: Problem, tile: Any, share: float) -> float:
    """Seconds of our own kernel, by the rule."""
    rates, chip = RATES[problem.chip.kind], problem.chip
    tiles = -(-problem.M // tile.block_m) * -(-problem.N // tile.block_n)
    waves = -(-tiles // chip.multiprocessors)
    products = 3 if tile.precision == "tf32x3" else 1
    flops = 2 * tile.block_m * tile.block_n * problem.K * products
    computing = waves * flops / (_rate(rates, problem.dtype, tile.precision) / chip.multiprocessors * share)
    return LAUNCH_S + max(computing, _bytes(problem) / rates.copy)


def estimate_of_library(problem: Problem) -> float:
    """Seconds of the library's product, ours through pointers with the share made up for, and of the pass after it."""
    rates = RATES[problem.chip.kind]
    own = problem._replace(precision="forced ieee" if problem.precision == "ieee" else problem.precision)
    best = min(estimate(own, tile, min(1.0, share / 0.85)) for tile, share in _tiles(own) if not tile.programs)
    passes = PASSES[problem.task]
    after = LAUNCH_S + passes * problem.M * problem.N * problem.dtype.itemsize / rates.copy
    return best + (after if passes else 0)


def _rate(rates: Rates, dtype: torch.dtype, precision: str) -> float:
    if dtype.itemsize == 2:
        return rates.half
    if dtype == torch.float64:
        return rates.double
    return rates.tf32 if precision in ("tf32", "tf32x3") else rates.single


def _bytes(problem: Problem) -> int:
    M, N, K = problem.M, problem.N, problem.K
    return (M * K + N * K + M * N) * problem.dtype.itemsize


def estimates(problem: Problem) -> dict[str, float]:
    """Seconds of the candidates by the rule, but of those whose warps specialize: not every Triton compiles them."""
    times = {LIBRARY: estimate_of_library(problem)} if problem.chip.library else {}  # first: it wins a tie
    return times | {_name(t): estimate(problem, t, share) for t, share in _tiles(problem) if not t.specialized}


@lru_cache(4096)
def by_rule(problem: Problem) -> str:
    """The name of the candidate with the least estimate."""
    if problem.task == HEAD:
        return RULE
    times = estimates(problem)
    return min(times, key=times.__getitem__)
