"""act(x * W + b) along one, two and three dimensions, and transposed, against float64 PyTorch; its modules."""

import copy
import inspect
import pickle

import pytest
import torch

import fusedact
from fusedact import functional as F
from fusedact import nn
from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, bias_activation, elementwise
from fusedact.nn.convolution import CONVOLUTIONS, convolved

pytestmark = pytest.mark.usefixtures("triton_backend")

NAMES = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
LAYERS = [cls.__name__ for cls in CONVOLUTIONS]
FIRST = ("conv1d", "conv_transpose3d", "Conv1d", "ConvTranspose3d")  # of which a slow test is run every time
SIZES = (6, 7, 5)
each = pytest.mark.parametrize("name", NAMES)
each_layer = pytest.mark.parametrize("layer", LAYERS)


def first_of(names):
    return [pytest.param(name, marks=[] if name in FIRST else pytest.mark.exhaustive) for name in names]


def dims_of(name):
    return int(name[-2])


def cut(options, name):
    """The options of so many dimensions."""
    return {key: value[: dims_of(name)] if isinstance(value, tuple) else value for key, value in options.items()}


def last(t, channels_last):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if not channels_last or not t.numel():
        return t
    if t.dim() == 3:
        return t.mT.contiguous().mT
    return t.contiguous(memory_format=formats[t.dim()])


