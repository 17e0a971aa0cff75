"""Each recipe equals the algorithm it is named after, as that is defined elsewhere."""

import copy

import pytest
import torch
from torch import nn

from torchloco import LocoProp, RelativeEntropy, SquaredDistance, WeightDecay, recipes


def network(positive=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    if positive:
        with torch.no_grad():
            for p in model.parameters():
                p.abs_()
    return model


def batch(seed, rows=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator).double(), torch.randn(rows, 3, generator=generator).double()


def train(model, optimizer, steps=3, criterion=nn.functional.mse_loss):
    for k in range(steps):
        x, y = batch(k)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def gradients(model, x, y):
    return torch.autograd.grad(nn.functional.mse_loss(model(x), y), list(model.parameters()))


def test_backprop_is_sgd():
    ours, theirs = network(), network()
    got = train(ours, recipes.backprop(ours, 0.3, output="identity"))
    torch.testing.assert_close(got, train(theirs, torch.optim.SGD(theirs.parameters(), 0.3)), rtol=1e-12, atol=1e-14)


def test_proximal_step_in_the_squared_distance_is_sgd():
    ours, theirs = network(), network()
    from torchloco import ProximalStep

    optimizer = LocoProp(ours, activation_lr=0.6, regularizer=SquaredDistance(2.0), solver=ProximalStep())
    got = train(ours, optimizer)
    torch.testing.assert_close(got, train(theirs, torch.optim.SGD(theirs.parameters(), 0.3)), rtol=1e-12, atol=1e-14)


def test_foof():
    """W - lr · ∂L/∂W · (C + λI)⁻¹ with an inverse that is written out, on the layer's own input."""
    model = network()
    x, y = batch(0)
    before = copy.deepcopy(model)
    grads = gradients(before, x, y)
    optimizer = recipes.foof(model, 0.7, 0.2, output="identity")
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    inputs = [x, before[1](before[0](x)).detach()]
    for layer, old, rows, (gw, gb) in zip(
        [model[0], model[2]], [before[0], before[2]], inputs, [grads[:2], grads[2:]], strict=True
    ):
        ones = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        inverse = torch.linalg.inv(ones.t() @ ones + 0.2 * torch.eye(ones.shape[1], dtype=rows.dtype))
        change = torch.cat([gw, gb[:, None]], 1) @ inverse * 0.7
        torch.testing.assert_close(layer.weight, old.weight - change[:, :-1], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.bias, old.bias - change[:, -1], rtol=1e-9, atol=1e-11)


def test_implicit_sgd_is_the_proximal_point():
    """Its gradient vanishes: ∂L/∂W at the new weights + (W̃ - W) / lr = 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3)).double()
    before = copy.deepcopy(model)
    x, y = batch(1)
    optimizer = recipes.implicit_sgd(model, 40.0, output="identity")
    (nn.functional.mse_loss(model(x), y, reduction="sum") / 2).backward()
    optimizer.step()
    optimizer.zero_grad()
    (nn.functional.mse_loss(model(x), y, reduction="sum") / 2).backward()
    for p, old in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.grad, -(p - old).detach() / 40.0, rtol=1e-9, atol=1e-11)


def test_proxprop_solves_the_proximal_problem():
    ours, theirs = network(), network()
    x, y = batch(2)
    for model, optimizer in [
        (ours, recipes.proxprop(ours, 5.0, 2.0, iterations=30, output="identity")),
        (theirs, recipes.foof(theirs, 5.0, 0.5, output="identity")),
    ]:
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=1e-8, atol=1e-10)


def test_exponentiated_gradient():
    model = network(positive=True)
    old = [p.detach().clone() for p in model.parameters()]
    x, y = batch(3)
    grads = gradients(model, x, y)
    optimizer = recipes.exponentiated_gradient(model, 0.5, output="identity")
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    for p, w, g in zip(model.parameters(), old, grads, strict=True):
        torch.testing.assert_close(p.detach(), w * torch.exp(-0.5 * g), rtol=1e-12, atol=1e-14)


def test_exponentiated_gradient_refuses_other_weights():
    model = network()
    optimizer = recipes.exponentiated_gradient(model, 0.5)
    old = [p.detach().clone() for p in model.parameters()]
    x, y = batch(3)
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(ValueError, match="positive"):
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], old, rtol=0, atol=0)


@pytest.mark.parametrize(
    "regularizer",
    [SquaredDistance(0.3), WeightDecay(0.2), RelativeEntropy(0.7), SquaredDistance(0.3) + WeightDecay(2.0)],
)
def test_regularizers_gradient(regularizer):
    torch.manual_seed(0)
    old = torch.rand(4, 3, dtype=torch.float64) + 0.1
    new = (torch.rand(4, 3, dtype=torch.float64) + 0.1).requires_grad_()
    (expected,) = torch.autograd.grad(regularizer.value(new, old), new)
    torch.testing.assert_close(regularizer.gradient(new.detach(), old), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("regularizer", [None, WeightDecay(1.0), SquaredDistance(0.3) + WeightDecay(2.0)])
def test_proximal_step_refused(regularizer):
    from torchloco import ProximalStep

    with pytest.raises(ValueError, match="ProximalStep needs a regularizer"):
        LocoProp(network(), solver=ProximalStep(), regularizer=regularizer)
