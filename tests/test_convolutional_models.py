"""Models of convolutions: what is found in them, kept for them and refused."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from torchloco import (
    Anderson,
    Exact,
    FirstOrderSteps,
    LocoProp,
    Newton,
)
from torchloco.layers import is_supported, layers_of


def sgd(**options):
    return FirstOrderSteps(torch.optim.SGD, schedule="constant", **options)


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
