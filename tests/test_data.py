"""Data sets: the rules they are made by, every fault of a file, and downloads from a server of our own."""

import ast
import gzip
import hashlib
import os
import runpy
import signal
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedact import data

IMAGES = np.arange(3 * 784, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
LABELS = np.array([0, 9, 5], np.uint8)
COLUMNS = ("x", "y", "z", "pass")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def digits(images: bytes = idx(IMAGES), labels: bytes = idx(LABELS)) -> dict[str, bytes]:
    """MNIST's four files, three images each, by name."""
    return dict(zip(data.SHA256, (images, labels, idx(IMAGES), idx(LABELS)), strict=True))


def fill(folder: Path, files: dict[str, bytes], suffix: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


def check(digits: data.Mnist) -> None:
    """That both sets are IMAGES and LABELS."""
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(images, IMAGES) and np.array_equal(labels, LABELS)


def flip(content: bytes, place: int) -> bytes:
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache folder of MNIST, not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fusedact" / "mnist"


@pytest.fixture
def full_data():
    """The folder of the real MNIST."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "mnist"
    folder = Path(os.environ.get("FUSEDACT_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"the full MNIST is not in {folder}: set FUSEDACT_DATA")
    return folder


# Tables made by a rule


def test_binary_follows_its_rule():
    x, y = data.binary(rows=20_000)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((20_000, 3), (20_000, 1), torch.float32, torch.float32)
    assert x.min() == 0 and x.max() == 100 and torch.equal(x, x.round())
    assert torch.equal(y[:, 0] == 1, (x >= 40).all(1) & (x.sum(1) >= 180))
    assert abs(y.mean() - 0.1836) < 0.01  # of all 101³ rows


def test_xor_follows_its_rule():
    x, y = data.xor(rows=400)
    assert (x.shape, y.shape, x.dtype, y.dtype) == ((400, 2), (400, 1), torch.float32, torch.float32)
    assert torch.equal(y[:, 0], (x[:, 0] != x[:, 1]).float())
    assert len(x.unique(dim=0)) == 4


@pytest.mark.parametrize("make", [data.binary, data.xor])
class TestTable:
    def test_seed_decides(self, make):
        assert torch.equal(make(seed=1)[0], make(seed=1)[0])
        assert not torch.equal(make(seed=1)[0], make(seed=2)[0])

    def test_leaves_random_states_alone(self, make, tmp_path):
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        make(path=tmp_path / "table.csv")
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)

    @pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.contract(69)), 50])
    def test_csv_holds_the_same_table(self, make, rows, tmp_path):
        path = tmp_path / "new" / "table.csv"
        for table in (make(rows, path=path), make(rows, path=str(path))):
            assert all(torch.equal(read, made) for read, made in zip(table, make(rows), strict=True))
            assert all(part.is_contiguous() for part in table)
        assert os.listdir(path.parent) == ["table.csv"]

    def test_csv_that_exists_is_read(self, make, tmp_path):
        path = tmp_path / "table.csv"
        first = make(10, path=path)
        assert torch.equal(make(20, seed=5, path=path)[0], first[0])

    @pytest.mark.parametrize("rows", [0, -1])
    def test_no_rows(self, make, rows, tmp_path):
        with pytest.raises(ValueError):
            make(rows, path=tmp_path / "table.csv")
        assert not os.listdir(tmp_path)


def test_csv_is_the_tutorials(tmp_path):
    data.binary(rows=3, seed=0, path=tmp_path / "binary.csv")
    data.xor(rows=2, seed=0, path=tmp_path / "xor.csv")
    assert (tmp_path / "binary.csv").read_text() == "x,y,z,pass\n85,64,51,True\n27,31,4,False\n7,1,17,False\n"
    assert (tmp_path / "xor.csv").read_text() == "x1,x2,y\nFalse,False,False\nFalse,True,True\n"


@pytest.mark.parametrize(
    "text",
    [
        "x,y,z,pass\n1,2,3,True\n4,5,6,False\n",
        "x,y,z,pass\r\n1,2,3,1\r\n4,5,6,0\r\n",
        "\ufeffx,y,z,pass\n1.0, 2,3e0 ,1.0\n4,5,6,0",
        "x,y,z,pass\n1,2,3,True\n4,5,6,False\n\n \n",
    ],
    ids=["plain", "windows", "mark and spaces", "blank end"],
)
def test_csv_forms(text, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(text, encoding="utf-8", newline="")
    assert data.read_csv(path, COLUMNS).tolist() == [[1, 2, 3, 1], [4, 5, 6, 0]]


HEADER = b"x,y,z,pass\n"
CSV_FAULTS = {
    "empty": (b"", 1, 1),
    "blank": (b"\n\n", 1, 1),
    "header only": (HEADER, 2, 1),
    "header absent": (b"1,2,3,True\n", 1, 1),
    "last column missing": (b"x,y,z\n1,2,3\n", 1, 4),
    "middle column missing": (b"x,z,pass\n1,3,True\n", 1, 2),
    "column too many": (b"x,y,z,pass,w\n1,2,3,True,4\n", 1, 5),
    "columns swapped": (b"x,z,y,pass\n1,2,3,True\n", 1, 2),
    "short row": (HEADER + b"1,2,3,True\n1,2,3\n", 3, 4),
    "long row": (HEADER + b"1,2,3,True,7\n", 2, 5),
    "trailing comma": (HEADER + b"1,2,3,True,\n", 2, 5),
    "blank row": (HEADER + b"\n1,2,3,True\n", 2, 1),
    "empty cell": (HEADER + b"1,2,3,True\n1,,3,True\n", 3, 2),
    "word": (HEADER + b"1,2,three,True\n", 2, 3),
    "quoted": (HEADER + b'"1",2,3,True\n', 2, 1),
    "comment": (HEADER + b"1,2,3,#\n", 2, 4),
    "nan": (HEADER + b"1,2,3,True\nnan,2,3,True\n", 3, 1),
    "infinity": (HEADER + b"1,-inf,3,True\n", 2, 2),
    "beyond float32": (HEADER + b"1,2,1e39,True\n", 2, 3),
    "no text": (HEADER + b"1,2,\xff\x00,True\n", 2, 3),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("content", "line", "column"), CSV_FAULTS.values(), ids=CSV_FAULTS)
@pytest.mark.contract(69, 87)
def test_csv_fault_is_named(content, line, column, tmp_path):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .*, found") as caught:
        data.binary(path=path)
    assert str(caught.value).startswith(f"{path}, line {line}, column {column}: ")


# IDX


@settings(deadline=None, max_examples=50)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)), content=st.randoms())
@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path_factory, packed, shape, content):
    array = np.frombuffer(content.randbytes(int(np.prod(shape))), np.uint8).reshape(shape)
    path = tmp_path_factory.getbasetemp() / "array"
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    read = data.read_idx(path, shape[1:])
    assert read.dtype == np.uint8 and np.array_equal(read, array)


WHOLE, PACKED = idx(IMAGES), gzip.compress(idx(IMAGES), mtime=0)
SIZES = r"expected 2,368 bytes, found "
HUGE = struct.pack(">4I", 0x803, 2**32 - 1, 28, 28)
IDX_FAULTS = {
    "empty": (b"", "a header of 16 bytes, found 0"),
    "cut in the magic": (WHOLE[:3], "a header of 16 bytes, found 3"),
    "cut in the header": (WHOLE[:15], "a header of 16 bytes, found 15"),
    "no items": (WHOLE[:16], SIZES + "16$"),
    "cut in the middle": (WHOLE[:1000], SIZES + "1,000$"),
    "last byte cut": (WHOLE[:-1], SIZES + "2,367$"),
    "byte too many": (WHOLE + b"\0", SIZES + "more$"),
    "wrong magic": (flip(WHOLE, 0), "magic number 0x00000803, found 0x01000803"),
    "other element type": (flip(WHOLE, 2), "magic number 0x00000803, found 0x00000903"),
    "labels for images": (idx(np.zeros(20, np.uint8)), "magic number 0x00000803, found 0x00000801"),
    "other dimensions": (idx(np.zeros((2, 28, 27), np.uint8)), r"\(28, 28\), found \(28, 27\)"),
    "count zero": (idx(IMAGES[:0]), "1 to 1,048,576 items, found 0 in the header"),
    "header promising 2^41 bytes": (HUGE, "1 to 1,048,576 items, found 4,294,967,295 in the header"),
    "header promising more": (struct.pack(">4I", 0x803, 2**20, 28, 28), "822,083,600 bytes, found 16$"),
    "flipped count": (flip(WHOLE, 7), "expected 1,584 bytes, found more$"),
    "gz of the header promising more": (
        gzip.compress(struct.pack(">4I", 0x803, 2**20, 28, 28)),
        "822,083,600 bytes, found 16$",
    ),
    "gz cut in its header": (PACKED[:5], "found 0 and then: Compressed file ended"),
    "gz cut in the middle": (PACKED[:60], "and then: Compressed file ended"),
    "gz without its end": (PACKED[:-8], SIZES + ".* and then: Compressed file ended"),
    "gz last byte cut": (PACKED[:-1], SIZES + ".* and then: Compressed file ended"),
    "gz CRC": (flip(PACKED, -8), SIZES + ".* and then: CRC check failed"),
    "gz length": (flip(PACKED, -4), SIZES + ".* and then: Incorrect length"),
    "gz flipped byte": (flip(PACKED, 60), "and then: "),
    "gz unknown method": (flip(PACKED, 2), "found 0 and then: Unknown compression method"),
    "gz with something after it": (PACKED + b"more", SIZES + ".* and then: Not a gzipped file"),
    "gz of too much": (gzip.compress(WHOLE + b"\0"), SIZES + "more$"),
    "no gz, no IDX": (b"<html>403 Forbidden</html>", "magic number 0x00000803, found 0x3c68746d"),
}


@pytest.mark.parametrize(("content", "message"), IDX_FAULTS.values(), ids=IDX_FAULTS)
@pytest.mark.contract(70, 86)
def test_idx_fault_is_named(content, message, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_idx(path, (28, 28))
    assert str(caught.value).startswith(f"{path}: expected ")


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(WHOLE + bytes(1 << 24)),
        gzip.compress(HUGE + bytes(1 << 24)),
        HUGE + bytes(1 << 24),
        gzip.compress(struct.pack(">4I", 0x803, 2**20, 28, 28)),
    ],
    ids=["bomb", "bomb of a huge header", "huge header", "gz of the header promising more"],
)
@pytest.mark.contract(86)
def test_idx_is_refused_before_allocating(content, tmp_path):
    path = tmp_path / "images"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected"):
        data.read_idx(path, (28, 28))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


# MNIST's places


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("layout", [".", "MNIST/raw"])
def test_mnist_from_a_folder(layout, suffix, cache, tmp_path):
    fill(tmp_path / layout, digits(), suffix)
    for folder in (tmp_path, str(tmp_path)):
        found = data.mnist(folder)
        check(found)
        assert found.source == f"3 + 3 images from {tmp_path}"


def test_mnist_plain_and_gzipped_mixed(tmp_path):
    files = digits()
    for number, (name, content) in enumerate(files.items()):
        fill(tmp_path, {name: content}, ".gz" if number % 2 else "")
    check(data.mnist(tmp_path))


def test_mnist_gz_by_content_not_by_name(tmp_path):
    fill(tmp_path, {name: gzip.compress(content) for name, content in digits().items()})
    check(data.mnist(tmp_path))


@pytest.mark.parametrize("absent", [*data.SHA256, "folder"])
def test_mnist_folder_without_a_file(absent, tmp_path):
    folder = fill(tmp_path / "mnist", digits()) if absent in data.SHA256 else tmp_path / absent
    (folder / absent).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError) as caught:
        data.mnist(folder, download=True)
    assert all(part in str(caught.value) for part in (str(folder), *data.SHA256, "MNIST/raw"))


def test_mnist_from_the_cache(cache):
    fill(cache, digits(), ".gz")
    found = data.mnist()
    check(found)
    assert found.source == f"3 + 3 images from {cache}"


def test_mnist_cache_in_the_home(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / ".cache" / "fusedact" / "mnist", digits(), ".gz")
    check(data.mnist())


def test_mnist_embedded(cache):
    found = data.mnist()
    assert found.source == "the embedded subset of 4,000 + 1,000 images"
    for images, labels, count in (
        (found.train_images, found.train_labels, 4000),
        (found.test_images, found.test_labels, 1000),
    ):
        assert (images.dtype, images.shape) == (torch.uint8, (count, 28, 28))
        assert labels.dtype == torch.int64 and labels.bincount().tolist() == [count // 10] * 10
        assert len(images.flatten(1).unique(dim=0)) == count
    assert not cache.exists()


def test_mnist_half_a_cache_is_none(cache):
    files = digits()
    files.popitem()
    fill(cache, files, ".gz")
    assert "embedded" in data.mnist().source


MNIST_FAULTS = {
    "label 250": (digits(labels=idx(np.array([0, 250, 5], np.uint8))), "labels 0 to 9, found 250 at item 1"),
    "label 10": (digits(labels=idx(np.array([0, 1, 10], np.uint8))), "labels 0 to 9, found 10 at item 2"),
    "labels too few": (digits(labels=idx(LABELS[:2])), "3 labels, as many as .*train-images.* has, found 2"),
    "labels too many": (digits(images=idx(IMAGES[:2])), "2 labels, as many as .*train-images.* has, found 3"),
}


@pytest.mark.parametrize(("files", "message"), MNIST_FAULTS.values(), ids=MNIST_FAULTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.contract(70, 86)
def test_mnist_fault_is_named(files, message, suffix, tmp_path):
    fill(tmp_path, files, suffix)
    with pytest.raises(ValueError, match=message) as caught:
        data.mnist(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'train-labels-idx1-ubyte'}{suffix}: expected ")


# The real data


def test_full_data_is_mnist(full_data):
    for path, sha256 in zip(data._idx_files(full_data), data.SHA256.values(), strict=True):
        item = (28, 28) if "idx3" in path.name else ()
        assert hashlib.sha256(idx(data.read_idx(path, item))).hexdigest() == sha256
    found = data.mnist(full_data)
    assert (len(found.train_images), len(found.test_images)) == (60_000, 10_000)
    assert found.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert found.source == f"60,000 + 10,000 images from {full_data}"


def test_embedded_subset_is_of_the_full_data(full_data, cache):
    def rows(images, labels):
        return {(image.tobytes(), int(label)) for image, label in zip(images.numpy(), labels, strict=True)}

    full, subset = data.mnist(full_data), data.mnist()
    assert rows(subset.train_images, subset.train_labels) <= rows(full.train_images, full.train_labels)
    assert rows(subset.test_images, subset.test_labels) <= rows(full.test_images, full.test_labels)


def test_embedding_again_gives_the_same_file(full_data, tmp_path, monkeypatch):
    tool = Path(__file__).parents[1] / "tools" / "embed_mnist.py"
    copy = fill(tmp_path / "tools", {tool.name: tool.read_bytes()}) / tool.name
    made, embedded = tmp_path / "fusedact" / "mnist.npz", Path(data.__file__).with_name("mnist.npz")
    made.parent.mkdir()
    monkeypatch.setattr(sys, "argv", [str(copy), str(full_data)])

    def make() -> bytes:
        runpy.run_path(str(copy), run_name="__main__")
        return made.read_bytes()

    assert make() == make()
    # Arrays, since another zlib may pack the same ones into other bytes.
    with np.load(made) as ours, np.load(embedded) as theirs:
        assert ours.files == theirs.files
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)
    assert embedded.stat().st_size < 1_200_000


# Downloads

BOMB = gzip.compress(bytes(1 << 26))


class Mirror(BaseHTTPRequestHandler):
    """Serves /KIND/NAME.gz, each kind of mirror with a fault of its own."""

    disable_nagle_algorithm = True  # else a body waits 40 ms for its header to be acknowledged

    def do_GET(self):
        kind, name = self.path[1:].split("/")
        packed = gzip.compress(digits()[name.removesuffix(".gz")], mtime=0)
        body = {
            "good": packed,
            "plain": gzip.decompress(packed),
            "truncated": packed[:-9],
            "cut": packed[:-9],
            "empty": b"",
            "flipped": flip(packed, len(packed) // 2),
            "tampered": gzip.compress(flip(gzip.decompress(packed), -1)),
            "page": b"<html>not here</html>",
            "bomb": BOMB,
        }.get(kind)
        if body is None:
            return self.send_error(403)
        self.send_response(200)
        self.send_header("Content-Length", str(len(packed) if kind == "cut" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


DOWN = "http://127.0.0.1:9"  # the discard port: nobody listens
FAULTY = ["truncated", "cut", "empty", "flipped", "tampered", "page", "bomb", "forbidden", "down"]


@pytest.fixture
def mirrors(server, monkeypatch):
    """Call with the kinds of mirror to be asked, in order; they serve three images a file."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in digits().items()}
    monkeypatch.setattr(data, "SHA256", digests)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def choose(*kinds):
        urls = tuple(DOWN if kind == "down" else f"{server}/{kind}" for kind in kinds)
        monkeypatch.setattr(data, "MIRRORS", urls)
        return urls

    return choose


@pytest.mark.parametrize("kind", ["good", "plain"])
def test_download_fills_the_cache_once(kind, mirrors, cache, capfd):
    mirrors(kind)
    check(data.mnist(download=True))
    assert sorted(os.listdir(cache)) == sorted(f"{name}.gz" for name in data.SHA256)
    out, err = capfd.readouterr()
    assert not out and all(f"{name}.gz" in err for name in data.SHA256)
    mirrors("down")
    check(data.mnist(download=True))
    check(data.mnist())


@pytest.mark.parametrize("kind", FAULTY)
def test_download_goes_on_to_the_next_mirror(kind, mirrors, cache):
    mirrors(kind, "good")
    check(data.mnist(download=True))


@pytest.mark.parametrize("kind", FAULTY)
@pytest.mark.contract(84)
def test_download_refuses_a_fault_and_leaves_nothing(kind, mirrors, cache):
    urls = mirrors(kind, "forbidden")
    with pytest.raises(OSError, match=r"train-images-idx3-ubyte.gz could not be downloaded") as caught:
        data.mnist(download=True)
    assert all(f"{url}/train-images-idx3-ubyte.gz: " in str(caught.value) for url in urls)
    assert not cache.exists()
    assert "embedded" in data.mnist().source


@pytest.mark.parametrize("damage", [lambda packed: packed[:-1], lambda packed: flip(packed, -8), lambda _: b""])
def test_download_mends_a_damaged_cache(damage, mirrors, cache):
    mirrors("good")
    data.mnist(download=True)
    path = cache / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte.gz: expected"):
        data.mnist()
    check(data.mnist(download=True))


def test_download_is_not_asked_for(mirrors, cache):
    mirrors("good")
    assert "embedded" in data.mnist().source
    assert not cache.exists()


def run(code: str, *arguments: object) -> int:
    """The exit status of a process that runs the code."""
    code = f"import os, signal, sys\nfrom fusedact import data\n{code}"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], timeout=120).returncode


