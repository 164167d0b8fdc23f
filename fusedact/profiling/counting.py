"""What a step does, by operation: torch's are counted as they are dispatched, Triton's kernels as they tell it."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.autograd.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusedact import backend

FREE = ("aten::_unsafe_view", "aten::set_", "aten::empty", "aten::new_empty")  # the last two begin more names
UNREAD = {  # the argument that is only written, or of which a number a row is read
    "aten::copy_": 0,
    "aten::fill_": 0,
    "aten::zero_": 0,
    "aten::nll_loss_forward": 0,
    "aten::nll_loss2d_forward": 0,
    "aten::nll_loss_backward": 1,
    "aten::nll_loss2d_backward": 1,
}


@dataclass
class Count:
    """Calls, bytes read and written, each tensor of a call once, and FLOPs by the width of their operands in bits."""

    calls: int = 0
    bytes: int = 0
    flops: Counter[int] = field(default_factory=Counter)


Counts = dict[str, Count]  # by operation, or by a kernel's name with its sizes


def counted(step: Callable[[], object]) -> Counts:
    """What one step does."""
    counts: Counts = defaultdict(Count)

    def launched(told: dict[str, Any]) -> None:
        count = counts[told["name"]]
        count.calls += 1
        count.bytes += told.get("bytes", 0)
        for width in (8, 16, 32, 64):
            count.flops[width] += told.get(f"flops{width}", 0)

    with watched(launched), backend.overlooking(), _Counting(counts):
        step()
    return dict(counts)


@contextmanager
def watched(enter: Callable[[dict[str, Any]], None], leave: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Calls enter with what each Triton launch tells of itself, and leave after it. Not in the interpreter."""
    try:
        from triton.knobs import runtime
    except ImportError:
        yield
        return

    def entered(metadata: Any) -> None:
        enter(metadata.get())

    def left(metadata: Any) -> None:
        leave()

    runtime.launch_enter_hook.add(entered)
    runtime.launch_exit_hook.add(left)
    try:
        yield
    finally:
        runtime.launch_enter_hook.remove(entered)
        runtime.launch_exit_hook.remove(left)


@contextmanager
def launches_named() -> Iterator[None]:
    """Each Triton launch is a range that bears its name and sizes."""
    ranges: list[record_function] = []

    def enter(told: dict[str, Any]) -> None:
        ranges.append(record_function(told["name"]))
        ranges[-1].__enter__()

    with watched(enter, lambda: ranges.pop().__exit__(None, None, None)):
        yield


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = self.counts[func._schema.name]
        count.calls += 1
        if not _is_free(func):
            count.bytes += _bytes(_read(func, args, kwargs)) + _bytes(result)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            width = 8 * next(iter(_tensors(args))).element_size()
            count.flops[width] += formula(*args, **kwargs, out_val=result)
        return result


def _is_free(func: Any) -> bool:
    """Whether nothing is read or written: a view, or memory that is merely there."""
    views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    return views or func._schema.name.startswith(FREE)


def _read(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The arguments but for those that are only written, as results that were handed in."""
    unread = UNREAD.get(func._schema.name)
    written = {argument.name for argument in func._schema.arguments if argument.is_out}
    by_place = [arg for at, arg in enumerate(args) if at != unread]
    return by_place, [value for name, value in kwargs.items() if name not in written]


def _bytes(values: Any) -> int:
    from fusedact.kernels.metadata import distinct_bytes

    return sum(map(distinct_bytes, _tensors(values)))


def _tensors(values: Any) -> Iterator[Tensor]:
    """Each once, however often it is given."""
    return iter({id(t): t for t in tree_leaves(values) if isinstance(t, Tensor)}.values())
