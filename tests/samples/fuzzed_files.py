"""What parses a file: whatever its bytes are, a valid value or a ValueError that names the file, soon and in little
memory."""

import gzip
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from fusedact import data
from fusedact.trainers import checkpoint
from fusedact.tuning import records

MOST_SECONDS = 5.0
MOST_BYTES = 256 << 20
ITEM = (2, 3)
COLUMNS = ("x", "y", "pass")
MACHINE = records.Machine("NVIDIA H200", "13.0", "3.7.1", "2.13.0")
PICKLE = "archive/data.pkl"  # of a checkpoint


@dataclass(frozen=True)
class Parser:
    """read(path) -> value; valid(value); small valid files; and whether a ValueError names the file itself."""

    read: Callable[[Path], Any]
    valid: Callable[[Any], bool]
    seeds: Callable[[], list[bytes]]
    named: bool = True


def _is_bytes(shape: tuple[int, ...]) -> Callable[[Any], bool]:
    return lambda a: a.dtype == np.uint8 and a.shape[1:] == shape and 0 < len(a) <= data.MOST_ITEMS


def _idx(shape: tuple[int, ...], count: int = 3) -> list[bytes]:
    header = struct.pack(f">{2 + len(shape)}I", 0x801 + len(shape), count, *shape)
    return [header + bytes(range(count * int(np.prod(shape))))]


def _is_table(table: Any) -> bool:
    return table.dtype == np.float32 and table.shape[1:] == (len(COLUMNS),) and len(table) and np.isfinite(table).all()


def _csv() -> list[bytes]:
    return [b"x,y,pass\n1,2,True\n-3.5e-2,4,False\n", b"\xef\xbb\xbfx,y,pass\r\n0,1e38,True\r\n"]


def _is_tuned(table: Any) -> bool:
    return all(
        isinstance(bucket, str) and isinstance(record.choice, str) and all(map(isfinite, record.microseconds.values()))
        for bucket, record in table.items()
    )


def _tuned() -> list[bytes]:
    table = {"op float32 tf32 64x64x64": records.Record("fused", {"fused": 12.5, "stock": 14.0})}
    return [records._text(MACHINE, table).encode(), records._text(MACHINE, {}).encode()]


def _is_run(found: Any) -> bool:
    state, run = found
    return all(isinstance(t, torch.Tensor) for t in state.values()) and isinstance(run, dict)


@cache
def _checkpoints() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run.pt")
        checkpoint.save_checkpoint(path, {"weight": torch.arange(6.0).view(2, 3)}, {"epoch": 3, "name": "xor"})
        return [path.read_bytes()]


PARSERS = {
    "idx images": Parser(lambda path: data.read_idx(path, ITEM), _is_bytes(ITEM), lambda: _idx(ITEM)),
    "idx labels": Parser(data.read_idx, _is_bytes(()), lambda: _idx(())),
    "csv": Parser(lambda path: data.read_csv(path, COLUMNS), _is_table, _csv),
    "tuning": Parser(lambda path: records._parsed(path.read_bytes(), MACHINE), _is_tuned, _tuned, named=False),
    "checkpoint": Parser(checkpoint.load_run, _is_run, _checkpoints),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": lambda content: gzip.compress(content, 1, mtime=0),
    "pickle": lambda content: _with_pickle(content),
}


def _with_pickle(content: bytes) -> bytes:
    """A whole archive with these bytes as its pickle, so that they come to be unpickled."""
    made = BytesIO()
    with zipfile.ZipFile(BytesIO(_checkpoints()[0])) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            new.writestr(zipfile.ZipInfo(name), content if name == PICKLE else old.read(name))
    return made.getvalue()


def pickles() -> list[bytes]:
    with zipfile.ZipFile(BytesIO(_checkpoints()[0])) as archive:
        return [archive.read(PICKLE)]


@dataclass(frozen=True)
class File:
    parser: str
    content: bytes
    packed: str = ""

    def problem(self) -> str | None:
        parser = PARSERS[self.parser]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "given")
            path.write_bytes(PACKED[self.packed](self.content))
            before, started = _peak(), time.process_time()
            said = _said(parser, path)
            seconds = time.process_time() - started
            grown = _peak(again=False) - before
        if said is None and grown > MOST_BYTES:
            return f"{grown >> 20} MiB more than before"
        return f"{seconds:.1f} s" if said is None and seconds > MOST_SECONDS else said


def _peak(again: bool = True) -> int:
    """The most bytes that were resident since it began `again`; since ever where Linux's files are not."""
    if not Path("/proc/self/clear_refs").exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if again:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def _said(parser: Parser, path: Path) -> str | None:
    try:
        value = parser.read(path)
    except ValueError as error:
        return None if not parser.named or str(path) in str(error) else f"does not name the file: {error!r}"
    except RecursionError as error:
        return None if not parser.named else repr(error)  # which records._read expects
    except Exception as error:
        return repr(error)
    return None if parser.valid(value) else f"gives {value!r}"


@st.composite
def files(draw: Any, name: str) -> File:
    """A valid file with some of its bytes changed, or anything at all."""
    packed = draw(st.sampled_from({"idx": ["", "", "gzip"], "che": ["", "pickle"]}.get(name[:3], [""])))
    seeds = pickles() if packed == "pickle" else PARSERS[name].seeds()
    content = bytearray(draw(st.sampled_from(seeds)) if draw(st.integers(0, 9)) else draw(st.binary(max_size=64)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["put", "insert", "drop", "cut", "repeat", "flip"])):
            case "put":
                new = draw(st.sampled_from(WORDS) | st.binary(max_size=4))
                content[at : at + len(new)] = new
            case "insert":
                content[at:at] = draw(st.sampled_from(WORDS) | st.binary(max_size=4))
            case "drop":
                del content[at : at + draw(st.integers(1, 8))]
            case "cut":
                del content[at:]
            case "repeat":
                content += content[at : at + draw(st.integers(1, 64))]
            case "flip" if at < len(content):
                content[at] ^= 1 << draw(st.integers(0, 7))
    return File(name, bytes(content), packed)


WORDS = [
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
    b"nan",
    b"inf",
    b"-1",
    b"1e999",
    b"True",
    b",",
    b"\n",
    b"\r",
]
WORDS += [
    b'"',
    b"[[",
    b"{}",
    b"null",
    b"1_0",
    "\N{ARABIC-INDIC DIGIT ONE}".encode(),
    b"\0",
    b"\x1f\x8b",
    b"PK\x03\x04",
    b"#",
    b" ",
    b"\xc2\x85",
    b"\x0c",
]
