"""Every supported layer is the matrix problem it is said to be: rows gathered one by one, in float64."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from patches import as_rows, product, rows, weight_by_group
from torchloco import (
    Anderson,
    ConjugateGradient,
    Dense,
    Exact,
    FirstOrderSteps,
    Inputs,
    Layer,
    LocoProp,
    Newton,
    Spectral,
    SquaredDistance,
    register_layer,
)
from torchloco.layers import _kinds, is_supported, layers_of
from torchloco.layers.dense import LinearLayer

CONVOLUTIONS = [None, nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [None, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
GAMMA = 0.3  # targets stay within the range of tanh, so that minima exist

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


@st.composite
def convolutions(draw, transposed=False):
    """A convolution in float64 and an input for it."""
    dims = draw(st.sampled_from([1, 2, 3]))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, sizes = each(1, 3), each(1, 2), each(3, 6 - dims)
    stride = each(1, 3)
    groups = draw(st.sampled_from([1, 2, 4]))
    options = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans()), "dtype": torch.float64}
    channels = 4, 4 * draw(st.sampled_from([1, 2]))
    if transposed:
        output_padding = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = each(0, 2)
        conv = TRANSPOSED[dims](*channels, kernel, stride, padding, output_padding, **options)
        places = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(sizes, stride, padding, dilation, kernel, output_padding, strict=True)
        ]
    else:
        padding = draw(st.sampled_from(["same", "valid", None]))
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        if padding is None:
            padding = each(0, 2)
        elif padding == "same":
            stride = (1,) * dims
            assume(all(d * (k - 1) < n for k, d, n in zip(kernel, dilation, sizes, strict=True)))
        conv = CONVOLUTIONS[dims](*channels, kernel, stride, padding, padding_mode=mode, **options)
        pads = conv._reversed_padding_repeated_twice[::-2]
        places = [n + 2 * p - d * (k - 1) for n, p, d, k in zip(sizes, pads, dilation, kernel, strict=True)]
    assume(all(place > 0 for place in places))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return conv, torch.randn(2, channels[0], *sizes, generator=generator, dtype=torch.float64)


every = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def check_rows(module, x):
    """All that solvers ask of the rows, against the rows themselves."""
    output = module(x).detach()
    [layer] = layers_of("layer", module)
    inputs, expected = layer.inputs(x, output), rows(module, x, output)
    weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    groups, n, d_in = expected.shape
    assert (inputs.groups, inputs.n, inputs.d_in, layer.d_out) == (groups, n, d_in, as_rows(module, output).shape[1])
    matrix = inputs.matrix(weight)
    assert_close(matrix, weight_by_group(module, weight).flatten(0, 1))
    assert_close(inputs.shaped(matrix, weight.shape), weight)
    assert_close(product(module, expected, weight, bias), as_rows(module, output))  # the reference is right
    assert_close(layer.rows(output), as_rows(module, output))
    assert_close(inputs.apply(matrix, bias), as_rows(module, output))
    delta = torch.randn_like(layer.rows(output))
    assert_close(inputs.sum(delta), (delta.t().reshape(groups, -1, n) @ expected).flatten(0, 1))
    flat = expected[0] if groups == 1 else expected
    assert_close(inputs.dense(), flat)
    assert_close(inputs.gram(), flat.mT @ flat)
    assert_close(inputs.row_sum(), flat.sum(-2))
    assert_close(inputs.squares(), float(expected.square().sum()))
    parts = min(3, n)
    for k in range(parts):
        assert_close(inputs.part(k, parts).dense(), flat[..., k::parts, :])


@every
@given(convolutions())
def test_convolutions_are_their_patches(drawn):
    check_rows(*drawn)


@every
@given(convolutions(transposed=True))
def test_transposed_convolutions_are_patches_of_the_spread_input(drawn):
    check_rows(*drawn)


def test_blocks_are_small(monkeypatch):
    monkeypatch.setattr("torchloco.windows._BLOCK", 100)
    conv = nn.Conv2d(2, 3, 3, dtype=torch.float64)
    x = torch.randn(7, 2, 5, 5, dtype=torch.float64)
    [layer] = layers_of("layer", conv)
    sizes = [block.numel() for _, block in layer.inputs(x, conv(x)).blocks()]
    assert sizes == [9 * 18] * 7  # an example at a time
    check_rows(conv, x)


def test_kernels_of_one_entry_are_not_unfolded():
    for stride in (1, 2):
        conv = nn.Conv2d(4, 3, 1, stride)
        x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
        [layer] = layers_of("layer", conv)
        inputs = layer.inputs(x, conv(x))
        assert type(inputs).__name__ == "Dense"
        assert (inputs.x.data_ptr() == x.data_ptr()) == (stride == 1)


# --- whole steps ------------------------------------------------------------------------------------------------------

SHAPES = {
    "linear": lambda: (nn.Linear(4, 3), (5, 6, 4)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, 2, 1), (3, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 4, (3, 2), 1, (1, 0), padding_mode="circular"), (3, 3, 5, 4)),
    "conv2d 1x1": lambda: (nn.Conv2d(3, 4, 1), (3, 3, 5, 4)),
    "conv2d channels last": lambda: (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), (3, 3, 5, 4)),
    "conv2d same": lambda: (nn.Conv2d(3, 4, (2, 3), padding="same", dilation=2, padding_mode="reflect"), (3, 3, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2, (1, 2, 1)), (3, 2, 3, 4, 3)),
    "grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 4, 4)),
    "depthwise": lambda: (nn.Conv1d(4, 8, 3, groups=4), (4, 4, 9)),
    "no bias": lambda: (nn.Conv1d(4, 6, 3, groups=2, bias=False), (4, 4, 9)),
    "transposed1d": lambda: (nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), (3, 4, 5)),
    "transposed2d": lambda: (nn.ConvTranspose2d(4, 6, 3, (2, 1), 1, groups=2, dilation=(1, 2)), (3, 4, 4, 5)),
    "transposed3d": lambda: (nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 2, 2, 3, 2)),
}


@pytest.fixture(params=SHAPES)
def case(request):
    """A model of one such layer and a tanh, an input, and a target for its output."""
    torch.manual_seed(0)
    module, shape = SHAPES[request.param]()
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(module, nn.Tanh())
    return model, x, torch.rand_like(model(x))


def backward(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y, reduction="sum").backward()


def problem(model, x, y, loss):
    """The local objective as a function of weight and bias, from the rows."""
    module = copy.deepcopy(model[0])
    output = module(x)
    a = output.detach().requires_grad_()
    [g] = torch.autograd.grad(nn.functional.mse_loss(a.tanh(), y, reduction="sum"), a)
    xs, a, g = rows(module, x, output), as_rows(module, a.detach()), as_rows(module, g)

    def objective(weight, bias):
        moved = product(module, xs, weight, bias)
        if loss == "squared":
            return (moved - (a - GAMMA * g)).square().sum() / 2
        return (moved.cosh().log() - moved * (a.tanh() - GAMMA * g)).sum()

    return objective


def solved(model, loss, x, y, **options):
    model = copy.deepcopy(model)
    optimizer = LocoProp(model, activation_lr=GAMMA, loss=loss, **options)
    backward(model, optimizer, x, y)
    optimizer.step()
    assert optimizer.fallback_parameters == []
    return [p.detach() for p in model.parameters()]


def descended(model, loss, x, y, lr, steps):
    objective = problem(model, x, y, loss)
    params = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for _ in range(steps):
        grads = torch.autograd.grad(objective(params[0], params[1] if len(params) > 1 else None), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= lr * g
    return [p.detach() for p in params]


def sgd(**options):
    return FirstOrderSteps(torch.optim.SGD, schedule="constant", **options)


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_first_order_steps(case, loss):
    model, x, y = case
    got = solved(model, loss, x, y, lr=1e-3, local_steps=4, solver=sgd())
    assert_close(got, descended(model, loss, x, y, 1e-3, 4))


def test_first_order_steps_from_c(case, monkeypatch):
    model, x, y = case
    monkeypatch.setattr("torchloco.problem.Size.prefers_gram", lambda self, *args: self.quadratic)
    for rows_of_step in (1.0, 0.5):
        got = solved(model, "squared", x, y, lr=1e-3, local_steps=4, solver=sgd(local_rows=rows_of_step))
        assert_close(got, descended(model, "squared", x, y, 1e-3, 4))
    got = solved(model, "squared", x, y, lr=1e-3, local_steps=4, solver=sgd(), safe=True)
    assert_close(got, descended(model, "squared", x, y, 1e-3, 4))


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_one_plain_step_is_sgd(case, loss):
    model, x, y = case
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), 1e-2 * GAMMA)
    backward(expected, optimizer, x, y)
    optimizer.step()
    got = solved(model, loss, x, y, lr=1e-2, local_steps=1, solver=sgd())
    assert_close(got, [p.detach() for p in expected.parameters()], rtol=1e-14, atol=1e-15)


def test_steps_on_part_of_the_rows_stay_close(case):
    model, x, y = case
    steps = [solved(model, "matching", x, y, lr=1e-3, local_steps=3, solver=sgd(local_rows=r)) for r in (1.0, 0.5)]
    for whole, part in zip(*steps, strict=True):
        assert not torch.equal(whole, part)
        assert_close(whole, part, rtol=0.1, atol=0.1)


def test_low_precision(case):
    model, x, y = case
    got = solved(model, "matching", x, y, lr=1e-3, local_steps=3, solver=sgd(local_dtype=torch.float32))
    assert_close(got, descended(model, "matching", x, y, 1e-3, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: Exact(1e-12, relative=False), lambda: ConjugateGradient(200, tolerance=0)])
def test_solvers_of_the_quadratic_problem(case, make):
    model, x, y = case
    got = solved(model, "squared", x, y, solver=make(), regularizer=SquaredDistance(0.5))
    params = [p.detach().clone().requires_grad_() for p in got]
    check_minimum(model, params, problem(model, x, y, "squared"))


@pytest.mark.parametrize(
    "solver", [Newton(20), Newton(20, direct=0, conjugate_gradients=60), Anderson(8, 300, tolerance=1e-9)]
)
def test_solvers_of_the_matching_loss(case, solver):
    model, x, y = case
    got = solved(model, "matching", x, y, solver=solver, regularizer=SquaredDistance(0.5))
    params = [p.detach().clone().requires_grad_() for p in got]
    check_minimum(model, params, problem(model, x, y, "matching"), 1e-5)


def check_minimum(model, params, objective, atol=1e-8):
    """Whether the gradient of the objective with (0.5 / 2)‖W̃ - W‖² is zero."""
    penalty = sum((p - old.detach()).square().sum() for p, old in zip(params, model.parameters(), strict=True)) / 4
    grads = torch.autograd.grad(objective(params[0], params[1] if len(params) > 1 else None) + penalty, params)
    for g in grads:
        assert_close(g, torch.zeros_like(g), rtol=0, atol=atol)


def test_exact_with_fewer_rows_than_columns():
    torch.manual_seed(0)
    for groups in (1, 2):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Tanh()).double()
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        y = torch.rand_like(model(x))
        got = solved(model, "squared", x, y, solver=Exact(1e-12, relative=False), regularizer=SquaredDistance(0.5))
        params = [p.detach().clone().requires_grad_() for p in got]
        check_minimum(model, params, problem(model, x, y, "squared"))


def test_running_average_of_c():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3)).double()
    x = torch.randn(5, 4, 9, dtype=torch.float64)
    optimizer = LocoProp(model, loss="squared", solver=Exact(0.1, average=0.9))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [optimizer.state[model[i].weight]["memory"]["solver"]["gram"].shape for i in (0, 2)] == [
        (2, 7, 7),
        (1, 13, 13),
    ]


# --- calls and modules ------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A convolution called on inputs of two sizes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cat([self.module(x).tanh().flatten(), self.module(x[..., 1:]).tanh().flatten()])


@pytest.mark.parametrize("name", ["linear", "conv1d", "grouped", "conv2d 1x1", "transposed2d"])
@pytest.mark.parametrize("local_rows", [1.0, 0.3])
def test_a_layer_that_is_called_twice(name, local_rows):
    torch.manual_seed(0)
    module, shape = SHAPES[name]()
    if name == "linear":
        shape = (shape[0], 4, 4)
        module = nn.Linear(3, 3)
        shape = (5, 6, 4)
    model = Twice(module.double() if name != "linear" else nn.Conv1d(6, 3, 1).double())
    x = torch.randn(shape, dtype=torch.float64)
    optimizer = LocoProp(model, 1e-3, activation_lr=GAMMA, local_steps=3, solver=sgd(local_rows=local_rows))
    old = [p.detach().clone() for p in model.parameters()]
    outputs = [model.module(x), model.module(x[..., 1:])]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    if local_rows < 1:
        assert all(p.isfinite().all() and not p.equal(o) for p, o in zip(model.parameters(), old, strict=True))
        return
    a = [as_rows(model.module, output.detach()) for output in outputs]
    xs = torch.cat([rows(model.module, v, o) for v, o in zip([x, x[..., 1:]], outputs, strict=True)], 1)
    a = torch.cat(a)
    t = a.tanh() - GAMMA * 2 * a.tanh() * (1 - a.tanh().square())
    params = [p.clone().requires_grad_() for p in old]
    for _ in range(3):
        moved = product(model.module, xs, *params)
        grads = torch.autograd.grad((moved.cosh().log() - moved * t).sum(), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= 1e-3 * g
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in params])


def cnn(dtype=torch.float32, *, inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.ReLU(inplace),
        nn.ConvTranspose2d(8, 4, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).to(dtype)


def train(model, optimizer, steps=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        x, y = torch.randn(6, 1, 8, 8, generator=generator).to(dtype), torch.arange(6) % 3
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_inplace_activations_change_nothing():
    models = [cnn(torch.float64), cnn(torch.float64, inplace=True)]
    for model in models:
        train(model, LocoProp(model, 1e-4, output=nn.CrossEntropyLoss()), dtype=torch.float64)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert_close(a, b)


def test_transfers_are_discovered_and_shapes_shown():
    model = cnn()
    optimizer = LocoProp(model, 1e-4, output=nn.CrossEntropyLoss())
    train(model, optimizer, 1)
    infos = optimizer.layers
    assert [info.transfer.name for info in infos] == ["relu", "relu", "tanh", "softmax"]
    assert [info.shape for info in infos] == [(4, 9), (8, 18), (4, 32), (3, 64)]
    # nine further steps, two products each, over all rows: batch · places · d_in · d_out
    products = [6 * 64 * 9 * 4, 6 * 4 * 18 * 8, 6 * 4 * 8 * 4 * 4, 6 * 64 * 3]
    assert [info.multiply_adds for info in infos] == [18 * product for product in products]
    assert "4 × 32" in repr(optimizer)


@pytest.mark.parametrize(("axis", "expected"), [(1, "softmax"), (2, "identity"), (3, "identity")])
@pytest.mark.parametrize("activation", [nn.Softmax, nn.LogSoftmax])
def test_softmax_over_channels_belongs_to_the_convolution(activation, axis, expected):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), activation(axis))
    optimizer = LocoProp(model)
    model(torch.randn(4, 2, 5, 5)).square().sum().backward()
    assert optimizer.layers[0].transfer.name == expected


def test_autocast_and_unbatched_inputs():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(inplace=True), nn.ConvTranspose1d(3, 2, 3))
    optimizer = LocoProp(model, 1e-4)
    x = torch.randn(2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    models = [nn.Conv1d(2, 3, 3).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, v in zip(models, [x.double(), x[None].double()], strict=True):
        optimizer = LocoProp(model, 1e-3)
        model(v).relu_().square().sum().backward()
        optimizer.step()
    assert_close(models[0].weight, models[1].weight)


def test_resumes_bit_for_bit():
    model = cnn()
    optimizer = LocoProp(model, 1e-4, output=nn.CrossEntropyLoss())
    train(model, optimizer)
    other = copy.deepcopy(model)
    second = LocoProp(other, 1e-4, output=nn.CrossEntropyLoss())
    second.load_state_dict(optimizer.state_dict())
    train(model, optimizer)
    train(other, second)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_copies_are_inert_and_nothing_is_kept_between_steps():
    model = cnn()
    optimizer = LocoProp(model, 1e-4, output=nn.CrossEntropyLoss())
    train(model, optimizer, 1)
    twin = copy.deepcopy(model)
    twin(torch.randn(2, 1, 8, 8)).sum().backward()
    for layer in optimizer._layers.values():
        assert layer.rows is None
        assert layer.recorder.captures == []


class Largest(TorchDispatchMode):
    """The largest number of entries that any operation has put into memory."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, torch.Tensor):
                self.entries = max(self.entries, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("options", [{}, {"solver": FirstOrderSteps(local_rows=64)}, {"loss": "squared"}], ids=str)
@pytest.mark.parametrize("convolution", [nn.Conv2d, nn.ConvTranspose2d])
def test_patches_are_never_all_in_memory(convolution, options, monkeypatch):
    monkeypatch.setattr("torchloco.windows._BLOCK", 20_000)
    model = convolution(8, 8, 3, padding=1)
    optimizer = LocoProp(model, 1e-4, **options)
    x = torch.randn(16, 8, 16, 16)
    model(x).square().mean().backward()
    with Largest() as largest:
        optimizer.step()
    assert x.numel() <= largest.entries <= 1.3 * x.numel()  # the padded input; all patches are nine times as many


@pytest.mark.parametrize("solver", [FirstOrderSteps(), FirstOrderSteps(local_rows=8), Exact(), Anderson(), Newton()])
def test_an_empty_batch_changes_nothing(solver):
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose2d(4, 3, 3, 2))
    old = [p.detach().clone() for p in model.parameters()]
    optimizer = LocoProp(model, solver=solver, loss="squared")
    model(torch.randn(0, 2, 6, 6)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), old, strict=True))


