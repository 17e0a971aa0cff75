"""Inputs and settings that have broken solvers before."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from torchloco import (
    Anderson,
    ConjugateGradient,
    Exact,
    LocoProp,
    Newton,
    NormalizedTarget,
    OuterOptimizer,
    PostActivationLoss,
    Solver,
    SquaredDistance,
    WeightDecay,
    recipes,
)

LR_FREE = {
    "exact": {"loss": "squared", "solver": Exact()},
    "conjugate": {"loss": "squared", "solver": ConjugateGradient()},
    "anderson": {"solver": Anderson()},
    "newton": {"solver": Newton()},
}


def displacement(model, optimizer, batch):
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    F.mse_loss(model(batch[0]), batch[1]).backward()
    optimizer.step()
    return [p.detach() - w for p, w in zip(model.parameters(), old, strict=True)]


@pytest.mark.parametrize("tolerance", [0.0, 1e-8, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_conjugate_gradients_stay_in_the_row_space(tolerance, dtype):
    """Rank-deficient rows leave directions without curvature, where only rounding would be left to divide by."""
    torch.manual_seed(0)
    for rows, rank in ((5, 5), (64, 3)):
        x = (torch.randn(rows, rank) @ (torch.randn(rank, 40) * torch.logspace(0, 2, rank)[:, None])).to(dtype)
        y = torch.randn(rows, 3, dtype=dtype)
        ends = []
        start = torch.randn(3, 40, dtype=dtype)
        for solver, kind in ((ConjugateGradient(50, tolerance=tolerance), dtype), (Exact(1e-9), torch.float64)):
            model = nn.Sequential(nn.Linear(40, 3, bias=False, dtype=kind))
            with torch.no_grad():
                model[0].weight.copy_(start)
            optimizer = LocoProp(model, loss="squared", activation_lr=1.0, solver=solver)
            ends.append(displacement(model, optimizer, (x.to(kind), y.to(kind)))[0].norm().item())
        assert ends[0] < 2 * ends[1] + 1e-6


@pytest.mark.parametrize("name", LR_FREE)
def test_every_way_of_writing_lr_scales_the_displacement(name, mlp, batches):
    [batch] = batches(1)

    def moved(change):
        model = mlp()
        optimizer = LocoProp(model, 1e-3, activation_lr=1.0, **LR_FREE[name])
        change(optimizer)
        return displacement(model, optimizer, batch)

    def plateau(optimizer):
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        for _ in range(2):
            scheduler.step(1.0)

    def written(optimizer):
        optimizer.param_groups[0]["lr"] = 0.5e-3

    def raised(optimizer):  # as OneCycleLR does; a minimum is not to be overshot
        optimizer.param_groups[0]["lr"] = 1.0

    whole = moved(lambda optimizer: None)
    for change, factor in ((plateau, 0.5), (written, 0.5), (raised, 1.0)):
        torch.testing.assert_close(moved(change), [factor * d for d in whole], rtol=1e-9, atol=1e-12)


class Eager(torch.optim.Optimizer):
    """Fills its state when it is made, as Adagrad did."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, 0.5)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.addcdiv_(p.grad, self.state[p]["sum"].addcmul_(p.grad, p.grad).sqrt(), value=-group["lr"])


@pytest.mark.parametrize("place", ["solver", "outer", "fallback"])
def test_state_that_an_optimizer_has_from_the_start_is_kept(place):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    optimizer = LocoProp(model, 1e-3, **{place: Eager})
    for _ in range(2):
        displacement(model, optimizer, (torch.randn(8, 6), torch.randn(8, 3)))
    entry = optimizer.state[model[1].weight if place == "fallback" else model[0].weight]
    assert (entry if place == "fallback" else entry[place])["sum"].min() >= 0.5
    optimizer.load_state_dict(optimizer.state_dict())
    displacement(model, optimizer, (torch.randn(8, 6), torch.randn(8, 3)))


def test_what_an_outer_optimizer_makes_of_it_is_checked(mlp):
    model = mlp(dtype=torch.float32)
    optimizer = LocoProp(model, 1e-3, outer=OuterOptimizer(torch.optim.AdamW, lr=0.01, eps=0.0))
    with pytest.raises(RuntimeError, match="diverged"):  # 0 / 0 for the columns of inputs that are zero
        displacement(model, optimizer, (torch.zeros(8, 6), torch.randn(8, 3)))
    assert all(p.isfinite().all() for p in model.parameters())


