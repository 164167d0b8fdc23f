"""The machine code that `python -m bench.codegen` reads, in its own process since tests replace the compiler.

The cases are those of the committed report; after a change of either, write it anew:
`python -m bench.codegen --json bench/results/codegen.json`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import assembly, codegen, codegen_cases, codegen_launchers

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "bench/results/codegen.json").read_text())
COMMITTED = {(report["case"], report["chip"]): report for report in RECORD["reports"]}
CASES = list(COMMITTED)
FIRST = {report["launcher"]: case for (case, _), report in reversed(COMMITTED.items())}.values()  # of each launcher
MACHINE_CODE = [pytest.param(case, chip, marks=[] if case in FIRST else pytest.mark.exhaustive) for case, chip in CASES]

# The tensor cores' instruction. On NVIDIA IEEE float32 has none; for float64 on sm_100 Triton takes none.
MATRIX = {
    "sm_80": {"bf16": "HMMA", "fp16": "HMMA", "tf32": "HMMA", "tf32x3": "HMMA", "fp64": "DMMA"},
    "sm_90": {"bf16": "HGMMA", "fp16": "HGMMA", "tf32": "HGMMA", "tf32x3": "HGMMA", "fp64": "DMMA"},
    "sm_100": {"bf16": "UTCHMMA", "fp16": "UTCHMMA", "tf32": "UTCHMMA", "tf32x3": "UTCHMMA"},
    "gfx942": dict.fromkeys(("bf16", "fp16", "tf32", "fp32", "fp64"), "v_mfma"),
}
SHORTEST_ASYNCHRONOUS = 64  # rows of a tile; a shorter one takes the warp's own instruction
ITEMSIZE = {"bf16": 2, "fp16": 2, "tf32": 4, "tf32x3": 4, "fp32": 4, "fp64": 8}
KEPT = {"training_layers_train": 8}  # bytes of stack: two stores a launch or, in the head, a step
KEPT_ON_SM_100 = {  # stores and loads a row
    "cross_entropy_forward": 16,
    "cross_entropy_forward_with_gradient": 24,
    "cross_entropy_overwrite_with_gradient": 8,
}
BARRIERS = {  # of programs that wait for each other: before the first step, and one after each phase
    "training_layers_train": lambda shape: 2 * (len(shape) - 2),
    "training_single_train": lambda shape: 1,
}
GATHERS = ("nll_forward",)  # given a table of which it reads one number a row
ADDED_APART = ("linear_bce_forward", "linear_bce_backward")  # whose partial sums may take a second launch
NARROW_LOADS = 8  # of a bias, a slope, targets and partial sums; all of it in each phase of a trainer
# By how much the committed report may be passed before someone must write it anew and so see what was lost. One
# version of Triton compiles one source alike; a changed line moves registers by the few that are allotted together,
# and the rest by its own length.
REGISTERS_MORE = 8
SHARE_MORE = {"shared_memory": 0.05, "instructions": 0.05, "step_instructions": 0.05}

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
    if report["launcher"] in GATHERS or report["copies"]:
        return False
    aligned = all(n * ITEMSIZE[report["precision"]] % 16 == 0 for n in report["shape"][1:] or report["shape"])
    return aligned and not (k_outermost and report["chip"] in ("sm_90", "sm_100"))


def violations(report: dict) -> Iterator[str]:
    if report["error"]:
        yield report["error"]
        return
    kept = KEPT | (KEPT_ON_SM_100 if report["chip"] == "sm_100" else {})
    if report["spills"] > kept.get(report["launcher"], 0):
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
    if report["launches"] != 1 and report["launcher"] not in ADDED_APART:
        yield f"{report['launches']} launches"
    unequal = report["launcher"] in (*GATHERS, *BARRIERS)  # the latter exchange what no formula has
    if not unequal and report["bytes_given"] > 1.05 * report["bytes"] + 2**16:
        yield f"given {report['bytes_given']} bytes where the formula says {report['bytes']}"


def losses(report: dict, committed: dict) -> Iterator[str]:
    """What the report's kernel takes more of than the committed one's; a committed 0 is no line to hold."""
    if report["registers"] > committed["registers"] + REGISTERS_MORE:
        yield f"registers {report['registers']}, committed {committed['registers']}"
    for name, share in SHARE_MORE.items():
        if committed.get(name) and report[name] > committed[name] * (1 + share):
            yield f"{name} {report[name]}, committed {committed[name]}"


def test_the_committed_report_has_these_cases():
    assert [(str(case), chip) for case in codegen_cases.CASES for chip in MATRIX if chip in case.chips] == CASES


@pytest.mark.parametrize(("case", "chip"), MACHINE_CODE)
def test_machine_code(reports, case, chip):
    report = reports[case, chip]
    assert not list(violations(report))
    if RECORD["triton"] == triton.__version__:
        assert not list(losses(report, COMMITTED[case, chip]))


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
    found = assembly.events(assembly.PTX_EVENTS, "\n".join(lines))
    assert len(codegen.ARRIVAL.findall(found)) == arrivals
    assert len(codegen.LOOK.findall(codegen.ARRIVAL.sub("", found))) == looks


LINE = {"registers": 128, "shared_memory": 98304, "instructions": 1400, "step_instructions": 120}


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("registers", 136, 137),
        ("shared_memory", 98304 + 4915, 98304 + 4916),
        ("instructions", 1470, 1471),
        ("step_instructions", 126, 127),
    ],
)
def test_a_worse_report_is_refused(name, allowed, refused):
    assert not list(losses(LINE | {name: allowed}, LINE))
    (loss,) = losses(LINE | {name: refused}, LINE)
    assert loss.startswith(f"{name} {refused}")


def test_a_better_report_and_a_line_that_is_not_there_are_not_refused():
    assert not list(losses(dict.fromkeys(LINE, 0), LINE))
    assert not list(losses(LINE, LINE | {"step_instructions": 0}))
    assert not list(losses(LINE, {name: value for name, value in LINE.items() if name != "step_instructions"}))


# A wait of the loop stands behind the kernel's end and jumps back to the middle: from .L_x_4 to that jump the text
# holds the second product, and is no loop.
WAITING = """
_forward_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P6 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR32+0x2c040], R4 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0040*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24 ;
.L_x_2:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR32+0x2c000], R4 ;
        /*0060*/              @!P0 BRA P1, `(.L_x_2) ;
        /*0070*/                   BRA.U !UP0, `(.L_x_1) ;
