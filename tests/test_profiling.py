"""What a profiler sees of us: a range for each op, what a launch tells, what a step counts; and nothing when idle."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from torch.profiler import profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fusedact
from fusedact import backend, nn
from fusedact.kernels.metadata import flops_each, product_flops, told
from fusedact.profiling import proton
from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import contenders, output_gradient
from fusedact.profiling.counting import Count, counted
from fusedact.profiling.ops import work
from fusedact.profiling.rows import OTHER, of_device
from fusedact.profiling.timing import DRY
from fusedact.profiling.tracing import profile_unit

CPU = torch.device("cpu")
TOLD_LAUNCHES = Path(__file__).with_name("told_launches.py")
RANGES = {  # the ops that a case runs
    Case("linear_act", (8, 16, 4), "float32", "relu"): "linear_act",
    Case("linear_chain", (8, 16, 4), "float32", "relu"): "linear_chain",
    Case("cross_entropy", (8, 10), "float32"): "cross_entropy",
    Case("cross_entropy_grad_in_forward", (8, 10), "float32"): "cross_entropy_early",
    Case("linear_cross_entropy", (8, 4, 10), "float32"): "linear_cross_entropy",
    Case("linear_bce", (8, 4), "float32"): "linear_bce",
    Case("softmax", (8, 10), "float32"): "softmax",
    Case("bce_with_logits", (64,), "float32"): "bce_with_logits",
    Case("gated", (8, 16), "float32", "silu"): "gated",
    Case("activation", (64,), "float32", "mish"): "activation",
}
EXACT = ("linear_act", "linear_chain", "cross_entropy", "softmax", "log_softmax", "bce", "bce_with_logits")  # in FLOPs
UNTOLD = ("gated", "activation", "prelu", "nll_loss")  # whose functions decide


class Dispatched(TorchDispatchMode):
    """How often each operation is."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name] += 1
        return func(*args, **kwargs or {})


def step_of(case):
    run = contenders(case, 0)["fusedact"]
    dy = output_gradient(run.forward().detach())

    def step():
        with record_function("forward"):
            y = run.forward()
        with record_function("backward"):
            run.gradients(y, dy)

    return step


def ranges(recorded):
    return {event.name: event.time_range for event in recorded.events()}


def inside(inner, outer):
    return outer.start <= inner.start and inner.end <= outer.end


@pytest.mark.parametrize("case", RANGES, ids=lambda case: case.op)
def test_an_op_is_a_range_of_its_name_forward_and_backward(case, triton_backend):
    step = step_of(case)
    with profile() as recorded:
        step()
    found, name = ranges(recorded), f"fusedact::{RANGES[case]}"
    assert inside(found[name], found["forward"])
    assert inside(found[f"{name}_backward"], found["backward"])
    assert Counter(event.name for event in recorded.events())[name] == 1


def test_inference_is_named_too(triton_backend):
    x = torch.randn(4, 10)
    with profile() as recorded, torch.no_grad():
        nn.Softmax(1)(x)
        nn.LinearBCEWithLogitsLoss(10)(x, torch.rand(4, 1))
    assert {"fusedact::softmax", "fusedact::linear_bce"} <= set(ranges(recorded))


def test_nothing_is_recorded_while_no_profiler_runs(triton_backend):
    step = step_of(Case("linear_act", (8, 16, 4), "float32", "relu"))
    early = step_of(Case("linear_bce", (8, 4), "float32"))
    with mock.patch.object(backend.profiler, "record_function", side_effect=AssertionError):
        step()
        early()


def test_a_registered_op_has_its_name_of_torch_alone(triton_backend):
    x = torch.randn(4, 10, requires_grad=True)
    with profile() as recorded, FlopCounterMode(display=False):
        nn.functional.softmax(x, 1).sum().backward()
    ours = {event.name: event.is_user_annotation for event in recorded.events() if event.name.startswith("fusedact::")}
    assert ours == {"fusedact::softmax": False, "fusedact::softmax_backward": False}


