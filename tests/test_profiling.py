"""What a profiler sees of us: a range for each op, what a launch tells, what a step counts; and nothing when idle."""

import json
import os
import select
import signal
import subprocess
import sys
import weakref
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
from fusedact.profiling import proton, tracing
from fusedact.profiling.cases import Case
from fusedact.profiling.contenders import contenders, output_gradient
from fusedact.profiling.counting import Count, counted
from fusedact.profiling.ops import work
from fusedact.profiling.rows import OTHER, STEP, of_device, of_host
from fusedact.profiling.timing import DRY
from fusedact.profiling.tracing import profile_unit, unit_of

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
    described = {"x_ptr": SimpleNamespace(base=torch.zeros(7, 3))}
    assert told_of(described, flops_each("x_ptr", 5))["flops32"] == 105
    assert set(told_of(kernel_arguments())) == {"name", "bytes"}
    assert told_of(kernel_arguments(), untouched=("x_ptr",))["bytes"] == 2 * (20 + 30)


def test_rows_that_are_visited_again_are_told_each_time():
    x, w = torch.zeros(6, 4), torch.zeros(3, 4)
    found = told_of({"x_ptr": x, "w_ptr": w}, visited=lambda args: (20, (args["x_ptr"],)))
    assert found["bytes"] == 4 * (20 * 4 + 12)


@pytest.mark.parametrize(
    "args, flops",
    [
        ({"M": 3}, None),
        ({"x_ptr": torch.zeros(3, dtype=torch.int64)}, flops_each("x_ptr", 5)),
        ({"x_ptr": torch.zeros(3)}, product_flops),
        ({"x_ptr": object(), "y_ptr": torch.zeros(3)}, flops_each("x_ptr", 5)),
    ],
    ids=["no tensor", "no floating-point one", "no sizes", "what is no tensor"],
)
def test_no_launch_fails_since_it_cannot_be_told(args, flops):
    assert told_of(args, flops) == {"name": "_forward_kernel"}


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
def test_training_launches_tell_their_products_and_every_visit(launches):
    """The first run is an epoch in a launch, the second that and four in one more."""
    rows, layers = 64, {"tiny": [(3, 4), (4, 1)], "single": [(784, 10)], "layers": [(48, 32), (32, 10)]}
    for name, sizes in layers.items():
        one, five = (
            list(map(sum, zip(*(told for key, told in runs[name].items() if key.startswith("training_")), strict=True)))
            for runs in launches["training"]
        )
        products = [inputs * outputs for inputs, outputs in sizes]
        flops = 2 * rows * (3 * sum(products) - products[0])
        assert (one[0], one[2]) == (1, flops) and (five[0], five[2]) == (2, 5 * flops), name
        epoch = 4 * (rows * (sizes[0][0] + sizes[-1][1]) + rows + 4)  # x, y, the order, and the steps' losses
        assert five[1] - 2 * one[1] == 3 * epoch, name


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


def test_a_kernel_belongs_to_the_outermost_range_that_is_counted():
    """Its bytes are those of the calls whose time it has."""
    events = [
        event("user_annotation", "forward", 0, 100),
        event("cpu_op", "aten::contiguous", 0, 11),
        event("cpu_op", "aten::clone", 0, 10),
        event("cpu_op", "aten::copy_", 1, 8),
        event("cuda_runtime", "cudaLaunchKernel", 2, 1, correlation=1),
        event("cpu_op", "aten::copy_", 20, 8),
        event("cuda_runtime", "cudaLaunchKernel", 22, 1, correlation=2),
        event("cpu_op", "aten::convolution", 40, 20),
        event("cpu_op", "aten::cudnn_convolution", 42, 16),
        event("cuda_runtime", "cudaLaunchKernel", 45, 1, correlation=3),
        event("kernel", "copy", 100, 1000.0, tid=9, correlation=1),
        event("kernel", "copy", 1200, 10.0, tid=9, correlation=2),
        event("kernel", "conv", 2300, 50.0, tid=9, correlation=3),
    ]
    counts = {
        "aten::clone": Count(1, 4_000_000),
        "aten::copy_": Count(1, 40_000),
        "aten::convolution": Count(1, 1000, Counter({32: 10**9})),
    }
    rows = of_device(events, 1, counts)
    for row in rows:
        row.set_share({"copy, GB/s": 4.0, "fp32, TFLOP/s": 50.0}, "highest")
    assert {row.name: (row.calls, row.us, row.bytes, row.share) for row in rows} == {
        "aten::clone": (1, 1000.0, 4_000_000, 1.0),
        "aten::convolution": (1, 50.0, 1000, 0.4),
        "aten::copy_": (1, 10.0, 40_000, 1.0),
    }


def copies():
    x = torch.ones(512, 512)

    def step():
        with record_function(STEP):
            torch.empty(512, 512).copy_(x)
            return x.t().contiguous(), x.to(torch.float64), torch.zeros(512, 512)  # each of which fills or copies

    return step