.L_x_0:
        /*0080*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
        /*0090*/               @P1 STG.E.128 desc[UR14][R16.64], R28 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR32+0x2c040], R4 ;
        /*00c0*/              @!P0 BRA `(.L_x_3) ;
        /*00d0*/                   BRA `(.L_x_4) ;
.L_x_5:
        /*00e0*/                   BRA `(.L_x_5);
        /*00f0*/                   NOP;
"""
# As a loop over tiles around one over k, and another without products.
NESTED = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDSM.16.M88.4 R8, [R3] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/                   FMUL R4, R4, R5 ;
        /*0070*/                   STG.E desc[UR4][R6.64], R4 ;
        /*0080*/              @!P1 BRA `(.L_x_2) ;
        /*0090*/               @P2 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
"""
STRAIGHT = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   BRA `(.L_x_0);
        /*0050*/                   NOP;
"""
# The block behind s_endpgm jumps back over products of the last steps, which no jump repeats.
AMD = """
_forward_kernel:
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_branch .LBB0_0
\t.p2align\t8
.LBB0_0:
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\tds_read_b64 v[2:3], v4
\ts_nop 1
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[6:7], a[0:15]
\ts_cbranch_scc1 .LBB0_2
.LBB0_3:
\ts_cbranch_scc0 .LBB0_9
.LBB0_6:
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[6:7], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[4:5], v[6:7], a[0:15]
\tbuffer_store_dwordx4 v[0:3], v4, s[0:3], 0 offen
\ts_endpgm
.LBB0_9:                                ; %epilog
\tds_read_b64 v[2:3], v4
\ts_branch .LBB0_6
"""


@pytest.mark.parametrize(
    ("pattern", "text", "step"),
    [
        (assembly.SASS, WAITING, ["SYNCS", "BRA", "HGMMA", "SYNCS", "BRA", "BRA", "SYNCS", "BRA", "BRA"]),
        (assembly.SASS, NESTED, ["LDSM", "HMMA", "BRA"]),
        (assembly.SASS, NESTED.replace("HMMA", "FFMA"), ["FADD", "FMUL", "STG", "BRA"]),
        (assembly.SASS, STRAIGHT, []),
        (assembly.AMDGCN, AMD, ["ds_read_b64", "v_mfma_f32_32x32x8_bf16", "s_cbranch_scc1"]),
        (assembly.AMDGCN, AMD.replace("s_cbranch_scc1 .LBB0_2", "s_barrier"), []),
    ],
    ids=["waits", "nested", "no matrix instruction", "no loop", "AMD", "AMD, no loop"],
)
def test_the_loop_that_does_the_work(pattern, text, step):
    found = assembly.step(pattern.findall(text))
    assert [mnemonic.split(".")[0] for mnemonic in found] == step