def test_scaled_and_accumulated_gradients_are_followed():
    models = [cnn(torch.float64) for _ in range(2)]
    optimizers = [LocoProp(m, 1e-3, local_steps=3, solver=sgd(), output=nn.CrossEntropyLoss()) for m in models]
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    (0.5 * nn.functional.cross_entropy(models[0](x), y, reduction="sum")).backward()
    for part in (slice(0, 2), slice(2, 6)):
        nn.functional.cross_entropy(models[1](x[part]), y[part], reduction="sum").backward()
    for p in models[1].parameters():
        p.grad *= 0.5
    for optimizer in optimizers:
        optimizer.step()
    assert_close(*([p.detach() for p in model.parameters()] for model in models))


def test_lazy_layers_after_their_first_call():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.LazyConvTranspose2d(2, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="call the model once"):
        LocoProp(model)
    x = torch.randn(2, 1, 6, 6)
    model(x)
    optimizer = LocoProp(model, 1e-4)
    model(x).square().mean().backward()
    optimizer.step()
    assert [info.name for info in optimizer.layers] == ["0", "2", "4"]


def test_what_computes_something_else_is_no_layer():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Normalised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.norm(), bias)

    class Named(nn.Conv2d):
        pass

    assert not is_supported(Scaled(1, 1, 1))
    assert not is_supported(Normalised(1, 1, 1))
    assert not is_supported(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)))
    assert not is_supported(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1), "bias"))
    assert is_supported(Named(1, 1, 1))
    attention = nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
    assert [layer.name for layer in layers_of("a", attention)] == ["a.out_proj"]
    nn.utils.parametrizations.weight_norm(attention.out_proj)
    assert layers_of("a", attention) == []


