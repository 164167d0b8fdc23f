"""Checkpoints that are damaged or malicious, and those that cannot be written."""

import os
import pickle
import re
import resource
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import pytest
import torch

import fusedact
from fusedact import data
from fusedact.__main__ import main
from fusedact.trainers import load_checkpoint, save_checkpoint
from fusedact.trainers.checkpoint import load_run


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small checkpoint, and what it holds."""
    path = tmp_path_factory.mktemp("small") / "a.pt"
    state, run = {"w": torch.arange(4.0)}, {"epochs": 1, "costs": [0.5], "lr": 1e-3, "seen": torch.tensor([1, 2])}
    save_checkpoint(path, state, run)
    return path.read_bytes(), state, run


def refused(path, content):
    """Whether it is refused, by the file's name; where it is not, it is the small checkpoint, bit for bit."""
    path.write_bytes(content)
    try:
        state, run = load_run(path)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
        return True
    assert list(state) == ["w"] and torch.equal(state["w"], torch.arange(4.0)) and state["w"].dtype == torch.float32
    assert torch.equal(run.pop("seen"), torch.tensor([1, 2])) and run == {"epochs": 1, "costs": [0.5], "lr": 1e-3}
    return False


@pytest.mark.contract(64, 85)
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_checkpoint_cut_at_any_byte_is_refused(tmp_path, small, step):
    whole, *_ = small
    assert not refused(tmp_path / "a.pt", whole)
    assert all(refused(tmp_path / "a.pt", whole[:size]) for size in range(0, len(whole), step))


@pytest.mark.contract(64, 85)
@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("bits", [0x01, 0x10, 0x80, 0xFF])
def test_no_flipped_byte_changes_what_is_loaded(tmp_path, small, bits, step):
    whole, *_ = small
    with warnings.catch_warnings(action="ignore"):
        found = [
            refused(tmp_path / "a.pt", whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
            for at in range(0, len(whole), step)
        ]
    assert any(found)


@pytest.mark.contract(64)
def test_a_checkpoint_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_checkpoint(tmp_path / "absent.pt")


def rewritten(whole, change=lambda name, part: part, compression=zipfile.ZIP_STORED, more=()):
    """The archive with other members, each with its right checksum."""
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(whole)) as given, zipfile.ZipFile(buffer, "w", compression) as archive:
        for member in given.infolist():
            archive.writestr(member.filename, change(member.filename, given.read(member)))
        for name, part in more:
            archive.writestr(name, part)
    return buffer.getvalue()


def with_pickle(pickled):
    return lambda whole: rewritten(whole, lambda name, part: pickled if name.endswith("data.pkl") else part)


def calling(name, *arguments):
    """A pickle that calls the global of that name."""
    return b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + pickle.dumps(arguments, 2)[2:-1] + b"R."


def longer(whole):
    """Its tensor of 4 is said to have 8, more than its member holds."""
    old, new = b"K\x04", b"K\x08"
    return rewritten(whole, lambda name, part: part.replace(old, new) if name.endswith("data.pkl") else part)


def repeated(whole):
    """A tensor of 2^40 numbers, all of them one in memory."""
    huge = {"state_dict": {"w": torch.zeros(1).expand(2**40)}, "run": {}, "sha256": ""}
    return saved(huge)


def laughing(levels=40):
    """A list of ten lists, each of ten, and so on."""
    inner = [1.0]
    for _ in range(levels):
        inner = [inner] * 10
    return inner


def saved(content):
    buffer = BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def run_of(value):
    return lambda whole: saved({"state_dict": {}, "run": value, "sha256": ""})


