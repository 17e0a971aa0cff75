"""Odd batches and modes: no rows at all, uneven ones, train and eval in turns, models on meta or loaded later."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp


def test_a_batch_without_rows_changes_nothing(mlp, values, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3, solver=torch.optim.SGD)
    before = values(model)
    model(torch.zeros(0, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert same(values(model), before)


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("order", [(0, 8), (8, 0), (3, 0, 5)])
def test_micro_batches_without_rows(order, loss, mlp, batches, values):
    """As experts see them that no token goes to."""
    whole, parts = mlp(), mlp()
    optimizers = [LocoProp(m, lr=1e-3, loss=loss) for m in (whole, parts)]
    [(x, y)] = batches(1, rows=8)
    nn.functional.mse_loss(whole(x), y, reduction="sum").backward()
    for part_x, part_y in zip(x.split(list(order)), y.split(list(order)), strict=True):
        nn.functional.mse_loss(parts(part_x), part_y, reduction="sum").backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_close(values(parts), values(whole), rtol=1e-9, atol=1e-12)


def test_train_and_eval_in_turns(batches, train, values, same):
    """Evaluations with gradients off, and even a forward pass in eval mode with gradients, leave training as it was."""

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()

    plain, model = build(), build()
    data = batches(4)
    losses = train(plain, LocoProp(plain, lr=1e-3), data)
    optimizer = LocoProp(model, lr=1e-3)
    got = []
    for batch in data:
        model.eval()
        with torch.no_grad():
            model(batch[0])
        nn.functional.mse_loss(model(batch[0]), batch[1])
        model.train()
        got += train(model, optimizer, [batch])
    assert got == losses
    assert same(values(model), values(plain))


def test_made_on_meta_and_materialised_before(mlp, batches, train, values, same):
    """As large models are loaded: to_empty and load_state_dict keep the modules."""
    plain, source = mlp(), mlp()
    data = batches(3)
    losses = train(plain, LocoProp(plain, lr=1e-3), data)
    with torch.device("meta"):
        model = mlp()
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    assert train(model, LocoProp(model, lr=1e-3), data) == losses
    assert same(values(model), values(plain))


def test_assigned_weights_are_refused_by_name(mlp, batches, train, values, same):
    """load_state_dict(assign=True) replaces the parameters that the optimizer holds."""
    model, other = mlp(), mlp(seed=1)
    optimizer = LocoProp(model, lr=1e-3)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"assign=True\)\); build LocoProp afterwards"):
        train(model, optimizer, batches(1))
    assert same(values(model), before)


def test_loaded_after_the_optimizer_is_built(mlp, batches, train, values, same):
    """load_state_dict writes into the parameters; the optimizer goes on with them."""
    plain, model = mlp(seed=1), mlp()
    optimizer = LocoProp(model, lr=1e-3)
    model.load_state_dict(plain.state_dict())
    data = batches(3)
    assert train(model, optimizer, data) == train(plain, LocoProp(plain, lr=1e-3), data)
    assert same(values(model), values(plain))
