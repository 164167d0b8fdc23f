"""What can take a product, and the rule that chooses: tiles have room, estimates are those of the formula."""

import itertools

import pytest
import torch
import triton

from fusedact.tuning.candidates import (
    BY_DESCRIPTORS,
    BY_POINTERS,
    HEAD,
    LIBRARY,
    RATES,
    RULE,
    SPECIALIZED,
    TF32X3,
    Chip,
    Problem,
    by_rule,
    candidates,
    estimates,
)
from fusedact.tuning.records import REFERENCE_CHIPS

INTERPRETED = Chip("sm_90", 227 * 1024, warp_size=32, multiprocessors=132, interpreted=True, library=False)
CHIPS = REFERENCE_CHIPS | {"interpreted": INTERPRETED}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [(1, 1, 1), (64, 64, 64), (8, 4096, 16), (4096, 20, 4096), (1024, 1024, 1024), (4096, 4096, 4096)]
TASKS = ["forward", "backward", "dx", "dw", "loss"]
HALF = torch.bfloat16


def problem(task="forward", shape=(4096, 4096, 4096), dtype=HALF, precision="ieee", aligned=True, chip="sm_90"):
    return Problem(task, *shape, dtype, precision, aligned, CHIPS[chip])


def tiles(asked):
    return [tile for tile in candidates(asked).values() if tile is not None]


EVERY = [
    problem(task, shape, dtype, precision, aligned, chip)
    for task, shape, dtype, aligned, chip in itertools.product(TASKS, SHAPES, DTYPES, (True, False), CHIPS)
    for precision in (("ieee", "forced ieee", "tf32") if dtype == torch.float32 else ("ieee",))
]


def is_power_of_2(number):
    return number > 0 and number & (number - 1) == 0


def test_each_tile_has_room_and_as_many_stages_as_there_are():
    for asked in EVERY:
        size, room = asked.dtype.itemsize, asked.chip.shared_memory
        assert tiles(asked)
        for tile in tiles(asked):
            smallest = tile.block_m * tile.block_n <= 32 * 32
            held = 2 if tile.precision == "tf32x3" else 0
            scratch = tile.block_m * tile.block_n * size if tile.specialized else 0
            stage = (tile.block_m + tile.block_n) * tile.block_k * size
            assert all(map(is_power_of_2, (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)))
            assert min(tile.block_m, tile.block_n, tile.block_k) >= 16 and 4 <= tile.num_warps <= 8
            assert 1 <= tile.num_stages <= 4 and (smallest or tile.num_stages >= 2)
            assert (tile.num_stages + held) * stage + scratch <= room
            assert tile.num_stages == 4 or (tile.num_stages + 1 + held) * stage + scratch > room
            assert smallest or (tile.block_m < 2 * max(32, asked.M) and tile.block_n < 2 * max(32, asked.N))
            assert tile.programs or tile.block_k < 2 * max(16, asked.K)
            assert tile.programs in (0, asked.chip.multiprocessors) and bool(tile.programs) <= asked.described


def test_the_way_of_each_tile_is_one_that_the_product_asks_for():
    for asked in EVERY:
        ways = {tile.precision for tile in tiles(asked)}
        splits = asked.dtype == torch.float32 and asked.precision == "ieee"
        splits = splits and asked.chip.kind != "gfx942" and not asked.chip.interpreted
        large = min(asked.M, asked.N, asked.K) >= 64
        assert ways - {"tf32x3"} == {"tf32" if asked.precision == "tf32" else "ieee"}
        assert ("tf32x3" in ways) == (splits and large) or not large
        assert splits or "tf32x3" not in ways
        assert (LIBRARY in candidates(asked)) == asked.chip.library
        for tile in tiles(asked):
            assert not asked.chip.interpreted or tile.block_m >= 32
            if asked.task == "loss" and tile.precision == "tf32x3":
                assert tile.block_k >= 32
            if tile.specialized:
                assert (asked.chip.kind, asked.dtype.itemsize) == ("sm_90", 2) and asked.task != "backward"
                assert tile.programs and (tile.block_m == 64 or triton.__version__.startswith("3.6."))
            if tile.programs and asked.task == "backward":
                assert tile.block_n <= 128
            if tile.programs and tile.precision == "tf32x3":
                assert tile.block_m * tile.block_n <= 128 * 64


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"pointers", "descriptors", "specialized"}),
        ({"aligned": False}, {"pointers"}),
        ({"chip": "sm_80"}, {"pointers"}),
        ({"chip": "sm_100"}, {"pointers", "descriptors"}),
        ({"chip": "gfx942"}, {"pointers"}),
        ({"chip": "interpreted"}, {"pointers"}),
        ({"task": "backward"}, {"pointers", "descriptors"}),
        ({"shape": (1024, 1024, 1024)}, {"pointers", "descriptors", "specialized"}),
        ({"shape": (1023, 1024, 1024)}, {"pointers"}),
        ({"dtype": torch.float32}, {"pointers", "descriptors"}),
        ({"dtype": torch.float32, "precision": "tf32"}, {"pointers", "descriptors"}),
        ({"dtype": torch.float32, "precision": "forced ieee"}, {"pointers"}),
        ({"dtype": torch.float64}, {"pointers"}),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_how_tiles_are_read(changed, expected):
    assert {name.split()[0] for name in candidates(problem(**changed)) if name != LIBRARY} == expected


