"""The machine code that `python -m bench.codegen` reads, in its own process since tests replace the compiler.

The cases are those of the committed report; after a change of either, write it anew:
`python -m bench.codegen --json bench/results/codegen.json`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import codegen, codegen_cases

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
COMMITTED = json.loads((ROOT / "bench/results/codegen.json").read_text())["reports"]
CASES = [(report["case"], report["chip"]) for report in COMMITTED]
FIRST = {report["launcher"]: report["case"] for report in reversed(COMMITTED)}.values()  # of each launcher
MACHINE_CODE = [pytest.param(case, chip, marks=[] if case in FIRST else pytest.mark.exhaustive) for case, chip in CASES]

# The tensor cores' instruction. On NVIDIA IEEE float32 has none; for float64 on sm_100 Triton takes none.
MATRIX = {
    "sm_80": {"bf16": "HMMA", "fp16": "HMMA", "tf32": "HMMA", "fp64": "DMMA"},
    "sm_90": {"bf16": "HGMMA", "fp16": "HGMMA", "tf32": "HGMMA", "fp64": "DMMA"},
    "sm_100": {"bf16": "UTCHMMA", "fp16": "UTCHMMA", "tf32": "UTCHMMA"},
    "gfx942": dict.fromkeys(("bf16", "fp16", "tf32", "fp32", "fp64"), "v_mfma"),
}
SHORTEST_ASYNCHRONOUS = 64  # rows of a tile; a shorter one takes the warp's own instruction
ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4, "fp64": 8}
KEPT = {"training_layers_train": 8}  # bytes of stack on sm_100: two stores a launch or, in the head, a step
BARRIERS = {  # of programs that wait for each other: before the first step, and one after each phase
    "training_layers_train": lambda shape: 2 * (len(shape) - 2),
    "training_single_train": lambda shape: 1,
}
GATHERS = ("nll_forward",)  # given a table of which it reads one number a row
NARROW_LOADS = 8  # of a bias, a slope, targets and partial sums; all of it in each phase of a trainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory) -> dict[tuple[str, str], dict]:
    """Of the cases that are tested in this run."""
    try:
        _ = triton.knobs.nvidia.cuobjdump.path, triton.knobs.nvidia.nvdisasm.path
    except RuntimeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("codegen")
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    wanted = {item.callspec.params["case"] for item in request.session.items if item.name.startswith(CHECK.__name__)}
    kernels = [argument for case in sorted(wanted) for argument in ("--kernel", case)]
    command = [sys.executable, "-m", "bench.codegen", "--json", str(folder / "report.json"), *kernels]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (folder / "report.json").exists(), finished.stderr
    fresh = json.loads((folder / "report.json").read_text())["reports"]
    return {(report["case"], report["chip"]): report for report in fresh}


def instruction(report: dict) -> str | None:
    """The matrix instruction that the case should have been compiled to."""
    name = MATRIX[report["chip"]].get(report["precision"]) if report["flops"] else None
    small = report["config"].get("block_m", 0) < SHORTEST_ASYNCHRONOUS
    return "HMMA" if small and name in ("HGMMA", "UTCHMMA") else name


def wide(report: dict) -> bool:
    """Whether the layout allows 16-byte loads: rows of whole 16 bytes, and K innermost where tf32 asks for that."""
    k_outermost = report["launcher"] in ("linear_dx", "linear_dw") and report["precision"] == "tf32"
    if report["launcher"] in GATHERS:
        return False
    aligned = all(n * ITEMSIZE[report["precision"]] % 16 == 0 for n in report["shape"][1:] or report["shape"])
    return aligned and not (k_outermost and report["chip"] in ("sm_90", "sm_100"))


def violations(report: dict) -> Iterator[str]:
    if report["error"]:
        yield report["error"]
        return
    if report["spills"] > KEPT.get(report["launcher"], 0):
        yield f"spills {report['spills']}"
    if report["registers"] > report["registers_limit"]:
        yield f"{report['registers']} registers of {report['registers_limit']}"
    if report["shared_memory"] > report["shared_memory_limit"]:
        yield f"{report['shared_memory']} bytes of shared memory of {report['shared_memory_limit']}"
    expected = {instruction(report)} - {None}
    if report["launcher"] in BARRIERS and expected:  # products of several tiles
        expected |= {MATRIX[report["chip"]][report["precision"]]} & set(report["matrix"])
    if set(report["matrix"]) != expected:
        yield f"matrix instructions {report['matrix']}, expected {expected}"
    if wide(report) and not report["loads"].get("128"):
        yield f"no 16-byte load among {report['loads']}"
    element = 8 * ITEMSIZE[report["precision"]]
    narrow = report["loads"].get(str(element), 0)
    if wide(report) and element < 64 and narrow > NARROW_LOADS * (8 if report["launcher"] in BARRIERS else 1):
        yield f"loads of one element at a time: {report['loads']}"
    if report["float_atomics"]:
        yield f"{report['float_atomics']} floating-point atomics"
    if report["ordered"] is False:
        yield "partial sums are not ordered by barrier, ticket, barrier"
    barriers = BARRIERS.get(report["launcher"], lambda shape: 0)(report["shape"])
    if (len(report["barriers"]), report["looks"], report["stray"]) != (barriers, barriers, 0):
        yield f"grid barriers {report['barriers']}, {report['looks']} loops and {report['stray']} more, not {barriers}"
    if barriers and not sum(report["barriers"]):
        yield "no load after a grid barrier"
    if report["launches"] != 1:
        yield f"{report['launches']} launches"
    unequal = report["launcher"] in (*GATHERS, *BARRIERS)  # the latter exchange what no formula has
    if not unequal and report["bytes_given"] > 1.05 * report["bytes"] + 2**16:
        yield f"given {report['bytes_given']} bytes where the formula says {report['bytes']}"


def test_the_committed_report_has_these_cases():
    assert [(str(case), chip) for case in codegen_cases.CASES for chip in MATRIX] == CASES


@pytest.mark.parametrize(("case", "chip"), MACHINE_CODE)
def test_machine_code(reports, case, chip):
    assert not list(violations(reports[case, chip]))


CHECK = test_machine_code


@pytest.mark.parametrize("start", ["bias_activation_backward", "cross_entropy_forward", "bce_forward"])
def test_reductions_take_a_ticket(reports, start):
    """So that a check of their order is not passed by finding none."""
    reduced = [r for (case, _), r in reports.items() if case.startswith(start) and "=none" not in case]
    assert reduced and all(r["ordered"] for r in reduced if "db=False" not in r["case"])


ARRIVE, LOOK, LOAD, SYNC = (
    "atom.global.gpu.release.add.u64 %rd1, [%rd2], 1;", "ld.global.gpu.acquire.b64 %rd3, [%rd2];",
    "ld.global.b32 %r1, [%rd4];", "bar.sync 0;",
)  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "arrivals", "looks"),
    [
        ((SYNC, ARRIVE, LOOK, SYNC, LOOK, SYNC, LOAD), 1, 1),
        ((SYNC, ARRIVE, LOAD, LOOK, SYNC, LOOK, SYNC), 0, 1),
        ((SYNC, LOAD, ARRIVE, LOOK, SYNC, LOOK, SYNC), 0, 1),
        ((SYNC, ARRIVE, LOOK, SYNC, LOAD, LOOK, SYNC), 1, 0),
    ],
    ids=["whole", "load before the look", "load after the barrier of threads", "load in the loop"],
)
def test_a_load_inside_a_grid_barrier_is_seen(lines, arrivals, looks):
    found = codegen.events(codegen.PTX_EVENTS, "\n".join(lines))
    assert len(codegen.ARRIVAL.findall(found)) == arrivals
    assert len(codegen.LOOK.findall(codegen.ARRIVAL.sub("", found))) == looks


def test_refuses_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.codegen"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode and "TRITON_INTERPRET" in finished.stderr
