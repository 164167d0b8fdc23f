"""Every name of torch.nn and torch.nn.functional is reachable from ours, at run time and to a type checker."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fusedact
import fusedact.functional
import fusedact.nn
from fusedact.activations import TABLE

ROOT = Path(__file__).resolve().parents[1]
PAIRS = {"nn": (fusedact.nn, torch.nn), "functional": (fusedact.functional, torch.nn.functional)}
OURS = {
    "nn": {
        "BCELoss",
        "BCEWithLogitsLoss",
        "MultiLabelSoftMarginLoss",
        "CrossEntropyLoss",
        *(f"Conv{dims}d" for dims in (1, 2, 3)),
        *(f"ConvTranspose{dims}d" for dims in (1, 2, 3)),
        "Linear",
        "Sequential",
        "functional",
    },
    "functional": {
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "multilabel_soft_margin_loss",
        "cross_entropy",
        *(f"conv{dims}d" for dims in (1, 2, 3)),
        *(f"conv_transpose{dims}d" for dims in (1, 2, 3)),
        "linear",
    },
}
OURS["nn"] |= {"LogSoftmax", "Softmax", "Softmax2d", "Softmin"}
OURS["functional"] |= {"log_softmax", "softmax", "softmin"}
OURS["nn"] |= {a.module.__name__ for a in TABLE if a.module is not None}
OURS["functional"] |= {a.name for a in TABLE if hasattr(torch.nn.functional, a.name)}


def python(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )


def public(module: ModuleType) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_")]


def is_ours(value: object) -> bool:
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return str(home).startswith("fusedact.")


@pytest.mark.parametrize("pair", PAIRS)
def test_every_name_is_torchs_own_object_or_ours(pair):
    ours, stock = PAIRS[pair]
    other = {name for name in public(stock) if getattr(ours, name) is not getattr(stock, name)}
    assert all(is_ours(getattr(ours, name)) for name in other)
    assert other >= OURS[pair]


@pytest.mark.parametrize("pair", PAIRS)
def test_private_names_of_torchs_fall_through_too(pair):
    """Programs reach for `F._canonical_mask` and `nn.functional._Reduction`."""
    ours, stock = PAIRS[pair]
    private = [name for name in dir(stock) if name.startswith("_") and not name.startswith("__")]
    assert [name for name in private if not hasattr(ours, name)] == []


@pytest.mark.parametrize("pair", PAIRS)
def test_dir_lists_every_name_once(pair):
    ours, stock = PAIRS[pair]
    assert set(public(stock)) <= set(dir(ours))
    assert sorted(set(dir(ours))) == dir(ours)


@pytest.mark.parametrize("pair", PAIRS)
def test_unknown_name(pair):
    ours, _ = PAIRS[pair]
    with pytest.raises(AttributeError, match=rf"module '{ours.__name__}' has no attribute 'Lineal'"):
        _ = ours.Lineal


@pytest.mark.parametrize("pair", PAIRS)
def test_dunder_names_are_never_forwarded(pair, monkeypatch):
    """`__path__`, `__wrapped__` and their like are asked for by tools, which would take torch's for ours."""
    ours, stock = PAIRS[pair]
    monkeypatch.setattr(stock, "__wrapped__", object(), raising=False)
    assert not hasattr(ours, "__wrapped__")
    assert ours.__name__ == f"fusedact.{pair}" and ours.__file__ != stock.__file__


def test_one_functional_under_three_paths():
    import fusedact.nn.functional as F
    from fusedact.nn import Parameter, functional, init, utils

    assert F is fusedact.functional is functional is fusedact.nn.functional
    assert (Parameter, init, utils) == (torch.nn.Parameter, torch.nn.init, torch.nn.utils)


