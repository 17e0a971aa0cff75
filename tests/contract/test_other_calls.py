"""Weights that come from elsewhere: functional_call, torch.func and parametrizations are right, or refused."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations
from torch.testing import assert_close

from torchloco import LocoProp


def test_functional_call_with_its_own_parameters(mlp, batches, train, values, same):
    """As some libraries wrap a forward pass: the parameters are the model's own."""
    plain, model = mlp(), mlp()
    data = batches(3)
    losses = train(plain, LocoProp(plain, lr=1e-3), data)

    def called(x):
        return functional_call(model, dict(model.named_parameters()), (x,))

    optimizer = LocoProp(model, lr=1e-3)
    got = []
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(called(x), y)
        loss.backward()
        optimizer.step()
        got.append(loss.item())
    assert got == losses
    assert same(values(model), values(plain))


def test_functional_call_with_other_parameters_leaves_nothing(mlp, batches, train, values, same):
    """As for MAML's inner loop, an EMA teacher, or an ensemble: their gradients are not the model's."""
    plain, model = mlp(), mlp()
    data = batches(3)
    losses = train(plain, LocoProp(plain, lr=1e-3), data)
    optimizer = LocoProp(model, lr=1e-3)
    got = []
    for batch in data:
        fast = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        nn.functional.mse_loss(functional_call(model, fast, (batch[0],)), batch[1]).backward()
        got += train(model, optimizer, [batch])
    assert got == losses
    assert same(values(model), values(plain))


def test_torch_func_grad_leaves_nothing(mlp, batches, train, values, same):
    plain, model = mlp(), mlp()
    data = batches(2)
    losses = train(plain, LocoProp(plain, lr=1e-3), data)
    optimizer = LocoProp(model, lr=1e-3)
    x, y = data[0]

    def loss_of(parameters):
        return nn.functional.mse_loss(functional_call(model, parameters, (x,)), y)

    grad(loss_of)({name: p.detach() for name, p in model.named_parameters()})
    assert train(model, optimizer, data) == losses
    assert same(values(model), values(plain))


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_before_trains(wrap, mlp, batches, train, values):
    model = mlp()
    wrap(model[2])
    optimizer = LocoProp(model, lr=1e-3)
    assert [info.name for info in optimizer.layers] == ["0", "4"]
    losses = train(model, optimizer, batches(1) * 30)
    assert losses[-1] < losses[0]


def test_parametrization_removed_before_is_a_layer(mlp, batches, train):
    model = mlp()
    parametrizations.weight_norm(model[2])
    remove_parametrizations(model[2], "weight")
    optimizer = LocoProp(model, lr=1e-3)
    assert [info.name for info in optimizer.layers] == ["0", "2", "4"]
    train(model, optimizer, batches(2))


def test_gradient_penalty_is_refused(mlp, batches, values, same):
    """A double backward pass brings gradients that no rows explain."""
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    [(x, y)] = batches(1)
    x.requires_grad_()
    output = model(x)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    before = values(model)
    (nn.functional.mse_loss(output, y) + slope.square().sum()).backward()
    with pytest.raises(RuntimeError, match="does not belong to the captured rows"):
        optimizer.step()
    assert same(values(model), before)


def test_jacobians_by_vmap_leave_nothing(mlp, batches, train, values):
    plain, model = mlp(), mlp()
    data = batches(2)
    losses = train(plain, LocoProp(plain, lr=1e-3), data)
    optimizer = LocoProp(model, lr=1e-3)
    with torch.no_grad():
        torch.vmap(model)(data[0][0])
    assert_close(train(model, optimizer, data), losses, rtol=1e-12, atol=1e-14)


def test_other_parameters_made_of_the_models_are_refused(mlp, batches, values, same):
    """The gradient flows to the weights, but not from rows of theirs."""
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    [(x, y)] = batches(1)
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    before = values(model)
    nn.functional.mse_loss(functional_call(model, doubled, (x,)), y).backward()
    with pytest.raises(RuntimeError, match="no captured rows: 0"):
        optimizer.step()
    assert same(values(model), before)


def test_parametrized_afterwards_is_refused(mlp, batches, values, train, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(1))
    parametrizations.weight_norm(model[2])
    before = values(model)
    [(x, y)] = batches(1)
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(RuntimeError, match="build LocoProp afterwards"):
        optimizer.step()
    assert same(values(model), before)


def test_other_parameters_before_accumulation(mlp, batches, values):
    """Whose weights come first does not matter to the hooks."""
    whole, parts = mlp(), mlp()
    optimizers = [LocoProp(m, lr=1e-3) for m in (whole, parts)]
    [(x, y)] = batches(1, rows=8)
    fast = {name: p.detach().clone().requires_grad_() for name, p in parts.named_parameters()}
    nn.functional.mse_loss(functional_call(parts, fast, (x,)), y).backward()
    nn.functional.mse_loss(whole(x), y, reduction="sum").backward()
    for part_x, part_y in zip(x.chunk(4), y.chunk(4), strict=True):
        nn.functional.mse_loss(parts(part_x), part_y, reduction="sum").backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_close(values(parts), values(whole), rtol=1e-9, atol=1e-12)
