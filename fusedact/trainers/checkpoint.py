"""State dicts on disk, with a checksum: `torch.load` accepts a flipped bit."""

import hashlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from fusedact.data import write_whole


def save_checkpoint(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes `{"state_dict": state, "sha256": checksum}` by `torch.save`, whole or not at all."""
    buffer = BytesIO()
    torch.save({"state_dict": dict(state), "sha256": _checksum(state)}, buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict that `save_checkpoint` wrote, on the CPU.

    Only tensors are unpickled. Raises ValueError, naming the file, where it is no checkpoint or damaged.
    """
    content = path.read_bytes()
    try:
        checkpoint = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
        state, expected = checkpoint["state_dict"], checkpoint["sha256"]
        checksum = _checksum(state)
    except Exception as error:  # a damaged archive raises whatever its first wrong byte leads to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a whole checkpoint: {reason}") from error
    if checksum != expected:
        raise ValueError(f"{path}: damaged: its SHA-256 is {checksum}, expected {expected}")
    return state


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
