"""Each recipe equals the algorithm it is named after, as that is defined elsewhere."""

import copy

import pytest
import torch
from torch import nn

from torchloco import (
    ConjugateGradient,
    Exact,
    FirstOrderSteps,
    LocoProp,
    MomentumTarget,
    SquaredDistance,
    recipes,
)


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


def test_exponentiated_gradient_moves_negative_weights_by_their_magnitude():
    model = network()
    old = [p.detach().clone() for p in model.parameters()]
    x, y = batch(3)
    grads = gradients(model, x, y)
    optimizer = recipes.exponentiated_gradient(model, 0.5, output="identity")
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    for p, w, g in zip(model.parameters(), old, grads, strict=True):
        torch.testing.assert_close(p.detach().abs(), w.abs() * torch.exp(-0.5 * g * w.sign()), rtol=1e-12, atol=1e-14)
        assert torch.equal(p.sign(), w.sign())


def test_exponentiated_gradient_refuses_weights_that_could_not_move():
    model = network()
    nn.init.zeros_(model[2].bias)
    optimizer = recipes.exponentiated_gradient(model, 0.5)
    old = [p.detach().clone() for p in model.parameters()]
    x, y = batch(3)
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(ValueError, match="are zero"):
        optimizer.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], old, rtol=0, atol=0)


def test_sgd_momentum():
    ours, theirs = network(), network()
    got = train(ours, recipes.sgd_momentum(ours, 0.3, 0.8, output="identity"), steps=5)
    want = train(theirs, torch.optim.SGD(theirs.parameters(), 0.3, momentum=0.8), steps=5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_momentum_target_gives_the_biases_the_gradients_of_sgd_with_momentum(loss):
    """Before each step the second network takes the weights of the first, and keeps its momentum buffers."""
    ours, theirs = network(), network()
    solver = FirstOrderSteps(torch.optim.SGD, schedule="constant")
    optimizer = LocoProp(
        ours, 0.3, activation_lr=1.0, local_steps=1, loss=loss, target=MomentumTarget(0.8), solver=solver
    )
    momentum = torch.optim.SGD(theirs.parameters(), 0.3, momentum=0.8)
    for k in range(4):
        with torch.no_grad():
            for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
                p.copy_(q)
        x, y = batch(k, rows=7 + k)
        for model, each in ((ours, optimizer), (theirs, momentum)):
            each.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            each.step()
        for layer in (0, 2):
            torch.testing.assert_close(ours[layer].bias, theirs[layer].bias, rtol=1e-12, atol=1e-14)


def test_momentum_target_is_sgd_with_momentum_where_the_input_is_constant():
    results = []
    for make in (
        lambda model: LocoProp(
            model,
            0.3,
            activation_lr=1.0,
            local_steps=1,
            target=MomentumTarget(0.8),
            solver=FirstOrderSteps(torch.optim.SGD, schedule="constant"),
            output="identity",
        ),
        lambda model: torch.optim.SGD(model.parameters(), 0.3, momentum=0.8),
    ):
        torch.manual_seed(0)
        model = nn.Linear(5, 3).double()
        optimizer = make(model)
        x = torch.linspace(-1, 1, 5, dtype=torch.float64).expand(7, 5)
        for k in range(6):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), batch(k)[1]).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_conjugate_gradients_and_exact_agree_in_a_whole_run():
    ours, theirs = network(), network()
    kwargs = {"loss": "squared", "activation_lr": 5.0, "output": "identity"}
    got = train(
        ours, LocoProp(ours, solver=ConjugateGradient(50, tolerance=1e-14), regularizer=SquaredDistance(0.1), **kwargs)
    )
    want = train(theirs, LocoProp(theirs, solver=Exact(0.1, relative=False), **kwargs))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_locoprop_s_exact_and_anderson_recipes():
    for make in (recipes.locoprop_s_exact, recipes.locoprop_m_anderson):
        model = network()
        x, y = batch(0, rows=40)
        optimizer = make(model, 3.0)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_what_makes_a_recipe_is_not_an_option_of_it():
    with pytest.raises(TypeError, match=r"recipes\.locoprop_m_normalized chooses loss, target itself"):
        recipes.locoprop_m_normalized(network(), loss="squared", target=None)
    with pytest.raises(TypeError, match=r"recipes\.foof chooses solver itself"):
        recipes.foof(network(), 0.1, 0.1, solver=Exact())
    with pytest.raises(TypeError, match=r"recipes\.spectral has no use for activation_lr, local_steps"):
        recipes.spectral(network(), activation_lr=1.0, local_steps=3)
    with pytest.raises(ValueError, match="at most 1, the mean distance of the targets"):
        recipes.locoprop_m_normalized(network(), activation_lr=10.0)
