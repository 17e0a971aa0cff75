"""Param groups: what they may list, what their options do, and that schedulers act on them."""

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from torchloco import FirstOrderSteps, LocoProp

PLAIN = FirstOrderSteps(torch.optim.SGD, schedule="constant")
"""The first local step moves by lr · activation_lr · gradient."""


def first_move(train, model, optimizer, data):
    """How far each parameter moved in one step, relative to its gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, data)
    return {name: ((before[name] - p.detach()).norm() / p.grad.norm()).item() for name, p in model.named_parameters()}


WAYS = {
    "parameters": lambda m: [
        {"params": list(m[0].parameters()), "lr": 1e-2},
        {"params": [*m[2].parameters(), *m[4].parameters()]},
    ],
    "generators": lambda m: [
        {"params": m[0].parameters(), "lr": 1e-2},
        {"params": (p for i in (2, 4) for p in m[i].parameters())},
    ],
    "named parameters": lambda m: [
        {"params": m[0].named_parameters(prefix="0"), "lr": 1e-2},
        {"params": [*m[2].parameters(), *m[4].parameters()]},
    ],
    "modules": lambda m: [{"params": m[0], "lr": 1e-2}, {"params": [m[2], m[4]]}],
    "layer names": lambda m: [{"params": "0", "lr": 1e-2}, {"params": ["2", "4"]}],
    "added later": None,
}


@pytest.mark.parametrize("way", WAYS)
def test_listed_by(way, mlp, batches, train, values, same):
    expected, model = mlp(), mlp()
    by_hand = [{"params": [p for n, p in expected.named_parameters() if n.startswith("0")], "lr": 1e-2}]
    by_hand.append({"params": [p for n, p in expected.named_parameters() if not n.startswith("0")]})
    train(expected, LocoProp(expected, lr=1e-3, params=by_hand), batches(3))
    if way == "added later":
        optimizer = LocoProp(model, lr=1e-3, params=["2", "4"])
        optimizer.add_param_group({"params": ["0"], "lr": 1e-2})
    else:
        optimizer = LocoProp(model, lr=1e-3, params=WAYS[way](model))
    assert sorted(g["lr"] for g in optimizer.param_groups) == [1e-3, 1e-2]
    train(model, optimizer, batches(3))
    assert same(values(model), values(expected))


def test_params_restrict(mlp, batches, train, values):
    model = mlp()
    optimizer = LocoProp(model, params=["2"])
    assert [info.name for info in optimizer.layers] == ["2"]
    before = values(model)
    train(model, optimizer, batches(2))
    after = values(model)
    assert all(torch.equal(before[n], after[n]) == (not n.startswith("2.")) for n in before)


def test_lr_and_activation_lr_scale_the_first_step(mlp, batches, train):
    model = mlp()
    groups = [
        {"params": "0"},
        {"params": "2", "lr": 1e-2},
        {"params": "4", "activation_lr": 0.5},
    ]
    optimizer = LocoProp(model, lr=1e-3, activation_lr=2.0, local_steps=1, solver=PLAIN, params=groups)
    moves = first_move(train, model, optimizer, batches(1))
    for layer, expected in {"0": 2e-3, "2": 2e-2, "4": 5e-4}.items():
        assert moves[f"{layer}.weight"] == pytest.approx(expected)
        assert moves[f"{layer}.bias"] == pytest.approx(expected)


def test_local_steps_of_a_group(mlp, batches, train, values, same):
    """A layer with one step in its group goes as in a run with one step for all; the other as in a run with five."""
    results = {}
    for steps in (1, 5, None):
        model = mlp(6, 4, 3)
        groups = None if steps else [{"params": "0", "local_steps": 1}, {"params": "2", "local_steps": 5}]
        train(model, LocoProp(model, lr=1e-2, local_steps=steps or 3, params=groups), batches(1))
        results[steps] = values(model)
    for name in results[None]:
        steps, other = (1, 5) if name.startswith("0") else (5, 1)
        assert torch.equal(results[None][name], results[steps][name])
        assert not torch.equal(results[None][name], results[other][name])


@pytest.mark.parametrize("order", [1, -1], ids=["weights first", "biases first"])
def test_biases_in_a_group_of_their_own(order, mlp, batches, train):
    model = mlp()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith("weight")]},
        {"params": [p for n, p in model.named_parameters() if n.endswith("bias")], "lr": 5e-3},
    ][::order]
    optimizer = LocoProp(model, lr=1e-3, activation_lr=1.0, local_steps=1, solver=PLAIN, params=groups)
    assert optimizer.fallback_parameters == []
    moves = first_move(train, model, optimizer, batches(1))
    for name, move in moves.items():
        assert move == pytest.approx(5e-3 if name.endswith("bias") else 1e-3)


def test_biases_of_their_own_same_options_change_nothing(mlp, batches, train, values, same):
    a, b = mlp(), mlp()
    split = [{"params": [p for n, p in b.named_parameters() if n.endswith(kind)]} for kind in ("weight", "bias")]
    train(a, LocoProp(a, lr=1e-3), batches(3))
    train(b, LocoProp(b, lr=1e-3, params=split), batches(3))
    assert same(values(a), values(b))


def test_one_problem_has_one_activation_lr(mlp):
    model = mlp()
    split = [{"params": [model[0].weight]}, {"params": [model[0].bias], "activation_lr": 1.0}]
    with pytest.raises(ValueError, match="layer '0'.*activation_lr"):
        LocoProp(model, params=split)


def test_without_biases_in_params_they_stay(mlp, batches, train, values):
    model = mlp()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    optimizer = LocoProp(model, lr=1e-3, params=weights)
    before = values(model)
    train(model, optimizer, batches(2))
    after = values(model)
    assert all(torch.equal(before[n], after[n]) == n.endswith("bias") for n in before)


def test_refused_group_changes_nothing(mlp, batches, train):
    model = mlp()
    optimizer = LocoProp(model, params=["0"])
    shown = repr(optimizer)
    for group, error in [
        ({"params": [model[2].weight, model[0].weight]}, "another param group"),
        ({"params": ["2"], "lr": -1.0}, "lr must be"),
        ({"params": ["2", "2"]}, "twice"),
        ({"params": ["5"]}, "no module of the model"),
    ]:
        with pytest.raises(ValueError, match=error):
            optimizer.add_param_group(group)
        assert repr(optimizer) == shown
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [model[2].bias]})  # its weight is in no group: not the layer's problem
    assert optimizer.fallback_parameters == ["2.bias"]
    train(model, optimizer, batches(1))


class WithNorm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(6, dtype=torch.float64)
        self.out = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x):
        return self.out(self.norm(x))


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_reach_layers_and_fallback(scheduler, batches, train):
    model = WithNorm()
    optimizer = LocoProp(
        model,
        lr=1e-3,
        activation_lr=1.0,
        local_steps=1,
        solver=PLAIN,
        fallback=lambda ps: torch.optim.SGD(ps, lr=0.1),
    )
    schedule = SCHEDULERS[scheduler](optimizer)
    for k, batch in enumerate(batches(3)):
        moves = first_move(train, model, optimizer, [batch])
        for name, move in moves.items():
            assert move == pytest.approx((1e-3 if name.startswith("out") else 0.1) * 0.5**k), (k, name)
        arguments = [1.0] if scheduler == "ReduceLROnPlateau" else []
        schedule.step(*arguments)
        if scheduler == "ReduceLROnPlateau" and k == 0:
            schedule.step(1.0)


def test_one_cycle(batches, train):
    model = WithNorm()
    optimizer = LocoProp(model, lr=1e-3)
    schedule = lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 1e-1], total_steps=6, cycle_momentum=False)
    seen = []
    for batch in batches(5):
        train(model, optimizer, [batch])
        seen.append([g["lr"] for g in optimizer.param_groups])
        schedule.step()
    peak = [max(lrs) for lrs in zip(*seen, strict=True)]
    assert all(0.5 * high < top <= high for top, high in zip(peak, [1e-2, 1e-1], strict=True))
    assert seen[0] != seen[1] != seen[-1]


def test_warm_up_from_zero(batches, train, values, same):
    """A schedule may set the rate to zero, as the authors' does in the first epoch."""
    model = WithNorm()
    optimizer = LocoProp(model, lr=1e-3, fallback=torch.optim.SGD)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch))
    before = values(model)
    train(model, optimizer, batches(1))
    assert same(values(model), before)
    schedule.step()
    train(model, optimizer, batches(1))
    assert not same(values(model), before)


