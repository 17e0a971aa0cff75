"""Steps in a metric that is renewed once per mini-batch: what they are, and that the cheap form is the same."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from test_combinations import LOSSES, make_task, solve
from test_zoo import build
from test_zoo import train as train_problem
from torchloco import Dense, GradientTarget, LocoProp, MirrorTarget, MomentumSteps, SquaredDistance, recipes
from torchloco.sampling import SampledGradients
from zoo import ZOO


class AsWritten(MomentumSteps):
    """Every gradient written to memory, then the recurrences of the docstring."""

    def _descend(self, task):
        steps, momentum, decay = self.steps or task.steps, self.options["momentum"], self.options["decay"]
        further = self._further(task.problem, steps - 1)
        kept = [task.inner.averages(p) for p in task.params]
        for j in range(steps):
            factor = self.schedule(j, steps)
            gradients = task.problem.first_gradient() if j == 0 else further(task.values, j)
            for p, (v, mean), g, lr in zip(task.params, kept, gradients, task.lrs, strict=True):
                mean.copy_(momentum * mean + (1 - momentum) * factor * g)
                p.sub_(lr * mean / (1 - momentum) / (v + self.options["epsilon"]).sqrt())
        for (v, _), g in zip(kept, gradients, strict=True):
            v.copy_(decay * v + (1 - decay) * g**2)
        return gradients


def solve_twice(solver, task):
    """The second solve goes on from what the first has kept; returns the weights after each."""
    task.inner = solver.attach(task.params, task.lrs[0])
    ends = []
    with torch.no_grad():
        for _ in range(2):
            for p, old in zip(task.params, task.problem.old, strict=True):
                p.copy_(old)
            solver.solve(task)
            ends.append(copy.deepcopy(task.values))
    return ends


@given(
    loss=st.sampled_from(sorted(LOSSES)),
    transfer=st.sampled_from(["tanh", "relu", "softmax", "identity"]),
    rows=st.integers(1, 40),
    bias=st.booleans(),
    regularizer=st.sampled_from([None, SquaredDistance(0.5)]),
    local_rows=st.sampled_from([1.0, 0.3, 1, 4]),
    steps=st.integers(1, 5),
    momentum=st.sampled_from([0.01, 0.5, 0.998]),
)
@settings(max_examples=60, deadline=None)
def test_equals_the_recurrences(loss, transfer, rows, bias, regularizer, local_rows, steps, momentum):
    ends = []
    for kind in (MomentumSteps, AsWritten):
        target = GradientTarget() if loss == "squared" else MirrorTarget()
        task = make_task(LOSSES[loss], target, regularizer, transfer, rows=rows, bias=bias)
        solver = kind(steps, momentum=momentum, local_rows=local_rows, epsilon=1e-3)
        task.lrs = [0.02, 0.01][: len(task.params)]
        weights = itertools.chain(*solve_twice(solver, task))
        averages = itertools.chain(*(task.inner.averages(p) for p in task.params))
        ends.append([*weights, *averages])
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["mlp", *(name for name in sorted(ZOO) if "conv" in name or "transformer" in name)])
def test_equals_the_recurrences_on_models_of_other_kinds(name):
    torch.set_default_dtype(torch.float64)
    try:
        ends = []
        for kind in (MomentumSteps, AsWritten):
            problem = build(name)
            solver = kind(3, local_rows=4)
            train_problem(problem, LocoProp(problem.model, 1e-4, solver=solver, output=problem.output), 3)
            ends.append([p.detach() for p in problem.model.parameters()])
    finally:
        torch.set_default_dtype(torch.float32)
    for got, want in zip(*ends, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_an_interrupted_solve_leaves_the_momentum_in_its_unit():
    def interrupted(j, steps):
        if j == 2:
            raise KeyboardInterrupt
        return 1.0

    kept = []
    for kind in (MomentumSteps, AsWritten):
        task = make_task(LOSSES["matching"], MirrorTarget(), None)
        with pytest.raises(KeyboardInterrupt):
            solve(kind(5, interrupted, local_rows=4, momentum=0.7), task)
        kept.append([*itertools.chain(*(task.inner.averages(p) for p in task.params))])
    torch.testing.assert_close(*kept, rtol=1e-10, atol=1e-14)


class Permuted(Dense):
    """Rows that meet a weight whose matrix is a copy."""

    def matrix(self, weight):
        return weight.flip(1)

    def shaped(self, matrix, shape):
        return matrix.flip(1)


def test_a_matrix_that_is_a_copy():
    ends = []
    for kind in (MomentumSteps, AsWritten):
        task = make_task(LOSSES["matching"], MirrorTarget(), None)
        task.problem.rows.inputs = Permuted(task.problem.rows.x.flip(1))
        task.lrs = [0.02, 0.01]
        ends.append(solve_twice(kind(4, local_rows=4), task)[1])
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("momentum", "rows"), [(0.998, 1), (0.5, 64)])
def test_float16_momentum_stays_in_range(momentum, rows):
    """Plain sums of such gradients overflow, and so would a mean that is not shrunk in every step."""
    ends = []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3).to(dtype)
        solver = MomentumSteps(None, "constant", momentum=momentum, local_rows=8)
        optimizer = LocoProp(layer, 1e-4, activation_lr=1.0, output="sigmoid", solver=solver)
        for _ in range(60):
            optimizer.zero_grad()
            (300 / rows * layer(torch.ones(rows, 4, dtype=dtype))).sum().backward()
            optimizer.step()
        ends.append([p.detach().float() for p in layer.parameters()])
    torch.testing.assert_close(*ends, rtol=0.1, atol=0.05)


def test_the_momentum_of_many_short_lived_steps_stays_in_range():
    """0.01 to the power of 200 is no float64."""
    ends = []
    for kind in (MomentumSteps, AsWritten):
        task = make_task(LOSSES["matching"], MirrorTarget(), None)
        ends.append(solve_twice(kind(200, momentum=0.01, local_rows=4), task)[1])
    assert all(p.isfinite().all() for p in ends[0])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lr", [1e155, 1e-3])
def test_a_safe_solve_renews_the_metric_where_it_ends(lr):
    """At the first rate nowhere: the first steps are infinitely bad, and the state begins anew amid the solve."""
    task = make_task(LOSSES["squared"], GradientTarget(), None, safe=True)
    task.lrs = [lr, lr]
    solve(MomentumSteps(10, decay=0.9), task)
    assert torch.equal(task.values[0], task.problem.old[0]) == (lr > 1)
    for p, g in zip(task.params, task.problem.gradient(task.values), strict=True):
        torch.testing.assert_close(task.inner.averages(p)[0], 0.9 + 0.1 * g**2, rtol=1e-9, atol=0)


def test_dense_rows_write_no_gradient_but_the_last(monkeypatch, mlp, batches, train):
    written, gradient = [], SampledGradients.gradient
    monkeypatch.setattr(SampledGradients, "gradient", lambda *a: written.append(a[2]) or gradient(*a))
    model = mlp()
    train(model, LocoProp(model, 1e-3, solver=MomentumSteps(7, local_rows=2)), batches(3))
    assert set(written) == {6}


def test_the_metric_is_renewed_once_per_mini_batch(mlp, batches, train):
    """After T steps v = decay · 1 + (1 - decay) · (the last gradient)², whatever T is."""
    kept = {}
    for steps in (1, 7):
        model = mlp()
        optimizer = LocoProp(model, 1e-3, solver=MomentumSteps(steps, decay=0.8))
        train(model, optimizer, batches(1))
        kept[steps] = [optimizer.state[p]["solver"]["mean_square"] for p in model.parameters()]
        if steps == 1:
            expected = [
                0.8 + 0.2 * (optimizer.param_groups[0]["activation_lr"] * p.grad) ** 2 for p in model.parameters()
            ]
            torch.testing.assert_close(kept[1], expected)
    assert all((v >= 0.8).all() and (v < 1).any() for v in kept[7])


def test_without_state_every_mini_batch_begins_anew():
    for keep_state in (False, True):
        task = make_task(LOSSES["matching"], MirrorTarget(), None)
        task.lrs = [0.01, 0.01]
        (first, _), (second, _) = solve_twice(MomentumSteps(3, keep_state=keep_state), task)
        assert torch.equal(first, second) != keep_state


def test_lr_rescales_the_steps_under_way(mlp, batches, train, values):
    """Lr is outside of the momentum: at lr 0 nothing moves."""
    model = mlp()
    optimizer = LocoProp(model, 0.01, solver=MomentumSteps())
    train(model, optimizer, batches(2))
    before = values(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, batches(1))
    torch.testing.assert_close(values(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [2, 300])
def test_a_safe_solve_that_finds_nothing_wrong_is_the_same(rows):
    ends = []
    for safe in (False, True):
        task = make_task(LOSSES["squared"], GradientTarget(), None, rows=rows, safe=safe)
        task.lrs = [1e-5, 1e-5]
        solve(MomentumSteps(4), task)
        ends.append(task.values)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("momentum", 0, ValueError),
        ("momentum", 1.0, ValueError),
        ("momentum", "much", TypeError),
        ("decay", 1, ValueError),
        ("decay", -0.1, ValueError),
        ("epsilon", 0.0, ValueError),
        ("epsilon", float("nan"), ValueError),
        ("steps", 0, ValueError),
        ("schedule", "steep", ValueError),
        ("local_rows", 0, ValueError),
        ("local_dtype", torch.int8, TypeError),
    ],
)
def test_bad_values_are_refused(option, value, error):
    with pytest.raises(error, match=option):
        MomentumSteps(**{option: value})


def test_repr_says_how_it_was_made():
    assert repr(MomentumSteps()) == "MomentumSteps(momentum=0.998, decay=0.98, epsilon=1e-05)"
    other = MomentumSteps(5, "cosine", local_rows=48, local_dtype=torch.bfloat16, keep_state=False)
    assert repr(other) == (
        "MomentumSteps(steps=5, schedule=cosine, momentum=0.998, decay=0.98, epsilon=1e-05, local_rows=48, "
        "local_dtype=torch.bfloat16, keep_state=False)"
    )


def test_a_state_of_other_steps_is_refused(mlp, batches, train):
    """RMSProp's v is that of all gradients: the same names, other numbers."""
    model = mlp()
    optimizer = LocoProp(model, solver=MomentumSteps())
    train(model, optimizer, batches(1))
    with pytest.raises(ValueError, match="MomentumSteps"):
        LocoProp(mlp()).load_state_dict(optimizer.state_dict())


def test_the_recipe_takes_them():
    optimizer = recipes.locoprop_m_normalized(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    assert type(optimizer.solver) is MomentumSteps
