"""A place in a model where operations that follow each other could be one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """What stands at a place, whether it is fused, and what that saves.

    module: the path of the module whose own forward holds it, '' for the model itself.
    parts: what is there, in order, by its path from the model ('vit.layers.0.mlp.fc1') or its function's name ('relu').
    kind: 'linear', 'chain', 'convolution', 'gated', 'softmax', 'activation' or 'loss'.
    label: the same for a reader: 'Linear(32, 64) + gelu'.
    reason: why it is left as it is; None where it is fused.
    width: channels or features of its output at one position, 0 where that is not known.
    itemsize: bytes of a number of its parameters.
    launches: how many launches fewer, forward and backward, than stock.
    moves: how many reads and writes of one output fewer, forward and backward, in training.
    """

    module: str
    parts: tuple[str, ...]
    kind: str
    label: str
    reason: str | None = None
    width: int = 0
    itemsize: int = 4
    launches: tuple[int, int] = (0, 0)
    moves: tuple[int, int] = (0, 0)

    @property
    def fused(self) -> bool:
        return self.reason is None
