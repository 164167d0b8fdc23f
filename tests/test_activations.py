"""Each activation's value and derivative, in the kernels' own functions, against float64 PyTorch; and its two faces,
the function and the module, against torch's.
"""

import copy
import inspect
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

import fusedact
from fusedact import nn
from fusedact.activations import ACTIVATIONS, TABLE, by_name, of_module
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


def test_the_gradient_of_prelus_slope(device):
    z = points(torch.float32, device).nan_to_num(0.25, posinf=4.0, neginf=-4.0)
    dy = torch.randn(len(z), generator=torch.Generator().manual_seed(1)).to(device)
    ours = run(_gradient_kernel, dy, z, params=(), function=device_functions.prelu_slope_grad)
    slopes = torch.full((len(z),), SLOPE, device=device, requires_grad=True)
    (stock,) = torch.autograd.grad(F.prelu(z[None], slopes), slopes, dy[None])
    assert torch.equal(ours, stock)


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


# ---- functional


FUNCTIONS = [a.name for a in TABLE if hasattr(F, a.name)]
MODULES = list(dict.fromkeys(a.module.__name__ for a in TABLE if a.module is not None))
OURS = fusedact.functional


def test_every_activation_has_its_function_and_its_module():
    assert {a.name for a in TABLE} - set(FUNCTIONS) == {"step", "squared_relu", "gelu_tanh"}
    for name in [*FUNCTIONS, "step", "squared_relu"]:
        assert getattr(OURS, name).__module__ == "fusedact.functional.activations"
    for name in [*MODULES, "Step"]:
        assert getattr(nn, name).__module__ == "fusedact.nn.activation"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_tells_what_torchs_tells(name):
    ours, stock = getattr(OURS, name), getattr(F, name)
    assert ours.__name__ == name and ours.__doc__ == stock.__doc__
    assert pickle.loads(pickle.dumps(ours)) is ours
    try:
        assert inspect.signature(ours) == inspect.signature(stock)
    except ValueError:  # torch's tells none
        assert next(iter(inspect.signature(ours).parameters)) == "input"


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f.relu(x),
        lambda f, x: f.relu(input=x, inplace=False),
        lambda f, x: f.relu(x.clone(), True),
        lambda f, x: f.relu_(x.clone()),
        lambda f, x: f.threshold(x, 0.5, value=-2),
        lambda f, x: f.leaky_relu(x, 0.3),
        lambda f, x: f.leaky_relu(x, torch.tensor(0.3)),
        lambda f, x: f.hardtanh(x, -0.5, max_val=0.25, inplace=True),
        lambda f, x: f.elu(x, alpha=2),
        lambda f, x: f.celu(x, -0.5),
        lambda f, x: f.gelu(x, approximate="tanh"),
        lambda f, x: f.softplus(x, 2, threshold=1.5),
        lambda f, x: f.prelu(x, x.new_full((3,), 0.25)),
        lambda f, x: f.prelu(input=x, weight=x.new_full((), 0.25)),
        lambda f, x: f.hardshrink(x, lambd=1),
        lambda f, x: f.relu(x.long()),
        lambda f, x: f.sigmoid(x.long()),
        lambda f, x: f.relu(x.to_sparse()).to_dense(),
        lambda f, x: f.silu(torch.complex(x, x).conj().imag),
        lambda f, x: f.tanh(torch.complex(x, x)),
        lambda f, x: f.relu(torch.nested.nested_tensor([x, x[:2]])).to_padded_tensor(0.0),
    ],
)
def test_calls_that_torch_takes(call, backend, device):
    x = torch.randn(4, 3, device=device)
    with fusedact.use_backend(backend):
        torch.testing.assert_close(call(OURS, x), call(F, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize(
    "call",
    [
        lambda f, x: f.relu([1.0]),
        lambda f, x: f.relu(x, slope=1),
        lambda f, x: f.relu(x, False, False),
        lambda f, x: f.relu(x, input=x),
        lambda f, x: f.relu(x > 0),
        lambda f, x: f.threshold(x, 0.5),
        lambda f, x: f.gelu(x, "tanh"),
        lambda f, x: f.gelu(x, approximate="x"),
        lambda f, x: f.gelu(x, approximate=None),
        lambda f, x: f.gelu(x, approximate=5),
        lambda f, x: f.gelu(x.long()),
        lambda f, x: f.leaky_relu(x, "steep"),
        lambda f, x: f.hardtanh(x, 2.0, 1.0),
        lambda f, x: f.softshrink(x, -1.0),
        lambda f, x: f.celu(x, 0.0),
        lambda f, x: f.prelu(x, 0.25),
        lambda f, x: f.prelu(x, x.new_ones(2)),
        lambda f, x: f.relu6(torch.complex(x, x)),
        lambda f, x: f.elu(x.requires_grad_(), 1.0, True),
    ],
)
def test_calls_that_torch_refuses(call, backend, device, launches):
    with pytest.raises(Exception) as stock:
        call(F, torch.randn(4, 3, device=device))
    with fusedact.use_backend(backend), pytest.raises(stock.type) as ours:
        call(OURS, torch.randn(4, 3, device=device))
    assert str(ours.value) == str(stock.value)
    assert launches.count == 0


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_step(backend, device):
    x = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1e-45, 3.0, math.inf, math.nan], device=device, requires_grad=True)
    with fusedact.use_backend(backend):
        y = nn.Step()(x)
        assert y.tolist()[:-1] == [0, 0, 1, 1, 1, 1, 1] and y[-1].isnan()
        assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0] * 8


