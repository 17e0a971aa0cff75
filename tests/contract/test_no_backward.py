"""A step without a backward pass changes nothing."""

import pytest
import torch
from torch import nn

from torchloco import LocoProp


@pytest.fixture
def model(mlp):
    return nn.Sequential(mlp(6, 5), nn.LayerNorm(5, dtype=torch.float64), mlp(5, 3, seed=1))


def test_before_any_pass(model, values, same):
    optimizer = LocoProp(model)
    before = values(model)
    assert optimizer.step() is None
    assert same(values(model), before)


def test_after_a_forward_alone(model, batches, values, same):
    optimizer = LocoProp(model)
    before = values(model)
    model(batches(1)[0][0])
    optimizer.step()
    assert same(values(model), before)


def test_after_zero_grad(model, batches, train, values, same):
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    before = values(model)
    optimizer.step()  # neither momentum nor weight decay may move anything
    assert same(values(model), before)


def test_layers_out_of_the_pass_stay(mlp, batches, values):
    model = nn.ModuleDict({"a": mlp(6, 4, 3), "b": mlp(6, 4, 3, seed=1)})
    optimizer = LocoProp(model, lr=1e-3)
    [(x, y)] = batches(1)
    before = values(model)
    nn.functional.mse_loss(model["a"](x), y).backward()
    optimizer.step()
    after = values(model)
    assert all(torch.equal(before[n], after[n]) == n.startswith("b") for n in before)