def test_a_compiled_graph_is_whole_and_one_whether_or_not_a_profiler_runs(triton_backend):
    torch._dynamo.reset()
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    act = nn.Linear(4, 8, activation="gelu")
    x = torch.randn(3, 4)
    expected = act(x)
    compiled = torch.compile(act, fullgraph=True, backend=compiles)
    with profile() as recorded:
        first = compiled(x)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(compiled(x), expected)
    assert compiles.frame_count == 1
    assert "fusedact::linear_act" in ranges(recorded)


# What launches tell


def kernel_arguments(**changed):
    x, w = torch.zeros(6, 4, dtype=torch.bfloat16), torch.zeros(5, 4, dtype=torch.bfloat16)
    y = torch.zeros(6, 5, dtype=torch.bfloat16)
    args = {"x_ptr": x, "w_ptr": w, "b_ptr": None, "y_ptr": y, "tickets_ptr": torch.zeros(1024), "M": 6, "N": 5, "K": 4}
    return args | changed


def told_of(args, *given, module="fusedact.kernels.linear", kernel="_forward_kernel", **options):
    return told(module, *given, **options)((1,), SimpleNamespace(name=kernel), args)


@pytest.mark.parametrize(
    "changed, moved",
    [
        ({}, 2 * (24 + 20 + 30)),
        ({"b_ptr": torch.zeros(5)}, 2 * (24 + 20 + 30) + 20),
        ({"x_ptr": torch.zeros(4, dtype=torch.bfloat16).expand(6, 4)}, 2 * (4 + 20 + 30)),
        ({"x_ptr": SimpleNamespace(base=torch.zeros(6, 4, dtype=torch.bfloat16))}, 2 * (24 + 20 + 30)),  # described
        ({"run": (torch.zeros(3), (torch.zeros(2), None, 7))}, 2 * (24 + 20 + 30) + 20),
        ({"x_ptr": torch.zeros(0, 4)}, 2 * (20 + 30)),
    ],
)
def test_a_launch_tells_the_bytes_of_its_tensors_once(changed, moved):
    found = told_of(kernel_arguments(**changed), product_flops)
    assert found["bytes"] == moved
    assert found["name"] == "linear.forward 6x5x4"
    assert sum(found[key] for key in found if key.startswith("flops")) == 2 * 6 * 5 * 4


def test_a_launch_tells_flops_by_width_and_only_where_they_are_counted():
    assert told_of(kernel_arguments(), product_flops)["flops16"] == 240
    assert told_of({"x_ptr": torch.zeros(7, 3)}, flops_each("x_ptr", 5))["flops32"] == 105
    assert set(told_of(kernel_arguments())) == {"name", "bytes"}
    assert told_of(kernel_arguments(), untouched=("x_ptr",))["bytes"] == 2 * (20 + 30)


@pytest.mark.parametrize(
    "module, kernel, name",
    [
        ("fusedact.kernels.softmax", "_backward_kernel", "softmax.backward"),
        ("fusedact.kernels.scale", "_scale_kernel", "scale"),
        ("fusedact.kernels.cross_entropy_gradient", "_kernel", "cross_entropy_gradient"),
        ("fusedact.kernels.cross_entropy_backward", "_backward_kernel", "cross_entropy_backward"),
    ],
)
def test_a_kernel_is_named_by_its_module(module, kernel, name):
    assert told_of({"x_ptr": torch.zeros(7, 3)}, module=module, kernel=kernel)["name"] == f"{name} 7x3"


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = [sys.executable, str(TOLD_LAUNCHES)]
    done = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def launched(phase):
    """Bytes and FLOPs of our launches and of the library's products."""
    ours = [
        count for name, count in phase.items() if not name.startswith("aten::") or name in ("aten::mm", "aten::addmm")
    ]
    return sum(count[1] for count in ours), sum(count[2] for count in ours)


