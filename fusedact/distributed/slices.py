"""Which classes a process has: rank r of p those from r s to before r s + s of C, s = ceil(C / p), as torch.chunk."""

import copy
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn


class Slice(NamedTuple):
    """Of so many classes those from `first` to before `end`; the name of the group among whose ranks they are spread.

    The name is empty where there is no group: one process has all classes.
    """

    group: str
    rank: int
    ranks: int
    classes: int
    first: int
    end: int

    @property
    def own(self) -> int:
        return self.end - self.first


def slice_of(classes: int, group: Any = None) -> Slice:
    """This process's slice; of no group the default one's, or of a single process where none was started.

    ValueError where this process is not in the group, TypeError for what is no group.
    """
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    if group is None:
        return Slice("", 0, 1, classes, 0, classes)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is not in the group whose processes hold the classes")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, not {type(group).__name__}")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    step = -(-classes // ranks)
    first, end = (min(classes, at * step) for at in (rank, rank + 1))
    return Slice(group.group_name, rank, ranks, classes, first, end)


def checked_slice(what: str, given: Tensor, dim: int, classes: int | None, group: Any) -> Slice:
    """The slice that `given` has along `dim`; classes None: all of them, in one process.

    ValueError where several processes share classes of which no number is given, and where `given` has more or fewer
    than that rank of so many.
    """
    own = given.shape[dim]
    part = slice_of(own if classes is None else classes, group)
    if classes is None and part.ranks > 1:
        raise ValueError(f"classes must be given where {part.ranks} processes share them")
    if own != part.own:
        raise ValueError(
            f"expected {what} with {part.own} of {part.classes} classes, which rank {part.rank} of {part.ranks} has, "
            f"got {own}: {tuple(given.shape)}"
        )
    return part


class OfGroup(nn.Module):
    """A module that names a group of processes. Its copies name the same one, which cannot be copied."""

    group: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self.group)] = self.group
        memo[id(self)] = copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def check_own(tensors: dict[str, Any], *optional: str) -> None:
    """That each is a tensor of this process, on the device of the first; None may be what is optional.

    TypeError for a DTensor or what is no tensor, RuntimeError for two devices.
    """
    device = None
    for name, t in tensors.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be Tensor, not {type(t).__name__}")
        if hasattr(t, "to_local"):
            raise TypeError(f"{name} must be this process's own tensor, got {type(t).__name__}: pass its to_local()")
        device = device or t.device
        if t.device != device:
            devices = f"{device} and {t.device}"
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {devices}"
            )
