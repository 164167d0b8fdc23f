"""Kernels compiled through a cache, a driver or a compiler at fault: tests/faulty_launches.py, a process of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    return json.loads(in_a_process(tmp_path_factory.mktemp("triton")))


SCRIPT = Path(__file__).with_name("faulty_launches.py")
MOST = 300  # seconds that a process may take


def without_interpreter(cache):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return environment | {"TRITON_CACHE_DIR": str(cache)}


def in_a_process(cache):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        env=without_interpreter(cache),
        check=False,
        timeout=MOST,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


DAMAGED = {
    "json": "JSONDecodeError",
    "missing binary": "KeyError: \"Unknown key: 'cubin'\"",
    "truncated binary": "RuntimeError: Triton Error .CUDA.: device kernel image is invalid",
    "truncated text": "UnicodeDecodeError",
}
HOPELESS = {
    "a full disk": "OSError: .Errno 27. File too large",
    "an old driver": "Triton Error .CUDA.: the provided PTX was compiled with an unsupported toolchain",
    "no compiler": "Failed to find C compiler",
}


@pytest.mark.contract(75, 81)
@pytest.mark.parametrize(("name", "cause"), DAMAGED.items(), ids=DAMAGED)
def test_what_is_damaged_in_tritons_cache_is_compiled_anew_in_its_place(name, cause, faulty):
    first, second = faulty[name]
    assert first["launched"] == second["launched"] == 1 and second["told"] == []
    assert first["cache"] == second["cache"]
    if name == "missing binary" and triton.__version__.startswith("3.9."):
        assert first["told"] == []  # Triton sees for itself that it is missing
        return
    assert re.fullmatch(f"a damaged kernel in Triton's cache .* was compiled anew .{cause}.*", first["told"][0])
    assert len(first["told"]) == 1


@pytest.mark.contract(75)
def test_a_damaged_group_of_files_is_compiled_anew(faulty):
    """By Triton 3.7 itself; in 3.6 the folder counts as one that cannot be used."""
    assert [outcome["launched"] for outcome in faulty["json of a group"]] == [1, 1]


UNUSABLE = {
    "a file in its place": ("file", "NotADirectoryError: .Errno 20."),
    "read-only": (r"\w+", "PermissionError: .Errno 13."),
    "no home": (r"home/\.triton/cache", "PermissionError: .Errno 13."),
}


@pytest.mark.contract(74, 81)
@pytest.mark.parametrize(("name", "place", "cause"), [(name, *told) for name, told in UNUSABLE.items()], ids=UNUSABLE)
def test_a_cache_that_cannot_be_used_is_left_for_a_temporary_folder(name, place, cause, faulty):
    (found,) = faulty[name]
    (told,) = found["told"]
    assert re.match(f"Triton's cache .*/{place} cannot be used: .* temporary folder .{cause}", told)
    assert found["launched"] == 2 and not any(found["by torch"]) and not Path(found["cache"]).exists()


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        pytest.param(name, cause, marks=pytest.mark.contract(*rows), id=name)
        for (name, cause), rows in zip(HOPELESS.items(), ((80, 81), (80,), (73, 80)), strict=True)
    ],
)
def test_where_nothing_helps_torch_answers_with_one_warning(name, cause, faulty):
    (found,) = faulty[name]
    (told,) = found["told"]
    assert re.match(f"fusedact runs stock PyTorch operations: kernel .* cannot be compiled or loaded: .*{cause}", told)
    assert found["by torch"] == [True, True] and found["launched"] == 0


@pytest.mark.contract(80)
def test_an_activation_that_does_not_compile_leaves_the_others_alone(faulty):
    (found,) = faulty["an activation"]
    assert found["by torch"] == [True, True, False] and found["launched"] == 1
    assert len(found["told"]) == 1 and "nothing_of_this_name" in found["told"][0]


@pytest.mark.contract(80)
def test_by_name_an_old_driver_is_an_error_each_time(faulty):
    assert len(set(faulty["by name"])) == 1 and len(faulty["by name"]) == 2
    assert re.fullmatch("LaunchError: kernel .* unsupported toolchain. from RuntimeError", faulty["by name"][0])


@pytest.mark.contract(76, 82)
@pytest.mark.exhaustive
def test_four_processes_fill_one_cold_cache(tmp_path):
    """As many files as one process leaves, and nothing half done."""

    def fill(cache, processes):
        command = [sys.executable, str(SCRIPT), "--compile", str(cache)]
        started = [subprocess.Popen(command, env=without_interpreter(cache)) for _ in range(processes)]
        assert [process.wait(MOST) for process in started] == [0] * processes
        return sorted(path.name for path in cache.rglob("*") if path.is_file())

    assert fill(tmp_path / "four", 4) == fill(tmp_path / "one", 1)
    assert not [*tmp_path.rglob("tmp.pid*")]