TILE = SimpleNamespace(block_m=128, block_n=256, block_k=64)
STEP_FLOPS = 2 * 128 * 256 * 64
TILES_LOADED = ["LDG.E.128"] * ((128 + 256) * 64 * 2 // (16 * 8 * 32))  # by 8 warps, 16 bytes a thread
CYCLES = {"bf16": STEP_FLOPS / 4096, "tf32": STEP_FLOPS / 2048, "tf32x3": 3 * STEP_FLOPS / 2048}  # of an sm_90


def launched(programs, shared=0, num_warps=8) -> codegen.Launch:
    return codegen.Launch(SimpleNamespace(metadata=SimpleNamespace(num_warps=num_warps, shared=shared)), programs, 0)


def text(code, registers=0) -> assembly.Assembly:
    """A kernel that is nothing but its loop."""
    return assembly.Assembly(registers=registers, spills=0, mnemonics=code, step=code, events="")


def estimated(precision, config, code, programs, least_bytes, flops) -> float:
    """Seconds on an sm_90 of a kernel of 8 warps whose loop is that code."""
    case = codegen_cases.Case(codegen_launchers.linear_forward, precision, ())
    launch, read = launched(programs), text(code)
    return codegen.estimate(
        codegen.CHIPS["sm_90"], case, codegen_launchers.Work(config, least_bytes, flops), launch, read
    )


@pytest.mark.parametrize(
    ("precision", "config", "code", "programs", "steps", "cycles"),
    [
        ("bf16", TILE, ["HGMMA"] * 4, 132, 1320, 10 * CYCLES["bf16"]),
        ("bf16", TILE, ["HGMMA"] * 4, 133, 1330, 20 * CYCLES["bf16"]),
        ("tf32x3", TILE, ["HGMMA"] * 12, 132, 1320, 10 * CYCLES["tf32x3"]),
        ("bf16", TILE, ["FFMA"] * 2000, 132, 1320, 10 * 2000 * 8 / 4),
        ("bf16", TILE, TILES_LOADED * 2 + ["FFMA"] * 1976, 132, 1320, 10 * 2000 * 8 / 4 / 2),
        ("bf16", SimpleNamespace(), ["HGMMA"] * 4, 132, 1320, 0),
    ],
    ids=["products", "two waves", "three products", "instructions", "two steps a pass", "no tile"],
)
def test_the_estimate_of_a_product(precision, config, code, programs, steps, cycles):
    assert estimated(precision, config, code, programs, 0, steps * STEP_FLOPS) == pytest.approx(cycles / 1.46e9)


PASS = 16 * 2 * 8 * 32  # bytes that 8 warps load and store in a pass of MOVES
MOVES = ["LDG.E.128", "STG.E.128"]
TRANSFER = PASS / (4.3e12 / 132 / 1.46e9)  # cycles


@pytest.mark.parametrize(
    ("code", "programs", "cycles"),
    [
        ([*MOVES, "BAR.SYNC"], 132 * 8, TRANSFER),
        ([*MOVES, "BAR.SYNC"], 132 * 2, (1000 + 3 * 8 / 4 + TRANSFER) / 2),
        ([*MOVES, "FFMA"], 132 * 2, (1000 + 3 + TRANSFER / 8) / 2),
        (MOVES + ["FFMA"] * 998, 132 * 8, 1000 * 8 / 4),
        (MOVES + ["FFMA"] * 998, 131, 0),
        (["FFMA"] * 1000, 264, 0),
    ],
    ids=["bytes", "latency", "latency of warps that drift apart", "instructions", "few programs", "no loads"],
)
def test_the_estimate_without_a_product(code, programs, cycles):
    seconds = 1000 * cycles / 1.46e9  # a thousand passes on each multiprocessor
    assert estimated("bf16", SimpleNamespace(), code, programs, 132 * 1000 * PASS, 0) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "programs", "expected"),
    [
        (64, 0, 8, 10**6, 4),
        (65, 0, 8, 10**6, 3),
        (24, 60 * 1024, 8, 10**6, 3),
        (32, 0, 8, 10**6, 8),
        (16, 0, 1, 10**6, 32),
        (16, 0, 1, 133, 2),
        (255, 0, 32, 10**6, 1),
    ],
    ids=["registers", "registers by eights", "shared memory", "threads", "programs", "grid", "one at least"],
)
def test_resident_programs(registers, shared, num_warps, programs, expected):
    launch = launched(programs, shared, num_warps)
    assert codegen.resident(codegen.CHIPS["sm_90"], launch, text([], registers)) == expected


def test_instructions_are_told_for_each_element():
    report = codegen.Report("", "sm_90", "", "bf16", (), step_instructions=96, pass_bits=256)
    assert codegen.per_element(report) == "6.0"
    assert codegen.per_element(replace(report, flops=1)) == codegen.per_element(replace(report, pass_bits=0)) == ""


def test_refuses_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "bench.codegen"]
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode and "TRITON_INTERPRET" in finished.stderr
