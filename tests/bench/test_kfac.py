"""K-FAC of the benchmark: its factors, its step, and that it goes on from its state."""

from copy import deepcopy
from math import inf

import pytest
import torch
from torch import nn

from locobench import problems
from locobench.kfac import KFAC
from locobench.stepping import take_step

pytest.importorskip("curvlinops")

BATCH = torch.rand(12, 6, generator=torch.Generator().manual_seed(1)).double()


def autoencoder() -> problems.Autoencoder:
    torch.manual_seed(0)
    return problems.Autoencoder(6, [5, 3], "tanh").double()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [
        torch.cat([module.weight.detach(), module.bias.detach()[:, None]], 1)
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]


def test_the_first_step_is_the_formula():
    model, damping, lr = autoencoder(), 0.3, 0.01
    optimizer = KFAC(model, lr, damping=damping, clip=inf)
    before = weights(model)
    expected_loss = problems.loss(model(BATCH), BATCH).item()
    assert take_step(model, optimizer, BATCH).item() == pytest.approx(expected_loss)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for old, new, linear in zip(before, weights(model), linears, strict=True):
        state = optimizer.state[linear.weight]
        a, b = state["a"], state["b"]
        ratio = (a.diagonal().mean() / b.diagonal().mean()).sqrt()
        a = a + damping**0.5 * ratio * torch.eye(len(a)).double()
        b = b + damping**0.5 / ratio * torch.eye(len(b)).double()
        gradient = torch.cat([linear.weight.grad, linear.bias.grad[:, None]], 1)
        torch.testing.assert_close(b @ (old - new) / lr @ a, gradient, rtol=1e-8, atol=1e-10)


def test_factors_are_means_over_images_and_renewals():
    model = autoencoder()
    optimizer = KFAC(model, 1e-9, every=1)
    first = model.encoder[0].weight
    take_step(model, optimizer, BATCH)
    ones = torch.ones(12, 1).double()
    x = torch.cat([BATCH, ones], 1)
    torch.testing.assert_close(optimizer.state[first]["a"], x.t() @ x / 12)
    take_step(model, optimizer, 2 * BATCH)
    y = torch.cat([2 * BATCH, ones], 1)
    torch.testing.assert_close(optimizer.state[first]["a"], (x.t() @ x + y.t() @ y) / 24)


def test_output_factor_is_the_fisher():
    """Of a sampled Bernoulli label the gradient at a logit has variance p (1 - p)."""
    model, batch = autoencoder(), BATCH.repeat(400, 1)
    optimizer = KFAC(model, 1e-9)
    p = model(batch).sigmoid().detach()
    take_step(model, optimizer, batch)
    b = optimizer.state[model.decoder[-1].weight]["b"]
    torch.testing.assert_close(b.diagonal(), (p * (1 - p)).mean(0), rtol=0.1, atol=0)


def test_a_long_step_is_shortened():
    model = autoencoder()
    free, clipped = (KFAC(autoencoder(), 1.0, damping=1e-3, momentum=0.0, clip=clip) for clip in (inf, 1e-2))
    moved = []
    for optimizer in (free, clipped):
        take_step(optimizer._model, optimizer, BATCH)
        moved.append([new - old for new, old in zip(weights(optimizer._model), weights(model), strict=True)])
    factors = [(short / long) for long, short in zip(*moved, strict=True)]
    for factor in factors:
        torch.testing.assert_close(factor, torch.full_like(factor, factors[0][0, 0].item()))
    assert factors[0][0, 0] < 1
    gradients = [
        torch.cat([m.weight.grad, m.bias.grad[:, None]], 1)
        for m in clipped._model.modules()
        if isinstance(m, nn.Linear)
    ]
    length = sum((-m * g).sum() for m, g in zip(moved[0], gradients, strict=True))
    assert float(factors[0][0, 0] ** 2 * length) == pytest.approx(1e-2)


def test_it_goes_on_from_its_state():
    whole = autoencoder()
    optimizer = KFAC(whole, 1e-2, every=4)
    for _ in range(6):
        take_step(whole, optimizer, BATCH)
    saved = deepcopy(optimizer.state_dict())  # torch would share the tensors
    copy = autoencoder()
    copy.load_state_dict(whole.state_dict())
    other = KFAC(copy, 1e-2, every=4)
    other.load_state_dict(saved)
    for _ in range(6):
        take_step(whole, optimizer, BATCH)
        take_step(copy, other, BATCH)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(copy), strict=True))