class Calls:
    """What a pickle of it calls when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


BOMB = 1 << 26
STORAGE, OURS = "torch.storage UntypedStorage", "its pickle is damaged or not ours"
LONGER = (  # 2^28 numbers, where there are 4
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00J\x00\x00\x00\x10\x85K\x01\x85\x89}tR."
)
MALICE = {
    "os.system": (with_pickle(calling("os system", "touch unpickled")), "names os system"),
    "posix.system": (with_pickle(calling("posix system", "touch unpickled")), "names posix system"),
    "eval": (with_pickle(calling("builtins eval", "open('unpickled', 'w')")), "names builtins eval"),
    "torch.save of a call": (lambda _: saved(Calls(os.mkdir, "unpickled")), "names posix mkdir"),
    "getattr": (with_pickle(calling("__builtin__ getattr", "a", "b")), "names __builtin__ getattr"),
    "bytearray of 2^40": (with_pickle(calling("builtins bytearray", 2**40)), "names builtins bytearray"),
    "torch.Tensor of 2^40": (with_pickle(calling("torch Tensor", 2**40)), "names torch Tensor"),
    "a storage of 2^30": (with_pickle(calling(STORAGE, 2**30)), "'StorageType' object is not callable"),
    "a new storage of 2^30": (with_pickle(calling(STORAGE, 2**30)[:-2] + b"\x81."), "X is not a type object"),
    "a storage of 2^30, by its other name": (with_pickle(calling("torch UntypedStorage", 2**30)), OURS),
    "a tensor longer than its memory": (with_pickle(LONGER), "Trying to resize storage that is not resizable"),
    "rebuild with odd arguments": (with_pickle(calling("torch._utils _rebuild_tensor_v2", 1, 2)), ""),
    "a dict's method as state": (with_pickle(b"\x80\x02}q\x00}X\x05\x00\x00\x00itemsK\x01sb."), OURS),
    "no pickle": (with_pickle(b"\x80\x02"), ""),
    "a pickle in the file's place": (lambda _: pickle.dumps(Calls(os.mkdir, "unpickled"), 2), "not a zip file"),
    "a whole module": (lambda _: saved(torch.nn.Linear(2, 2)), "names torch.nn.modules.linear Linear"),
    "a bomb beside": (lambda w: rewritten(w, compression=zipfile.ZIP_DEFLATED, more=[("x", bytes(BOMB))]), "is packed"),
    "a bomb after the pickle": (
        lambda w: rewritten(w, lambda n, p: p + bytes(BOMB * n.endswith(".pkl")), zipfile.ZIP_DEFLATED),
        "is packed",
    ),
    "two of one name": (lambda w: rewritten(w, more=[("archive/data.pkl", b"\x80\x02}.")]), "two members of one name"),
    "two but for capitals": (lambda w: rewritten(w, more=[("archive/Data.pkl", b"\x80\x02}.")]), "two members of one"),
    "another's pickle": (lambda w: rewritten(w, more=[("../data.pkl", calling("os system", "id"))]), "names os system"),
    "a tensor longer than its bytes": (longer, ""),
    "a tensor that repeats its memory": (repeated, "damaged: its SHA-256"),
    "lists in lists": (run_of({"laugh": laughing()}), "more values than the"),
    "a list in itself": (with_pickle(b"\x80\x02]q\x00h\x00a."), ""),
    "a run that is a list": (run_of([1, 2]), "its run is of type list, expected dict"),
    "a run with a set": (run_of({"a": {1}}), "names __builtin__ set"),
    "a state that is a tensor": (lambda _: saved({"state_dict": torch.ones(2), "run": {}, "sha256": ""}), ""),
    "a checksum that is a tensor": (lambda _: saved({"state_dict": {}, "run": {}, "sha256": torch.ones(2)}), ""),
    "no checksum": (lambda _: saved({"state_dict": {}, "run": {}}), "sha256"),
    "another program's": (lambda _: saved(OrderedDict(w=torch.ones(2))), "state_dict"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name", "ignore:Detected pickle protocol")
@pytest.mark.parametrize(("make", "reason"), MALICE.values(), ids=MALICE)
@pytest.mark.contract(85)
def test_a_malicious_checkpoint_is_refused(tmp_path, monkeypatch, small, make, reason):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    path.write_bytes(make(small[0]))
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{re.escape(reason)}") as caught:
        load_run(path)
    assert not re.search("\n|weights_only|PyTorch", str(caught.value))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BOMB / 4
    assert os.listdir() == ["a.pt"]


def test_an_expanded_tensor_comes_back(tmp_path):
    state = {"w": torch.arange(3.0)[:, None].expand(3, 4000), "t": torch.randn(3, 4).t(), "f": torch.ones(2).half()}
    state["u"] = torch.arange(5).to(torch.uint16)  # by an untyped storage
    save_checkpoint(tmp_path / "a.pt", state, {"dtype": torch.bfloat16, "none": None, "both": (1, 2j)})
    loaded, run = load_run(tmp_path / "a.pt")
    assert all(torch.equal(loaded[name], value) for name, value in state.items())
    assert all(loaded[name].stride() == value.stride() for name, value in state.items())
    assert run == {"dtype": torch.bfloat16, "none": None, "both": (1, 2j)}


# Writing


@pytest.mark.contract(66)
def test_a_folder_that_is_not_there(tmp_path):
    state = fusedact.nn.Linear(2, 2).state_dict()
    with pytest.raises(RuntimeError, match=r"Parent directory .*none does not exist\."):
        torch.save(state, tmp_path / "none/a.pt")
    save_checkpoint(tmp_path / "made/here/a.pt", state)
    assert load_checkpoint(tmp_path / "made/here/a.pt").keys() == state.keys()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(f"'{tmp_path}/file/a.pt'")):
        save_checkpoint(tmp_path / "file/a.pt", state)


@pytest.fixture
def full_disk():
    """No file may grow beyond 2,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.contract(66)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, full_disk):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"w": torch.ones(2)})
    full_disk()
    with pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")):
        save_checkpoint(path, {"w": torch.zeros(2000)})
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(2)) and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.contract(66)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_without_space_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"w": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r"enforce fail at inline_container|No space left"):
        torch.save({"w": torch.zeros(1 << 20)}, "/dev/full")
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda self, mode: opened(Path("/dev/full"), "wb") if "x" in mode else opened(self, mode)
    )
    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{path}'")):
        save_checkpoint(path, {"w": torch.zeros(2)})
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(2)) and os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.contract(66, 88)
def test_a_full_disk_is_one_line(tmp_path, capsys, full_disk):
    path = tmp_path / "xor-fused.pt"
    save_checkpoint(path, {"w": torch.ones(2)})
    full_disk()
    assert main(["train", "xor", "--device", "cpu", "--epochs", "1", "--out", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("fusedact: ") and errors.count("\n") == 1 and f"'{path}'" in errors
    assert torch.equal(load_checkpoint(path)["w"], torch.ones(2)) and os.listdir(tmp_path) == [path.name]


def test_a_link_stays_one(tmp_path):
    disk, path = tmp_path / "disk", tmp_path / "a.pt"
    disk.mkdir()
    path.symlink_to(disk / "b.pt")
    for number in (1.0, 2.0):
        save_checkpoint(path, {"w": torch.full((2,), number)})
        assert path.is_symlink() and os.listdir(disk) == ["b.pt"]
        assert load_checkpoint(disk / "b.pt")["w"].tolist() == [number] * 2


def test_what_killed_writers_left_is_removed(tmp_path):
    """Once it is old, and nothing else is: another writer may be at work."""
    names = [".a.pt.0123abcd", ".a.pt.0123abc", ".a.pt.0123abcx", ".aXpt.0123abcd", ".b.pt.0123abcd", "a.pt.0123abcd"]
    for name in [*names, ".a.pt.fedcba98"]:
        (tmp_path / name).touch()
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    data.write_whole(tmp_path / "a.pt", b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], ".a.pt.fedcba98", "a.pt"])
