"""The table of activations: what its lines say of torch's functions, and the kernels' functions that they lead to."""

import inspect

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime import KernelInterface

from fusedact.activations import ACTIVATIONS, TABLE, difference
from fusedact.kernels import activations as device_functions

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OTHER_NUMBERS = [
    ("threshold", (0.1, 20.0)),
    ("threshold", (0.5, -1.0)),
    ("leaky_relu", (-0.2,)),
    ("leaky_relu", (0.0,)),
    ("hardtanh", (-0.5, 2.0)),
    ("softplus", (2.0, 20.0)),
    ("softplus", (1.0, 1.0)),
]
FROM_OUTPUT = [
    (name, numbers, dtype)
    for name, numbers in [*((a.name, a.default_values) for a in TABLE), *OTHER_NUMBERS]
    for dtype in DTYPES
    if ACTIVATIONS[name].from_output(dtype, *numbers)
]


def test_each_function_is_tritons():
    """The interpreter would run plain functions too; the compiler would not."""
    source = inspect.getsource(device_functions)
    names = [name for name in vars(device_functions) if f"def {name}(" in source]
    assert len(names) > len(ACTIVATIONS)
    plain = [name for name in names if not isinstance(getattr(device_functions, name), KernelInterface)]
    assert not plain


@pytest.mark.parametrize("name", [a.name for a in TABLE if a.defaults and a.name != "threshold"])
def test_defaults_are_torchs(name):
    """Of nn.Threshold, alone, torch asks for both numbers."""
    activation, x = ACTIVATIONS[name], torch.linspace(-30, 30, 241)
    stock = activation.module()
    assert activation.defaults == tuple((parameter, getattr(stock, parameter)) for parameter, _ in activation.defaults)
    assert torch.equal(activation.reference(x), activation.reference(x, *activation.default_values))


@pytest.fixture
def autocast_on_gpu():
    """torch's own autocast of tensors on a GPU, whether there is one or not: these have no values."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode():
        yield
    torch.set_autocast_enabled("cuda", before[0])
    torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.parametrize("name", [a.name for a in TABLE])
def test_stocks_precision_under_a_gpus_autocast(name, autocast_on_gpu):
    activation = ACTIVATIONS[name]
    x, slope = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in ((2, 3), (3,)))
    y = activation.reference(x, *([slope] if activation.learned else activation.default_values))
    assert y.dtype == (torch.bfloat16 if activation.low_precision else torch.float32)


@pytest.mark.parametrize(("name", "numbers", "dtype"), FROM_OUTPUT, ids=str)
def test_where_the_derivative_is_taken_from_the_output_it_can_be(name, numbers, dtype):
    """Inputs of one output have one derivative, up to a few last digits."""
    z = torch.linspace(-30, 30, 4801, dtype=torch.float64).to(dtype).requires_grad_()
    y = ACTIVATIONS[name].reference(z, *numbers)
    (slopes,) = torch.autograd.grad(y.sum(), z)
    y, order = y.detach().double().sort(stable=True)
    near = 8 * torch.finfo(dtype).eps * y.abs()[1:].clamp(min=1)
    apart = slopes.double()[order].diff().abs() > near
    assert not (apart & (y.diff() == 0)).any()


@pytest.mark.parametrize(
    ("numbers", "dtype", "expected"),
    [
        ((1.0, 20.0), torch.float32, True),
        ((2.0, 20.0), torch.bfloat16, True),
        ((1.0, 19.0), torch.float32, False),
        ((1.0, 20.0), torch.float64, False),
        ((-1.0, 20.0), torch.float32, False),
        ((0.0, 20.0), torch.float32, False),
    ],
    ids=str,
)
def test_softplus_tells_by_its_output_where_it_is_linear_to_the_last_digit(numbers, dtype, expected):
    assert ACTIVATIONS["softplus"].from_output(dtype, *numbers) is expected


@pytest.mark.parametrize(
    ("name", "numbers", "dtype", "expected"),
    [
        ("threshold", (0.5, 0.5), torch.bfloat16, True),
        ("threshold", (0.5, 0.75), torch.bfloat16, False),
        ("threshold", (0.3, 0.3), torch.bfloat16, False),
        ("threshold", (0.5, 0.3), torch.bfloat16, False),
        ("hardtanh", (-1.0, 0.3), torch.bfloat16, False),
        ("hardtanh", (-0.3, 1.0), torch.bfloat16, False),
        ("hardtanh", (-0.3, 0.3), torch.float64, True),
        ("leaky_relu", (0.0,), torch.float32, True),
        ("leaky_relu", (-0.1,), torch.float32, False),
    ],
    ids=str,
)
def test_an_output_that_rounding_may_move_tells_nothing(name, numbers, dtype, expected):
    assert ACTIVATIONS[name].from_output(dtype, *numbers) is expected


@pytest.mark.parametrize(
    ("ours", "truth", "found"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.5], [1.0, 2.0], "2.5 at 1, not 2"),
        ([0.5, 300.0], [0.0, 301.0], "0.5 at 0, not 0"),
        ([0.0, 100.0], [0.05, 109.0], None),
        ([1.0, float("nan")], [1.0, 2.0], "nan at 1, not 2"),
        ([5.0, 2.0], [float("inf"), 2.0], None),
        ([5.0, 2.0], [float("nan"), 3.0], "2 at 1, not 3"),
    ],
    ids=str,
)
def test_the_greatest_difference_relative_to_one_or_the_truth(ours, truth, found):
    assert difference(torch.tensor([0.0, 1.0]), torch.tensor(ours), torch.tensor(truth), 0.1) == found