def tensors(name, channels=(4, 6), groups=1, dtype=torch.float32, device="cpu", bias=True, channels_last=False, N=2):
    """x, W and b for a kernel of 3, and of 2 along the last dimension."""
    dims, (inputs, outputs) = dims_of(name), channels
    kernel = (3,) * (dims - 1) + (2,)
    first = (inputs, outputs // groups) if "transpose" in name else (outputs, inputs // groups)
    shapes = (N, inputs, *SIZES[:dims]), (*first, *kernel), (outputs,)
    x, weight, b = (torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)
    return [last(x, channels_last), last(weight / (inputs * 3**dims) ** 0.5, channels_last), b if bias else None]


def ours(name, activation, x, weight, bias, slope=None, **options):
    return getattr(F, name)(x, weight, bias, activation=activation, slope=slope, **options)


def stock(name, activation, x, weight, bias, slope=None, **options):
    act = ACTIVATIONS[activation]
    z = getattr(torch.nn.functional, name)(x, weight, bias, **options)
    return act.reference(z, *(act.parameters({}) if slope is None else [slope]))


def stock_on_cuda(name, activation, x, weight, bias, slope=None, **options):
    """The same where torch's product is cuDNN's: rounded, and then b is added. A CPU's adds b before it rounds."""
    act = ACTIVATIONS[activation]
    z = getattr(torch.nn.functional, name)(x, weight, **options)
    z = z if bias is None else z + bias.view(-1, *[1] * dims_of(name))
    return act.reference(z, *(act.parameters({}) if slope is None else [slope]))


def outcome(function, name, activation, inputs, **options):
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(name, activation, *leaves, **options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def check(name, activation, inputs, compare, **options):
    doubles = [t if t is None else t.cpu().double() for t in inputs]
    ways = (ours, inputs), (stock_on_cuda, inputs), (stock, doubles)
    for results in zip(*(outcome(way, name, activation, given, **options) for way, given in ways), strict=True):
        compare(*results)


GEOMETRIES = [
    {},
    {"stride": 2, "padding": (0, 2, 1), "dilation": (2, 1, 1), "groups": 2},
    {"stride": (3, 2, 1), "padding": 1, "groups": 2, "output_padding": (2, 1, 0), "dilation": (1, 2, 1)},
    {"padding": (1, 0, 0)},
    {"padding": "valid", "dilation": 2},
    {"padding": "same", "dilation": 2},
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", first_of(NAMES))
def test_geometries(name, options, channels_last, device, launches, as_accurate_as_torch):
    if "transpose" in name and isinstance(options.get("padding"), str):
        pytest.skip("a transposed convolution takes no padding by name")
    if "transpose" not in name:
        options = {key: value for key, value in options.items() if key != "output_padding"}
    inputs = tensors(name, groups=options.get("groups", 1), device=device, channels_last=channels_last)
    check(name, "silu", inputs, as_accurate_as_torch, **cut(options, name))
    assert launches.count == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu"])  # from the output, and from the product
@each
def test_dtypes(name, activation, dtype, device, as_accurate_as_torch):
    bias = activation == "relu"
    inputs = tensors(name, (3, 6), dtype=dtype, device=device, bias=bias, channels_last=bias)
    check(name, activation, inputs, as_accurate_as_torch)


@pytest.mark.parametrize("slopes", [1, 6])
@each
def test_prelu_learns_its_slope(name, slopes, device, as_accurate_as_torch):
    inputs = tensors(name, (3, 6), device=device, channels_last=slopes == 1)
    slope = torch.linspace(0.1, 0.4, slopes, device=device)
    check(name, "prelu", [*inputs, slope], as_accurate_as_torch)


@each
def test_nothing(name, device, as_accurate_as_torch):
    check(name, "sigmoid", tensors(name, device=device, N=0), as_accurate_as_torch)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@each
def test_memory(name, activation, device, monkeypatch):
    """x, W and b by reference, and one tensor of y's size; y in the product's memory and in its strides."""
    products, convolution = [], torch.convolution
    monkeypatch.setattr(torch, "convolution", lambda *args: products.append(convolution(*args)) or products[-1])
    for channels_last in (False, True):
        inputs = [t.requires_grad_() for t in tensors(name, device=device, channels_last=channels_last)]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = ours(name, activation, *inputs)
        assert sum(t.numel() for t in kept) == sum(t.numel() for t in inputs) + y.numel()
        assert (y.data_ptr() == products[-1].data_ptr()) == (activation == "relu")
        with torch.no_grad():
            assert ours(name, activation, *inputs).data_ptr() == products[-1].data_ptr()
        assert y.stride() == products[-1].stride() == stock(name, activation, *inputs).stride()


@pytest.mark.parametrize("sizes", [(7,), (5, 3, 2)], ids=str)
def test_a_product_in_channels_last(sizes, device):
    """As cuDNN may give it, whatever a CPU's gives."""
    x, dy = (last(t, True) for t in torch.randn(2, 2, 6, *sizes, dtype=torch.float64, device=device))
    bias, config = torch.randn(6, dtype=torch.float64, device=device), elementwise.tile(8)
    y = bias_activation.forward_channels(x, bias, activations.relu, (), None, config, in_place=False)
    z = x + bias.view(-1, *[1] * len(sizes))
    assert torch.equal(y, z.relu()) and y.stride() == x.stride()
    wanted = True, True, False
    dz, db, _ = bias_activation.backward_channels(dy, x, bias, activations.relu_grad, (), None, False, wanted, config)
    assert torch.equal(dz, dy * (z > 0)) and dz.stride() == x.stride()
    torch.testing.assert_close(db, dz.transpose(0, 1).flatten(1).sum(1))


@pytest.mark.parametrize("name", first_of(NAMES))
def test_derivatives(name, device):
    kernel = (2,) * dims_of(name)
    x = torch.randn(1, 2, *[3] * len(kernel), dtype=torch.float64, device=device)
    weight = torch.randn(2, 2, *kernel, dtype=torch.float64, device=device)
    slope = torch.full((2,), 0.25, dtype=torch.float64, device=device)
    inputs = [t.requires_grad_() for t in (x, weight, torch.randn_like(slope), slope)]

    def f(*inputs):
        return ours(name, "prelu", *inputs, stride=2, padding=1)

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize("channels_last", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.parametrize("name", first_of(NAMES))
def test_opcheck(name, channels_last, device):
    dims, transposed = dims_of(name), "transpose" in name
    inputs = [t.requires_grad_() for t in tensors(name, device=device, channels_last=channels_last)]
    geometry = [2] * dims, [1] * dims, [1] * dims, transposed, [int(transposed)] * dims, 1
    call = *inputs, None, *geometry, "gelu" if channels_last else "relu", [], True
    torch.library.opcheck(torch.ops.fusedact.convolution_act.default, call)


@pytest.mark.parametrize("transform", ["vmap", "jvp"])
@each
def test_transforms_take_torchs_formula(name, transform, device):
    x, weight, bias = tensors(name, device=device)
    results = []
    for function in (ours, stock):
        f = lambda x, function=function: function(name, "gelu", x, weight, bias).square().mean()  # noqa: E731
        results.append(
            torch.func.vmap(f)(torch.stack([x, -x]))
            if transform == "vmap"
            else torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
        )
    torch.testing.assert_close(*results)


@each
def test_autocast_gives_stocks_dtype(name, device):
    inputs = tensors(name, device=device)
    with torch.autocast(device, torch.bfloat16):
        own, torchs = (outcome(way, name, "relu", inputs) for way in (ours, stock))
    assert [t.dtype for t in own] == [t.dtype for t in torchs] == [torch.bfloat16, *[torch.float32] * 3]
    torch.testing.assert_close(own[0], torchs[0], rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda x, w, b: (x[0], w, b), {}),  # one, not a batch
        (lambda x, w, b: (x, w, b), {"padding": "same"}),  # one side is padded more
        (lambda x, w, b: (x, w, b), {"stride": [2]}),
        (lambda x, w, b: (x, w, b[:-1]), {}),
        (lambda x, w, b: (x, w, b.double()), {}),
        (lambda x, w, b: (x.double(), w, b), {}),
        (lambda x, w, b: (x[:, :2], w, b), {}),
        (lambda x, w, b: (x[..., :0], w, b), {}),
        (lambda x, w, b: (x, w[0], b), {}),
        (lambda x, w, b: (x[0, 0], w, b), {}),
        (lambda x, w, b: (x[None], w, b), {}),
        (lambda x, w, b: (x, w, b), {"stride": (1, 2, 3, 4)}),
        (lambda x, w, b: (x, w, b), {"stride": 0}),
        (lambda x, w, b: (x, w, b), {"padding": "same", "stride": 2}),
        (lambda x, w, b: (x, w, b), {"padding": "some"}),
        (lambda x, w, b: (x, w, b), {"padding": -1}),
        (lambda x, w, b: (x, w, None), {"groups": 0}),
        (lambda x, w, b: (x, w, None), {"groups": 3}),
        (lambda x, w, b: (x, w, b), {"groups": 2.0}),
        (lambda x, w, b: (x, w, b), {"output_padding": 5}),
    ],
)
@each
def test_what_no_kernel_takes_is_torchs_to_answer(name, change, options, device, launches):
    inputs = change(*tensors(name, device=device))
    try:
        expected = stock(name, "relu", *inputs, **options)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            ours(name, "relu", *inputs, **options)
        if not isinstance(error, TypeError):  # whose text tells what was given by position
            assert str(raised.value) == str(error)
        assert not launches.count
    else:
        torch.testing.assert_close(ours(name, "relu", *inputs, **options), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "rely"}, ValueError, "unknown activation 'rely'"),
        ({"activation": "relu", "beta": 1}, TypeError, "activation 'relu' takes no parameter, got beta"),
        ({"activation": nn.ReLU(), "beta": 1}, TypeError, r"{name}\(\) takes an activation's parameters from its"),
        ({"beta": 1}, TypeError, r"{name}\(\) takes an activation's parameters only together"),
    ],
)
@each
def test_wrong_activations(name, options, error, message, device, launches):
    with pytest.raises(error, match=message.format(name=name)):
        getattr(F, name)(*tensors(name, device=device), **options)
    assert not launches.count


