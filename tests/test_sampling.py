"""Local steps on some of the rows and in low precision: what they estimate, and how well."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from test_combinations import LOSSES, make_task, solve
from torchloco import FirstOrderSteps, GradientTarget, LocoProp, MirrorTarget, Size, SquaredDistance
from torchloco.sampling import SampledGradients

TARGETS = {"squared": GradientTarget(), "matching": MirrorTarget(), "post-activation": MirrorTarget()}


def moved(problem, by=0.3):
    generator = torch.Generator().manual_seed(5)
    return [p + by * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in problem.old]


def make_problem(loss, transfer="tanh", rows=24, bias=True, regularizer=None):
    return make_task(LOSSES[loss], TARGETS[loss], regularizer, transfer, rows=rows, bias=bias).problem


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transfer", ["tanh", "relu", "softmax", "identity"])
@pytest.mark.parametrize("regularizer", [None, SquaredDistance(0.5)], ids=["", "regularized"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 24])
def test_the_mean_over_the_parts_is_the_exact_gradient(loss, transfer, regularizer, bias, parts):
    problem = make_problem(loss, transfer, bias=bias, regularizer=regularizer)
    sampled = SampledGradients(problem, parts, torch.float64)
    new = moved(problem)
    exact = [g.clone() for g in problem.gradient(new)]
    estimates = [[g.clone() for g in sampled.gradient(new, j)] for j in range(1, parts + 1)]
    for k, want in enumerate(exact):
        torch.testing.assert_close(torch.stack([e[k] for e in estimates]).mean(0), want, rtol=1e-10, atol=1e-11)


@given(rows=st.integers(1, 30), parts=st.integers(1, 40), j=st.integers(0, 60), gram=st.booleans(), bias=st.booleans())
@settings(max_examples=60, deadline=None)
def test_at_the_old_weights_every_part_gives_the_exact_gradient(rows, parts, j, gram, bias):
    problem = make_problem("squared", rows=rows, bias=bias)
    got = SampledGradients(problem, parts, torch.float64, gram).gradient(problem.old, j)
    for g, want in zip(got, [g.clone() for g in problem.first_gradient()], strict=True):
        torch.testing.assert_close(g, want, rtol=1e-12, atol=1e-13)


def test_a_part_by_its_definition():
    """γ·∂L/∂W + parts · Σ (f(X W̃ᵀ + b̃) - f(X Wᵀ + b)) xᵀ over the rows k, k + parts, …; parts may differ in size."""
    problem = make_problem("matching", rows=11)
    new = moved(problem)
    x, weight, bias = problem.rows.x, problem.weight, problem.bias
    for j in range(5):
        rows = torch.arange(11) % 3 == j % 3
        delta = torch.tanh(x[rows] @ new[0].t() + new[1]) - torch.tanh(x[rows] @ weight.t() + bias)
        share = 3
        got = SampledGradients(problem, 3, torch.float64).gradient(new, j)
        want = problem.rows.g.t() @ x + share * delta.t() @ x[rows]
        torch.testing.assert_close(got[0], want, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(got[1], problem.rows.g.sum(0) + share * delta.sum(0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_gram_form_equals_all_rows(bias):
    problem = make_problem("squared", bias=bias)
    new = moved(problem)
    want = [g.clone() for g in problem.gradient(new)]
    for g, w in zip(SampledGradients(problem, 4, torch.float64, gram=True).gradient(new, 1), want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("loss", ["squared", "matching"])
@pytest.mark.parametrize("gram", [False, True])
def test_low_precision_rounds_only_the_change(loss, gram):
    """For a small displacement bfloat16's error is small against the change of the gradient, not the gradient."""
    problem = make_problem(loss, "identity" if gram else "tanh", rows=200)
    new = moved(problem, 1e-4)
    exact = problem.gradient(new)[0].clone()
    first = problem.first_gradient()[0].clone()
    got = SampledGradients(problem, 1, torch.bfloat16, gram).gradient(new, 1)[0]
    assert (got - exact).norm() < 0.02 * (exact - first).norm()


@pytest.mark.parametrize("loss", ["squared", "matching"])
@pytest.mark.parametrize("local_rows", [0.25, 50, 0.3, 1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sampled_steps_end_near_the_exact_ones(loss, local_rows, dtype):
    def end(**options):
        task = make_task(LOSSES[loss], TARGETS[loss], None, rows=200)
        task.lrs = [0.3 / float(torch.linalg.eigvalsh(task.problem.gram)[-1])] * 2
        solve(FirstOrderSteps(torch.optim.SGD, steps=10, **options), task)
        return torch.cat([(p - w).detach().flatten() for p, w in zip(task.params, task.problem.old, strict=True)])

    exact = end()
    assert (end(local_rows=local_rows, local_dtype=dtype) - exact).norm() < 0.1 * exact.norm()


def test_all_rows_in_the_own_precision_is_the_exact_solve(mlp, batches, train, values):
    plain, same = mlp(), mlp()
    train(plain, LocoProp(plain, 1e-3), batches(3))
    train(same, LocoProp(same, 1e-3, solver=FirstOrderSteps(local_rows=1.0, local_dtype=torch.float64)), batches(3))
    torch.testing.assert_close(values(plain), values(same), rtol=0, atol=0)


def test_what_it_costs():
    size = Size(1000, 784, 1000, False)
    assert FirstOrderSteps(local_rows=0.25).multiply_adds(size, 10) == 9 * 2 * size.product // 4
    assert FirstOrderSteps(local_rows=100).multiply_adds(size, 10) == 9 * 2 * size.product // 10
    assert FirstOrderSteps(local_rows=5000).multiply_adds(size, 10) == 9 * 2 * size.product


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_small_batches_train(rows, mlp, batches, train):
    model = mlp()
    train(model, LocoProp(model, 1e-3, solver=FirstOrderSteps(local_rows=0.25)), batches(3, rows=rows))
    assert all(p.isfinite().all() for p in model.parameters())


def test_bad_values_are_refused():
    for bad in (0, 0.0, -0.5, 1.5, float("nan")):
        with pytest.raises(ValueError, match="local_rows"):
            FirstOrderSteps(local_rows=bad)
    for bad in ("quarter", None, True):
        with pytest.raises(TypeError, match="local_rows"):
            FirstOrderSteps(local_rows=bad)
    for bad in ("bfloat16", torch.int8, float):
        with pytest.raises(TypeError, match="local_dtype"):
            FirstOrderSteps(local_dtype=bad)


def test_repr_names_both():
    assert "local_rows=0.25, local_dtype=torch.bfloat16" in repr(
        FirstOrderSteps(local_rows=0.25, local_dtype=torch.bfloat16)
    )


def test_with_dropped_rows_of_a_sequence(mlp):
    """Rows of padding have no gradient; the estimate stays unbiased with them in."""
    model = mlp(6, 5, 3)
    optimizer = LocoProp(model, 1e-3, solver=FirstOrderSteps(torch.optim.SGD, local_rows=0.5))
    x = torch.randn(4, 10, 6, dtype=torch.float64)
    nn.functional.mse_loss(model(x)[:, :7], torch.zeros(4, 7, 3, dtype=torch.float64)).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