def test_operands_that_are_not_aligned_leave_out_what_takes_too_many_registers():
    aligned, other = (set(candidates(problem(chip="sm_80", aligned=a))) for a in (True, False))
    gone = {name.split()[1] for name in aligned - other}
    assert other < aligned and gone == {"128x256x64", "64x128x64"}


def test_names_are_of_the_tiles():
    for asked in EVERY:
        for name, tile in candidates(asked).items():
            if tile is not None:
                assert f" {tile.block_m}x{tile.block_n}x{tile.block_k} {tile.num_warps} warps " in name
                assert name.endswith(tile.precision)
                assert name.split()[0] == (
                    "specialized" if tile.specialized else "descriptors" if tile.programs else "pointers"
                )


def test_tables_are_shares_and_rates():
    tables = (BY_POINTERS, BY_DESCRIPTORS, TF32X3)
    shapes = [*SPECIALIZED, *itertools.chain(*(shapes for table in tables for shapes in table.values()))]
    assert all(0.1 <= shape.share <= 1 and is_power_of_2(shape.block_k) for shape in shapes)
    assert all(rates.half > rates.tf32 > rates.single >= 19e12 and rates.copy > 1e12 for rates in RATES.values())


@pytest.mark.parametrize(
    ("changed", "name", "expected"),
    [
        # 512 tiles are 4 waves on 132 multiprocessors, as long as 528 of them
        ({}, "pointers 128x256x64 8 warps ieee", 2e-6 + 528 * 2 * 128 * 256 * 4096 / (790e12 * 0.85)),
        ({}, "descriptors 128x256x64 8 warps ieee", 2e-6 + 528 * 2 * 128 * 256 * 4096 / (790e12 * 0.96)),
        ({"chip": "sm_80"}, "pointers 128x128x64 8 warps ieee", 2e-6 + 1080 * 2 * 128**2 * 4096 / (260e12 * 0.80)),
        ({"dtype": torch.float64}, "pointers 32x32x16 4 warps ieee", 2e-6 + 16500 * 2 * 32**2 * 4096 / (60e12 * 0.5)),
        (
            {"dtype": torch.float32, "precision": "tf32"},
            "descriptors 128x128x32 8 warps tf32",
            2e-6 + 1056 * 2 * 128**2 * 4096 / (395e12 * 0.90),
        ),
        (
            {"dtype": torch.float32, "precision": "forced ieee"},
            "pointers 64x64x32 4 warps ieee",
            2e-6 + 4224 * 2 * 64**2 * 4096 / (52e12 * 0.65),
        ),
        (
            {"dtype": torch.float32},
            "pointers 128x128x32 8 warps tf32x3",
            2e-6 + 1056 * 3 * 2 * 128**2 * 4096 / (395e12 * 0.75),
        ),
        # where bytes are the longer: of both operands and of the result
        ({"shape": (8192, 64, 64)}, "pointers 64x64x64 4 warps ieee", 2e-6 + 2 * (2 * 8192 * 64 + 64 * 64) / 4.3e12),
    ],
    ids=str,
)
def test_an_estimate_is_a_launch_and_the_longer_of_products_and_bytes(changed, name, expected):
    assert estimates(problem(**changed))[name] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("task", "passes"), [("forward", 2), ("backward", 3), ("dx", 0), ("dw", 0), ("loss", 0)])
def test_the_library_takes_a_pass_more(task, passes):
    bare = estimates(problem("dw", aligned=False))
    own = estimates(problem(task, aligned=False))
    after = 2e-6 + passes * 4096 * 4096 * 2 / 4.3e12 if passes else 0
    best = min(time for name, time in bare.items() if name != LIBRARY)
    assert own[LIBRARY] == pytest.approx(bare[LIBRARY] + after, rel=1e-9)
    assert bare[LIBRARY] - 2e-6 == pytest.approx((best - 2e-6) * 0.80 / (0.80 / 0.85), rel=1e-9)


def test_the_library_is_asked_for_ieee_arithmetic_itself():
    asked = problem("dw", dtype=torch.float32)
    assert estimates(asked)[LIBRARY] == estimates(asked._replace(precision="forced ieee"))[LIBRARY]
    assert estimates(asked._replace(precision="tf32"))[LIBRARY] < estimates(asked)[LIBRARY]


def test_the_rule_takes_the_least_estimate_and_knows_no_specialized_warps():
    for asked in EVERY:
        times = estimates(asked)
        assert times.keys() == {name for name in candidates(asked) if not name.startswith("specialized")}
        assert times[by_rule(asked)] == min(times.values())
        assert by_rule(asked) == LIBRARY or times[by_rule(asked)] < times.get(LIBRARY, 1e9)


def test_a_head_has_its_chunks():
    asked = problem(HEAD)
    own = {RULE: 0, "1024 rows": 1024, "2048 rows": 2048, "4096 rows": 4096}
    theirs = {"torch": None} if hasattr(torch.nn, "LinearCrossEntropyOptions") else {}
    assert candidates(asked) == own | theirs and by_rule(asked) == RULE
