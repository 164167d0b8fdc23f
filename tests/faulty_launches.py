"""Launches compiled for a GPU that is not there, through a cache, a driver or a compiler at fault: what came of each.

Run as its own process, since the interpreter that the tests use replaces triton.jit; with --compile FOLDER it compiles
one kernel into that cache, as one of several processes that do so at once.
"""

import json
import os
import resource
import runpy
import shutil
import sys
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.build import compile_module_from_src

import fusedact
from fusedact import autograd, backend
from fusedact.autograd.given_up import GIVEN_UP
from fusedact.kernels import elementwise, faults
from fusedact.kernels import launch as warm

DRY_LAUNCH = runpy.run_path(str(Path(__file__).with_name("dry_launch.py")))
LAUNCHED = DRY_LAUNCH["LAUNCHED"]
KERNEL = elementwise._forward_kernel
X = torch.linspace(-2, 2, 64)


class Hopper(DRY_LAUNCH["Hopper"]):
    """A driver that loads a binary only where it is whole."""

    def __init__(self) -> None:
        properties = DRY_LAUNCH["Hopper"].utils.get_device_properties
        self.utils = SimpleNamespace(get_device_properties=properties, load_binary=self.load)

    def load(self, name, binary, shared, device):
        if len(binary) < 1000:
            raise RuntimeError("Triton Error [CUDA]: device kernel image is invalid")
        return object(), 0, 0, 0, 1024


class OldHopper(Hopper):
    def load(self, name, binary, shared, device):
        raise RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain.")


class WithoutCompiler(Hopper):
    """Its launcher is a module in C, as Triton 3.6 makes one for each signature."""

    def launcher_cls(self, src, metadata):
        return compile_module_from_src("int f;", "launcher")


def begin(cache: Path, driver: Hopper | None = None) -> None:
    """As in a new process with that cache."""
    triton.runtime.driver.set_active(driver or Hopper())
    knobs.cache.dir = str(cache)
    KERNEL.device_caches.clear()
    warm._kept.cache_clear()
    for known in (faults._WARNED, faults._FOLDER, backend._warned, GIVEN_UP, LAUNCHED):
        known.clear()
    backend._broken = None


def relu(name: str = "relu") -> bool:
    """Whether that is torch's; the launch of a kernel writes nothing."""
    return torch.equal(autograd.activation(X, None, name, ()), X.relu())


def outcome(*calls) -> dict:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        by_torch = [call() for call in calls]
    told = [str(warning.message) for warning in told]
    return {"by torch": by_torch, "launched": len(LAUNCHED), "told": told, "cache": knobs.cache.dir}


def found(cache: Path, pattern: str) -> Path:
    (path,) = cache.rglob(pattern)
    return path


def a_damaged(pattern: str, damage):
    """A cache of one kernel, one of whose files was damaged; then it is used twice, by two processes."""

    def case(folder: Path) -> list[dict]:
        begin(folder)
        relu()
        damage(found(folder, pattern))
        outcomes = []
        for _ in range(2):
            begin(folder)
            outcomes.append(outcome(relu))
        return outcomes

    return case


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


def a_file(folder: Path) -> list[dict]:
    path = folder / "file"
    path.write_text("")
    begin(path)
    return [outcome(relu, relu)]


@contextmanager
def unwritable(place: Path):
    """No folder can be made there, nor by root, whom no mode keeps out."""
    made = os.makedirs

    def makedirs(path, *args, **options):
        if Path(path).is_relative_to(place):
            raise PermissionError(13, "Permission denied", str(path))
        made(path, *args, **options)

    with mock.patch("os.makedirs", makedirs):
        yield


def a_read_only_cache(folder: Path) -> list[dict]:
    begin(folder)
    with unwritable(folder):
        return [outcome(relu, relu)]


def no_home(folder: Path) -> list[dict]:
    """Where Triton keeps its cache unless it is told a place."""
    begin(folder)
    del knobs.cache.dir
    with mock.patch.dict("os.environ"), unwritable(folder / "home"):
        del os.environ["TRITON_CACHE_DIR"]
        with mock.patch.object(knobs.cache, "home_dir", str(folder / "home")):
            return [outcome(relu, relu)]


def a_full_disk(folder: Path) -> list[dict]:
    """So full that not even a temporary folder takes a kernel."""
    begin(folder)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        return [outcome(relu, relu)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def an_old_driver(folder: Path) -> list[dict]:
    begin(folder, OldHopper())
    return [outcome(relu, relu)]


def no_compiler(folder: Path) -> list[dict]:
    begin(folder, WithoutCompiler())
    with mock.patch.dict("os.environ", {"PATH": ""}):
        return [outcome(relu, lambda: backend._broken is not None)]


@triton.jit
def _uncompilable(x):
    return tl.nothing_of_this_name(x)


@triton.jit
def _uncompilable_grad(dy, x):
    return dy


def an_activation(folder: Path) -> list[dict]:
    """One that does not compile; the others go on."""
    begin(folder)
    if "uncompilable" not in fusedact.activations.ACTIVATIONS:
        fusedact.register_activation(
            "uncompilable",
            device=(_uncompilable, _uncompilable_grad),
            reference=torch.relu,
            derivative=lambda dy, x: dy * (x > 0),
        )
    return [outcome(lambda: relu("uncompilable"), lambda: relu("uncompilable"), relu)]


CASES = {
    "json": a_damaged("_forward_kernel.json", truncated),
    "json of a group": a_damaged("__grp__*", truncated),
    "missing binary": a_damaged("*.cubin", Path.unlink),
    "truncated binary": a_damaged("*.cubin", truncated),
    "truncated text": a_damaged("*.ptx", lambda path: path.write_bytes(b"\xff\xfe\xff")),
    "a file in its place": a_file,
    "read-only": a_read_only_cache,
    "no home": no_home,
    "a full disk": a_full_disk,
    "an old driver": an_old_driver,
    "no compiler": no_compiler,
    "an activation": an_activation,
}


def asked_for_by_name(folder: Path) -> list[str]:
    """The error and its cause, each time anew."""
    begin(folder, OldHopper())
    told = []
    with fusedact.use_backend("triton"):
        for _ in range(2):
            try:
                relu()
            except RuntimeError as error:
                told.append(f"{type(error).__name__}: {error} from {type(error.__cause__).__name__}")
    return told


def main() -> None:
    if "--compile" in sys.argv:
        begin(Path(sys.argv[-1]))
        assert outcome(relu)["told"] == [] and len(LAUNCHED) == 1
        return
    outcomes = {}
    for name, case in (*CASES.items(), ("by name", asked_for_by_name)):
        folder = Path(tempfile.mkdtemp())
        outcomes[name] = case(folder)
        shutil.rmtree(folder)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    backend._triton_problem = lambda device: None
    asks, on_gpu = backend.uses_triton, SimpleNamespace(is_cuda=True, is_meta=False, device=torch.device("cuda"))
    backend.uses_triton = lambda x: asks(on_gpu)
    with torch.no_grad():
        main()
