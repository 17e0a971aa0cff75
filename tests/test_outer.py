"""Outer rules: what is done with the displacement that a solver found."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from torchloco import Bounded, Exact, FirstOrderSteps, LocoProp, OuterOptimizer, ProximalStep, SquaredDistance


def displacements(model, optimizer, batch):
    old = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for p, g in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, g)  # a pseudo-gradient is not left behind
    return old, [p.detach() - w for p, w in zip(model.parameters(), old, strict=True)]


def test_sgd_of_rate_one_applies_the_displacement(mlp, batches, train, values):
    plain, outer = mlp(), mlp()
    train(plain, LocoProp(plain, 1e-3), batches(4))
    train(outer, LocoProp(outer, 1e-3, outer=OuterOptimizer(torch.optim.SGD, lr=1.0)), batches(4))
    torch.testing.assert_close(values(outer), values(plain), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ratio", [1e-3, 0.5])
def test_bounded_shortens_without_turning(ratio, bias, mlp, batches):
    [batch] = batches(1)
    moves = []
    for rule in (None, Bounded(ratio)):
        model = mlp(bias=bias)
        optimizer = LocoProp(model, loss="squared", activation_lr=20.0, solver=Exact(1e-2), outer=rule)
        old, moved = displacements(model, optimizer, batch)
        moves.append(moved)
    for layer in range(3):
        mine = slice(2 * layer, 2 * layer + 2) if bias else slice(layer, layer + 1)
        w, free, bounded = (torch.cat([t.flatten() for t in group[mine]]) for group in (old, *moves))
        length = min(free.norm().item(), ratio * w.norm().item())
        torch.testing.assert_close(bounded, free * (length / free.norm()), rtol=1e-9, atol=1e-13)
    assert any(moved.norm() < free.norm() for free, moved in zip(*moves, strict=True))


def test_bounded_lets_zero_weights_move():
    model = nn.Linear(4, 2).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    optimizer = LocoProp(model, loss="squared", activation_lr=50.0, solver=Exact(1e-2), outer=Bounded(0.1))
    _, moved = displacements(model, optimizer, (torch.randn(8, 4).double(), torch.randn(8, 2).double()))
    assert sum(m.square().sum() for m in moved).sqrt().item() == pytest.approx(0.1 * 1e-3 * 10**0.5)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Muon])
def test_an_outer_optimizer_is_given_the_displacement_as_a_gradient(optimizer_class, batches):
    """With a step whose displacement is -lr·∂L/∂W, the outer optimizer sees lr·∂L/∂W: compare with it on that."""
    data = batches(4)
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = nn.Linear(6, 3).double()
        if ours:
            rule = OuterOptimizer(optimizer_class, lr=0.02, weight_decay=0.1)
            optimizer = LocoProp(
                model, activation_lr=0.5, regularizer=SquaredDistance(1.0), solver=ProximalStep(), outer=rule
            )
        elif optimizer_class is torch.optim.AdamW:
            optimizer = optimizer_class(model.parameters(), lr=0.02, weight_decay=0.1)
        else:
            optimizer = optimizer_class([model.weight], lr=0.02, weight_decay=0.1)
            biases = torch.optim.AdamW([model.bias])
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if not ours:
                for p in model.parameters():
                    p.grad.mul_(0.5)
                if optimizer_class is torch.optim.Muon:
                    biases.step()
            optimizer.step()
            model.bias.grad = None
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


def test_a_scheduler_of_lr_scales_the_outer_rate_too(mlp, batches, train, values):
    halved, plain = mlp(), mlp()
    optimizer = LocoProp(halved, loss="squared", solver=Exact(1.0), outer=OuterOptimizer(torch.optim.SGD, lr=0.8))
    scheduler = LambdaLR(optimizer, lambda step: 0.5)
    train(halved, optimizer, batches(1))
    scheduler.step()
    # Exact's displacement takes the factor as well, as it would without an outer rule.
    train(
        plain,
        LocoProp(plain, loss="squared", solver=Exact(1.0), outer=OuterOptimizer(torch.optim.SGD, lr=0.2)),
        batches(1),
    )
    torch.testing.assert_close(values(halved), values(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["exact", "conjugate", "anderson", "newton", "proximal"])
def test_a_scheduler_scales_the_displacement_of_solvers_without_lr(solver, mlp, batches, train):
    from torchloco import Anderson, ConjugateGradient, Newton

    made = {
        "exact": Exact(),
        "conjugate": ConjugateGradient(),
        "anderson": Anderson(),
        "newton": Newton(),
        "proximal": ProximalStep(),
    }[solver]
    moves = []
    for factor in (None, 0.25):
        model = mlp()
        loss = "squared" if solver in ("exact", "conjugate") else "matching"
        optimizer = LocoProp(model, loss=loss, solver=made, regularizer=SquaredDistance(1.0))
        if factor is not None:
            LambdaLR(optimizer, lambda step, factor=factor: factor)
        _, moved = displacements(model, optimizer, batches(1)[0])
        moves.append(moved)
    torch.testing.assert_close(moves[1], [0.25 * m for m in moves[0]], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("rule", [torch.optim.AdamW, torch.optim.Muon])
def test_outer_state_is_saved_and_loaded(rule, mlp, batches, train):
    data = batches(6)

    def build():
        model = mlp()
        return model, LocoProp(model, 1e-3, outer=rule)

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
    with pytest.raises(ValueError, match="OuterOptimizer"):
        LocoProp(mlp(), 1e-3, outer=torch.optim.SGD).load_state_dict(saved[1])


def test_bad_outer_rules_are_refused(mlp):
    for outer in ("adamw", 3, Bounded, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), torch.optim.LBFGS):
        with pytest.raises(TypeError, match="outer|closure"):
            LocoProp(mlp(), outer=outer)
    with pytest.raises(ValueError, match="ratio must be"):
        Bounded(0.0)
    with pytest.raises(TypeError, match="factory returned"):
        LocoProp(mlp(), outer=lambda params: None)


def test_repr_names_the_rule(mlp):
    text = repr(LocoProp(mlp(), outer=OuterOptimizer(torch.optim.Muon, lr=0.02), safe=True))
    assert "outer: OuterOptimizer(Muon, lr=0.02, biases=AdamW)" in text
    assert "safe:" in text


def test_inner_steps_and_outer_optimizer_keep_their_states_apart(mlp, batches, train):
    model = mlp()
    optimizer = LocoProp(model, 1e-3, solver=FirstOrderSteps(torch.optim.Adam), outer=torch.optim.Adam)
    train(model, optimizer, batches(3))
    for p in model.parameters():
        assert optimizer.state[p]["solver"]["step"] == 30
        assert optimizer.state[p]["outer"]["step"] == 3