def test_anderson_on_mirrored_features():
    """The rows' sum of columns vanishes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    optimizer = LocoProp(model, activation_lr=1.0, solver=Anderson())
    h = torch.randn(16, 1)
    moved = displacement(model, optimizer, (torch.cat([h, -h], 1), torch.randn(16, 3)))
    assert 0 < moved[0].norm() < 10


def test_memory_is_loaded_as_it_was(mlp, batches, train):
    seen = []

    class Keeper(Solver):
        def solve(self, task):
            seen.append(dict(task.memory))
            task.keep.update(name="abc", wide=torch.ones(2, dtype=torch.float64) / 3, count=torch.tensor([2**30 + 1]))

    model = mlp(6, 3, dtype=torch.float32)
    optimizer = LocoProp(model, solver=Keeper())
    data = batches(2, dtype=torch.float32)
    train(model, optimizer, data[:1])
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, data[1:])
    assert seen[1]["name"] == "abc"
    assert torch.equal(seen[1]["wide"], torch.ones(2, dtype=torch.float64) / 3)
    assert torch.equal(seen[1]["count"], torch.tensor([2**30 + 1]))


@pytest.mark.parametrize("rows", [4, 40])
def test_exact_on_bfloat16_weights(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).bfloat16()
    optimizer = LocoProp(model, loss="squared", activation_lr=1.0, solver=Exact(0.1))
    batch = torch.randn(rows, 6).bfloat16(), torch.randn(rows, 3).bfloat16()
    assert all(0 < m.norm() < 10 for m in displacement(model, optimizer, batch))


def test_newton_on_bfloat16_weights_is_refused(mlp):
    model = mlp(dtype=torch.bfloat16)
    batch = torch.randn(8, 6).bfloat16(), torch.rand(8, 3).bfloat16()
    with pytest.raises(TypeError, match="float32 and float64.*FirstOrderSteps"):
        displacement(model, LocoProp(model, solver=Newton()), batch)


def test_a_group_that_the_solver_refuses_leaves_nothing_behind(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)).double()
    optimizer = LocoProp(model, params=["0"], solver=torch.optim.Muon)
    with pytest.raises(ValueError, match="Muon"):
        optimizer.add_param_group({"params": ["2"]})
    assert (len(optimizer.param_groups), len(optimizer.layers)) == (1, 1)
    displacement(model, optimizer, batches(1)[0])


@pytest.mark.parametrize("solver", [Anderson(), Newton(), None])
def test_targets_that_are_not_finite_are_said(solver, mlp, batches):
    model = mlp()
    optimizer = LocoProp(model, target=lambda rows: rows.a * math.nan, solver=solver, safe=solver is None)
    with pytest.raises(RuntimeError, match="not finite.*activation_lr"):
        displacement(model, optimizer, batches(1)[0])


def test_exponentiated_gradient_can_go_on_when_a_weight_has_vanished():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = recipes.exponentiated_gradient(model, 1.0)
    for _ in range(60):
        optimizer.zero_grad()
        (model(torch.ones(8, 1)) * 5).mean().backward()
        optimizer.step()
    assert 0 < model.weight.item() < 1e-30


def test_a_modified_target_without_a_base_is_refused_at_once(mlp):
    with pytest.raises(ValueError, match="base=MirrorTarget"):
        LocoProp(mlp(), loss=PostActivationLoss(), target=NormalizedTarget())


def test_vanishing_float64_gradients(mlp):
    model = mlp()
    optimizer = LocoProp(model)
    (model(torch.randn(8, 6, dtype=torch.float64)).sum() * 1e-85).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_python_sums_of_regularizers():
    assert repr(sum([WeightDecay(1.0), SquaredDistance(2.0)])) == "WeightDecay(1) + SquaredDistance(2)"


@pytest.mark.parametrize("lr", [0, -1.0, "a"])
def test_recipes_name_a_bad_rate(lr, mlp):
    for make in (lambda: recipes.implicit_sgd(mlp(), lr), lambda: recipes.proxprop(mlp(), 1.0, lr)):
        with pytest.raises((ValueError, TypeError), match="lr must be"):
            make()