@pytest.mark.exhaustive
def test_launches_tell_what_the_ops_table_says(launches):
    """At least the work's bytes, at most twice: a product reads dz again. A head's logits, which are only in between,
    may be more than all else, and a small x is read again.
    """
    for name, phases in launches["cases"].items():
        op, *activation, shape, dtype = name.split()
        case = Case(op, tuple(map(int, shape.split("x"))), dtype, *activation)
        moved, flops = map(sum, zip(launched(phases["forward"]), launched(phases["backward"]), strict=True))
        least = work(case, "both")
        most = 7 if op == "linear_cross_entropy" else 2.1
        assert least.bytes <= moved <= most * least.bytes, (name, moved, least)
        if op in UNTOLD:
            assert flops == 0, name
        elif op in EXACT:
            assert flops == least.flops, name
        else:
            assert 0.7 * least.flops <= flops <= 1.5 * least.flops, (name, flops, least)


@pytest.mark.exhaustive
def test_training_launches_tell_their_products(launches):
    visits, layers = 2 * 64, {"tiny": [(3, 4), (4, 1)], "single": [(784, 10)], "layers": [(48, 32), (32, 10)]}
    for name, sizes in layers.items():
        (flops,) = [count[2] for key, count in launches["training"][name].items() if key.startswith("training_")]
        products = [inputs * outputs for inputs, outputs in sizes]
        assert flops == 2 * visits * (3 * sum(products) - products[0]), name


# What a step counts


def test_counts_are_those_of_what_is_dispatched():
    case = Case("linear_act", (64, 32, 16), "float32", "relu")
    run = contenders(case, 0)["stock"]
    step = run.call("both", torch.ones(64, 32))
    with Dispatched() as dispatched:
        step()
    counts = counted(step)
    assert {name: count.calls for name, count in counts.items()} == dispatched.calls
    x, w, b, y = 64 * 16, 32 * 16, 32, 64 * 32
    assert counts["aten::addmm"] == Count(1, 4 * (x + w + b + y), Counter({32: 2 * 64 * 32 * 16}))
    assert counts["aten::relu"].bytes == 4 * 2 * y
    assert counts["aten::threshold_backward"].bytes == 4 * 3 * y
    assert counts["aten::mm"].flops == {32: 4 * 64 * 32 * 16}
    assert counts["aten::t"].bytes == counts["aten::detach"].bytes == 0


@pytest.mark.parametrize(
    "step, name, moved",
    [
        (lambda x: x.add_(1), "aten::add_", 800),
        (lambda x: x.zero_(), "aten::zero_", 400),
        (lambda x: torch.empty(100).copy_(x), "aten::copy_", 800),
        (lambda x: torch.mm(x[None], x[:, None], out=torch.empty(1, 1)), "aten::mm", 804),
        (lambda x: x[:1].expand(100) + x, "aten::add", 804),
        (lambda x: x * x, "aten::mul", 800),
        (lambda x: x.new_empty(7), "aten::new_empty", 0),
    ],
)
def test_bytes_of_an_operation(step, name, moved):
    assert counted(lambda: step(torch.ones(100)))[name].bytes == moved


def test_ops_launch_as_ever_while_they_are_counted(triton_backend):
    """And the doors find the modes again afterwards."""
    before = backend.dispatching
    step = step_of(Case("softmax", (8, 10), "float32"))
    assert not any(name.startswith("fusedact::") for name in counted(step))
    assert backend.dispatching is before


# Profiles


@pytest.mark.parametrize("name, shape", [("cross_entropy", (64, 100)), ("linear_act", (64, 32, 16))])
def test_rows_hold_every_call_and_what_it_moved(name, shape):
    activation = "relu" if name == "linear_act" else None
    found = profile_unit(name, CPU, steps=3, shape=shape, activation=activation, effort=DRY)
    counts = counted(step_of(Case(name, shape, "float32", activation or "")))
    for contender in ("stock", "fused"):
        rows = {row["name"]: row for row in found["contenders"][contender]["rows"]}
        assert OTHER in rows
        for operation, count in counts.items():
            if count.bytes:
                assert rows[operation]["calls"] == count.calls, operation
                assert rows[operation]["bytes"] == count.bytes
                assert rows[operation]["flops"] == {width: n for width, n in count.flops.items() if n}
                assert rows[operation]["share"] > 0
        assert found["contenders"][contender]["calls"] == sum(row["calls"] for row in rows.values())
    json.dumps(found)


