"""What a head's step costs on many GPUs, on paper: bytes, FLOPs, memory and seconds by rates of a chip and its links.

A GPU computes at its chip's rates and sends at the same time; collectives take turns, in the order in which the head
starts them. Their seconds are those of NCCL's own model of rings and double binary trees (its src/graph/tuning.cc): a
link's latency for each step, and bytes over its rate. Nothing here asks torch.distributed for anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil, fsum, inf, log2
from typing import NamedTuple

from fusedact.autograd.linear_cross_entropy import rows_by_rule
from fusedact.tuning.candidates import RATES

WAYS = ("replicated", "sharded", "both")
PER_NODE = 8
OPTIMIZER_BYTES = 12  # of a parameter: Adam's two moments and a float32 copy
PASSES_OF_WHOLE, PASSES_OF_SLICE = 2, 3  # over a chunk's logits; a slice is read once more, when the others are known


@dataclass(frozen=True)
class Link:
    """Bytes a second that a GPU sends, and receives at the same time; what a message takes however short it is.

    start_seconds: what a collective takes besides.
    """

    bytes_per_second: float
    latency_seconds: float
    name: str = ""
    start_seconds: float = 0.0


@dataclass(frozen=True)
class Chip:
    """Rates of products and of reading or writing memory.

    pass_bytes_per_second: of passes over logits, where these are slower than a copy.
    chunk_seconds: what a chunk takes besides, where nothing hides it.
    """

    flops: float
    copy_bytes_per_second: float
    name: str = ""
    pass_bytes_per_second: float = inf
    chunk_seconds: float = 0.0


# As published, measured by nobody here, but for the chip's rates, which are tuning's own: NVLink's 900 GB/s are both
# ways together, NDR InfiniBand has 400 Gb/s a GPU. Latencies are assumed, of the order of those in NCCL's model.
H200 = Chip(RATES["sm_90"].half, RATES["sm_90"].copy, "H200")
NVLINK = Link(450e9, 2e-6, "NVLink", 8e-6)
INFINIBAND = Link(50e9, 5e-6, "InfiniBand NDR", 8e-6)


@dataclass(frozen=True)
class Group:
    """GPUs that exchange something: how many, how many of them share a node, and the links in and between nodes."""

    gpus: int
    in_node: int
    link: Link
    between: Link

    @property
    def nodes(self) -> int:
        return ceil(self.gpus / self.in_node)

    @property
    def bytes_per_second(self) -> float:
        """Of a GPU in a ring: between nodes as many rings run as GPUs share a node, each by a link of its own."""
        inside, outside = self.link.bytes_per_second, self.in_node * self.between.bytes_per_second
        return inside if self.nodes == 1 else min(inside, outside)

    @property
    def start_seconds(self) -> float:
        return (self.link if self.nodes == 1 else self.between).start_seconds

    def latency(self, turns: int) -> float:
        """Of a ring that goes round so often, less one step each."""
        outside = self.nodes - 1
        inside = self.gpus - 1 - outside
        return turns * (inside * self.link.latency_seconds + outside * self.between.latency_seconds)


class Collective(NamedTuple):
    """One call: each of the GPUs hands in so many bytes."""

    kind: str  # all_gather, all_reduce
    bytes: int
    gpus: int

    @property
    def sent(self) -> float:
        """Bytes that a GPU of a ring sends, and receives as many."""
        if self.kind == "all_gather":
            return (self.gpus - 1) * self.bytes
        return 2 * (self.gpus - 1) * self.bytes / self.gpus

    def seconds(self, group: Group) -> float:
        """A ring's; of an all-reduce a tree's where that takes less: many GPUs, few bytes."""
        if self.gpus == 1:
            return 0.0
        turns = 1 if self.kind == "all_gather" else 2
        ring = group.latency(turns) + self.sent / group.bytes_per_second
        if self.kind == "all_gather":
            return group.start_seconds + ring
        deep = ceil(log2(group.nodes)) * group.between.latency_seconds
        hops = 2 * ((min(group.gpus, group.in_node) - 1) * group.link.latency_seconds + deep)
        return group.start_seconds + min(ring, hops + 2 * self.bytes / group.bytes_per_second)


class Memory(NamedTuple):
    """Bytes of one GPU. sums: what dW and chunks of dx are added up in; rows: the input and its gradient."""

    weights: int
    gradients: int
    sums: int
    optimizer: int
    logits: int
    rows: int


@dataclass(frozen=True)
class Cost:
    """Of one step of one GPU: a head's loss with its gradients.

    shards: GPUs that share the classes. rows: whose loss the GPU takes part in, chunk_rows of them at a time. Seconds:
    products; passes over logits and sums; exchange of rows' statistics; inputs, the sum of dx; weights, that of dW;
    exposed, what of those three nothing hides; total.
    """

    way: str
    gpus: int
    shards: int
    rows: int
    chunk_rows: int
    chunks: int
    flops: int
    collectives: tuple[Collective, ...]
    memory: Memory
    products: float
    passes: float
    exchange: float
    inputs: float
    weights: float
    total: float

    @property
    def sent(self) -> float:
        """Bytes that the GPU sends, and receives as many."""
        return sum(each.sent for each in self.collectives)

    @property
    def exposed(self) -> float:
        return max(0.0, self.total - self.products - self.passes)  # rounding of sums aside


class _Chunk(NamedTuple):
    """Seconds of a chunk of rows, in the order in which they come."""

    logits: float
    statistics: float
    exchange: float
    gradient: float
    dx: float
    inputs: float
    dw: float


@dataclass(frozen=True)
class _Slice:
    """The part of a head that one GPU has: classes of it, and rates."""

    hidden: int
    classes: int
    shards: int
    itemsize: int
    numbers: int
    group: Group
    chip: Chip

    @property
    def wide(self) -> int:
        """Bytes of an element of a sum."""
        return max(self.itemsize, 4)

    @property
    def alive(self) -> int:
        """Chunks at a time: the next one is multiplied while the numbers of one are sent."""
        return 1 if self.shards == 1 else 2

    def chunk_rows(self, rows: int) -> int:
        """As the head takes them on a GPU by rule."""
        return rows_by_rule(rows, self.classes, self.itemsize, "cuda", self.alive)

    def collectives(self, rows: int) -> tuple[Collective, Collective]:
        """Of a chunk: its rows' statistics, and the sum of dx."""
        gathered = Collective("all_gather", self.numbers * rows * self.wide, self.shards)
        return gathered, Collective("all_reduce", rows * self.hidden * self.wide, self.shards)

    def chunk(self, rows: int, several: bool) -> _Chunk:
        x, w, z = rows * self.hidden, self.classes * self.hidden, rows * self.classes
        size, wide = self.itemsize, self.wide
        reading = z * size / min(self.chip.copy_bytes_per_second, self.chip.pass_bytes_per_second)
        exchange, inputs = (each.seconds(self.group) for each in self.collectives(rows))
        passes = PASSES_OF_WHOLE if self.shards == 1 else PASSES_OF_SLICE
        operands = (x + w + z) * size
        return _Chunk(
            logits=self._product(rows, operands),
            statistics=reading + self.chip.chunk_seconds,
            exchange=exchange,
            gradient=(passes - 1) * reading,
            dx=self._product(rows, operands if self.shards == 1 else (w + z) * size + x * wide),
            inputs=inputs,
            dw=self._product(rows, (x + z) * size + w * (2 * wide if several else size)),
        )

    def _product(self, rows: int, moved: int) -> float:
        """Its FLOPs or, where these take longer, its bytes."""
        flops = 2 * rows * self.classes * self.hidden
        return max(flops / self.chip.flops, moved / self.chip.copy_bytes_per_second)

    def rounding(self, rows: int, several: bool) -> float:
        """Seconds in which sums become gradients of the inputs' dtype."""
        summed = self.classes * self.hidden * several + rows * self.hidden * (self.shards > 1)
        return summed * (self.wide + self.itemsize) * (self.wide > self.itemsize) / self.chip.copy_bytes_per_second

    def memory(self, rows: int, chunk: int) -> Memory:
        parameters, summed = self.classes * self.hidden, self.wide > self.itemsize
        alive = self.alive if chunk < rows else 1
        return Memory(
            weights=parameters * self.itemsize,
            gradients=parameters * self.itemsize,
            sums=parameters * self.wide * (summed and chunk < rows)
            + alive * chunk * self.hidden * self.wide * (summed and self.shards > 1),
            optimizer=parameters * OPTIMIZER_BYTES,
            logits=alive * chunk * self.classes * self.itemsize,
            rows=2 * rows * self.hidden * self.itemsize,
        )


