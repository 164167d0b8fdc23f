"""act(x * W + b) of images against float64 PyTorch; its modules; and the tutorial's convolutional model on it."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import max_pool2d, relu

import fusedact
from fusedact import functional as F
from fusedact import nn
from fusedact.activations import ACTIVATIONS
from fusedact.kernels import activations, bias_activation, elementwise
from fusedact.kernels.workspace import tickets
from fusedact.trainers.mnist_cnn import MnistCnn, MyModel

pytestmark = pytest.mark.usefixtures("triton_backend")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GEOMETRIES = [  # images, channels in and out, height, width, kernel, and the options
    ((1, 1, 1, 3, 3, 3), {}),
    ((2, 3, 5, 9, 7, 3), {"padding": 1}),
    ((3, 4, 6, 8, 9, 3), {"stride": 2, "padding": (0, 2), "dilation": 2, "groups": 2}),
    ((2, 2, 130, 3, 5, 1), {}),
    ((1, 1, 3, 50, 47, 2), {"padding": "valid"}),
    ((2, 3, 4, 6, 6, 5), {"padding": "same", "dilation": (1, 2)}),
]
GRADIENTS = {
    "as y": lambda t: t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels first": lambda t: t.contiguous(),
    "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
    "cropped": lambda t: torch.nn.functional.pad(t, [1] * 8)[(slice(1, -1),) * 4],
    "of a sum": lambda t: t[:1, :1, :1, :1].expand_as(t),
}


def tensors(N, C, K, H, W, size, dtype=torch.float32, device="cpu", bias=True, channels_last=False, groups=1):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    x = draw(N, C, H, W).to(memory_format=memory_format)
    weight = (draw(K, C // groups, size, size) / (C * size**2) ** 0.5).to(memory_format=memory_format)
    return [x, weight, draw(K) if bias else None]


def stock(name, x, weight, bias, slope=None, **options):
    act = ACTIVATIONS[name]
    z = torch.nn.functional.conv2d(x, weight, bias, **options)
    return act.reference(z, *(act.parameters({}) if slope is None else [slope]))


def stock_on_cuda(name, x, weight, bias, slope=None, **options):
    """The same where torch's product is cuDNN's: rounded, and then b is added. A CPU's adds b before it rounds."""
    act = ACTIVATIONS[name]
    z = torch.nn.functional.conv2d(x, weight, **options)
    z = z if bias is None else z + bias[:, None, None]
    return act.reference(z, *(act.parameters({}) if slope is None else [slope]))


def ours(name, x, weight, bias, slope=None, **options):
    return F.conv2d(x, weight, bias, activation=name, slope=slope, **options)


