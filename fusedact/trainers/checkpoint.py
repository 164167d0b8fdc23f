"""Training runs on disk, with a checksum: `torch.load` accepts a flipped bit."""

import hashlib
import pickle
import pickletools
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from fusedact.data import write_whole

NAMES = re.compile(  # that a pickle of tensors and plain values holds; torch's own list has some that allocate at will
    r"torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter)|torch \w+Storage"
    r"|torch (bool|u?int\d+|b?float\w+|complex\d+|Size)|collections OrderedDict|(__builtin__|builtins) complex"
)
CALLABLE, NEVER_CALLED = b"ctorch.storage\nUntypedStorage\n", b"ctorch\nByteStorage\n"
CONTAINERS = (dict, OrderedDict, list, tuple, torch.Size)
PLAIN = (*CONTAINERS, bool, int, float, complex, str, torch.dtype, type(None))


def save_checkpoint(path: Path, state: Mapping[str, Tensor], run: Mapping[str, Any] | None = None) -> None:
    """Writes `{"state_dict": state, "run": run, "sha256": checksum}` by `torch.save`, whole or not at all.

    run: what it takes to go on, of tensors, numbers, strings, lists and dicts; TypeError where it holds anything else.
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

    Nothing but tensors and plain values is unpickled, and no more memory taken than a few times the file's size. Raises
    ValueError, naming the file, where it is no checkpoint or damaged.
    """
    content = path.read_bytes()
    try:
        checkpoint = torch.load(_looked_at(content), map_location="cpu", weights_only=True)
        parts = {name: checkpoint[name] for name in ("state_dict", "run")}
        if not all(isinstance(value, Tensor) for value in parts["state_dict"].values()):
            raise TypeError("its state dict holds something that is no tensor")
        if not isinstance(parts["run"], dict):
            raise TypeError(f"its run is of type {type(parts['run']).__name__}, expected dict")
        expected, checksum = checkpoint["sha256"], _checksum(parts, len(content))
    except pickle.UnpicklingError as error:  # whose text advises to load it all the same
        raise ValueError(f"{path}: not a whole checkpoint: its pickle is damaged or not ours") from error
    except Exception as error:  # a damaged archive raises whatever its first wrong byte leads to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a whole checkpoint: {reason}") from error
    if checksum != expected:
        raise ValueError(f"{path}: damaged: its SHA-256 is {checksum}, expected {expected}")
    return parts["state_dict"], parts["run"]


def _looked_at(content: bytes) -> BytesIO:
    """The archive written anew, so that torch reads what was looked at here; ValueError where `save` wrote none such.

    torch would unpack any number of bytes that a few were made of, and call whatever its own list allows.
    """
    anew = BytesIO()
    with ZipFile(BytesIO(content)) as given, ZipFile(anew, "w") as archive:
        members = given.infolist()
        if len({member.filename.lower() for member in members}) < len(members):
            raise ValueError("its archive has two members of one name")
        if any(m.compress_type != ZIP_STORED for m in members) or sum(m.file_size for m in members) > len(content):
            raise ValueError("its archive is packed, expected members as they are")
        for member in members:
            part = given.read(member)
            if member.filename.lower().endswith(".pkl"):
                part = _looked_at_pickle(part)
            archive.writestr(member.filename, part)
    return BytesIO(anew.getvalue())


def _looked_at_pickle(pickled: bytes) -> bytes:
    """Itself, but for a class that it may call for as many bytes as it likes: another of one meaning, never called."""
    anew, copied = bytearray(), 0
    for opcode, argument, place in pickletools.genops(pickled):
        at = place or 0  # of bytes it is never None
        if opcode.name == "GLOBAL" and pickled.startswith(CALLABLE, at):
            anew += pickled[copied:at] + NEVER_CALLED
            copied = at + len(CALLABLE)
        elif opcode.name == "GLOBAL" and not NAMES.fullmatch(str(argument)):
            raise ValueError(f"its pickle names {argument}")
    return bytes(anew + pickled[copied:])


def _checksum(content: Any, most: int | None = None) -> str:
    """Of all but the containers. TypeError for what is not plain; ValueError for more than so many bytes can hold."""
    digest = hashlib.sha256()
    for count, (name, value) in enumerate(_parts("", content)):
        if most is not None and count > most:
            raise ValueError(f"it has more values than the {most:,} bytes of the file")
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(_bytes_of(value, most))
        elif type(value) not in PLAIN:
            raise TypeError(f"{name} is of type {type(value).__name__}, expected a tensor or a plain value")
        elif type(value) not in CONTAINERS:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor, most: int | None) -> bytes:
    """Its values; of a tensor that repeats its memory, as an expanded one does, where they are, and that memory."""
    storage, where = tensor.untyped_storage(), b""
    if most is not None and storage.nbytes() > most:
        raise ValueError(f"it has a tensor of {storage.nbytes():,} bytes in a file of {most:,}")
    if tensor.numel() * tensor.itemsize > storage.nbytes():
        where = f"{tensor.stride()} {tensor.storage_offset()}\n".encode()
        tensor = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)  # type: ignore[call-overload]
    return where + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _parts(name: str, content: Any) -> Iterator[tuple[str, Any]]:
    """Every value by its place, a container before what it holds."""
    yield name, content
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _parts(f"{name}.{key!r}", value)
    elif isinstance(content, list | tuple):
        for at, value in enumerate(content):
            yield from _parts(f"{name}[{at}]", value)
