"""Targets: what normalising and momentum do, and what a target keeps between mini-batches."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchloco import (
    Exact,
    FirstOrderSteps,
    GradientTarget,
    LayerRows,
    LocoProp,
    Loss,
    MirrorTarget,
    ModifiedTarget,
    MomentumTarget,
    NormalizedTarget,
    PostActivationLoss,
    SquaredLoss,
    get_transfer,
)

SGD = FirstOrderSteps(torch.optim.SGD, schedule="constant")


def make_rows(n=6, d_out=4, seed=0, gamma=0.3, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    x, a, g = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (3, d_out, d_out))
    return LayerRows("layer", x, a, 1e-3 * g, get_transfer("tanh"), gamma, **kwargs)


@given(factor=st.floats(1e-30, 1e30), padding=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_normalized_target_does_not_see_scale_or_padding(factor, padding):
    rows, scaled = make_rows(), make_rows()
    blank = torch.zeros(padding, 4, dtype=torch.float64)
    scaled.g = torch.cat([scaled.g * factor, blank])
    scaled.a = torch.cat([scaled.a, blank])
    got = NormalizedTarget(MirrorTarget())(scaled)
    torch.testing.assert_close(got[:6], NormalizedTarget(MirrorTarget())(rows), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got[6:], torch.zeros_like(blank))


@pytest.mark.parametrize("base", [GradientTarget(), MirrorTarget(), MomentumTarget(0.5, MirrorTarget())])
def test_gamma_is_the_root_mean_square_of_the_asked_change(base):
    rows = make_rows(gamma=0.3)
    change = NormalizedTarget(base)(rows) - base.center(rows)
    assert change.square().mean().sqrt().item() == pytest.approx(0.3)


def test_gamma_follows_the_schedule_where_it_shall(mlp, batches):
    rows = make_rows(gamma=0.3, lr_factor=0.25)
    for target, size in (
        (NormalizedTarget(MirrorTarget()), 0.3),
        (NormalizedTarget(MirrorTarget(), follow_lr=True), 0.075),
    ):
        change = target(rows) - target.center(rows)
        assert change.square().mean().sqrt().item() == pytest.approx(size)
    [(x, y)] = batches(1)
    moved = []
    for factor in (1.0, 0.5):  # one plain step: the product of lr and γ counts, and both have the factor
        model = mlp()
        before = [p.detach().clone() for p in model.parameters()]
        target, solver = NormalizedTarget(follow_lr=True), FirstOrderSteps(torch.optim.SGD, steps=1)
        optimizer = LocoProp(model, 0.1, activation_lr=0.1, target=target, solver=solver)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        moved.append([p.detach() - old for p, old in zip(model.parameters(), before, strict=True)])
    for whole, quarter in zip(*moved, strict=True):
        torch.testing.assert_close(quarter, whole / 4, rtol=1e-9, atol=1e-12)
    assert "NormalizedTarget(MirrorTarget(), follow_lr=True)" in {repr(layer.target) for layer in optimizer.layers}


def moved_by_schedule(model, data, target, solver, factors):
    """How far the last step goes under a schedule of these factors."""
    optimizer = LocoProp(model, 0.1, loss="squared", activation_lr=0.1, target=target, solver=solver)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[step])
    for k in range(len(factors)):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        if k == len(factors) - 1:
            optimizer.step()
        else:
            with torch.no_grad():  # the same weights at every step
                optimizer.step()
                for p, old in zip(model.parameters(), before, strict=True):
                    p.copy_(old)
            scheduler.step()
    return [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]


def test_gamma_follows_the_schedule_down_from_its_highest(mlp, batches):
    """As after a warm-up to more than the lr that was given, as `OneCycleLR` makes one."""
    [data] = batches(1)
    solver = FirstOrderSteps(torch.optim.SGD, steps=1)
    moves = [
        moved_by_schedule(mlp(), data, NormalizedTarget(follow_lr=True), solver, factors)
        for factors in ([1, 10, 10], [1, 10, 5])
    ]
    for whole, quarter in zip(*moves, strict=True):
        torch.testing.assert_close(quarter, whole / 4, rtol=1e-9, atol=1e-12)


def test_gamma_does_not_follow_where_the_solver_does(mlp, batches):
    """Or the schedule would count twice."""
    [data] = batches(1)
    moves = [
        moved_by_schedule(mlp(), data, NormalizedTarget(follow_lr=True), Exact(), factors) for factors in ([1], [0.5])
    ]
    for whole, half in zip(*moves, strict=True):
        torch.testing.assert_close(half, whole / 2, rtol=1e-9, atol=1e-12)


def test_normalizing_twice_is_refused():
    for base in (NormalizedTarget(), MomentumTarget(0.5, NormalizedTarget(MirrorTarget()))):
        with pytest.raises(ValueError, match="is normalized already"):
            NormalizedTarget(base)
    with pytest.raises(TypeError, match="follow_lr must be True or False"):
        NormalizedTarget(follow_lr="no")


@pytest.mark.parametrize("largest", [1e-300, 1e-310, 5e-324])
def test_a_gradient_of_nothing_but_rounding_asks_for_no_change(largest):
    rows = make_rows()
    rows.g = rows.g / rows.g.abs().max() * largest
    change = NormalizedTarget(GradientTarget())(rows) - rows.a
    expected = 0.0 if largest < 1e-292 else rows.activation_lr
    assert change.square().mean().sqrt().item() == pytest.approx(expected)


def test_rows_whose_squares_underflow_count_as_rows_with_a_gradient():
    rows = make_rows()
    rows.g[3:] *= 1e-200
    change = NormalizedTarget(GradientTarget())(rows) - rows.a
    assert change.square().mean().sqrt().item() == pytest.approx(rows.activation_lr)


def test_normalized_target_without_a_gradient_asks_for_no_change():
    rows = make_rows()
    rows.g = torch.zeros_like(rows.g)
    torch.testing.assert_close(NormalizedTarget(GradientTarget())(rows), rows.a)


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("copies", [1, 4])
def test_a_normalized_run_depends_neither_on_batch_size_nor_on_reduction(loss, reduction, copies, mlp):
    """Adam's steps do not see how many rows the local gradient is a sum of."""
    results = []
    for n, red in ((1, "mean"), (copies, reduction)):
        model = mlp(6, 5, 3)
        solver = FirstOrderSteps(torch.optim.Adam, eps=1e-16)
        optimizer = LocoProp(model, 1e-3, loss=loss, target=NormalizedTarget(), activation_lr=0.05, solver=solver)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            x, y = (torch.randn(8, d, generator=generator, dtype=torch.float64) for d in (6, 3))
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x.repeat(n, 1)), y.repeat(n, 1), reduction=red).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