@pytest.mark.parametrize(
    ("name", "learns", "expected"),
    [
        *((name, None, False) for name in ("relu", "gelu", "softplus", "hardshrink")),
        *((name, None, True) for name in ("softsign", "tanhshrink", "step", "squared_relu")),
        ("prelu", True, True),
        ("prelu", False, False),
    ],
)
def test_by_itself_it_takes_a_kernel_where_stock_takes_several(name, learns, expected):
    """`auto` on a GPU; a kernel asked for by name always runs."""
    worth = OURS.activations._worth_a_launch
    slope = None if learns is None else torch.ones(1, requires_grad=learns)
    with fusedact.use_backend("auto"):
        assert worth(ACTIVATIONS[name], slope) == expected
    with fusedact.use_backend("triton"):
        assert worth(ACTIVATIONS[name], slope)


# ---- modules


def pair(name):
    ours, stock = getattr(nn, name), getattr(torch.nn, name)
    args = (0.5, -1.0) if name == "Threshold" else ()
    return ours(*args), stock(*args)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_torchs_in_all_but_its_kernel(name, device, triton_backend, launches):
    ours, stock = (module.to(device) for module in pair(name))
    assert type(ours) is not type(stock) and isinstance(ours, type(stock))
    assert type(ours).__doc__ == type(stock).__doc__ and type(ours).__qualname__ == name
    assert repr(ours) == repr(stock) and ours.state_dict().keys() == stock.state_dict().keys()
    x = torch.randn(5, 4, device=device)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        launches.reset()
        torch.testing.assert_close(module(x), stock(x))
        assert launches.count == 1
        assert of_module(module)[0] is of_module(stock)[0]
    with fusedact.use_backend("auto"):
        torch.testing.assert_close(ours(x), stock(x), **({} if x.is_cuda else {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize(
    "name", [name for name in MODULES if "inplace" in inspect.signature(getattr(nn, name)).parameters]
)
def test_in_place_is_torchs_own(name, device, triton_backend, launches):
    ours, stock = pair(name)
    ours.inplace = stock.inplace = True
    x = torch.randn(5, 4, device=device)
    y = ours(x)
    assert y is x and launches.count == 0 and repr(ours) == repr(stock)


def test_a_subclass_of_ours_is_not_the_activation_and_keeps_its_forward(device, triton_backend, launches):
    class Louder(nn.ReLU):
        def forward(self, x):
            return 2 * super().forward(x)

    assert of_module(Louder()) is None
    assert Louder()(torch.ones(3, device=device)).tolist() == [2, 2, 2] and launches.count == 1
    model = nn.Sequential(nn.Linear(3, 3), Louder()).to(device)
    torch.testing.assert_close(model(torch.eye(3, device=device)), 2 * model[0](torch.eye(3, device=device)).relu())


def test_in_a_sequential_ours_is_fused(device, triton_backend, launches):
    for activation in (nn.ReLU(), nn.GELU("tanh"), nn.PReLU(3), nn.Step()):
        model, x = nn.Sequential(nn.Linear(4, 3), activation).to(device), torch.randn(5, 4, device=device)
        launches.reset()
        ours = model(x)
        assert launches.count == 1
        with fusedact.use_backend("torch"):
            torch.testing.assert_close(ours, model(x))


def test_symbolic_tracing_records_torchs_function():
    """torch.fx, whose stand-in is no tensor: nothing asks it where it is."""
    for module in (nn.ReLU(), nn.Softsign(), nn.PReLU(), nn.Linear(3, 2)):
        x = torch.randn(4, 3)
        torch.testing.assert_close(torch.fx.symbolic_trace(torch.nn.Sequential(module))(x), module(x))
