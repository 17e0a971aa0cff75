"""A step of every supported layer is one of the matrix problem it is said to be, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from patches import as_rows, product, rows
from torchloco import (
    Anderson,
    ConjugateGradient,
    Exact,
    FirstOrderSteps,
    LocoProp,
    Newton,
    SquaredDistance,
)

GAMMA = 0.3  # targets stay within the range of tanh, so that minima exist


SHAPES = {
    "linear": lambda: (nn.Linear(4, 3), (5, 6, 4)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, 2, 1), (3, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 4, (3, 2), 1, (1, 0), padding_mode="circular"), (3, 3, 5, 4)),
    "conv2d 1x1": lambda: (nn.Conv2d(3, 4, 1), (3, 3, 5, 4)),
    "conv2d channels last": lambda: (nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), (3, 3, 5, 4)),
    "conv2d same": lambda: (nn.Conv2d(3, 4, (2, 3), padding="same", dilation=2, padding_mode="reflect"), (3, 3, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(2, 3, 2, (1, 2, 1)), (3, 2, 3, 4, 3)),
    "grouped": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding=1), (3, 4, 4, 4)),
    "depthwise": lambda: (nn.Conv1d(4, 8, 3, groups=4), (4, 4, 9)),
    "no bias": lambda: (nn.Conv1d(4, 6, 3, groups=2, bias=False), (4, 4, 9)),
    "transposed1d": lambda: (nn.ConvTranspose1d(4, 3, 3, 2, 1, 1), (3, 4, 5)),
    "transposed2d": lambda: (nn.ConvTranspose2d(4, 6, 3, (2, 1), 1, groups=2, dilation=(1, 2)), (3, 4, 4, 5)),
    "transposed3d": lambda: (nn.ConvTranspose3d(2, 2, 2, bias=False), (2, 2, 2, 3, 2)),
}


@pytest.fixture(params=SHAPES)
def case(request):
    """A model of one such layer and a tanh, an input, and a target for its output."""
    torch.manual_seed(0)
    module, shape = SHAPES[request.param]()
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64)
    model = nn.Sequential(module, nn.Tanh())
    return model, x, torch.rand_like(model(x))


def backward(model, optimizer, x, y):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y, reduction="sum").backward()


def problem(model, x, y, loss):
    """The local objective as a function of weight and bias, from the rows."""
    module = copy.deepcopy(model[0])
    output = module(x)
    a = output.detach().requires_grad_()
    [g] = torch.autograd.grad(nn.functional.mse_loss(a.tanh(), y, reduction="sum"), a)
    xs, a, g = rows(module, x, output), as_rows(module, a.detach()), as_rows(module, g)

    def objective(weight, bias):
        moved = product(module, xs, weight, bias)
        if loss == "squared":
            return (moved - (a - GAMMA * g)).square().sum() / 2
        return (moved.cosh().log() - moved * (a.tanh() - GAMMA * g)).sum()

    return objective


def solved(model, loss, x, y, **options):
    model = copy.deepcopy(model)
    optimizer = LocoProp(model, activation_lr=GAMMA, loss=loss, **options)
    backward(model, optimizer, x, y)
    optimizer.step()
    assert optimizer.fallback_parameters == []
    return [p.detach() for p in model.parameters()]


def descended(model, loss, x, y, lr, steps):
    objective = problem(model, x, y, loss)
    params = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for _ in range(steps):
        grads = torch.autograd.grad(objective(params[0], params[1] if len(params) > 1 else None), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= lr * g
    return [p.detach() for p in params]


def sgd(**options):
    return FirstOrderSteps(torch.optim.SGD, schedule="constant", **options)


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_first_order_steps(case, loss):
    model, x, y = case
    got = solved(model, loss, x, y, lr=1e-3, local_steps=4, solver=sgd())
    assert_close(got, descended(model, loss, x, y, 1e-3, 4))


def test_first_order_steps_from_c(case, monkeypatch):
    model, x, y = case
    monkeypatch.setattr("torchloco.problem.Size.prefers_gram", lambda self, *args: self.quadratic)
    for rows_of_step in (1.0, 0.5):
        got = solved(model, "squared", x, y, lr=1e-3, local_steps=4, solver=sgd(local_rows=rows_of_step))
        assert_close(got, descended(model, "squared", x, y, 1e-3, 4))
    got = solved(model, "squared", x, y, lr=1e-3, local_steps=4, solver=sgd(), safe=True)
    assert_close(got, descended(model, "squared", x, y, 1e-3, 4))


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_one_plain_step_is_sgd(case, loss):
    model, x, y = case
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), 1e-2 * GAMMA)
    backward(expected, optimizer, x, y)
    optimizer.step()
    got = solved(model, loss, x, y, lr=1e-2, local_steps=1, solver=sgd())
    assert_close(got, [p.detach() for p in expected.parameters()], rtol=1e-14, atol=1e-15)


def test_steps_on_part_of_the_rows_stay_close(case):
    model, x, y = case
    steps = [solved(model, "matching", x, y, lr=1e-3, local_steps=3, solver=sgd(local_rows=r)) for r in (1.0, 0.5)]
    for whole, part in zip(*steps, strict=True):
        assert not torch.equal(whole, part)
        assert_close(whole, part, rtol=0.1, atol=0.1)


def test_low_precision(case):
    model, x, y = case
    got = solved(model, "matching", x, y, lr=1e-3, local_steps=3, solver=sgd(local_dtype=torch.float32))
    assert_close(got, descended(model, "matching", x, y, 1e-3, 3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: Exact(1e-12, relative=False), lambda: ConjugateGradient(200, tolerance=0)])
def test_solvers_of_the_quadratic_problem(case, make):
    model, x, y = case
    got = solved(model, "squared", x, y, solver=make(), regularizer=SquaredDistance(0.5))
    params = [p.detach().clone().requires_grad_() for p in got]
    check_minimum(model, params, problem(model, x, y, "squared"))


@pytest.mark.parametrize(
    "solver", [Newton(20), Newton(20, direct=0, conjugate_gradients=60), Anderson(8, 300, tolerance=1e-9)]
)
def test_solvers_of_the_matching_loss(case, solver):
    model, x, y = case
    got = solved(model, "matching", x, y, solver=solver, regularizer=SquaredDistance(0.5))
    params = [p.detach().clone().requires_grad_() for p in got]
    check_minimum(model, params, problem(model, x, y, "matching"), 1e-5)


def check_minimum(model, params, objective, atol=1e-8):
    """Whether the gradient of the objective with (0.5 / 2)‖W̃ - W‖² is zero."""
    penalty = sum((p - old.detach()).square().sum() for p, old in zip(params, model.parameters(), strict=True)) / 4
    grads = torch.autograd.grad(objective(params[0], params[1] if len(params) > 1 else None) + penalty, params)
    for g in grads:
        assert_close(g, torch.zeros_like(g), rtol=0, atol=atol)


def test_exact_with_fewer_rows_than_columns():
    torch.manual_seed(0)
    for groups in (1, 2):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Tanh()).double()
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        y = torch.rand_like(model(x))
        got = solved(model, "squared", x, y, solver=Exact(1e-12, relative=False), regularizer=SquaredDistance(0.5))
        params = [p.detach().clone().requires_grad_() for p in got]
        check_minimum(model, params, problem(model, x, y, "squared"))


def test_running_average_of_c():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Tanh(), nn.ConvTranspose1d(4, 2, 3)).double()
    x = torch.randn(5, 4, 9, dtype=torch.float64)
    optimizer = LocoProp(model, loss="squared", solver=Exact(0.1, average=0.9))
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert [optimizer.state[model[i].weight]["memory"]["solver"]["gram"].shape for i in (0, 2)] == [
        (2, 7, 7),
        (1, 13, 13),
    ]


class Twice(nn.Module):
    """A convolution called on inputs of two sizes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cat([self.module(x).tanh().flatten(), self.module(x[..., 1:]).tanh().flatten()])