# Modules


def batch(layer, device="cpu"):
    return torch.randn(2, 4, *SIZES[: dims_of(layer)], device=device)


def same_as_stock(compute, launches, fused):
    """compute() through kernels, in so many launches, and through torch."""
    launches.reset()
    results = [compute()]
    assert launches.count == fused
    with fusedact.use_backend("torch"):
        results.append(compute())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("library", [torch.nn, nn], ids=["stock", "fused"])
@each_layer
def test_sequential(layer, library, device, launches):
    cls = getattr(library, layer)
    model = nn.Sequential(cls(4, 6, 3, 2, 1), torch.nn.PReLU(6), cls(6, 4, 2, bias=False), nn.Tanh()).to(device)
    x = batch(layer, device)
    same_as_stock(lambda: model(x), launches, 2)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("layer", LAYERS[:3])
def test_padding_modes(layer, mode, device, launches):
    for padding in (1, "same"):
        own = getattr(nn, layer)(4, 6, 3, padding=padding, padding_mode=mode, activation="silu").to(device)
        same_as_stock(lambda own=own: own(batch(layer, device).fill_(0.5).cumsum(2)), launches, 1)


@pytest.mark.parametrize("layer", LAYERS[3:])
def test_output_size(layer, device, launches):
    torchs = getattr(torch.nn, layer)(4, 6, 3, 2, 1).to(device)
    own = getattr(nn, layer)(4, 6, 3, 2, 1, activation="relu").to(device)
    own.load_state_dict(torchs.state_dict())
    x = batch(layer, device)
    for size in ([2 * n for n in x.shape[2:]], None):
        same_as_stock(lambda size=size: own(x, output_size=size), launches, 1)
        torch.testing.assert_close(own(x, size), torchs(x, size).relu())
        assert convolved(torchs, x, "relu", size).shape == torchs(x, size).shape
    with pytest.raises(ValueError, match="requested an output size of"):
        own(x, [1] * dims_of(layer))


