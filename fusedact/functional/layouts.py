"""How the tensors of an op are split over a mesh, each rank's part of them, and DTensors made of such parts."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.torch_version import TorchVersion

from fusedact.backend import is_sharded

Names = tuple[Hashable, ...]  # of a tensor's dimensions
TWICE = TorchVersion(torch.__version__) >= "2.13"  # else torch's redistribute leaves a second derivative out unsaid
CLASSES = "classes"  # split only for ops that exchange what they need themselves


class Layout(NamedTuple):
    """By which dimension each dimension of the mesh is split, or None."""

    mesh: Any
    split: tuple[Hashable, ...]

    def placements(self, names: Names, without: Any) -> tuple:
        """Those of a tensor; `without` where the mesh dimension is split by a name that it does not have."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(
            Shard(names.index(name))
            if name is not None and name in names
            else (Replicate() if name is None or name == CLASSES else without)
            for name in self.split
        )

    def local(self, t: Tensor | None, names: Names) -> Tensor | None:
        """This rank's part of t."""
        from torch.distributed.tensor import Partial, Replicate

        if t is None:
            return None
        # Even in place: redistribute is what reduces a Partial gradient to the placement that t has.
        moved = t.redistribute(self.mesh, self.placements(names, Replicate()))  # type: ignore[attr-defined]
        local = moved.to_local(grad_placements=self.placements(names, Partial()))
        return _Own.apply(local) if _is_differentiated(local) or hasattr(local, "trigger_wait") else local

    def whole(self, local: Tensor, names: Names, sizes: dict[Hashable, int]) -> Tensor:
        """The DTensor of which each rank has that part; without a name that is split, the sum over the ranks of it."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        shape = [
            sizes[name] if name is not None and name in self.split else own
            for name, own in zip(names, local.shape, strict=True)
        ]
        placements = self.placements(names, Partial())
        over = tuple(self.mesh.get_group(at) for at, placed in enumerate(placements) if placed.is_partial())
        if _is_differentiated(local):
            local = _Share.apply(local, over) if over else _Own.apply(local)
        made = DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=_dense(shape, local)
        )
        # Even in place: the gradient's own way to those placements has no derivative in from_local.
        return made.redistribute(self.mesh, self.placements(names, Replicate()))

    def slice_of(self, classes: int) -> tuple[str, int, int]:
        """Among whom the classes are split, the first one here, and how many there are."""
        along = self.split.index(CLASSES)
        each = -(-classes // self.mesh.size(along))
        first = min(classes, self.mesh.get_local_rank(along) * each)
        return self.mesh.get_group(along).group_name, first, classes

    @property
    def splits_rows(self) -> bool:
        return any(name is not None and name != CLASSES for name in self.split)


def _is_differentiated(local: Tensor) -> bool:
    """Perhaps twice, which what is compiled never is."""
    return local.requires_grad and not torch.compiler.is_compiling()


class _Own(torch.autograd.Function):
    """A rank's part as a plain tensor, though torch's parallel styles have left it under way (async_op=True).

    Its gradients are 0 where this rank has none, as torch has no second one of a convolution of nothing: redistribute
    could not take that.
    """

    @staticmethod
    def forward(ctx: Any, t: Any) -> Tensor:
        arrived = t.trigger_wait() if hasattr(t, "trigger_wait") else t
        return arrived.view_as(arrived)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return gradient
        if not TWICE:
            raise RuntimeError("DTensors have a second derivative in torch 2.13 and newer alone: no create_graph")
        return _Own.apply(gradient)


class _Share(torch.autograd.Function):
    """One rank's part of a sum. Each part has the sum's gradient; by from_local alone its derivative is one part's."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, over: tuple) -> Tensor:
        ctx.over = over
        return share.view_as(share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:  # type: ignore[override]
        return _SameGradient.apply(gradient, ctx.over), None


class _SameGradient(torch.autograd.Function):
    """The gradient that all parts of a sum have, whose own is the sum over them."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, over: tuple) -> Tensor:
        ctx.over = over
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple:  # type: ignore[override]
        second = second.clone()
        for group in ctx.over:
            dist.all_reduce(second, group=group)
        return second, None


def _dense(shape: Sequence[int], like: Tensor) -> tuple[int, ...]:
    """Strides without gaps, the dimensions in the order that they have in `like`."""
    strides, step = [0] * len(shape), 1
    order = sorted(range(len(shape)), key=lambda dim: (like.stride(dim), -dim))
    for dim in order:
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def layout_of(tensors: Sequence[Tensor | None], names: Sequence[Names]) -> Layout | None:
    """None where not all are DTensors of one mesh that this rank is in, or one is placed in another way."""
    from torch.distributed.tensor import Shard

    given = [(t, own) for t, own in zip(tensors, names, strict=True) if t is not None]
    if not all(is_sharded(t) and t.dim() == len(own) for t, own in given):
        return None
    first: Any = given[0][0]
    mesh = first.device_mesh
    split: list[Hashable] = []
    for along in range(mesh.ndim):
        found = None
        for t, own in given:
            placement = t.placements[along]  # type: ignore[attr-defined]
            if t.device_mesh != mesh or not _known(placement):  # type: ignore[attr-defined]
                return None
            if type(placement) is Shard and found is None:
                name = own[placement.dim]
                found = None if name == CLASSES and CLASSES in split else name
        split.append(found)
    return None if mesh.get_coordinate() is None else Layout(mesh, tuple(split))


def _known(placement: Any) -> bool:
    from torch.distributed.tensor import Replicate, Shard

    kind = type(placement)
    return kind is Shard or kind is Replicate or placement.is_partial()


def sizes_of(tensors: Sequence[Tensor | None], names: Sequence[Names]) -> dict[Hashable, int]:
    return {
        name: size
        for t, own in zip(tensors, names, strict=True)
        if t is not None
        for name, size in zip(own, t.shape, strict=True)
    }