def test_a_modified_target_takes_the_base_that_goes_with_the_loss(mlp):
    for loss, base in (("squared", "GradientTarget()"), ("matching", "MirrorTarget()")):
        optimizer = LocoProp(mlp(), loss=loss, target=NormalizedTarget(MomentumTarget(0.5)))
        assert repr(optimizer.layers[0].target) == f"NormalizedTarget(MomentumTarget(0.5, {base}))"


def test_a_layer_that_takes_the_squared_loss_keeps_the_modification(mlp, batches):
    model = mlp(6, 5, 3, activation=nn.GELU)
    optimizer = LocoProp(model, target=NormalizedTarget(), activation_lr=0.1)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert repr(optimizer.layers[0].target) == "NormalizedTarget(GradientTarget())"
    assert optimizer.layers[0].loss.name == "squared"


def test_a_modified_target_on_its_own_says_what_it_needs():
    with pytest.raises(ValueError, match="base=MirrorTarget"):
        NormalizedTarget()(make_rows())
    with pytest.raises(TypeError, match="changes a Target"):
        MomentumTarget(0.9, lambda rows: rows.a)
    with pytest.raises(ValueError, match="momentum must be"):
        MomentumTarget(1.0)


def test_momentum_target_is_a_decayed_sum():
    target = MomentumTarget(0.5, GradientTarget())
    memory, total = {}, torch.zeros(4, dtype=torch.float64)
    for k in range(3):
        rows = make_rows(n=5 + k, seed=k, memory=memory)
        expected = rows.a - 0.3 * (rows.g + 0.5 * total / (5 + k))
        torch.testing.assert_close(target(rows), expected)
        torch.testing.assert_close(target(rows), expected)  # asking twice changes nothing
        total = 0.5 * total + rows.g.sum(0)
        memory = {**memory, **rows.keep}
        torch.testing.assert_close(memory["momentum"], total)


