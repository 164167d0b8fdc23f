"""Each activation's value and derivative, in the kernels' own functions, against float64 PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import fusedact
from fusedact.activations import ACTIVATIONS, by_name, of_module
from fusedact.kernels import activations as device_functions
from fusedact.kernels.workspace import as_arguments

SLOPE = 0.25
KINKS = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 6.0, 20.0, -20.0]
EXTREMES = [1e-45, 1e-8, -1e-8, 1e-4, -1e-4, 300.0, -300.0, 1e4, -1e4, math.inf, -math.inf, math.nan]
PARAMETERS = [(name, tuple(v for _, v in a.defaults)) for name, a in ACTIVATIONS.items()] + [
    ("threshold", (0.1, 20.0)),
    ("leaky_relu", (-0.2,)),
    ("leaky_relu", (0.0,)),
    ("elu", (0.3,)),
    ("celu", (2.5,)),
    ("hardtanh", (-0.5, 2.0)),
    ("softplus", (2.0, 20.0)),
    ("softplus", (1.0, 1.0)),
    ("softshrink", (0.1,)),
    ("hardshrink", (1.5,)),
]
# Where an infinite gradient meets a branch, torch selects; elsewhere it multiplies and the two differ by rounding.
SELECTS = ["relu", "leaky_relu", "threshold", "hardtanh", "relu6", "softshrink", "hardshrink", "prelu"]


@triton.jit
def _value_kernel(z_ptr, y_ptr, act_params, ACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, ACT(tl.load(z_ptr + offsets), *act_params))


@triton.jit
def _gradient_kernel(dy_ptr, saved_ptr, dz_ptr, act_params, ACT_GRAD: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + offsets)
    tl.store(dz_ptr + offsets, ACT_GRAD(dy, tl.load(saved_ptr + offsets), *act_params))


def points(dtype, device):
    fixed = torch.tensor(KINKS + EXTREMES, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    random = 4 * torch.randn(512 - len(fixed), dtype=dtype, generator=generator)
    return torch.cat([fixed, random]).to(device)


def torch_value(name, z, params):
    if name == "prelu":
        return F.prelu(z, torch.full((1,), SLOPE, dtype=z.dtype, device=z.device))
    return ACTIVATIONS[name].reference(z, *params)


def run(kernel, *tensors, params, function):
    out = torch.full_like(tensors[0], math.nan)
    kernel[(1,)](*tensors, out, params, function, BLOCK=out.numel())
    return out


def device_params(name, params, dtype):
    return as_arguments((SLOPE,) if name == "prelu" else params, dtype)


def compare(check, z, ours, stock, truth):
    """Ordinary points and extremes apart, so that the large numbers of the latter do not hide the former's errors."""
    stock = torch.where(truth.isfinite().to(stock.device), stock, truth.to(stock))
    ordinary = z.abs() <= 25
    for part in (ordinary, ~ordinary & ~z.isnan(), z.isnan()):
        check(ours[part], stock[part], truth[part.cpu()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "params"), PARAMETERS, ids=str)
def test_value(name, params, dtype, device, as_accurate_as_torch):
    z = points(dtype, device)
    y = run(_value_kernel, z, params=device_params(name, params, dtype), function=getattr(device_functions, name))
    compare(as_accurate_as_torch, z, y, torch_value(name, z, params), torch_value(name, z.cpu().double(), params))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "params"), PARAMETERS, ids=str)
def test_derivative_from_what_is_saved(name, params, dtype, device, as_accurate_as_torch):
    z = points(dtype, device)
    z = z[~z.isnan()]
    z = torch.cat([z, z.new_zeros(512 - len(z))])
    dy = torch.randn(len(z), dtype=dtype, generator=torch.Generator().manual_seed(1)).to(device)
    truth = gradient(name, z.cpu().double(), dy.cpu().double(), params)
    if name == "hardsigmoid":
        truth = torch.where(truth == 0, 0, dy.cpu().double() / 6)  # torch's own 1/6 is a float32's
    function = getattr(device_functions, f"{name}_grad")
    forms = [(z, function)]
    if ACTIVATIONS[name].from_output(dtype, *params):
        value = getattr(device_functions, name)
        y = run(_value_kernel, z, params=device_params(name, params, dtype), function=value)
        forms.append((y, getattr(device_functions, f"{name}_grad_from_output", function)))
    if name in ("sigmoid", "tanh"):
        forms = forms[1:]  # always from the output
    for saved, function in forms:
        dz = run(_gradient_kernel, dy, saved, params=device_params(name, params, dtype), function=function)
        compare(as_accurate_as_torch, z, dz, gradient(name, z, dy, params), truth)


@pytest.mark.parametrize("name", SELECTS)
@pytest.mark.parametrize("dy", [math.inf, -math.inf, math.nan])
def test_infinite_gradient_meets_the_branch_that_torch_takes(name, dy, device):
    z = torch.tensor([-2.0, -0.0, 0.0, 2.0] * 4, device=device)
    params = tuple(v for _, v in ACTIVATIONS[name].defaults)
    dy = torch.full_like(z, dy)
    dz = run(
        _gradient_kernel,
        dy,
        z,
        params=device_params(name, params, z.dtype),
        function=getattr(device_functions, f"{name}_grad"),
    )
    assert torch.equal(dz.nan_to_num(7.0), gradient(name, z, dy, params).nan_to_num(7.0))


def gradient(name, z, dy, params):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(torch_value(name, z, params), z, dy)[0]


def test_relu_keeps_the_sign_of_zero(device):
    z = torch.tensor([-0.0] * 16, device=device)
    assert run(_value_kernel, z, params=(), function=device_functions.relu).signbit().all()


@pytest.mark.parametrize(
    ("name", "z", "expected"), [("softplus", 1e4, 1e4), ("logsigmoid", -1e4, -1e4), ("mish", 1e4, 1e4)]
)
def test_stable_far_out(name, z, expected, device):
    z = torch.full((16,), z, device=device)
    params = tuple(v for _, v in ACTIVATIONS[name].defaults)
    y = run(_value_kernel, z, params=params, function=getattr(device_functions, name))
    assert y.eq(expected).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_module_and_name_lead_to_the_same_line(name):
    activation = by_name(name)
    if activation.module is None:
        pytest.skip(f"torch.nn has no module for {name}")
    found, values, slope = of_module(activation.build())
    assert found is activation
    assert values == tuple(v for _, v in activation.defaults)
    assert (slope is not None) == activation.learned


def test_a_subclass_is_not_the_activation():
    class Louder(torch.nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    assert of_module(Louder()) is None


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown activation 'rellu', expected one of .*relu"):
        by_name("rellu")


def test_unknown_parameter_names_the_known():
    x, w = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(TypeError, match="'leaky_relu' takes negative_slope, got slop"):
        fusedact.functional.linear(x, w, activation="leaky_relu", slop=0.2)
