"""Training runs on disk, with a checksum: `torch.load` accepts a flipped bit."""

import hashlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedact.data import write_whole


def save_checkpoint(path: Path, state: Mapping[str, Tensor], run: Mapping[str, Any] | None = None) -> None:
    """Writes `{"state_dict": state, "run": run, "sha256": checksum}` by `torch.save`, whole or not at all.

    run: what it takes to go on, of tensors, numbers, strings, lists and dicts.
    """
    buffer = BytesIO()
    content = {"state_dict": dict(state), "run": dict(run or {})}
    torch.save(content | {"sha256": _checksum(content)}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_checkpoint` wrote, on the CPU; raises as `load_run` does."""
    state, _ = load_run(path)
    return state


def load_run(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict and the rest of the run that `save_checkpoint` wrote, on the CPU.

    Nothing but tensors and plain values is unpickled. Raises ValueError, naming the file, where it is no checkpoint
    or damaged.
    """
    content = path.read_bytes()
    try:
        checkpoint = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        parts = {name: checkpoint[name] for name in ("state_dict", "run")}
        if not all(isinstance(value, Tensor) for value in parts["state_dict"].values()):
            raise TypeError("its state dict holds something that is no tensor")
        expected, checksum = checkpoint["sha256"], _checksum(parts)
    except Exception as error:  # a damaged archive raises whatever its first wrong byte leads to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a whole checkpoint: {reason}") from error
    if checksum != expected:
        raise ValueError(f"{path}: damaged: its SHA-256 is {checksum}, expected {expected}")
    return parts["state_dict"], parts["run"]


def _checksum(content: Any) -> str:
    digest = hashlib.sha256()
    for name, value in _leaves("", content):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def _leaves(name: str, content: Any) -> list[tuple[str, Any]]:
    """Everything that is no container, by its place."""
    if isinstance(content, dict):
        return [leaf for key, value in content.items() for leaf in _leaves(f"{name}.{key!r}", value)]
    if isinstance(content, list | tuple):
        return [leaf for at, value in enumerate(content) for leaf in _leaves(f"{name}[{at}]", value)]
    return [(name, content)]