def outcome(function, name, inputs, gradient=None, **options):
    """The value, every gradient, and the gradient that was pulled back."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(name, *leaves, **options)
    dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y) if gradient is None else gradient(y)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def check(name, inputs, compare, gradient=None, **options):
    doubles = [t if t is None else t.cpu().double() for t in inputs]
    three = [
        outcome(function, name, given, gradient, **options)
        for function, given in ((ours, inputs), (stock_on_cuda, inputs), (stock, doubles))
    ]
    for each in zip(*three, strict=True):
        compare(*each)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "options"), GEOMETRIES, ids=str)
def test_geometries(shape, options, channels_last, device, as_accurate_as_torch):
    inputs = tensors(*shape, device=device, channels_last=channels_last, groups=options.get("groups", 1))
    check("gelu", inputs, as_accurate_as_torch, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["relu", "silu"])  # from the output, and from the product
def test_dtypes(name, bias, dtype, device, as_accurate_as_torch):
    inputs = tensors(2, 3, 37, 9, 7, 3, dtype, device, bias, channels_last=bias)
    check(name, inputs, as_accurate_as_torch)


@pytest.mark.parametrize("name", [name for name, a in ACTIVATIONS.items() if not a.learned])
def test_every_activation(name, device, as_accurate_as_torch):
    x, weight, bias = tensors(2, 3, 5, 9, 7, 3, device=device)
    check(name, [4 * x, weight, bias], as_accurate_as_torch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("slopes", "bias"), [(1, True), (1, False), (37, True), (37, False)])
def test_prelu_learns_its_slope(slopes, bias, dtype, device, as_accurate_as_torch):
    inputs = tensors(3, 2, 37, 6, 5, 3, dtype, device, bias, channels_last=slopes == 1)
    slope = torch.linspace(0.1, 0.4, slopes, dtype=dtype, device=device)
    check("prelu", [*inputs, slope], as_accurate_as_torch)


@pytest.mark.parametrize("channels", [1, 6])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("layout", GRADIENTS)
def test_gradients_of_any_strides(layout, channels_last, channels, device, as_accurate_as_torch):
    inputs = tensors(2, 3, channels, 9, 7, 3, device=device, channels_last=channels_last)

    def gradient(y):
        dy = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
        return GRADIENTS[layout](dy.to(y))

    check("silu", inputs, as_accurate_as_torch, gradient)


def test_no_images(device, as_accurate_as_torch):
    check("sigmoid", tensors(0, 3, 4, 5, 5, 3, device=device), as_accurate_as_torch)


@pytest.mark.parametrize("programs", [1, 3, 1024])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 40, 33), (40, 300, 2, 1)], ids=str)
def test_sums_do_not_depend_on_how_they_are_shared(shape, programs, device, monkeypatch, as_accurate_as_torch):
    monkeypatch.setattr(bias_activation, "PROGRAMS", programs)
    dy, x = torch.randn(2, *shape, device=device)
    bias = torch.randn(shape[1], device=device)
    z = x + bias[:, None, None]
    for slopes in (1, shape[1]):
        slope = torch.full((slopes,), 0.25, device=device)
        dz, db, dslope = bias_activation.backward_channels(
            dy, x, bias, activations.prelu_grad, (), slope, False, (True, True, True), elementwise.tile(4)
        )
        expected = torch.where(z > 0, dy, dy * 0.25)
        assert torch.equal(dz, expected)
        as_accurate_as_torch(db, expected.sum((0, 2, 3)), expected.double().sum((0, 2, 3)))
        each = torch.where(z > 0, 0, dy.double() * z.double())
        summed = each.sum().view(1) if slopes == 1 else each.sum((0, 2, 3))
        as_accurate_as_torch(dslope, summed.float(), summed)
    assert not tickets(x.device, 1).any()


@pytest.mark.parametrize("wanted", [(1, 1, 1), (0, 1, 1), (1, 0, 0), (0, 0, 1)], ids=str)
def test_launches_and_only_wanted_gradients(wanted, device, launches):
    inputs = [t.requires_grad_(bool(want)) for t, want in zip(tensors(2, 3, 5, 9, 7, 3), wanted, strict=True)]
    inputs = [t.detach().to(device).requires_grad_(t.requires_grad) for t in inputs]
    launches.reset()
    y = ours("relu", *inputs)
    assert launches.count == 1
    y.sum().backward()
    assert launches.count == 2
    assert [t.grad is not None for t in inputs] == [bool(want) for want in wanted]


@pytest.mark.parametrize(("name", "saves_y"), [("relu", True), ("hardtanh", True), ("gelu", False), ("silu", False)])
def test_what_is_saved_and_where(name, saves_y, device, monkeypatch):
    """x, W and b by reference, and one tensor of y's size; y takes the product's memory unless that is saved."""
    products, convolution = [], torch.convolution

    def spied(*args):
        products.append(convolution(*args))
        return products[-1]

    monkeypatch.setattr(torch, "convolution", spied)
    inputs = [t.requires_grad_() for t in tensors(2, 3, 5, 9, 7, 3, device=device)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ours(name, *inputs)
        assert sum(t.numel() for t in kept) == sum(t.numel() for t in inputs) + y.numel()
        kept.clear()
        with torch.no_grad():
            inferred = ours(name, *inputs)
    assert not kept
    assert (y.data_ptr() == products[0].data_ptr()) == saves_y
    assert inferred.data_ptr() == products[1].data_ptr()


def test_arguments_are_left_as_they_were(device):
    inputs = tensors(2, 3, 5, 9, 7, 1, device=device)
    before = [t.clone() for t in inputs]
    outcome(ours, "gelu", inputs)
    outcome(ours, "relu", inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_bitwise_the_same_from_run_to_run(device):
    inputs = tensors(3, 2, 5, 33, 30, 3, device=device)
    runs = [outcome(ours, "silu", inputs) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][3], runs[1][3])


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "gelu", "prelu"])
def test_second_derivative(name, device):
    inputs = tensors(1, 1, 2, 3, 3, 2, torch.float64, device)
    if ACTIVATIONS[name].learned:
        inputs.append(torch.full((2,), 0.25, dtype=torch.float64, device=device))
    inputs = [t.requires_grad_() for t in inputs]

    def f(*inputs):
        return ours(name, *inputs, stride=(1, 2))

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "grad"])
def test_transforms_take_torchs_formula(transform, device):
    x, weight, bias = tensors(2, 3, 5, 5, 4, 3, device=device)
    results = []
    for function in (ours, stock):
        f = lambda x, function=function: function("gelu", x, weight, bias).square().mean()  # noqa: E731
        results.append(
            {
                "vmap": lambda f=f: torch.func.vmap(f)(torch.stack([x, -x])),
                "jvp": lambda f=f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
                "grad": lambda f=f: torch.func.grad(f)(x),
            }[transform]()
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["relu", "gelu", "prelu"])
def test_opcheck(name, channels_last, device):
    inputs = tensors(2, 3, 5, 9, 7, 3, device=device, channels_last=channels_last)
    inputs.append(torch.rand(5, device=device) if ACTIVATIONS[name].learned else None)
    inputs = [t if t is None else t.requires_grad_() for t in inputs]
    options = [2, 1], [1, 1], [1, 1], False, [0, 0], 1, name, [], True
    torch.library.opcheck(torch.ops.fusedact.convolution_act.default, (*inputs, *options))


def test_compiled_whole(device):
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding="same"), nn.ReLU(), nn.Conv2d(5, 2, 1, activation="gelu"))
    model, x = model.to(device), torch.randn(2, 3, 6, 5, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(m(x).square().sum(), list(model.parameters())) for m in (model, compiled)]
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(eager, whole)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["relu", "gelu", "prelu", "softplus"])
def test_autocast_gives_stocks_dtype(name, low, device):
    inputs = tensors(2, 3, 5, 9, 7, 3, device=device)
    inputs.append(torch.rand(5, device=device) if ACTIVATIONS[name].learned else None)
    with torch.autocast(device, low):
        own, torchs = outcome(ours, name, inputs), outcome(stock, name, inputs)
    assert [t.dtype for t in own] == [t.dtype for t in torchs]
    torch.testing.assert_close(own[0], torchs[0], rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda x, w, b: (x[0], w, b), {}),  # one image, not a batch
        (lambda x, w, b: (x, w[..., :2, :2], b), {"padding": "same"}),  # one side is padded more
        (lambda x, w, b: (x, w, b), {"stride": [2]}),
        (lambda x, w, b: (x, w, b[:-1]), {}),
        (lambda x, w, b: (x, w, b.double()), {}),
        (lambda x, w, b: (x.double(), w, b), {}),
        (lambda x, w, b: (x[:, :2], w, b), {}),
        (lambda x, w, b: (x[..., :1], w, b), {}),
        (lambda x, w, b: (x, w[0], b), {}),
        (lambda x, w, b: (x, w, b), {"stride": (1, 2, 3)}),
        (lambda x, w, b: (x, w, b), {"stride": 0}),
        (lambda x, w, b: (x, w, b), {"padding": "same", "stride": 2}),
        (lambda x, w, b: (x, w, b), {"padding": "some"}),
        (lambda x, w, b: (x, w, b), {"padding": -1}),
    ],
)
def test_what_no_kernel_takes_is_torchs_to_answer(change, options, device, launches):
    inputs = change(*tensors(2, 3, 5, 9, 7, 3, device=device))
    try:
        expected = stock("relu", *inputs, **options)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            ours("relu", *inputs, **options)
        assert str(raised.value) == str(error)
    else:
        assert torch.equal(ours("relu", *inputs, **options), expected)
    assert not launches.count


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "rely"}, ValueError, "unknown activation 'rely'"),
        ({"activation": "relu", "beta": 1}, TypeError, "activation 'relu' takes no parameter, got beta"),
        ({"activation": "prelu"}, TypeError, "activation 'prelu' takes a slope= tensor"),
        ({"activation": nn.ReLU(), "beta": 1}, TypeError, r"conv2d\(\) takes an activation's parameters from its"),
        ({"beta": 1}, TypeError, r"conv2d\(\) takes an activation's parameters only together"),
    ],
)
def test_wrong_activations(options, error, message, device, launches):
    with pytest.raises(error, match=message):
        F.conv2d(*tensors(2, 3, 5, 9, 7, 3, device=device), **options)
    assert not launches.count


# Modules


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output + 1)
    return module


@pytest.mark.parametrize(
    ("layers", "fused"),
    [
        (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU()], 1),
        (lambda: [torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.GELU("tanh")], 1),
        (lambda: [nn.Conv2d(3, 4, 3, 2, "valid", bias=False), nn.PReLU(4), nn.Conv2d(4, 2, 1), nn.Tanh()], 2),
        (lambda: [nn.Conv2d(3, 4, 3, activation="silu", padding="same", padding_mode="reflect")], 1),
        (lambda: [nn.Conv2d(3, 4, 3, activation=nn.Softmax(1))], 1),  # a launch of its own
        (lambda: [nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), torch.nn.ReLU()], 0),
        (lambda: [Doubled(3, 4, 3), torch.nn.ReLU()], 0),
        (lambda: [hooked(nn.Conv2d(3, 4, 3)), torch.nn.ReLU()], 0),
        (lambda: [nn.Conv2d(3, 4, 3), hooked(torch.nn.ReLU())], 0),
        (lambda: [nn.Conv2d(3, 4, 3, activation=hooked(torch.nn.ReLU()))], 0),
    ],
)
def test_what_sequential_fuses(layers, fused, device, launches):
    model, x = nn.Sequential(*layers()).to(device), torch.randn(2, 3, 8, 8, device=device)
    results = [model(x)]
    assert launches.count == fused
    with fusedact.use_backend("torch"):
        results.append(model(x))
    torch.testing.assert_close(*results)


def test_arguments_state_and_repr_are_torchs():
    arguments = (4, 6, (3, 5), 2, (1, 2), 1, 2, False, "reflect")
    torch.manual_seed(3)
    own = nn.Conv2d(*arguments, dtype=torch.float64, activation="prelu")
    torch.manual_seed(3)
    torchs = torch.nn.Conv2d(*arguments, dtype=torch.float64)
    assert torch.equal(own.weight, torchs.weight) and own.activation.weight.dtype == torch.float64
    assert repr(nn.Conv2d(*arguments)) == repr(torchs)
    assert "activation='step'" in repr(nn.Conv2d(4, 6, 3, activation="step"))
    assert list(own.state_dict()) == ["weight", "activation.weight"]
    assert torch.equal(copy.deepcopy(own).weight, own.weight)
    with pytest.raises(TypeError, match="activation must be a name, a module or None, got 5"):
        nn.Conv2d(4, 6, 3, activation=5)


# The tutorial's model


class Tutorial(torch.nn.Module):
    """The layers and steps of tutorial 001's MyModel."""

    def __init__(self):
        super().__init__()
        sizes = [(1, 10, 7, 3), (10, 50, 7, 3), (50, 120, 7, 3), (120, 100, 5, 0), (100, 20, 5, 0), (20, 10, 5, 0)]
        for number, (inputs, outputs, kernel, padding) in enumerate([*sizes, (10, 10, 3, 0)], 1):
            setattr(self, f"conv{number}", torch.nn.Conv2d(inputs, outputs, kernel, padding=padding))
        for number, (inputs, outputs) in enumerate([(640, 120), (120, 360), (360, 50), (50, 10)], 1):
            setattr(self, f"fc{number}", torch.nn.Linear(inputs, outputs))

    def forward(self, x):
        for number in range(1, 7):
            x = relu(getattr(self, f"conv{number}")(x))
        x = max_pool2d(x, 2, 2).view(-1, 640)
        for number in range(1, 4):
            x = relu(getattr(self, f"fc{number}")(x))
        return self.fc4(x)