def test_bytes_of_a_row_are_of_the_calls_whose_time_it_has():
    step = copies()
    counts = counted(step)
    with profile() as recorded:
        step()
        step()
    rows = {row.name: row for row in of_host(recorded, 2, counts)}
    for name in ("aten::copy_", "aten::clone", "aten::_to_copy"):
        assert (rows[name].calls, rows[name].bytes) == (1, counts[name].bytes)
    assert rows["aten::copy_"].bytes == 2 * 4 * 512**2
    assert rows["aten::contiguous"].bytes is None
    copied = sum(event.cpu_time_total for event in recorded.events() if event.name == "aten::copy_") / 2
    assert rows["aten::copy_"].us < copied < sum(rows[name].us for name in counts if name in rows)


def test_where_other_calls_were_counted_a_row_has_no_bytes():
    step = copies()
    counts = counted(step)
    counts["aten::clone"].calls = 2
    with profile() as recorded:
        step()
    rows = {row.name: row for row in of_host(recorded, 1, counts)}
    assert rows["aten::clone"].bytes is None and rows["aten::copy_"].bytes


def test_ceilings_are_measured_once_and_while_nothing_else_is_held(monkeypatch):
    held, measured = [], []
    steps = tracing.Unit.steps

    def watched_steps(unit, device):
        found = steps(unit, device)
        held.extend(weakref.ref(step) for step in found.values())
        return found

    def measure(names, device, effort):
        measured.append(list(names))
        assert held and not any(ref() for ref in held)
        return dict.fromkeys(names, 100.0)

    monkeypatch.setattr(tracing.Unit, "steps", watched_steps)
    monkeypatch.setattr(tracing.ceilings, "measured", measure)
    known = {"tf32, TFLOP/s": 5.0}
    given = [
        profile_unit(name, CPU, steps=1, shape=shape, known=known)["ceilings"]
        for name, shape in (("softmax", (8, 10)), ("linear_act", (8, 4, 4)), ("linear_act", (8, 4, 4)))
    ]
    assert measured == [["copy, GB/s"], ["fp32, TFLOP/s"], []]
    assert given[0] == {"copy, GB/s": 100.0}
    assert given[1] == given[2] == {"copy, GB/s": 100.0, "fp32, TFLOP/s": 100.0}
    assert known == {"tf32, TFLOP/s": 5.0} | given[1]


@pytest.mark.parametrize(
    "name, shape, fits",
    [
        ("cross_entropy", (4, 10, 3, 5), True),
        ("cross_entropy", (4,), False),
        ("softmax", (2, 3, 4, 5), True),
        ("bce_with_logits", (3, 4, 5), True),
        ("activation", (3, 4), True),
        ("linear_act", (3, 4, 5, 6), False),
        ("linear_bce", (3, 4, 5), False),
        ("convolution_act", (2, 3, 4, 8, 8, 3), True),
        ("convolution_act", (2, 3, 4, 3), False),
    ],
)
def test_shapes_are_those_that_the_op_takes(name, shape, fits):
    if not fits:
        with pytest.raises(ValueError, match=f"shape {'x'.join(map(str, shape))}: {name} takes one as "):
            unit_of(name, CPU, shape)
        return
    unit = unit_of(name, CPU, shape)
    assert unit.case.shape == shape
    for step in unit.steps(CPU).values():
        step()


@pytest.mark.parametrize("name", tracing.OPS)
def test_inference_of_every_op_is_profiled(name):
    assert unit_of(name, CPU, phase="no_grad", inference=True).phase == "no_grad"
    if "no_grad" not in tracing.OPS[name].phases:
        with pytest.raises(ValueError, match="phase 'no_grad'"):  # which the suites do not time
            unit_of(name, CPU, phase="no_grad")


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


def test_a_profile_of_proton_without_kernels_is_a_line(monkeypatch, tmp_path):
    path = tmp_path / "softmax.hatchet"
    path.write_text(json.dumps([{"frame": {"name": "ROOT"}, "metrics": {}, "children": []}, {"CUDA": {}}]))
    monkeypatch.setattr(proton.subprocess, "run", lambda *args, **options: None)
    assert proton.profiled("softmax", CPU, {}, 1, path) == {"error": "it recorded no kernel"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends at its time limit")
@pytest.mark.exhaustive
def test_protons_process_ends_with_whoever_waits_for_it():
    child = "from fusedact.profiling import proton; proton.end_in_time(); print('ready', flush=True); input()"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    command = [sys.executable, "-c", parent, child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.kill()
        process.wait()
        ends = select.select([process.stdout], [], [], 10)[0]  # which the child holds open while it lives
        process.stdin.close()  # ends it in any case
        assert ends and process.stdout.read() == ""
    assert process.returncode == -signal.SIGKILL


def test_what_proton_takes_too_long_for_ends_by_itself(monkeypatch):
    limits = []
    monkeypatch.setattr(proton.faulthandler, "dump_traceback_later", lambda *args, **options: limits.append(options))
    monkeypatch.setattr(proton.sys, "platform", "none")
    proton.end_in_time()
    assert limits == [{"exit": True}]


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