def test_star_import_gives_both():
    done = python(
        "-c",
        "from fusedact.nn import *; import fusedact.nn, torch\n"
        "assert Linear is fusedact.nn.Linear and functional is fusedact.functional\n"
        "assert MaxPool3d is torch.nn.MaxPool3d and init is torch.nn.init\n"
        "missing = [n for n in dir(torch.nn) if n[0] != '_' and n not in globals()]\n"
        "assert not missing, missing\n"
        "assert not any(n.startswith('__') and hasattr(torch.nn, n) for n in fusedact.nn.__all__)",
    )
    assert done.returncode == 0, done.stderr


def test_star_import_of_functional_gives_both():
    names = {}
    exec("from fusedact.functional import *", names)
    ours = {name for name, value in vars(fusedact.functional).items() if is_ours(value) and callable(value)}
    assert OURS["functional"] | {"gated", "linear_chain"} <= ours
    given = names.keys() - {"__builtins__"}
    assert given == {name for name in {*ours, *dir(torch.nn.functional)} if not name.startswith("_")}


def same_torch_as_the_stubs() -> None:
    written = (ROOT / "fusedact/nn/__init__.pyi").read_text().partition("\n")[0]
    if f" {torch.__version__.partition('+')[0]}:" not in written:
        pytest.skip(f"torch is {torch.__version__}; {written[2:]}")


def test_stubs_are_up_to_date():
    same_torch_as_the_stubs()
    done = python("tools/make_nn_stubs.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


SNIPPET = """
import torch

import fusedact.nn.functional as F
from fusedact import nn
from fusedact.nn import Parameter, init

x = torch.ones(2, 3, 8, 8)
reveal_type(nn.Conv2d(3, 4, 1))
reveal_type(nn.MaxPool3d(3))
reveal_type(nn.ConvTranspose3d(3, 4, (1, 2, 2), output_padding=1, activation="relu"))
reveal_type(nn.functional.relu(x))
reveal_type(F.cross_entropy(x, x))
reveal_type(nn.Linear(3, 4, activation="relu"))
reveal_type(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
reveal_type(nn.CrossEntropyLoss())
reveal_type(init.zeros_(Parameter(x)))
reveal_type(nn.utils.clip_grad_norm_([x], 1.0))
nn.Linear(3, 4, activation=5)
nn.Conv1d(3, 4, 1, activation=5)
nn.Lineal(3, 4)
"""
REVEALED = [
    "fusedact.nn.convolution.Conv2d",
    "torch.nn.modules.pooling.MaxPool3d",
    "fusedact.nn.convolution.ConvTranspose3d",
    "torch._tensor.Tensor",
    "torch._tensor.Tensor",
    "fusedact.nn.linear.Linear",
    "fusedact.nn.container.Sequential",
    "fusedact.nn.loss.CrossEntropyLoss",
    "torch._tensor.Tensor",
    "torch._tensor.Tensor",
]


@pytest.mark.slow
def test_mypy_sees_types(tmp_path):
    pytest.importorskip("mypy")
    same_torch_as_the_stubs()
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    done = python("-m", "mypy", "--config-file", "pyproject.toml", str(snippet))
    lines = done.stdout.splitlines()
    assert [line.split('"')[1] for line in lines if "Revealed type" in line] == REVEALED, done.stdout + done.stderr
    errors = [line.partition(" error: ")[2] for line in lines if "snippet.py" in line and " error: " in line]
    assert len(errors) == 3, done.stdout
    assert 'Argument "activation" to "Linear"' in errors[0]
    assert 'Argument "activation" to "Conv1d"' in errors[1]
    assert 'has no attribute "Lineal"' in errors[2]


@pytest.mark.parametrize(
    "statement",
    [
        "import fusedact.nn.init as module; assert module is torch.nn.init",
        "from fusedact.nn.utils import clip_grad_norm_",
        "from fusedact.nn.utils.rnn import PackedSequence; assert PackedSequence is torch.nn.utils.rnn.PackedSequence",
        "from fusedact.nn.parameter import Parameter; assert Parameter is torch.nn.Parameter",
        "from fusedact.nn.modules.loss import MSELoss; assert MSELoss is torch.nn.MSELoss",
    ],
)
def test_torchs_submodules_under_our_name(statement):
    exec(statement, {"torch": torch})
