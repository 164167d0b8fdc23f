"""The package installs from a wheel and in place, and works where Triton is absent. Nothing is fetched."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = os.environ.get("PYTHONPATH", "").split(os.pathsep)
OUTER = [path for path in sys.path if path and (path.endswith("-packages") or path in NAMED)]
IGNORED = (".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "results", "docs")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """The command's output; its environment has no say in what is imported or which backend runs."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FUSEDACT", "TRITON"))
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, since a build leaves files in it."""
    missing = [name for name in ("pip", "setuptools") if find_spec(name) is None]
    if missing or int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip(f"a build needs pip and setuptools 77; missing or older: {missing or 'setuptools'}")
    copy = tmp_path_factory.mktemp("source") / "tree"
    return shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("fusedact-*.whl")
    return built


@pytest.fixture
def installed(tmp_path):
    """install(*what): the Python of a fresh environment that has it, and sees this one's torch, Triton and numpy."""
    folder = tmp_path / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    ours = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    # A path in a .pth is searched last, and the .pth files there are not read: not the editable fusedact among them.
    Path(ours, "outer.pth").write_text("\n".join(path for path in OUTER if Path(path) != ROOT))

    def install(*what: str | Path) -> Path:
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
        run(*pip, "--no-index", "--ignore-installed", "--quiet", *what, cwd=tmp_path)
        return python

    return install


LINEAR = """
import sys, torch, fusedact
from fusedact import nn
import fusedact.kernels.linear

torch.manual_seed(0)
layer = nn.Linear(5, 3, activation="relu")
x = torch.randn(4, 5)
with fusedact.use_backend("triton"):
    y = layer(x)
    y.sum().backward()
assert torch.allclose(y, torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias)), atol=1e-5)
assert layer.weight.grad.abs().sum() > 0
assert not any(name == "kernels" or name.startswith("kernels.") for name in sys.modules)
print(fusedact.__file__, fusedact.kernels.linear.__file__, sep="\\n")
"""


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        links = [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []
    for folder in ("fusedact", "kernels"):
        inside = "fusedact/kernels" if folder == "kernels" else folder
        sources = [p.relative_to(ROOT / folder) for p in (ROOT / folder).rglob("*.py*") if p.suffix in (".py", ".pyi")]
        assert {f"{inside}/{path.as_posix()}" for path in sources} <= names
    assert {"fusedact/py.typed", "fusedact/mnist.npz"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fusedact"}
    assert [name for name in names if "__pycache__" in name or "/test" in name] == []


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert required == [f"Requires-Dist: {dependency}" for dependency in project["dependencies"]]
    assert 'Requires-Dist: triton>=3.6; platform_system == "Linux" and extra == "gpu"' in metadata


def test_wheel_runs_from_another_folder(wheel, installed, tmp_path):
    pytest.importorskip("triton")
    python = installed(wheel)
    places = run(python, "-c", LINEAR, cwd=tmp_path, TRITON_INTERPRET="1").split()
    assert all(Path(place).is_relative_to(tmp_path / "venv") for place in places), places


def test_editable_install_finds_the_kernels(source, installed, tmp_path):
    pytest.importorskip("triton")
    python = installed("--editable", source)
    package, kernel = run(python, "-c", LINEAR, cwd=tmp_path, TRITON_INTERPRET="1").split()
    assert Path(package).is_relative_to(source) and Path(kernel).resolve() == source / "kernels" / "linear.py"


def test_a_clone_runs_without_being_installed(source):
    pytest.importorskip("triton")
    script = f"import sys; sys.path.insert(0, {str(source)!r})\n{LINEAR}"
    package, _ = run(sys.executable, "-c", script, cwd=source.parent, TRITON_INTERPRET="1").split()
    assert Path(package).is_relative_to(source)


HERE = os.pathsep.join([str(ROOT), *OUTER])
NO_TRITON = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.contract(71, 80)
def test_without_triton_the_fallback_trains(tmp_path):
    script = """
import fusedact, torch
from fusedact import nn
from torch.utils._triton import has_triton_package

assert not has_triton_package()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3, activation="gelu"))
x, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])
loss = nn.CrossEntropyLoss()(model(x), target)
loss.backward()
assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
stock = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3), torch.nn.GELU())
stock.load_state_dict(dict(zip(stock.state_dict(), model.state_dict().values())))
assert torch.equal(loss, torch.nn.functional.cross_entropy(stock(x), target))

for op in (lambda: model(x), lambda: nn.CrossEntropyLoss()(x, target)):
    try:
        with fusedact.use_backend("triton"):
            op()
    except RuntimeError as error:
        assert "'triton'" in str(error) and "No module named 'triton'" in str(error), error
    else:
        raise AssertionError("asked for and impossible, and no error")
with fusedact.use_backend("torch"):
    model(x)
assert "triton" not in sys.modules and "fusedact.kernels" not in sys.modules
"""
    run(sys.executable, "-c", NO_TRITON + script, cwd=tmp_path, PYTHONPATH=HERE)


@pytest.mark.contract(71)
@pytest.mark.exhaustive
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_without_triton_torch_compiles_on_a_cpu(tmp_path):
    script = """
import torch
from torch.utils._triton import has_triton_package
from fusedact import nn

assert not has_triton_package()
torch.manual_seed(0)
layer, x = nn.Linear(4, 3, activation="gelu"), torch.randn(6, 4, requires_grad=True)
run = lambda x: torch.tanh(layer(x)).sum()
expected, found = run(x), torch.compile(run, fullgraph=True)(x)
torch.testing.assert_close(found, expected)
torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (found, expected)))
assert "triton" not in sys.modules
"""
    run(sys.executable, "-c", NO_TRITON + script, cwd=tmp_path, PYTHONPATH=HERE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(find_spec("fusedact.cli") is None, reason="no fusedact/cli.py")
def test_without_triton_the_command_line_tells(tmp_path):
    for name in ("typer", "rich", "matplotlib"):
        pytest.importorskip(name)
    script = "from fusedact.__main__ import main; sys.exit(main(['info']))"
    told = run(sys.executable, "-c", NO_TRITON + script, cwd=tmp_path, PYTHONPATH=HERE)
    assert "fusedact" in told
