"""The trainers' data sets: made by a rule, embedded, read from disk, downloaded.

MNIST is the work of Yann LeCun, Corinna Cortes and Christopher J. C. Burges, who license it CC BY-SA 3.0.
The subset embedded as `mnist.npz` is theirs under the same license; `tools/embed_mnist.py` made it.
"""

import gzip
import hashlib
import math
import os
import re
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedIOBase, BytesIO
from itertools import zip_longest
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

SHA256 = {  # of each file out of its gzip
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "https://raw.githubusercontent.com/fgnt/mnist/master",
)
MOST_ITEMS = 1 << 20  # in an IDX file: MNIST has 60,000, and a gzip bomb may hold any number
MOST_BYTES = 48 << 20  # in one of the four files: the largest has 47 million out of its gzip
STALE = 3600.0  # seconds after which nobody is writing what is left beside a file
GZIP_FAULTS = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, eq=False)
class Mnist:
    """Images uint8 (N, 28, 28) and labels int64 (N,), to train and to test on, and where they are from."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str


def binary(rows: int = 1000, seed: int = 0, path: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Three integers from 0 to 100 a row, true where each is at least 40 and their mean at least 60.

    Returns x (rows, 3) and y (rows, 1), float32. With a path they are read from that CSV (x, y, z, pass),
    which is made first where it is absent; `rows` and `seed` change nothing in one that exists.
    torch's random state is left alone. ValueError: no rows, or a CSV that `read_csv` refuses.
    """
    points = np.random.default_rng(seed).integers(0, 101, (rows, 3))
    passed = (points.min(1) >= 40) & (points.mean(1) >= 60)
    return _table(("x", "y", "z", "pass"), np.column_stack((points.astype(object), passed)), path)


