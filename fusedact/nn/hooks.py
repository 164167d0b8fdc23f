"""Whether a module's call may be replaced by its formula."""

from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: Module) -> bool:
    """Nobody would notice if `module.__call__` were skipped: no hook, no replaced forward, not compiled."""
    state = module.__dict__
    return not (
        any(state[hooks] for hooks in _HOOKS)
        or _has_any_global_hook()
        or "forward" in state
        or module._compiled_call_impl is not None
    )