@each_layer
def test_arguments_state_and_repr_are_torchs(layer):
    cls, torchs = getattr(nn, layer), getattr(torch.nn, layer)
    names = list(inspect.signature(torchs).parameters)
    assert list(inspect.signature(cls).parameters) == [*names, "activation"]
    assert str(inspect.signature(cls.forward)) == str(inspect.signature(torchs.forward))
    defaults = {name: p.default for name, p in inspect.signature(torchs).parameters.items()}
    assert {name: p.default for name, p in inspect.signature(cls).parameters.items()} == defaults | {"activation": None}
    own = cls(4, 6, 3, 2, groups=2, dtype=torch.float64, activation="prelu")
    assert list(own.state_dict()) == ["weight", "bias", "activation.weight"] and isinstance(own, torchs)
    assert own.activation.weight.dtype == torch.float64
    assert repr(cls(4, 6, 3, 2, 1, 1)) == repr(torchs(4, 6, 3, 2, 1, 1))
    assert "activation='step'" in repr(cls(4, 6, 3, activation="step"))
    for copied in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert type(copied) is cls and torch.equal(copied.weight, own.weight)


@each_layer
def test_hooks_and_strange_activations_are_called(layer, device, launches):
    cls, x = getattr(nn, layer), batch(layer, device)
    hooked = cls(4, 6, 3, activation="relu").to(device)
    hooked.activation.register_forward_hook(lambda module, args, output: output + 1)
    same_as_stock(lambda: hooked(x), launches, 0)
    strange = cls(4, 6, 3, activation=torch.nn.Softmax(1)).to(device)
    same_as_stock(lambda: strange(x), launches, 0)
    bare = cls(4, 6, 3).to(device)
    same_as_stock(lambda: bare(x), launches, 0)


@each_layer
def test_a_subclass_is_fused_by_its_own_activation_alone(layer, device, launches):
    x = batch(layer, device)
    derived = type("Derived", (getattr(nn, layer),), {})
    own = derived(4, 6, 3, activation="relu").to(device)
    same_as_stock(lambda: own(x), launches, 1)
    bare = nn.Sequential(derived(4, 6, 3), torch.nn.ReLU()).to(device)
    same_as_stock(lambda: bare(x), launches, 0)


@pytest.mark.parametrize("layer", first_of(LAYERS))
def test_compiled_whole(layer, device):
    cls = getattr(nn, layer)
    model = nn.Sequential(cls(4, 5, 2, padding=1), nn.ReLU(), cls(5, 2, 1, activation="gelu")).to(device)
    x = batch(layer, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (model, compiled)]
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(eager, whole)