def xor(rows: int = 1000, seed: int = 0, path: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """Random pairs of booleans and their exclusive or, drawn after `binary`'s rows from the same generator.

    Returns x (rows, 2) and y (rows, 1), float32. The CSV's columns are x1, x2, y; all else is as in `binary`.
    """
    generator = np.random.default_rng(seed)
    generator.integers(0, 101, (rows, 3))
    pairs = generator.integers(0, 2, (rows, 2)).astype(bool)
    return _table(("x1", "x2", "y"), np.column_stack((pairs, pairs[:, 0] ^ pairs[:, 1])), path)


def _table(columns: tuple[str, ...], cells: np.ndarray, path: str | Path | None) -> tuple[Tensor, Tensor]:
    if not len(cells):
        raise ValueError("expected at least 1 row, got 0")
    if path is None:
        table = cells.astype(np.float32)
    else:
        if not Path(path).exists():
            lines = (",".join(map(str, line)) + "\n" for line in (columns, *cells))
            write_whole(path, "".join(lines).encode())
        table = read_csv(path, columns)
    x, y = torch.from_numpy(table).split([len(columns) - 1, 1], dim=1)
    return x.contiguous(), y.contiguous()


def read_csv(path: str | Path, columns: tuple[str, ...]) -> np.ndarray:
    """float32 (rows, len(columns)) from a CSV whose first line names the columns; True is 1 and False 0.

    ValueError, with path, line and column: another header, no rows, a row with more or fewer cells, a cell
    that is no finite float32.
    """
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    header, *rows = text.rstrip().split("\n")
    for column, (name, expected) in enumerate(zip_longest(header.split(","), columns), 1):
        if name != expected:
            raise _csv_fault(path, 1, column, ",".join(columns), header)
    for line, row in enumerate(rows or [""], 2):
        cells = row.count(",") + bool(row)
        if cells != len(columns):
            raise _csv_fault(path, line, min(cells, len(columns)) + 1, f"{len(columns)} cells", row)
    table = np.loadtxt(rows, comments=None, delimiter=",", converters=_number, ndmin=2)
    for row, column in np.argwhere(~(abs(table) <= np.finfo(np.float32).max)):
        cell = rows[row].split(",")[column]
        raise _csv_fault(path, row + 2, column + 1, "a finite float32, True or False", cell)
    return table.astype(np.float32)


def _csv_fault(path: str | Path, line: int, column: int, expected: str, found: str) -> ValueError:
    return ValueError(f"{path}, line {line}, column {column}: expected {expected}, found {found!r}")


def _number(cell: str) -> float:
    """NaN for what is no number, so that one look at the finished table finds every bad cell."""
    try:
        return float({"True": "1", "False": "0"}.get(cell, cell))
    except ValueError:
        return math.nan


def mnist(folder: str | Path | None = None, download: bool = False) -> Mnist:
    """MNIST from a folder, else from the user's cache folder, else the subset embedded here.

    A folder holds the four IDX files, each plain or gzipped, itself or in `MNIST/raw` as torchvision lays
    them out; if one is given, nothing else is looked at. `download` first fills the cache folder,
    `fusedact/mnist` in $XDG_CACHE_HOME or ~/.cache, with what is absent or damaged there (the progress bar
    needs rich, of the `cli` extra). FileNotFoundError: a given folder without the files. ValueError: a file
    that `read_idx` refuses, labels that are no digits or fewer or more than the images. OSError: no mirror
    had a file whose SHA-256 is right.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fusedact", "mnist")
    if download and folder is None:
        _fill(cache)
    place = cache if folder is None else Path(folder)
    if files := _idx_files(place):
        train, test = _digits(*files[:2]), _digits(*files[2:])
        return Mnist(*train, *test, f"{len(train[0]):,} + {len(test[0]):,} images from {place}")
    if folder is not None:
        expected = ", ".join(SHA256)
        raise FileNotFoundError(f"{folder}: expected {expected}, plain or .gz, here or in MNIST/raw")
    return _embedded()


def _idx_files(folder: Path) -> list[Path]:
    """The four files in SHA256's order, or none if one is absent."""
    for place in (folder, folder / "MNIST" / "raw"):
        # os.path.isfile is False in a folder that may not be read, where Path.is_file raises.
        found = [[p for p in (place / name, place / f"{name}.gz") if os.path.isfile(p)] for name in SHA256]
        if all(found):
            return [choices[0] for choices in found]
    return []


def _digits(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    x, y = read_idx(images, (28, 28)), read_idx(labels)
    if len(x) != len(y):
        raise ValueError(f"{labels}: expected {len(x):,} labels, as many as {images} has, found {len(y):,}")
    if y.max() > 9:
        raise ValueError(f"{labels}: expected labels 0 to 9, found {y.max()} at item {y.argmax():,}")
    return torch.from_numpy(x), torch.from_numpy(y).long()


def _embedded() -> Mnist:
    with np.load(Path(__file__).with_name("mnist.npz"), allow_pickle=False) as arrays:
        parts = {name: torch.from_numpy(array) for name, array in arrays.items()}
    train, test = len(parts["train_labels"]), len(parts["test_labels"])
    return Mnist(**parts, source=f"the embedded subset of {train:,} + {test:,} images")


def read_idx(path: Path, item: tuple[int, ...] = ()) -> np.ndarray:
    """uint8 (N, *item) from an IDX file, plain or gzipped.

    ValueError, with path, expected and found: another magic number, other dimensions, no items or more than
    MOST_ITEMS, a size that is not the header's, a damaged gzip. No more is allocated than the file holds.
    """
    size = 8 + 4 * len(item)
    with path.open("rb") as raw:
        stream = _unpacked(raw)
        try:
            header = _read(stream, size)
            size += _count(path, header, item) * math.prod(item)
            data = _read(stream, size - len(header))
            found = "more" if stream.read(1) else f"{len(header) + len(data):,}"
        except GZIP_FAULTS as fault:
            found = f"{stream.tell():,} and then: {fault}"
    if found != f"{size:,}":
        raise ValueError(f"{path}: expected {size:,} bytes, found {found}")
    return np.frombuffer(data, np.uint8).reshape(-1, *item)


def _count(path: Path, header: bytearray, item: tuple[int, ...]) -> int:
    """How many items of that shape an IDX header promises."""
    layout = struct.Struct(f">{2 + len(item)}I")
    if len(header) < layout.size:
        raise ValueError(f"{path}: expected a header of {layout.size} bytes, found {len(header)}")
    magic, count, *shape = layout.unpack(header)
    if magic != 0x801 + len(item):
        raise ValueError(f"{path}: expected magic number {0x801 + len(item):#010x}, found {magic:#010x}")
    if tuple(shape) != item:
        raise ValueError(f"{path}: expected items of shape {item}, found {tuple(shape)}")
    if not 0 < count <= MOST_ITEMS:
        raise ValueError(f"{path}: expected 1 to {MOST_ITEMS:,} items, found {count:,} in the header")
    return count


def _read(stream: BufferedIOBase | BinaryIO, most: int) -> bytearray:
    """Up to that many bytes, in pieces, since a single read allocates what it is asked for at once."""
    data = bytearray()
    while piece := stream.read(min(most - len(data), 1 << 16)):
        data += piece
    return data


def _unpacked(raw: BufferedIOBase) -> BufferedIOBase:
    """The stream itself, or what its gzip holds."""
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if packed else raw


def _fill(folder: Path) -> None:
    for name, sha256 in SHA256.items():
        path = folder / f"{name}.gz"
        if not (path.exists() and _is_whole(path.open("rb"), sha256)):
            write_whole(path, _download(name, sha256))


def _is_whole(raw: BufferedIOBase, sha256: str) -> bool:
    with raw:
        try:
            return hashlib.sha256(_read(_unpacked(raw), MOST_BYTES)).hexdigest() == sha256
        except GZIP_FAULTS:
            return False


def _download(name: str, sha256: str) -> bytes:
    """The gzipped file from the first mirror that has it whole."""
    from http.client import HTTPException

    faults = []
    for mirror in MIRRORS:
        url = f"{mirror}/{name}.gz"
        try:
            packed = _fetch(url)
        except (OSError, HTTPException) as fault:
            faults.append(f"{url}: {fault}")
            continue
        if _is_whole(BytesIO(packed), sha256):
            return packed
        faults.append(f"{url}: {len(packed):,} bytes, which do not unpack to SHA-256 {sha256}")
    raise OSError(f"{name}.gz could not be downloaded. " + "; ".join(faults))


def _fetch(url: str) -> bytes:
    from urllib.request import urlopen

    from rich.console import Console
    from rich.progress import wrap_file

    with urlopen(url, timeout=30) as response:
        name, console = url.rpartition("/")[2], Console(stderr=True)
        with wrap_file(response, response.length or 0, description=name, console=console) as body:
            return bytes(_read(body, MOST_BYTES))


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all: beside its place, flushed to the disk, then renamed.

    Folders are made. Killed at any instant, or with two writers at once, what stands at `path` is a whole
    file, an old or a new one; after the return a power failure, too, leaves the new one. A link at `path` stays one,
    and what it leads to is replaced. OSError, naming the path, where it cannot be written.
    """
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.{token_hex(4)}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place)
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)
        _flush_folder(place.parent)
    except OSError as fault:
        raise OSError(fault.errno, fault.strerror, str(path)) from fault
    finally:
        with suppress(OSError):
            beside.unlink()


def _sweep(place: Path) -> None:
    """Removes what writers of this file left beside it when they were killed: none of them writes for an hour."""
    for left in place.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}", left.name):
            with suppress(OSError):  # another one swept, or wrote, it first
                if time.time() - left.stat().st_mtime > STALE:
                    left.unlink()


def _flush_folder(folder: Path) -> None:
    """The new name is on the disk too, where the system can be told so of a folder."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)
