"""The quadratic solvers end at the minimum that the reference computes naively, whichever form they take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference as ref
from torchloco import ConjugateGradient, Exact, FirstOrderSteps, LocoProp, SquaredDistance, WeightDecay


def layer_and_gradients(rows, d_in, d_out, bias, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    x = torch.randn(rows, d_in, dtype=torch.float64)
    y = torch.randn(rows, d_out, dtype=torch.float64)
    return linear, x, y


def step(linear, x, y, solver, gamma=3.0, regularizer=None, local_steps=10):
    model = nn.Sequential(linear)
    optimizer = LocoProp(
        model,
        activation_lr=gamma,
        loss="squared",
        solver=solver,
        regularizer=regularizer,
        output="identity",
        local_steps=local_steps,
    )
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.close()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 5),
    bias=st.booleans(),
    seed=st.integers(0, 99),
    solver=st.sampled_from(["exact", "exact with regularizer", "conjugate gradient"]),
)
def test_minimum(rows, d_in, d_out, bias, seed, solver):
    """Fewer rows than columns and more: the N×N form and the d×d form."""
    linear, x, y = layer_and_gradients(rows, d_in, d_out, bias, seed)
    weight, offset = linear.weight.detach().clone(), linear.bias.detach().clone() if bias else None
    gradients = torch.autograd.grad(nn.functional.mse_loss(linear(x), y), list(linear.parameters()))
    expected = ref.exact_squared_solution(
        weight, offset, x, gradients[0], gradients[1] if bias else None, activation_lr=3.0, regularizer=0.5
    )
    choice = {
        "exact": (Exact(0.5, relative=False), None),
        "exact with regularizer": (Exact(1e-12, relative=False), SquaredDistance(0.5)),
        "conjugate gradient": (ConjugateGradient(60, tolerance=0.0), SquaredDistance(0.5)),
    }[solver]
    step(linear, x, y, choice[0], regularizer=choice[1])
    new_weight, new_bias = expected if isinstance(expected, tuple) else (expected, None)
    torch.testing.assert_close(linear.weight.detach(), new_weight, rtol=1e-7, atol=1e-8)
    if bias:
        torch.testing.assert_close(linear.bias.detach(), new_bias, rtol=1e-7, atol=1e-8)


def test_every_solver_ends_at_the_same_weights():
    ends = []
    for solver, steps in [
        (Exact(1e-12, relative=False), 1),
        (ConjugateGradient(tolerance=0.0), 50),
        (FirstOrderSteps(torch.optim.SGD, schedule="constant"), 4000),
    ]:
        linear, x, y = layer_and_gradients(20, 4, 3, True, 1)
        model = nn.Sequential(linear)
        optimizer = LocoProp(
            model,
            0.02,
            loss="squared",
            solver=solver,
            regularizer=SquaredDistance(0.5),
            output="identity",
            local_steps=steps,
        )
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        ends.append(linear.weight.detach())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", [Exact(), ConjugateGradient()])
def test_refused_with_other_losses(solver):
    with pytest.raises(ValueError, match="use loss='squared'"):
        LocoProp(nn.Sequential(nn.Linear(2, 2)), solver=solver)


def test_strong_damping_is_sgd():
    """λ → ∞ with γ/λ fixed gives back SGD of that learning rate."""
    linear, x, y = layer_and_gradients(8, 5, 2, True, 2)
    before = linear.weight.detach().clone()
    gradient = torch.autograd.grad(nn.functional.mse_loss(linear(x), y), linear.weight)[0]
    step(linear, x, y, Exact(1e9, relative=False), gamma=1e8)
    torch.testing.assert_close(linear.weight.detach(), before - 0.1 * gradient, rtol=1e-6, atol=1e-8)


def test_failed_factorisation_raises_the_damping():
    linear = nn.Linear(3, 2, bias=False)
    x = 64 * torch.arange(1.0, 51.0)[:, None].repeat(1, 3)  # equal columns: C is singular to the last bit
    model = nn.Sequential(linear)
    optimizer = LocoProp(model, loss="squared", solver=Exact(1e-12, relative=False), output="identity")
    nn.functional.mse_loss(model(x), torch.zeros(50, 2)).backward()
    with pytest.warns(UserWarning, match="λ was raised"):
        optimizer.step()
    assert linear.weight.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_running_average_of_c(bias):
    """W - γ · ∂L/∂W · (N·c̄ + λI)⁻¹ with c̄ ← β·c̄ + (1 - β)·C/N, c̄ = C/N at first; batches of different sizes."""
    linear, _, _ = layer_and_gradients(5, 4, 3, bias, 0)
    model = nn.Sequential(linear)
    optimizer = LocoProp(
        model, activation_lr=2.0, loss="squared", solver=Exact(0.5, relative=False, average=0.8), output="identity"
    )
    mean = None
    for rows in (5, 3, 9):
        _, x, y = layer_and_gradients(rows, 4, 3, bias, rows)
        columns = torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], 1) if bias else x
        own = columns.t() @ columns / rows
        mean = own if mean is None else 0.8 * mean + 0.2 * own
        old = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        gradient = torch.cat([p.grad if p.dim() == 2 else p.grad[:, None] for p in model.parameters()], 1)
        before = torch.cat([p if p.dim() == 2 else p[:, None] for p in old], 1)
        optimizer.step()
        after = torch.cat([p if p.dim() == 2 else p[:, None] for p in model.parameters()], 1)
        damped = rows * mean + 0.5 * torch.eye(len(mean), dtype=x.dtype)
        torch.testing.assert_close(after, before - 2.0 * gradient @ torch.linalg.inv(damped), rtol=1e-9, atol=1e-11)
    kept = optimizer.state_dict()["state"][0]["memory"]["solver"]["gram"]
    torch.testing.assert_close(kept, mean[None])


@pytest.mark.parametrize("rows", [3, 30])
def test_weight_decay_takes_part_in_the_closed_form(rows):
    """The minimum of ½‖XW̃ᵀ - T‖² + (λ/2)‖W̃ - W‖² + (μ/2)‖W̃‖² by a plain solve."""
    linear, x, y = layer_and_gradients(rows, 6, 3, False, 1)
    old = linear.weight.detach().clone()
    g = 2 * (x @ old.t() - y) / y.numel()
    t = x @ old.t() - 3.0 * g
    eye = torch.eye(6, dtype=x.dtype)
    want = torch.linalg.solve(x.t() @ x + 0.7 * eye, x.t() @ t + 0.4 * old.t()).t()
    step(linear, x, y, Exact(1e-14), regularizer=SquaredDistance(0.4) + WeightDecay(0.3))
    torch.testing.assert_close(linear.weight.detach(), want, rtol=1e-8, atol=1e-10)