def head_step(
    tokens: int,
    hidden: int,
    classes: int,
    gpus: int,
    *,
    way: str,
    link: Link = NVLINK,
    chip: Chip = H200,
    itemsize: int = 2,
    chunk_rows: int | None = None,
    overlap: bool = True,
    per_node: int = PER_NODE,
    inter_node_link: Link = INFINIBAND,
    numbers: int = 3,
    behind: float = 0.0,
) -> Cost:
    """The step of a head of (classes, hidden) and its cross-entropy for so many tokens, of all GPUs together.

    way: replicated, each GPU has the whole head and its part of the tokens, and dW is summed over all; sharded, each
    has its part of the classes and all tokens; both, the GPUs of a node share the classes, and the nodes the tokens.
    Ranks of a group of shards have the same rows of input, as a tensor-parallel network gives them, each the whole
    sum of their dx.

    itemsize: bytes of an element of inputs and weights. chunk_rows: None by the rule of the head on a GPU. numbers:
    that each row exchanges with every slice, 3, or 5 with label smoothing. overlap: whether a GPU computes while it
    sends. behind: seconds of work after the head that needs no dW, such as the network's backward: its sum hides there.

    Gradients are taken with the loss. In float16, and where each row keeps its loss, they come late, which is not in
    the model: all exchanges first, and in the backward the sums of dx, after a fourth product for the logits.

    ValueError where way is another, a count is less than 1, or both is to share nodes that are not whole.
    """
    if way not in WAYS:
        raise ValueError(f"expected way as one of {', '.join(WAYS)}, got {way!r}")
    asked = {} if chunk_rows is None else {"chunk_rows": chunk_rows}
    counts = {"tokens": tokens, "hidden": hidden, "classes": classes, "gpus": gpus} | asked
    for name, count in (counts | {"per_node": per_node, "itemsize": itemsize}).items():
        if count < 1:
            raise ValueError(f"expected {name} of 1 or more, got {count}")
    shards = {"replicated": 1, "sharded": gpus, "both": min(gpus, per_node)}[way]
    if gpus % shards:
        raise ValueError(f"expected gpus as a multiple of the {shards} of a node, got {gpus}")
    copies = gpus // shards
    rows = ceil(tokens / copies)
    group = Group(shards, min(shards, per_node), link, inter_node_link)
    part = _Slice(hidden, ceil(classes / shards), shards, itemsize, numbers, group, chip)
    chunk = min(rows, chunk_rows or part.chunk_rows(rows))
    several = chunk < rows
    sizes = list(_sizes(rows, chunk))
    by_size = {size: part.chunk(size, several) for size in set(sizes)}
    chunks = [by_size[size] for size in sizes]

    collectives = _in_turn([part.collectives(size) for size in sizes]) if shards > 1 else []
    weights = 0.0
    if copies > 1:
        summed = Collective("all_reduce", part.classes * hidden * itemsize, copies)
        among = max(1, min(gpus, per_node) // shards)
        weights = summed.seconds(Group(copies, min(copies, among), link, inter_node_link))
        collectives.append(summed)
    rounding = part.rounding(rows, several)
    hidden_behind = min(weights, behind) if overlap else 0.0
    return Cost(
        way=way,
        gpus=gpus,
        shards=shards,
        rows=rows,
        chunk_rows=chunk,
        chunks=len(chunks),
        flops=3 * 2 * rows * part.classes * hidden,
        collectives=tuple(collectives),
        memory=part.memory(rows, chunk),
        products=fsum(each.logits + each.dx + each.dw for each in chunks),
        passes=fsum(each.statistics + each.gradient for each in chunks) + rounding,
        exchange=fsum(each.exchange for each in chunks),
        inputs=fsum(each.inputs for each in chunks),
        weights=weights,
        total=_finished(chunks, overlap) + rounding + weights - hidden_behind,
    )


def _sizes(rows: int, chunk: int) -> Iterator[int]:
    for first in range(0, rows, chunk):
        yield min(chunk, rows - first)


def _in_turn(chunks: Sequence[tuple[Collective, Collective]]) -> list[Collective]:
    """As the head starts them: a chunk's dx is summed after the next one's numbers are under way."""
    gathered, summed = ([chunk[at] for chunk in chunks] for at in (0, 1))
    pairs = zip_longest(gathered, [None, *summed])
    return [each for pair in pairs for each in pair if each is not None]


def _finished(chunks: Sequence[_Chunk], overlap: bool) -> float:
    """When both the chip and the network are done, the chunks in a pipeline of two."""
    if not overlap:
        return fsum(map(fsum, chunks))
    chip = network = summed = 0.0  # until when each is busy; when the sum of the former dx is there
    exchanged: list[float] = []
    for at in range(len(chunks) + 1):
        if at < len(chunks):
            chip += chunks[at].logits + chunks[at].statistics
            network = max(network, chip) + chunks[at].exchange
            exchanged.append(network)
        if at > 0:
            former = chunks[at - 1]
            chip = max(chip, exchanged[at - 1]) + former.gradient + former.dx
            network = max(network, chip) + former.inputs
            chip, summed = max(chip, summed) + former.dw, network
    return max(chip, network)