def test_scheduler_resumes(batches, train):
    model = WithNorm()
    optimizer = LocoProp(model, lr=1e-3)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for batch in batches(3):
        train(model, optimizer, [batch])
        schedule.step()
    other = LocoProp(WithNorm(), lr=1e-3)
    resumed = lr_scheduler.CosineAnnealingLR(other, 10)
    other.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]
    assert [g["initial_lr"] for g in other.param_groups] == [1e-3, 1e-3]


def test_groups_are_shown(mlp):
    optimizer = LocoProp(mlp(), params=[{"params": "0", "lr": 2e-3}, {"params": ["2", "4"], "local_steps": 7}])
    text = repr(optimizer)
    assert "lr=0.002" in text
    assert "local_steps=7" in text


def test_a_model_that_has_grown(mlp, batches, train, values, same):
    """Modules that were not there when the optimizer was built are taken in by add_param_group."""
    whole, grown = mlp(), mlp()
    rest = [grown.pop(4), grown.pop(3)][::-1]
    optimizer = LocoProp(grown, lr=1e-3)
    grown.extend(rest)
    for model in (grown, whole):
        model.append(nn.LayerNorm(model[4].out_features, dtype=model[4].weight.dtype))
    optimizer.add_param_group({"params": grown[4].parameters()})
    optimizer.add_param_group({"params": ["5"]})
    assert [info.name for info in optimizer.layers] == ["0", "2", "4"]
    data = batches(3)
    assert train(grown, optimizer, data) == train(whole, LocoProp(whole, lr=1e-3), data)
    assert same(values(grown), values(whole))
