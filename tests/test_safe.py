"""safe=True: no solve leaves a local objective above its old value, and steps end when it no longer falls."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_combinations import LOSSES, make_task, solve
from torchloco import (
    FirstOrderSteps,
    GradientTarget,
    LocoProp,
    Loss,
    MirrorTarget,
    MomentumSteps,
    RMSProp,
    Solver,
    SquaredDistance,
)

OUTSIDE = partial(RMSProp, momentum=0.9, lr_outside=True)
SOLVERS = [*map(FirstOrderSteps, [torch.optim.SGD, torch.optim.Adam, RMSProp, OUTSIDE]), MomentumSteps()]


@given(
    lr=st.floats(1e-4, 1e6),
    loss=st.sampled_from(sorted(LOSSES)),
    transfer=st.sampled_from(["tanh", "relu", "sigmoid", "softmax", "identity"]),
    rows=st.integers(1, 40),
    solver=st.sampled_from(SOLVERS),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_learning_rate_can_make_it_worse(lr, loss, transfer, rows, solver, bias):
    target = GradientTarget() if loss == "squared" else MirrorTarget()
    task = make_task(LOSSES[loss], target, None, transfer, rows=rows, safe=True, bias=bias)
    task.lrs = [lr] * len(task.params)
    before = task.problem.value(task.problem.old).item()
    solve(solver, task)
    after = task.problem.value(task.values).item()
    assert all(p.isfinite().all() for p in task.params)
    assert after <= before + 1e-12 * abs(before)


class Wild(Solver):
    """Leaps somewhere; or to a place that is no number."""

    def __init__(self, leap):
        self.leap = leap

    def solve(self, task):
        for p in task.params:
            p.add_(self.leap)


@pytest.mark.parametrize("leap", [0.1, 1e6, math.nan, math.inf])
def test_any_solver_is_held_to_it(leap):
    task = make_task(LOSSES["matching"], MirrorTarget(), None, safe=True)
    before = task.problem.value(task.problem.old).item()
    solve(Wild(leap), task)
    assert task.problem.value(task.values).item() <= before


def test_steps_that_are_too_long_are_halved():
    """A rate at which plain steps diverge still lowers the objective."""
    values = {}
    for safe in (False, True):
        task = make_task(LOSSES["matching"], MirrorTarget(), None, "relu", safe=safe)
        task.lrs = [3 / float(torch.linalg.eigvalsh(task.problem.gram)[-1])] * 2
        before = task.problem.value(task.problem.old).item()
        solve(FirstOrderSteps(torch.optim.SGD, steps=30, schedule="constant"), task)
        values[safe] = task.problem.value(task.values).item() - before
    assert values[False] > 0 > values[True]


def test_steps_under_way_are_halved_too_where_lr_is_outside_of_them(monkeypatch: pytest.MonkeyPatch):
    task = make_task(LOSSES["matching"], MirrorTarget(), None, safe=True)
    task.lrs = [1e6] * 2
    taken: list[tuple[float, float]] = []

    def step(self: RMSProp) -> None:
        taken.append((self.param_groups[0]["lr"], self.param_groups[0]["weight"]))
        original(self)

    original = RMSProp.step
    monkeypatch.setattr(RMSProp, "step", step)
    solve(FirstOrderSteps(RMSProp, steps=4, momentum=0.9, lr_outside=True), task)
    assert taken == [(1e6, 1.0), (5e5, 0.75), (2.5e5, 0.5), (1.25e5, 0.25)]


def test_steps_end_when_the_objective_no_longer_falls(monkeypatch):
    task = make_task(LOSSES["squared"], GradientTarget(), None, safe=True)
    task.lrs = [0.5 / float(torch.linalg.eigvalsh(task.problem.gram)[-1])] * 2
    solver = FirstOrderSteps(torch.optim.SGD, steps=100_000, schedule="constant")
    steps = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, *a: steps.append(1) or step(self, *a))
    solve(solver, task)
    assert 3 < len(steps) < 1000


@pytest.mark.parametrize("rows", [2, 300], ids=["rows", "Gram form"])
def test_where_nothing_is_wrong_it_changes_nothing(rows):
    ends = []
    for safe in (False, True):
        task = make_task(LOSSES["squared"], GradientTarget(), None, rows=rows, safe=safe)
        assert task.problem.size.prefers_gram(3) == (rows == 300)
        task.lrs = [0.1 / float(torch.linalg.eigvalsh(task.problem.gram)[-1])] * 2
        solve(FirstOrderSteps(torch.optim.SGD, steps=3), task)
        ends.append([p.detach() for p in task.params])
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_an_inner_state_that_was_spoilt_starts_anew(mlp, batches, train):
    model = mlp()
    optimizer = LocoProp(model, 1e-3, safe=True)
    train(model, optimizer, batches(2))
    for p in model.parameters():
        optimizer.state[p]["solver"]["momentum"].fill_(math.inf)
    train(model, optimizer, batches(1))
    old = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, batches(1))
    for p, q in zip(model.parameters(), old, strict=True):
        assert torch.isfinite(p).all()
        assert not torch.equal(p, q)


def test_what_has_no_value_is_refused(mlp):
    class Valueless(Loss):
        def residual(self, a, target, transfer):
            return a - target

    class Pull:
        def gradient(self, new, old):
            return new

    with pytest.raises(ValueError, match="has no value"):
        LocoProp(mlp(), loss=Valueless(), target=GradientTarget(), safe=True)
    with pytest.raises(ValueError, match="has no value"):
        LocoProp(mlp(), regularizer=Pull(), safe=True)
    with pytest.raises(ValueError, match="has no value"):
        LocoProp(mlp(), regularizer=SquaredDistance(1.0) + Pull(), safe=True)
    LocoProp(mlp(), regularizer=Pull()).close()


def test_the_paper_preset_is_not_safe(mlp):
    assert not LocoProp(mlp()).safe