@pytest.mark.parametrize("name", ["linear", "conv1d", "grouped", "conv2d 1x1", "transposed2d"])
@pytest.mark.parametrize("local_rows", [1.0, 0.3])
def test_a_layer_that_is_called_twice(name, local_rows):
    torch.manual_seed(0)
    module, shape = SHAPES[name]()
    if name == "linear":
        shape = (shape[0], 4, 4)
        module = nn.Linear(3, 3)
        shape = (5, 6, 4)
    model = Twice(module.double() if name != "linear" else nn.Conv1d(6, 3, 1).double())
    x = torch.randn(shape, dtype=torch.float64)
    optimizer = LocoProp(model, 1e-3, activation_lr=GAMMA, local_steps=3, solver=sgd(local_rows=local_rows))
    old = [p.detach().clone() for p in model.parameters()]
    outputs = [model.module(x), model.module(x[..., 1:])]
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
    if local_rows < 1:
        assert all(p.isfinite().all() and not p.equal(o) for p, o in zip(model.parameters(), old, strict=True))
        return
    a = [as_rows(model.module, output.detach()) for output in outputs]
    xs = torch.cat([rows(model.module, v, o) for v, o in zip([x, x[..., 1:]], outputs, strict=True)], 1)
    a = torch.cat(a)
    t = a.tanh() - GAMMA * 2 * a.tanh() * (1 - a.tanh().square())
    params = [p.clone().requires_grad_() for p in old]
    for _ in range(3):
        moved = product(model.module, xs, *params)
        grads = torch.autograd.grad((moved.cosh().log() - moved * t).sum(), params)
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p -= 1e-3 * g
    assert_close([p.detach() for p in model.parameters()], [p.detach() for p in params])
