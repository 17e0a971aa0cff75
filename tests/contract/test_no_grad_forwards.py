"""Forward passes that no backward pass follows leave no trace."""

import pytest
import torch

from torchloco import LocoProp


def in_eval_without_gradients(model, x):
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def without_gradients(model, x):
    with torch.no_grad():
        model(x)


def in_inference_mode(model, x):
    with torch.inference_mode():
        model(x)


def without_backward(model, x):
    model(x)


EXTRA = {f.__name__: f for f in (in_eval_without_gradients, without_gradients, in_inference_mode, without_backward)}


@pytest.mark.parametrize("extra", EXTRA)
def test_step_is_the_same(extra, mlp, batches, values, same):
    plain, model = mlp(), mlp()
    other = batches(1, rows=5, seed=9)[0][0]
    for m, visit in ((plain, lambda m, x: None), (model, EXTRA[extra])):
        optimizer = LocoProp(m, lr=1e-3)
        for x, y in batches(3):
            visit(m, other)
            optimizer.zero_grad()
            visit(m, other)
            loss = torch.nn.functional.mse_loss(m(x), y)
            visit(m, other)
            loss.backward()
            visit(m, other)
            optimizer.step()
    assert same(values(plain), values(model))


@pytest.mark.parametrize("extra", ["in_eval_without_gradients", "without_gradients", "in_inference_mode"])
def test_nothing_is_decided_or_kept(extra, mlp, batches, values, same):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    before = values(model)
    EXTRA[extra](model, batches(1)[0][0])
    optimizer.step()
    assert [info.transfer for info in optimizer.layers] == [None, None, None]
    assert same(values(model), before)


def test_eval_mode_with_gradients_trains(mlp, batches, train, values, same):
    """What counts is the gradient, not the module's mode."""
    a, b = mlp(), mlp()
    b.eval()
    assert train(a, LocoProp(a, lr=1e-3), batches(2)) == train(b, LocoProp(b, lr=1e-3), batches(2))
    assert same(values(a), values(b))