def event(cat, name, ts, dur, tid=1, correlation=None):
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 1, "tid": tid, "args": args}


def test_a_kernel_belongs_to_the_innermost_range_around_its_launch():
    events = [
        event("user_annotation", "step", 0, 100),
        event("cpu_op", "aten::linear", 10, 30),
        event("cpu_op", "aten::addmm", 12, 20),
        event("cuda_runtime", "cudaLaunchKernel", 15, 2, correlation=1),
        event("cpu_op", "aten::empty", 33, 2),
        event("cuda_runtime", "cudaLaunchKernel", 36, 2, correlation=2),
        event("cpu_op", "aten::other", 10, 80, tid=2),
        event("user_annotation", "softmax.forward 8x10", 50, 10),
        event("cuda_driver", "cuLaunchKernelEx", 52, 2, correlation=3),
        event("cuda_driver", "cuLaunchKernelEx", 153, 2, correlation=4),
        event("kernel", "gemm", 20, 7.0, tid=7, correlation=1),
        event("kernel", "split", 27, 1.0, tid=7, correlation=2),
        event("kernel", "_forward_kernel", 60, 5.0, tid=7, correlation=3),
        event("gpu_memcpy", "Memcpy HtoD", 160, 2.0, tid=7, correlation=4),
        {"ph": "M", "name": "process_name", "pid": 1},
    ]
    counts = {"softmax.forward 8x10": Count(1, 640, Counter({32: 400}))}
    rows = {row.name: row for row in of_device(events, 1, counts)}
    assert {name: (row.calls, row.us, row.kernels) for name, row in rows.items()} == {
        "aten::addmm": (1, 7.0, ["gemm"]),
        "softmax.forward 8x10": (1, 5.0, ["_forward_kernel"]),
        "cuLaunchKernelEx": (1, 2.0, ["Memcpy HtoD"]),
        "aten::linear": (1, 1.0, ["split"]),
    }
    row = rows["softmax.forward 8x10"]
    row.set_share({"copy, GB/s": 256.0, "fp32, TFLOP/s": 1.0}, "highest")
    assert row.bytes == 640 and row.share == pytest.approx(0.0025 / 5)


def test_protons_tree_is_read_by_launch():
    def node(name, metrics, *children):
        return {"frame": {"name": name, "type": "function"}, "metrics": metrics, "children": list(children)}

    below = node("_forward_kernel", {"count": 2, "time (ns)": 3000.0})
    ours = node("softmax.forward 8x10", {"bytes": 1280, "flops32": 800}, below)
    copy = node("Memcpy", {"count": 4, "time (ns)": 1000.0})
    found = proton.rows([node("ROOT", {}, node("step", {}, ours, copy)), {"CUDA": {"0": {}}}], 2)
    assert found == [
        {"name": "softmax.forward 8x10", "bytes": 640, "flops32": 400, "count": 1, "time (ns)": 1500},
        {"name": "Memcpy", "count": 2, "time (ns)": 500},
    ]


@pytest.mark.exhaustive
def test_what_proton_cannot_is_a_line(tmp_path):
    """Here it finds no GPU."""
    found = proton.profiled("softmax", CPU, {"shape": (8, 10)}, 1, tmp_path / "softmax.hatchet")
    assert set(found) == {"error"} and "\n" not in found["error"]


def test_profiling_leaves_torch_as_it_was():
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    profile_unit("softmax", CPU, steps=1, shape=(8, 10), effort=DRY, threads=2)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)
    assert fusedact.get_backend() in backend.BACKENDS
