"""Centered inputs: the same local problem, descended in coordinates in which X has mean zero."""

import copy

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.testing import assert_close

from test_windows import convolutions, every
from test_zoo import build
from test_zoo import train as train_problem
from torchloco import Dense, FirstOrderSteps, LocoProp, MomentumSteps, SquaredDistance, recipes
from torchloco.centering import CenteredInputs
from torchloco.inputs import Grouped
from torchloco.layers import layers_of
from zoo import ZOO

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]
SGD = {"optimizer": torch.optim.SGD, "schedule": "constant", "center": True}
SOLVERS = {
    "RMSProp": FirstOrderSteps(center=True),
    "SGD": FirstOrderSteps(**SGD),
    "SGD on some rows": FirstOrderSteps(**SGD, local_rows=20),
    "momentum": MomentumSteps(momentum=0.9, local_rows=20, center=True),
    "momentum on all rows": MomentumSteps(momentum=0.9, center=True),
}


def check_inputs(inputs, x, units):
    """All that solvers ask of centered inputs, against rows of which the mean is taken; x is (g, N, d_in)."""
    groups, n, _ = x.shape
    mean = x.mean(1)
    expected = x - mean[:, None]
    flat = expected[0] if groups == 1 else expected
    got = CenteredInputs(inputs, mean[0] if groups == 1 else mean)
    weight, bias, delta = (torch.randn(*shape).to(x) for shape in ((units, x.shape[2]), (units,), (n, units)))
    by_group = weight.view(groups, units // groups, -1)
    products = (by_group @ expected.mT).flatten(0, 1).t()
    assert_close(got.sum(delta), (delta.t().reshape(groups, -1, n) @ expected).flatten(0, 1))
    assert_close(got.apply(weight), products)
    assert_close(got.apply(weight, bias), products + bias)
    assert_close(got.sum_ones(delta), delta.sum(0))
    assert_close(got.gram(), flat.mT @ flat)
    assert_close(got.row_sum(), torch.zeros_like(flat[..., 0, :]), atol=1e-9, rtol=0)
    assert_close(got.squares(), float(expected.square().sum()))
    assert_close(got.dense(), flat)
    assert_close(got.to(torch.float32).dense(), flat.float())
    for k in range(min(3, n)):
        assert_close(got.part(k, 3).dense(), flat[..., k::3, :])


@pytest.mark.parametrize("kind", [Dense, Grouped])
def test_centered_rows(kind):
    x = 5 + torch.randn(1 if kind is Dense else 3, 11, 4, dtype=torch.float64)
    check_inputs(kind(x[0]) if kind is Dense else kind(x), x, 2 * len(x))


def test_the_gram_matrix_keeps_its_digits_far_from_zero():
    """C - N·μμᵀ of float32 numbers would lose them."""
    x = torch.randn(50, 4)
    far = x + 1e3
    gram = CenteredInputs(Dense(far), far.mean(0)).gram()
    centered = far.double() - far.double().mean(0)
    assert_close(gram.double(), centered.T @ centered, rtol=1e-3, atol=1e-2)


@every
@given(convolutions())
def test_centered_patches(drawn):
    conv, x = drawn
    output = conv(x).detach()
    [layer] = layers_of("layer", conv)
    inputs = layer.inputs(x, output)
    rows = inputs.dense()
    check_inputs(inputs, rows if conv.groups > 1 else rows[None], layer.d_out)


def test_as_written(mlp, batches, train):
    """Five plain steps by autograd, on ∑ log cosh((X - 1μᵀ)W̃ᵀ + b̃′) - T·(…) in W̃ and b̃′ = b̃ + W̃μ."""
    model = nn.Sequential(*mlp(6, 3), nn.Tanh())
    [(x, y)] = batches(1)
    x = x + 3
    layer, lr, gamma = model[0], 0.05, 2.0
    weight, bias = (p.detach().clone() for p in layer.parameters())
    a = (x @ weight.t() + bias).requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.mse_loss(a.tanh(), y), a)
    target, mean = a.detach().tanh() - gamma * g, x.mean(0)
    w, b = weight.clone().requires_grad_(), (bias + weight @ mean).requires_grad_()
    for _ in range(5):
        moved = (x - mean) @ w.t() + b
        gradients = torch.autograd.grad((moved.cosh().log() - target * moved).sum(), (w, b))
        with torch.no_grad():
            for p, gradient in zip((w, b), gradients, strict=True):
                p -= lr * gradient
    train(model, LocoProp(model, lr, local_steps=5, activation_lr=gamma, solver=FirstOrderSteps(**SGD)), [(x, y)])
    assert_close(layer.weight, w, rtol=1e-9, atol=1e-12)
    assert_close(layer.bias, b - w @ mean, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(layer.weight, weight, atol=1e-3)


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_constant_added_to_the_inputs_changes_nothing(solver, safe, mlp, batches, train):
    """If the first bias takes it off again; without centering it does."""
    shift = torch.tensor([3.0, -2.0, 5.0, 1.0, 9.0, 0.0], dtype=torch.float64)
    plain = copy.copy(solver)
    plain.center = False
    for kind, equal in ((solver, True), (plain, False)):
        weights = []
        for by in (0 * shift, shift):
            model = mlp(6, 5, 3, activation=nn.ReLU)
            with torch.no_grad():
                model[0].bias -= model[0].weight @ by
            data = [(x + by, y) for x, y in batches(4, rows=60)]
            train(model, LocoProp(model, 1e-3, solver=copy.copy(kind), safe=safe), data)
            weights.append([model[0].weight, *model[2].parameters()])
        alike = [torch.allclose(one, other, rtol=1e-7, atol=1e-9) for one, other in zip(*weights, strict=True)]
        assert all(alike) == equal


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_inputs_of_mean_zero_are_as_they_are(solver, mlp, batches, train, values):
    results = []
    for center in (True, False):
        model, kind = mlp(6, 3), copy.copy(solver)
        kind.center = center
        data = [(x - x.mean(0), y) for x, y in batches(3, rows=60)]
        train(model, LocoProp(model, 1e-3, solver=kind), data)
        results.append(values(model))
    assert_close(*results, rtol=1e-9, atol=1e-11)


def test_a_layer_without_a_bias_is_as_it_is(mlp, batches, train, values, same):
    results = []
    for center in (True, False):
        model = mlp(6, 5, 3, bias=False)
        train(model, LocoProp(model, 1e-3, solver=FirstOrderSteps(center=center)), batches(3))
        results.append(values(model))
    assert same(*results)


def test_a_frozen_bias_is_not_touched(mlp, batches, train, values, same):
    results = []
    for center in (True, False):
        model = mlp(6, 5, 3)
        model[0].bias.requires_grad_(False)
        model[2].bias.requires_grad_(False)
        train(model, LocoProp(model, 1e-3, solver=FirstOrderSteps(center=center)), batches(3))
        results.append(values(model))
    assert same(*results)


@pytest.mark.parametrize("name", [name for name in sorted(ZOO) if "conv" in name or "transformer" in name])
def test_models_of_other_kinds_train(name):
    problem = build(name)
    optimizer = LocoProp(problem.model, output=problem.output, solver=FirstOrderSteps(center=True, local_rows=16))
    losses = train_problem(problem, optimizer, 30)
    assert losses[-1] < losses[0]


def test_a_relu_network_stands_a_rate_that_it_does_not_stand_otherwise(mlp, train):
    """The mean of non-negative inputs is most of their curvature, and that is what long steps fail on."""
    torch.manual_seed(0)
    x = torch.rand(400, 6, dtype=torch.float64) * torch.tensor([1, 2, 4, 1, 2, 4], dtype=torch.float64)
    y = torch.sin(x @ torch.randn(6, 3, dtype=torch.float64))
    data = [(x[rows], y[rows]) for _ in range(20) for rows in torch.randperm(400).split(100)]
    for center in (True, False):
        model = mlp(6, 32, 32, 3, activation=nn.ReLU)
        solver = FirstOrderSteps(torch.optim.SGD, schedule="constant", center=center)
        optimizer = LocoProp(model, 4e-3, activation_lr=50.0, solver=solver)
        if center:
            losses = train(model, optimizer, data)
        else:
            with pytest.raises(RuntimeError, match="diverged"):
                train(model, optimizer, data)
    assert losses[-1] < losses[0] / 2


def test_an_interrupted_solve_changes_nothing(mlp, batches, train, values, same):
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise RuntimeError("out of luck")

    model = mlp()
    before = values(model)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(model, LocoProp(model, 0.1, solver=FirstOrderSteps(Failing, center=True)), batches(1))
    assert same(values(model), before)


def test_what_does_not_go_together_is_refused(mlp):
    for kind in (FirstOrderSteps, MomentumSteps):
        with pytest.raises(TypeError, match="center must be True or False, got 'yes'"):
            kind(center="yes")
        with pytest.raises(ValueError, match=r"center=True takes no regularizer.*SquaredDistance\(1"):
            LocoProp(mlp(), solver=kind(center=True), regularizer=SquaredDistance(1.0))
        assert "center=True" in repr(kind(center=True))
        assert "center" not in repr(kind())
    saved = recipes.locoprop_m_normalized(mlp()).state_dict()
    with pytest.raises(ValueError, match="MomentumSteps with centered inputs"):
        recipes.locoprop_m_centered(mlp()).load_state_dict(saved)