@pytest.mark.parametrize("layers", [torch.nn, nn], ids=["stock", "fused"])
def test_model_is_the_tutorials(layers):
    torch.manual_seed(5)
    expected = Tutorial()
    torch.manual_seed(5)
    model = MyModel(layers)
    assert list(model.state_dict()) == list(expected.state_dict())
    for name, parameter in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter)
    x = torch.rand(2, 1, 28, 28)
    with fusedact.use_backend("torch"):
        assert torch.equal(model(x), expected(x)) and torch.equal(model(x[0]), expected(x[0]))
        assert torch.equal(copy.deepcopy(model)(x), expected(x))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_fused_model_steps_as_stock(device, launches):
    torch.manual_seed(5)
    models = {"stock": MyModel(torch.nn).to(device)}
    models["fused"] = MyModel(nn).to(device)
    models["fused"].load_state_dict(models["stock"].state_dict())
    batches = [(torch.rand(1, 1, 28, 28, device=device), torch.randint(10, (1,), device=device)) for _ in range(2)]
    costs = {}
    for name, model in models.items():
        launches.reset()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        costs[name] = []
        for x, y in batches:
            optimizer.zero_grad()
            cost = torch.nn.functional.cross_entropy(model(x), y)
            cost.backward()
            optimizer.step()
            costs[name].append(cost.item())
        assert model.conv7.weight.grad is None and model.conv7.bias.grad is None
        assert all(p.grad is not None for n, p in model.named_parameters() if not n.startswith("conv7"))
    assert costs["fused"] == pytest.approx(costs["stock"], rel=1e-5)
    # Forward: a launch for each of 9 pairs; backward: one for each, and two products for each of 3 linear layers.
    assert launches.count == len(batches) * (9 + 9 + 6)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 28, 28), (28, 28), (1, 2, 1, 28, 28)], ids=str)
def test_images_of_another_size_are_refused(shape, launches):
    with pytest.raises(ValueError, match=r"expected images \(N, 1, 28, 28\), received"):
        MyModel(nn)(torch.zeros(shape))
    assert not launches.count


def test_trainer():
    with fusedact.use_backend("torch"):
        trainer = MnistCnn(nn, replace(MnistCnn.defaults, batch_size=4))
        assert trainer.x.shape[1:] == trainer.x_test.shape[1:] == (1, 28, 28)
        trainer.x_test, trainer.y_test = trainer.x_test[:101], trainer.y_test[:101]
        first = trainer.step(trainer.x[:4], trainer.y[:4]).item()
        for _ in range(2):
            last = trainer.step(trainer.x[:4], trainer.y[:4]).item()
        assert last < first
        evaluation = trainer.evaluate()
        predictions = trainer.model(trainer.x_test).argmax(1)
    assert evaluation.accuracy == (predictions == trainer.y_test).float().mean().item()
    assert evaluation.text == f"Learning finished\nAccuracy: {evaluation.accuracy}"
