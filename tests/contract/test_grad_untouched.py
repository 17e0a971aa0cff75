"""`.grad` is the user's: after a step it is what the backward pass left."""

import pytest
import torch
from torch import nn

from torchloco import FirstOrderSteps, LocoProp, RMSProp, SquaredDistance


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": "squared"},
        {"local_steps": 1},
        {"solver": torch.optim.Adam},
        {"solver": FirstOrderSteps(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1)},
        {"solver": FirstOrderSteps(RMSProp, momentum=0.0)},
        {"regularizer": SquaredDistance(0.5)},
        {"activation_lr": 1.0},
    ],
    ids=str,
)
def test_grad_is_identical(options, mlp, batches):
    model = nn.Sequential(mlp(6, 5), nn.LayerNorm(5, dtype=torch.float64), mlp(5, 3))
    optimizer = LocoProp(model, lr=1e-3, **options)
    for x, y in batches(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        before = {name: (p.grad, p.grad.clone(), p.grad._version) for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            grad, value, version = before[name]
            assert p.grad is grad, name
            assert torch.equal(p.grad, value), name
            assert p.grad._version == version, name


def test_restored_when_the_step_is_refused(mlp, batches):
    model = mlp()
    optimizer = LocoProp(model, lr=1e100, solver=torch.optim.SGD)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    before = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="diverged"):
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.grad is before[name][0]
        assert torch.equal(p.grad, before[name][1])