@pytest.mark.contract(84)
def test_two_processes_download_at_once(mirrors, cache):
    code = """
data.SHA256, data.MIRRORS = eval(sys.argv[1]), eval(sys.argv[2])
child = os.fork()
data.mnist(download=True)
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code, data.SHA256, mirrors("good")) == 0
    assert sorted(os.listdir(cache)) == sorted(f"{name}.gz" for name in data.SHA256)
    check(data.mnist())


# Writing


@pytest.mark.contract(67, 84)
def test_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
data.write_whole(sys.argv[1], b"new")
"""
    assert run(code, path) == -signal.SIGKILL
    assert path.read_bytes() == b"old"


@pytest.mark.contract(84)
def test_a_file_is_flushed_and_then_the_folder_that_names_it(tmp_path, monkeypatch):
    path, flushed = tmp_path / "file", []

    def fsync(opened):
        found = os.fstat(opened)
        flushed.append((stat.S_ISREG(found.st_mode), os.path.samestat(found, tmp_path.stat()), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    data.write_whole(path, b"new")
    assert flushed == [(True, False, False), (False, True, True)]


def test_reader_keeps_the_file_it_opened(tmp_path):
    path = tmp_path / "file"
    data.write_whole(path, b"old")
    with path.open("rb") as reader:
        data.write_whole(path, b"new")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new"


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def disk_full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        data.write_whole(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_import_needs_neither_rich_nor_urllib():
    top = ast.parse(Path(data.__file__).read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not names & {"rich", "urllib", "http", "pickle"}