def test_what_a_target_keeps_is_saved_and_loaded(mlp, batches, train):
    data = batches(6)

    def build():
        model = mlp()
        return model, LocoProp(model, 1e-2, target=MomentumTarget(0.9), solver=SGD)

    model, optimizer = build()
    train(model, optimizer, data[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, data[3:])
    resumed, other = build()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(resumed, other, data[3:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    forgetful, third = build()
    forgetful.load_state_dict(saved[0])
    train(forgetful, third, data[3:])
    assert not torch.equal(model[0].weight, forgetful[0].weight)


def test_a_failed_step_leaves_the_memory_as_it_was(mlp, batches, train):
    model = mlp()
    fail = []

    class Careless(MomentumTarget):
        def direction(self, rows):
            direction = super().direction(rows)
            if fail and rows.name == fail[0]:
                raise RuntimeError("user's error")
            return direction

    optimizer = LocoProp(model, 1e-2, target=Careless(0.9), solver=SGD)
    data = batches(3)
    train(model, optimizer, data[:2])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    fail.append("4")
    with pytest.raises(RuntimeError, match="user's error"):
        train(model, optimizer, data[2:])
    after = optimizer.state_dict()["state"]
    for key, entry in before.items():
        if "memory" in entry:
            assert torch.equal(entry["memory"]["target"]["momentum"], after[key]["memory"]["target"]["momentum"])


def test_normalized_target_warns_of_a_gamma_meant_for_another_target(mlp, batches, train):
    model = mlp()
    with pytest.warns(UserWarning, match="activation_lr = 10 with NormalizedTarget.*about 0.01"):
        train(model, LocoProp(model, target=NormalizedTarget()), batches(1))


@pytest.mark.parametrize(
    ("loss", "target"),
    [("matching", GradientTarget()), ("squared", MirrorTarget()), (PostActivationLoss(), GradientTarget())],
    ids=str,
)
def test_a_target_that_belongs_to_another_loss_is_warned_of(loss, target, mlp):
    with pytest.warns(UserWarning, match="does not belong to"):
        LocoProp(mlp(), loss=loss, target=target)


class Clamped(MirrorTarget):
    def __call__(self, rows):
        return super().__call__(rows).clamp(-0.05, 0.05)


class Halved(ModifiedTarget):
    def direction(self, rows):
        return self.base.direction(rows) * torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64)[: rows.g.shape[1]]


class Shifted(MirrorTarget):
    def center(self, rows):
        return super().center(rows) + 0.1


@pytest.mark.parametrize("target", [Clamped(), Halved(MirrorTarget()), Shifted()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("steps", [1, 5])
def test_an_overridden_target_takes_part_from_the_first_step_on(target, steps, mlp, batches, train, values):
    """As the same rule given as a plain callable, whose first gradient is always computed."""
    assert not target.along_gradient
    results = []
    for rule in (target, lambda rows: target(rows)):
        model = mlp(6, 3, 3)
        train(model, LocoProp(model, 1e-2, target=rule, solver=SGD, local_steps=steps), batches(2))
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)


def test_a_loss_that_overrides_its_residual_takes_part_in_every_step(mlp, batches, train, values):
    class Double(SquaredLoss):
        def residual(self, a, target, transfer):
            return 2 * (a - target)

    class Plain(Loss):
        def residual(self, a, target, transfer):
            return 2 * (a - target)

    results = []
    for loss in (Double(), Plain()):
        model = mlp()
        train(model, LocoProp(model, 1e-2, loss=loss, target=GradientTarget(), solver=SGD), batches(2))
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
