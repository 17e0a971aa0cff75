"""What a solve costs is counted, shown, and what is done."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchloco import (
    Anderson,
    ConjugateGradient,
    Exact,
    FirstOrderSteps,
    LocoProp,
    Newton,
    ProximalStep,
    Size,
    Solver,
    Spectral,
)

SIZES = [Size(1000, 50, 40, True), Size(1000, 50, 40, False), Size(20, 500, 300, True), Size(1000, 784, 1000, False)]


def test_first_order_steps_by_hand():
    assert FirstOrderSteps().multiply_adds(Size(1000, 784, 1000, False), 10) == 9 * 2 * 1000 * 784 * 1000
    # C, then nine products with it
    assert FirstOrderSteps().multiply_adds(Size(1000, 784, 1000, True), 10) == 1000 * 784**2 + 9 * 1000 * 784**2
    assert FirstOrderSteps(steps=1).multiply_adds(Size(1000, 784, 1000, True), 10) == 0


class Count(TorchDispatchMode):
    """Multiply-adds of all matrix products."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            left, right = args[-2:] if name in ("mm", "bmm") else args[1:3]
            self.total += left.numel() * right.shape[-1]
        return result


FOR_ALL = [
    FirstOrderSteps(torch.optim.SGD),
    FirstOrderSteps(torch.optim.SGD, steps=3),
    Anderson(3, 6),
    Newton(1, direct=0, conjugate_gradients=8),
]
FOR_SQUARED = [ConjugateGradient(6), ConjugateGradient(2)]


@pytest.mark.parametrize("rows", [64, 600])
@pytest.mark.parametrize(
    ("loss", "solver"),
    [("matching", solver) for solver in FOR_ALL] + [("squared", solver) for solver in FOR_ALL + FOR_SQUARED],
    ids=str,
)
def test_the_count_is_what_is_computed(solver, loss, rows):
    """Matrix products, counted as they are dispatched, against `multiply_adds`, for one layer without bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 80, bias=False), nn.Sigmoid())
    optimizer = LocoProp(model, 1e-5, loss=loss, solver=solver)
    x = torch.randn(rows, 96)
    model(x).square().mean().backward()
    with Count() as count:
        optimizer.step()
    told = optimizer.layers[0].multiply_adds
    # Power iterations and the check of the gradient are matrix-vector products; mixing is counted generously.
    assert count.total <= told * 1.05 + 30 * rows * 96
    assert count.total >= 0.7 * told


def test_costs_are_monotone_in_every_dimension():
    for solver in (FirstOrderSteps(), Exact(), ConjugateGradient(), Anderson(), Newton(), ProximalStep(), Spectral()):
        for size in SIZES:
            cost = solver.multiply_adds(size, 10)
            for bigger in (
                Size(2 * size.n, size.d_in, size.d_out, size.quadratic),
                Size(size.n, size.d_in, 2 * size.d_out, size.quadratic),
            ):
                if not isinstance(solver, Newton):  # it turns to conjugate gradients where Hessians cost too much
                    assert solver.multiply_adds(bigger, 10) >= cost


def test_repr_shows_it_after_the_first_step(mlp, batches, train):
    model = mlp(6, 5, 3)
    optimizer = LocoProp(model, output="sigmoid")
    assert optimizer.layers[0].multiply_adds is None
    train(model, optimizer, batches(1))
    assert optimizer.layers[0].multiply_adds == 9 * 2 * 8 * 6 * 5
    assert "4.32 k" in repr(optimizer)
    optimizer.param_groups[0]["local_steps"] = 3
    assert optimizer.layers[0].multiply_adds == 2 * 2 * 8 * 6 * 5


def test_a_solver_that_does_not_say_shows_a_question_mark(mlp, batches, train):
    class Own(Solver):
        def solve(self, task):
            pass

    model = mlp(6, 3)
    optimizer = LocoProp(model, solver=Own())
    train(model, optimizer, batches(1))
    assert optimizer.layers[0].multiply_adds is None
    assert "?" in repr(optimizer)
