"""`step(closure)` evaluates the closure once, with gradients, and returns its loss."""

import pytest
import torch
from torch import nn

from torchloco import LocoProp


def test_equals_the_plain_loop(mlp, batches, train, values, same):
    plain, model = mlp(), mlp()
    data = batches(4)
    expected = train(plain, LocoProp(plain, lr=1e-3), data)
    optimizer = LocoProp(model, lr=1e-3)
    losses, calls = [], []
    for x, y in data:

        def closure(x=x, y=y):
            assert torch.is_grad_enabled()
            calls.append(1)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses == expected
    assert len(calls) == len(data)
    assert same(values(model), values(plain))


def test_inside_no_grad(mlp, batches):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    [(x, y)] = batches(1)
    before = model[0].weight.detach().clone()

    def closure():
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        optimizer.step(closure)
    assert not torch.equal(model[0].weight, before)


def test_without_closure_returns_none(mlp, batches):
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    assert optimizer.step() is None


def test_error_in_the_closure_changes_nothing(mlp, batches, train, values, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)

    def closure():
        raise KeyError("no such batch")

    before = values(model)
    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert same(values(model), before)
    train(model, optimizer, batches(1))
    assert not same(values(model), before)


def test_step_hooks_run(mlp, batches, train):
    model = mlp()
    optimizer = LocoProp(model)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, batches(1))
    assert calls == ["before", "after"]