def test_a_weight_that_is_computed_later_is_refused():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh())
    optimizer = LocoProp(model)
    nn.utils.parametrizations.weight_norm(model[0])
    model(torch.randn(2, 2, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="was replaced after LocoProp was built"):
        optimizer.step()


def test_output_size_of_a_transposed_convolution():
    conv = nn.ConvTranspose2d(2, 3, 3, 2, dtype=torch.float64)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x, output_size=[10, 9])

    model = Model()
    optimizer = LocoProp(model, 1e-3)
    model(torch.randn(2, 2, 4, 4, dtype=torch.float64)).relu_().square().sum().backward()
    optimizer.step()  # raises if rows and gradient disagree


@pytest.mark.parametrize("outer", [torch.optim.Muon, torch.optim.AdamW])
def test_outer_optimizers_see_the_parameters(outer):
    model = cnn()
    optimizer = LocoProp(model, 1e-4, output=nn.CrossEntropyLoss(), outer=outer)
    train(model, optimizer, 2)
    state = optimizer.state[model[0].weight]["outer"]
    assert state["exp_avg"].shape == model[0].weight.shape


def test_one_layer_of_ones_own(monkeypatch):
    """A weight of another shape, its units not last, in an operator that knows its blocks alone."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))

        def forward(self, x):
            return (x @ self.kernel).mT  # (B, units, L)

    class Halves(Inputs):
        def __init__(self, x):
            super().__init__(*x.shape)
            self.x = x

        def blocks(self):
            middle = self.n // 2
            yield slice(0, middle), self.x[None, :middle]
            yield slice(middle, self.n), self.x[None, middle:]

        def part(self, k, parts):
            return Dense(self.x[k::parts].contiguous())

        def to(self, dtype):
            return Halves(self.x.to(dtype))

        def matrix(self, weight):
            return weight.t()

        def shaped(self, matrix, shape):
            return matrix.t()

    class MixedLayer(Layer):
        weight_name, units = "kernel", -2

        @property
        def d_out(self):
            return self.weight.shape[1]

        def inputs(self, x, output):
            return Halves(x.flatten(0, -2))

    monkeypatch.setattr("torchloco.layers._kinds", {nn.Linear: LinearLayer})
    register_layer(Mixed, MixedLayer)
    torch.manual_seed(0)
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    model = nn.Sequential(Mixed(), nn.Tanh())
    same = nn.Sequential(nn.Linear(4, 3, bias=False, dtype=torch.float64), nn.Tanh())
    same[0].weight.data.copy_(model[0].kernel.t())
    for solver in (sgd(), sgd(local_rows=0.5), Newton(), Anderson()):
        for network in (model, same):
            optimizer = LocoProp(network, 1e-3, solver=solver)
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
            assert optimizer.layers[0].shape == (3, 4)
            optimizer.close()
        assert_close(model[0].kernel.t(), same[0].weight)


class Conv1D(nn.Module):
    """A linear layer with its weight transposed, as transformers has it."""

    def __init__(self, nf, nx):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


TRANSPOSED_SOLVERS = {
    "steps": lambda: sgd(),
    "some rows": lambda: sgd(local_rows=0.5),
    "low precision": lambda: sgd(local_dtype=torch.float32),
    "exact": lambda: Exact(0.1),
    "average": lambda: Exact(0.1, average=0.5),
    "cg": ConjugateGradient,
    "anderson": Anderson,
    "newton": Newton,
    "spectral": Spectral,
}


@pytest.mark.parametrize("loss", ["squared", "matching"])
@pytest.mark.parametrize("solver", TRANSPOSED_SOLVERS)
def test_transposed_weights_are_solved_for_as_linear_ones(solver, loss, monkeypatch):
    if loss == "matching" and solver in ("exact", "average", "cg"):
        return
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model = nn.Sequential(Conv1D(5, 4), nn.Tanh(), Conv1D(3, 5)).double()
    for k in (0, 2):
        model[k].weight.data.copy_(plain[k].weight.t())
        model[k].bias.data.copy_(plain[k].bias)
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64)  # of two micro-batches
    for network in (plain, model):
        optimizer = LocoProp(network, 1e-3, activation_lr=GAMMA, loss=loss, solver=TRANSPOSED_SOLVERS[solver]())
        for _ in range(2):
            optimizer.zero_grad()
            for part in x:
                network(part)[:, :-1].square().mean().backward()  # the last rows have no gradient
            optimizer.step()
        assert [info.shape for info in optimizer.layers] == [(5, 4), (3, 5)]
    for k in (0, 2):
        assert_close(model[k].weight.t(), plain[k].weight, rtol=1e-6, atol=1e-8)
        assert_close(model[k].bias, plain[k].bias, rtol=1e-6, atol=1e-8)


def test_registering_something_else_is_refused():
    with pytest.raises(TypeError, match="class of nn.Module first"):
        register_layer(nn.Linear(1, 1), LinearLayer)
    with pytest.raises(TypeError, match="class derived from torchloco.Layer second"):
        register_layer(nn.Linear, Dense)


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    class Wrong(LinearLayer):
        def inputs(self, x, output):
            return Dense(x[:, 0])

    monkeypatch.setattr("torchloco.layers._kinds", {})
    register_layer(nn.Linear, Wrong)
    model = nn.Linear(4, 3)
    optimizer = LocoProp(model)
    model(torch.randn(5, 6, 4)).square().sum().backward()
    with pytest.raises(RuntimeError, match="Wrong made 5 rows of its input and 30 of its output"):
        optimizer.step()


class Table(nn.Module):
    """Rows of a table, looked up by number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
        self.bias = None

    def forward(self, x):
        return self.weight.t()[x]


class TableLayer(Layer):
    def inputs(self, x, output):
        return Dense(nn.functional.one_hot(x.flatten(), 5).to(self.weight.dtype))


def test_a_layer_may_take_numbers_of_things(monkeypatch):
    """Its input's dtype is then no precision."""
    monkeypatch.setitem(_kinds, Table, None)  # forgotten afterwards
    register_layer(Table, TableLayer)
    model = nn.Sequential(Table(), nn.Tanh(), nn.Linear(3, 2, dtype=torch.float64))
    expected = copy.deepcopy(model)
    x = torch.tensor([[0, 1], [4, 1]])
    expected(x).square().sum().backward()
    torch.optim.SGD(expected.parameters(), 0.2).step()
    optimizer = LocoProp(model, 0.1, activation_lr=2.0, local_steps=1, solver=torch.optim.SGD)
    model(x).square().sum().backward()
    optimizer.step()
    assert [info.name for info in optimizer.layers] == ["0", "2"]
    assert_close(dict(model.named_parameters()), dict(expected.named_parameters()), rtol=1e-14, atol=1e-15)
