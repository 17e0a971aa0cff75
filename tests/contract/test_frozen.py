"""A frozen parameter never changes, whatever momentum or weight decay would do to it."""

import pytest
import torch
from torch import nn

from torchloco import FirstOrderSteps, LocoProp


@pytest.fixture
def model(mlp):
    return nn.Sequential(mlp(6, 5), nn.Tanh(), nn.LayerNorm(5, dtype=torch.float64), mlp(5, 4, 3, seed=1))


def decaying(params):
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)


DECAYING_STEPS = FirstOrderSteps(torch.optim.SGD, momentum=0.9, weight_decay=0.5)


@pytest.mark.parametrize("solver", [None, DECAYING_STEPS], ids=["paper", "SGD with decay"])
@pytest.mark.parametrize("when", ["before", "after two steps"])
@pytest.mark.parametrize("frozen", [["0.0.weight", "0.0.bias"], ["2.weight", "2.bias"], ["3.2.weight", "3.2.bias"]])
def test_stays_while_the_others_move(frozen, when, solver, model, batches, train, values):
    if when == "before":
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
    optimizer = LocoProp(model, lr=1e-3, solver=solver, fallback=decaying)
    data = batches(4)
    if when != "before":
        train(model, optimizer, data[:2])
        optimizer.zero_grad()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
    before = values(model)
    train(model, optimizer, data[2:])
    after = values(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name


def test_frozen_parameters_are_in_no_group(model):
    model[0].requires_grad_(False)
    optimizer = LocoProp(model)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}
    assert "0.0" not in [info.name for info in optimizer.layers]


def test_frozen_bias_alone(batches, train, values):
    """The layer's problem then has the bias as a constant; at zero it is as if there were none."""
    results = []
    for bias in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64), nn.Tanh(), nn.Linear(5, 3, dtype=torch.float64))
        if not bias:
            model[0].bias = model[2].bias = None
        else:
            for layer in (model[0], model[2]):
                nn.init.zeros_(layer.bias).requires_grad_(False)
        optimizer = LocoProp(model, lr=1e-3)
        train(model, optimizer, batches(4))
        assert optimizer.fallback_parameters == []
        results.append(values(model))
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-12)
    assert not results[0]["0.bias"].any()


def test_bias_frozen_in_the_middle(mlp, batches, train, values):
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(2))
    optimizer.zero_grad()
    model[0].bias.requires_grad_(False)
    slots = optimizer.state[model[0].weight]["solver"]["mean_square"].clone()
    before = values(model)
    train(model, optimizer, batches(1))
    after = values(model)
    assert torch.equal(before["0.bias"], after["0.bias"])
    assert not torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(optimizer.state[model[0].weight]["solver"]["mean_square"], slots)
    assert not torch.equal(optimizer.state[model[0].weight]["solver"]["mean_square"], torch.ones_like(slots))


def test_frozen_weight_with_a_learnt_bias(mlp, batches, train, values):
    """Such a bias goes to the fallback optimizer."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = LocoProp(model, fallback=lambda ps: torch.optim.SGD(ps, lr=0.1))
    assert optimizer.fallback_parameters == ["0.bias"]
    before = values(model)
    train(model, optimizer, batches(1))
    assert torch.equal(model[0].weight, before["0.weight"])
    torch.testing.assert_close(model[0].bias.detach(), before["0.bias"] - 0.1 * model[0].bias.grad)


def test_unfrozen_by_add_param_group(mlp, batches, train, values, same):
    model, free = mlp(), mlp()
    model[0].requires_grad_(False)
    optimizer = LocoProp(model, lr=1e-3)
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": ["0"]})
    assert sorted(info.name for info in optimizer.layers) == ["0", "2", "4"]
    data = batches(3)
    assert train(model, optimizer, data) == train(free, LocoProp(free, lr=1e-3), data)
    assert same(values(model), values(free))


def test_unfrozen_in_the_middle(mlp, batches, train, values):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(2))
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 1e-2})
    before = values(model)
    train(model, optimizer, batches(2))
    after = values(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert {info.name: info.transfer.name for info in optimizer.layers}["0"] == "tanh"


def test_unfrozen_and_not_added_is_said_once(mlp, batches, train):
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(1))
    model[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"0.weight, 0.bias were frozen or not there when LocoProp was built") as said:
        train(model, optimizer, batches(3))
    assert len(said) == 1
    assert said[0].filename.endswith("conftest.py")  # where step() was called
    optimizer.add_param_group({"params": ["0"]})
    train(model, optimizer, batches(1))


def test_left_out_of_params_is_not_said(mlp, batches, train):
    model = mlp()
    train(model, LocoProp(model, lr=1e-3, params=[model[2], model[4]]), batches(2))
