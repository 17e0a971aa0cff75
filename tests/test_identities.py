"""The method's identities: each holds for any correct implementation, to rounding."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import (
    FirstOrderSteps,
    GradientTarget,
    LayerRows,
    LocoProp,
    MatchingLoss,
    MirrorTarget,
    SquaredDistance,
    SquaredLoss,
    get_transfer,
    transfer_names,
)
from torchloco.problem import LocalProblem, Size

SGD = FirstOrderSteps(torch.optim.SGD, schedule="constant")
PAIRS = {"M": (MatchingLoss(), MirrorTarget()), "S": (SquaredLoss(), GradientTarget())}
ELEMENTWISE = [name for name in transfer_names() if get_transfer(name).elementwise]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_problem(loss, target, transfer="tanh", rows=20, d_in=6, d_out=4, bias=True, regularizer=None, gamma=3.0):
    """A problem with random X, W, b and G, and the gradients that go with them."""
    x, weight, b, g = draw(rows, d_in), draw(d_out, d_in, seed=1), draw(d_out, seed=2), 0.1 * draw(rows, d_out, seed=3)
    a = x @ weight.t() + (b if bias else 0)
    return LocalProblem(
        rows=LayerRows("layer", x, a, g, get_transfer(transfer), gamma),
        loss=loss,
        target=target,
        regularizer=regularizer,
        weight=weight,
        bias=b if bias else None,
        learn_bias=bias,
        gradients=[g.t() @ x, g.sum(0)] if bias else [g.t() @ x],
    )


def old(problem):
    return [problem.weight, problem.bias] if problem.learn_bias else [problem.weight]


def copies(gradients):
    return [g.clone() for g in gradients]


# --- the first step is back-propagation -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.Sigmoid, nn.Softplus, nn.GELU, nn.Identity])
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_one_plain_step_is_sgd(loss, activation, mlp, batches, train, values):
    gamma, h = 7.0, 0.01
    ours, plain = (mlp(activation=activation) for _ in range(2))
    optimizer = LocoProp(ours, lr=h, activation_lr=gamma, local_steps=1, loss=loss, solver=torch.optim.SGD)
    data = batches(5)
    losses = train(ours, optimizer, data)
    assert losses == pytest.approx(train(plain, torch.optim.SGD(plain.parameters(), lr=gamma * h), data), rel=1e-12)
    assert_close(values(ours), values(plain), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("transfer", transfer_names())
@pytest.mark.parametrize("pair", PAIRS)
def test_first_gradient_is_gamma_times_the_networks(pair, transfer):
    """As computed from the residual, without the shortcut."""
    problem = make_problem(*PAIRS[pair], transfer)
    for got, network in zip(problem.gradient(old(problem)), problem.gradients, strict=True):
        assert_close(got, 3.0 * network, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_shortcut_equals_the_residuals_gradient(pair):
    problem = make_problem(*PAIRS[pair], regularizer=SquaredDistance(0.5))
    first = copies(problem.first_gradient())
    for a, b in zip(first, problem.gradient(old(problem)), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_without_a_shortcut_the_residual_counts():
    """A mirror target under the squared loss has no known residual; it is computed."""
    problem = make_problem(SquaredLoss(), MirrorTarget())
    delta = problem.rows.a - (problem.rows.a.tanh() - 3.0 * problem.rows.g)
    assert_close(problem.first_gradient()[0], delta.t() @ problem.rows.x)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_first_gradient_is_not_computed_again(steps, mlp, batches, monkeypatch):
    calls, products = [], []
    residual = MatchingLoss.residual
    for form in ("gradient", "gram_gradient"):
        original = getattr(LocalProblem, form)
        monkeypatch.setattr(LocalProblem, form, lambda self, new, f=original: calls.append(1) or f(self, new))
    monkeypatch.setattr(MatchingLoss, "residual", lambda self, *args: products.append(1) or residual(self, *args))
    model = mlp(6, 3)
    optimizer = LocoProp(model, local_steps=steps)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert len(calls) == steps - 1
    assert not products


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_number_of_matrix_products(steps, mlp, batches):
    """Two per local step after the first, and none for the first."""

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.overloadpacket.__name__ in {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear"}
            return func(*args, **(kwargs or {}))

    model = mlp()
    optimizer = LocoProp(model, local_steps=steps, output="sigmoid")  # no layer may take the Gram form
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    with Count() as count:
        optimizer.step()
    assert count.products == 3 * 2 * (steps - 1)


# --- M and S ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, torch.optim.SGD, torch.optim.Adam], ids=["paper", "SGD", "Adam"])
def test_identity_transfer_makes_m_and_s_the_same(solver, mlp, batches, train, values):
    results = []
    for loss in ("matching", "squared"):
        model = mlp(activation=nn.Identity)
        train(model, LocoProp(model, lr=1e-3, activation_lr=1.0, loss=loss, solver=solver, local_steps=5), batches(4))
        results.append(values(model))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_other_transfers_make_them_differ(mlp, batches, train, values):
    results = []
    for loss in ("matching", "squared"):
        model = mlp()
        train(model, LocoProp(model, lr=1e-3, loss=loss), batches(4))
        results.append(values(model)["0.weight"])
    assert not torch.allclose(*results, rtol=1e-6)


# --- plain steps on the squared loss in closed form -------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_plain_steps_in_closed_form(steps, rows, bias):
    """W_T - W = -hγ · ∂L/∂W · Σ_{j<T} (I - hC)^j; a bias is one more column of W, and of ones in X."""
    h, gamma = 1e-3, 5.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=bias, dtype=torch.float64))
    x, t = draw(rows, 6), draw(rows, 4, seed=1)
    optimizer = LocoProp(
        model, lr=h, activation_lr=gamma, local_steps=steps, loss="squared", solver=SGD, transfers={"0": "tanh"}
    )
    nn.functional.mse_loss(torch.tanh(model(x)), t).backward()
    w, dw = model[0].weight.detach().clone(), model[0].weight.grad.clone()
    if bias:
        x = torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], 1)
        w = torch.cat([w, model[0].bias.detach()[:, None]], 1)
        dw = torch.cat([dw, model[0].bias.grad[:, None]], 1)
    c = x.t() @ x
    eye = torch.eye(len(c), dtype=c.dtype)
    power = sum(torch.linalg.matrix_power(eye - h * c, j) for j in range(steps))
    optimizer.step()
    got = torch.cat([model[0].weight, model[0].bias[:, None]], 1) if bias else model[0].weight
    assert_close(got.detach(), w - h * gamma * dw @ power, rtol=1e-10, atol=1e-12)


# --- the Gram form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("regularizer", [None, SquaredDistance(0.5)], ids=["alone", "regularized"])
@pytest.mark.parametrize("rows", [3, 50])
def test_gram_form_equals_row_form(rows, regularizer, bias):
    problem = make_problem(*PAIRS["S"], rows=rows, bias=bias, regularizer=regularizer)
    for seed in (7, 8):
        new = [p + 0.3 * draw(*p.shape, seed=seed) for p in old(problem)]
        by_rows = copies(problem.gradient(new))
        for a, b in zip(problem.gram_gradient(new), by_rows, strict=True):
            assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gram_form_is_taken_where_it_is_cheaper():
    assert make_problem(*PAIRS["S"], rows=1000).size.prefers_gram(9)
    assert make_problem(SquaredLoss(), MirrorTarget(), rows=1000).size.prefers_gram(9)
    assert make_problem(*PAIRS["M"], "identity", rows=1000).size.prefers_gram(9)
    assert not make_problem(*PAIRS["S"], rows=2).size.prefers_gram(9)
    assert not make_problem(*PAIRS["S"], rows=1000).size.prefers_gram(0)
    assert not make_problem(*PAIRS["M"], rows=1000).size.prefers_gram(9)


@pytest.mark.parametrize("solver", [None, torch.optim.SGD], ids=["paper", "SGD"])
def test_a_step_is_the_same_in_either_form(solver, mlp, batches, train, values, monkeypatch):
    results = []
    for gram in (True, False):
        monkeypatch.setattr(Size, "prefers_gram", lambda self, count, parts=1, gram=gram: gram)
        model = mlp()
        train(model, LocoProp(model, lr=1e-3, loss="squared", solver=solver), batches(3))
        results.append(values(model))
    assert_close(*results, rtol=1e-9, atol=1e-11)


# --- the matching loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in transfer_names() if get_transfer(n).integral])
def test_matching_residual_is_the_derivative(name):
    """δ = ∂/∂A of F(A) - T·A, also for targets outside the range of f."""
    transfer = get_transfer(name)
    a, target = (2 * draw(6, 4)).requires_grad_(), draw(6, 4, seed=1)
    objective = transfer.integral(a).sum() - (target * a).sum()
    (expected,) = torch.autograd.grad(objective, a)
    assert_close(MatchingLoss().residual(a.detach(), target, transfer), expected, rtol=1e-9, atol=1e-11)
    assert_close(MatchingLoss().residual_(a.detach().clone(), target, transfer), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("transfer", ["tanh", "relu", "sigmoid", "softmax", "identity"])
def test_gradient_is_the_derivative_of_the_value(pair, transfer):
    problem = make_problem(*PAIRS[pair], transfer, regularizer=SquaredDistance(0.5))
    new = [p + 0.1 * draw(*p.shape, seed=9) for p in old(problem)]
    got = copies(problem.gradient(new))
    for k, p in enumerate(new):
        direction = draw(*p.shape, seed=11)
        ends = [
            problem.value([q + shift * direction if i == k else q for i, q in enumerate(new)]).item()
            for shift in (1e-6, -1e-6)
        ]
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((got[k] * direction).sum().item(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_local_steps_lower_the_local_loss(loss, mlp, batches, monkeypatch):
    values_seen = []
    solve = FirstOrderSteps.solve

    def watched(self, task):
        values_seen.append([task.problem.value(task.values).item()])
        solve(self, task)
        values_seen[-1].append(task.problem.value(task.values).item())

    monkeypatch.setattr(FirstOrderSteps, "solve", watched)
    model = mlp()
    optimizer = LocoProp(model, lr=1e-2, loss=loss, solver=torch.optim.SGD)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert len(values_seen) == 3
    assert all(after < before for before, after in values_seen)
