"""Hooks live as long as the optimizer that needs them, and no longer."""

import gc

import pytest
import torch
from torch import nn

from torchloco import FirstOrderSteps, LocoProp


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_close_takes_the_hooks_off(mlp, batches, train, values, same):
    model = mlp()
    optimizer = LocoProp(model)
    assert hooks(model) > 0
    train(model, optimizer, batches(1))
    optimizer.close()
    optimizer.close()
    assert hooks(model) == 0
    before = values(model)
    with pytest.raises(RuntimeError, match="closed.*build a new one"):
        optimizer.step()
    assert same(values(model), before)


def test_garbage_collection_takes_the_hooks_off(mlp, batches, train):
    model = mlp()
    optimizer = LocoProp(model)
    train(model, optimizer, batches(2))
    del optimizer
    gc.collect()
    assert hooks(model) == 0
    train(model, LocoProp(model), batches(1))


def test_collected_in_the_middle_of_a_pass(mlp, batches):
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    loss = nn.functional.mse_loss(model(x), y)
    del optimizer
    gc.collect()
    loss.backward()
    assert model[0].weight.grad is not None


def test_second_optimizer_is_refused(mlp, batches, train):
    model = mlp()
    first = LocoProp(model, lr=1e-3)
    count = hooks(model)
    with pytest.raises(RuntimeError, match=r"attached to another LocoProp.*close\(\)"):
        LocoProp(model)
    gc.collect()
    assert hooks(model) == count
    before = model[0].weight.detach().clone()
    train(model, first, batches(1))
    assert not torch.equal(model[0].weight, before)


def test_after_close_another_may_follow(mlp, batches, train, values, same):
    model, fresh = mlp(), mlp()
    LocoProp(model).close()
    data = batches(2)
    second = LocoProp(model, lr=1e-3)
    assert train(model, second, data) == train(fresh, LocoProp(fresh, lr=1e-3), data)
    assert same(values(model), values(fresh))


BROKEN = {
    "second group out of range": {"params": [{"params": ["0"]}, {"params": ["2"], "lr": -1.0}]},
    "parameter in two groups": {"params": [{"params": ["0"]}, {"params": ["0", "2"]}]},
    "inner optimizer's option": {"solver": FirstOrderSteps(torch.optim.SGD, momentum=-1.0)},
}


@pytest.mark.parametrize("fault", BROKEN)
def test_refused_construction_leaves_the_model_free(fault, mlp, batches, train):
    model = mlp()
    with pytest.raises(ValueError) as kept:  # noqa: PT011 - kept alive, as an interactive session keeps the last one
        LocoProp(model, **BROKEN[fault])
    train(model, LocoProp(model), batches(1))
    assert kept.value is not None


def test_works_with_layers_called_by_keyword(mlp, batches, train, values, same):
    class Keyword(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            for module in self.body:
                x = module(input=x)
            return x

    a, b = mlp(), mlp()
    wrapped = Keyword(b)
    assert train(a, LocoProp(a, lr=1e-3), batches(2)) == train(wrapped, LocoProp(wrapped, lr=1e-3), batches(2))
    assert same(values(a), values(b))
