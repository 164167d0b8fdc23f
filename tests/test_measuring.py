"""The parts of fusedact's tuner, each by itself: errors, faults, turns, clocks, inputs."""

import math
from types import SimpleNamespace

import pytest
import torch

from fusedact.tuning import LEAST_ALIGNED, Chip, measure
from fusedact.tuning.measure import Layer

CHIP = Chip("sm_90", 227 * 1024, warp_size=32, multiprocessors=132)
TRUTH = torch.tensor([3.0, 4.0], dtype=torch.float64)


def layer(M=24, N=16, K=20, dtype=torch.float32):
    return Layer(M, N, K, dtype, "ieee", CHIP)


@pytest.mark.parametrize(
    ("result", "truth", "expected"),
    [
        ([3.0, 4.0], TRUTH, 0.0),
        ([3.0, 4.5], TRUTH, 0.1),
        ([2.5, 4.0], TRUTH, 0.1),
        ([math.nan, 4.0], TRUTH, math.inf),
        ([math.inf, 4.0], TRUTH, math.inf),
        ([1.0, 0.0], 0 * TRUTH, math.inf),
        ([math.nan, 4.0], None, 0.0),
    ],
    ids=str,
)
def test_an_error_is_relative_to_the_truth(result, truth, expected):
    assert measure._error(torch.tensor(result), truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("error", "told"), [(0.1, None), (0.101, "errs by 1.0e-01, at most 1.0e-01 is right"), (math.nan, "errs by inf")]
)
def test_a_candidate_may_err_as_much_as_is_allowed(error, told):
    found = measure._fault(lambda: torch.tensor([3.0, 4.0 + 5 * error], dtype=torch.float64), TRUTH, 0.1 + 1e-9)
    assert found is None if told is None else told in found


def test_a_fault_is_told_in_one_line():
    def broken():
        raise RuntimeError("\nout of registers\nat line 5")

    assert measure._fault(broken, None, 1.0) == "RuntimeError: out of registers"


@pytest.mark.parametrize(
    ("takes", "most", "expected"),
    [
        (1000.0, 16, 10),
        (1000.0, 4, 4),
        (10_000.0, 16, 1),
        (1e6, 16, 1),
        (0.0, 200, 200),
        (1500.0, 16, 6),
        (5000.2, 16, 1),
    ],
)
def test_a_sample_is_of_ten_milliseconds_and_goes_round_the_inputs(takes, most, expected):
    calls = [lambda: TRUTH, lambda: -TRUTH, lambda: 2 * TRUTH]
    turns = measure._turns(calls, lambda given: takes if given is calls else 0.0, most)
    assert turns == [calls[n % 3] for n in range(expected)]


def test_candidates_are_judged_by_their_first_inputs_whose_truth_it_is():
    calls = {name: [lambda: TRUTH, lambda: 2 * TRUTH] for name in ("ours", "library")}
    calls["wrong"] = [lambda: 2 * TRUTH, lambda: TRUTH]
    found = measure._measured(calls, TRUTH, "library", "library", lambda given: 1.0, 2)
    assert found.record.microseconds == {"ours": 1.0, "library": 1.0} and found.left_out.keys() == {"wrong"}


def test_medians_and_noise():
    samples = {"ours": iter(range(1, 100)), "library": iter([100.0, 103.0, 100.0, 95.0] * 20)}
    medians, noise = measure._medians(
        {name: [name] for name in samples}, "library", lambda calls: next(samples[calls[0]])
    )
    assert medians == {"ours": 5, "library": 100.0}
    assert noise == 3.0  # of 3 and 5 in turns, the first once more than the other


def test_the_clock_tells_microseconds_of_one_call(monkeypatch):
    times, called = iter([10.0, 10.5]), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(times))
    assert measure._wall([lambda: called.append(1)] * 4) == pytest.approx(0.5 / 4 * 1e6)
    assert len(called) == 4


@pytest.mark.parametrize(
    ("size", "dtype", "cache", "expected"),
    [
        (1024, torch.float32, 2**20, 1),  # 8 MiB of x and W beside 3 MiB
        (1024, torch.float32, 50 * 2**20, 16),
        (1024, torch.float32, 8 * 2**20, 3),
        (1024, torch.float16, 8 * 2**20, 6),
        (1024, torch.float32, 9 * 2**20, 4),
        (64, torch.float32, 50 * 2**20, 16),
    ],
)
def test_inputs_exceed_the_cache_three_times(size, dtype, cache, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache))
    assert measure._set_count(layer(size, size, size, dtype), torch.device("cuda")) == expected
    assert measure._set_count(layer(size, size, size, dtype), torch.device("cpu")) == 2


def test_inputs_are_of_unit_size_the_same_each_time_and_nobodys_random_numbers():
    state = torch.random.get_rng_state()
    first, again = (measure._inputs(layer(256, 128, 512), torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], again[name], strict=True))
    x, w, b = first["forward"]
    assert [tuple(t.shape) for t in (x, w, b)] == [(256, 512), (128, 512), (128,)]
    assert (x @ w.t()).std().item() == pytest.approx(1.0, rel=0.05)
    assert {name: [tuple(t.shape) for t in tensors] for name, tensors in first.items()} == {
        "forward": [(256, 512), (128, 512), (128,)],
        "dx": [(256, 128), (128, 512)],
        "dw": [(128, 256), (256, 512)],
        "backward": [(256, 128), (128, 512), (256, 512)],
        "whole": [(256, 512), (128, 512), (128,), (256, 128)],
    }
    assert [t.requires_grad for t in first["whole"]] == [True, True, True, False]


@pytest.mark.parametrize(
    ("sizes", "aligned"),
    [
        ((256, 256, 256), {"forward", "dx", "dw", "backward"}),
        ((256, 256, 255), set()),
        ((128, 256, 512), {"forward", "dx", "dw", "backward"}),
        ((512, 258, 512), {"forward"}),
        ((512, 512, 258), set()),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, set) else str(value),
)
def test_which_operands_are_aligned(sizes, aligned):
    problems = layer(*sizes, dtype=torch.bfloat16).problems()
    assert {label for label, problem in problems.items() if problem.aligned} == (
        aligned if math.prod(sizes) >= LEAST_ALIGNED else set()
    )


def test_float32_products_are_the_librarys_for_the_while():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    for precision, expected in (("tf32", "tf32"), ("ieee", "ieee"), ("forced ieee", "ieee")):
        with pytest.raises(KeyError), measure._float32_products(precision):
            assert matmul.fp32_precision == expected
            raise KeyError
        assert matmul.fp32_precision == before
