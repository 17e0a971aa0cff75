"""Spectral: its step against singular values, its invariances, and what it keeps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from torchloco import LocoProp, NormalizedTarget, Spectral, recipes


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients_of(model, x, y):
    return torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))


def step(model, x, y, lr=0.1, scale=1.0, output="identity", **options):
    optimizer = LocoProp(model, lr, solver=Spectral(**options), output=output)
    (scale * F.mse_loss(model(x), y)).backward()
    optimizer.step()
    optimizer.close()


def by_singular_values(gradient, c, lr, damping, iterations=5):
    """The step with every factor taken apart: the quintic acts on each singular value alone."""
    factor = torch.linalg.cholesky(c + damping * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype))
    inverse = torch.linalg.inv(factor)
    u, s, v = torch.linalg.svd(gradient @ inverse.T, full_matrices=False)
    s = s / s.norm()
    for _ in range(iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    ratio = max(1.0, gradient.shape[0] / gradient.shape[1])
    return -lr * ratio**0.5 * (u * s) @ v @ inverse


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_step(rows, d_in, d_out, bias, seed):
    torch.manual_seed(seed)
    model = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    x, y = draw(rows, d_in, seed=seed), draw(rows, d_out, seed=seed + 1)
    old = [p.detach().clone() for p in model.parameters()]
    found = gradients_of(model, x, y)
    gradient = torch.cat([found[0], found[1][:, None]], 1) if bias else found[0]
    columns = torch.cat([x, torch.ones(rows, 1, dtype=x.dtype)], 1) if bias else x
    expected = by_singular_values(gradient, columns.T @ columns / rows, 0.1, 0.1)
    step(model, x, y)
    moved = [p.detach() - w for p, w in zip(model.parameters(), old, strict=True)]
    torch.testing.assert_close(moved[0], expected[:, :d_in], rtol=1e-6, atol=1e-9)
    if bias:
        torch.testing.assert_close(moved[1], expected[:, -1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_the_factor_is_renewed_at_intervals(average):
    """Steps 0, 2, 4 renew C; the others take the one before."""
    model = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    optimizer = LocoProp(model, 0.1, solver=Spectral(0.0, average=average, every=2, damping=1e-9), output="identity")
    batches = [(draw(20, 5, seed=k) @ draw(5, 5, seed=k + 50), draw(20, 4, seed=k + 99)) for k in range(5)]
    mean = None
    for k, (x, y) in enumerate(batches):
        if k % 2 == 0:
            own = x.T @ x / 20
            mean = own if mean is None else average * mean + (1 - average) * own
        expected = by_singular_values(gradients_of(model, x, y)[0], mean, 0.1, 1e-9)
        old = model.weight.detach().clone()
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(model.weight.detach() - old, expected, rtol=1e-5, atol=1e-8)


def test_lr_is_how_far_each_pre_activation_moves():
    """For a gradient of full rank: within what five iterations leave of the singular values."""
    for d_in, d_out in ((40, 8), (8, 40)):
        model = nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
        x, y = 30 * draw(300, d_in) @ draw(d_in, d_in, seed=1), draw(300, d_out, seed=2)
        before = model(x).detach()
        step(model, x, y, lr=0.05, damping=1e-12)
        moved = (model(x).detach() - before).square().mean().sqrt()
        assert 0.6 * 0.05 < moved < 1.3 * 0.05


def test_inputs_may_be_mixed_linearly():
    """XB with W B⁻ᵀ is the same function, before the step and after it; Muon's step would differ."""
    x, y, b = draw(50, 6), draw(50, 4, seed=1), draw(6, 6, seed=2)
    plain = nn.Linear(6, 4, dtype=torch.float64)
    mixed = copy.deepcopy(plain)
    with torch.no_grad():
        mixed.weight.copy_(plain.weight @ torch.linalg.inv(b).T)
    torch.testing.assert_close(plain(x), mixed(x @ b))
    before = plain(x).detach()
    step(plain, x, y, damping=1e-13)
    step(mixed, x @ b, y, damping=1e-13)
    torch.testing.assert_close(plain(x), mixed(x @ b), rtol=1e-7, atol=1e-8)
    assert (plain(x) - before).abs().max() > 1e-3


def test_the_scale_of_the_loss_and_gamma_drop_out():
    x, y = draw(50, 6), draw(50, 4, seed=1)
    start = nn.Linear(6, 4, dtype=torch.float64)
    ends = []
    for scale in (1.0, 1e4):
        model = copy.deepcopy(start)
        step(model, x, y, scale=scale)
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends)


def test_with_white_inputs_it_is_muon():
    """XᵀX = N·I makes L a multiple of the identity; torch's Muon iterates in bfloat16."""
    x = 50**0.5 * torch.linalg.qr(draw(50, 6))[0].float()
    ours = nn.Linear(6, 4, bias=False)
    theirs = copy.deepcopy(ours)
    muon = torch.optim.Muon(theirs.parameters(), lr=0.1, momentum=0.95, weight_decay=0.0)
    # torch's Muon averages gradients, (1 - β)g, where ours adds them up: the scale drops out.
    optimizer = LocoProp(ours, 0.1, solver=Spectral(damping=1e-9, average=0.0), output="identity")
    for seed in range(4):
        y = draw(50, 4, seed=seed + 1).float()
        for model, opt in ((ours, optimizer), (theirs, muon)):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            opt.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0.0, atol=0.03)
    optimizer.close()


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def train(model, optimizer, steps, first=0):
    losses = []
    for k in range(first, first + steps):
        g = torch.Generator().manual_seed(k)
        y = torch.randint(3, (16,), generator=g)
        x = torch.randn(16, 2, 4, 4, generator=g) + y[:, None, None, None]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_groups_are_problems_of_their_own():
    """A grouped convolution moves as its groups do in two convolutions."""
    torch.manual_seed(0)
    grouped = nn.Conv1d(4, 6, 3, groups=2, dtype=torch.float64)
    halves = nn.ModuleList([nn.Conv1d(2, 3, 3, dtype=torch.float64) for _ in range(2)])
    with torch.no_grad():
        for k, half in enumerate(halves):
            half.weight.copy_(grouped.weight[3 * k : 3 * k + 3])
            half.bias.copy_(grouped.bias[3 * k : 3 * k + 3])
    x = draw(5, 4, 9)
    y = draw(5, 6, 7, seed=1)
    # Both groups' inputs have the same mean square, since the damping is relative to the mean over all groups.
    x[:, 2:] = x[:, :2].flip(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.halves = halves

        def forward(self, x):
            return torch.cat([half(part) for half, part in zip(self.halves, x.chunk(2, 1), strict=True)], 1)

    step(grouped, x, y)
    step(Two(), x, y, output=None)
    torch.testing.assert_close(grouped.weight, torch.cat([h.weight for h in halves]), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("every", [1, 4])
def test_it_trains_convolutions_and_resumes_exactly(every):
    model = net()
    optimizer = recipes.spectral(model, lr=0.03, every=every, output="softmax")
    losses = train(model, optimizer, 12)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 5, first=12)
    other = net()
    resumed = recipes.spectral(other, lr=0.03, every=every, output="softmax")
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, 5, first=12) == expected


def test_schedulers_of_lr_reach_it():
    ends = []
    for factor in (1.0, 0.5):
        model = nn.Linear(6, 4, bias=True, dtype=torch.float64)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        optimizer = LocoProp(model, 0.1, solver=Spectral(), output="identity")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, factor=factor: factor)
        F.mse_loss(model(draw(50, 6)), draw(50, 4, seed=1)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.close()
        ends.append(model.weight.detach().clone())
    torch.testing.assert_close(0.5 * ends[0], ends[1])


def test_a_layer_at_rest_stays():
    """No gradient and no input: nothing moves, and nothing divides by zero."""
    model = nn.Linear(6, 4)
    old = copy.deepcopy(model.state_dict())
    for x in (torch.zeros(5, 6), torch.randn(5, 6)):
        optimizer = LocoProp(model, 0.1, solver=Spectral(), output="identity")
        (0 * model(x).sum()).backward()
        optimizer.step()
        optimizer.close()
    for name, value in model.state_dict().items():
        assert torch.equal(value, old[name])


@pytest.mark.parametrize("every", [1, 3])
def test_dead_inputs_leave_the_weights_alone(every):
    """Momentum without gradients would go on by its direction alone, in a metric that vanishes."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    optimizer = LocoProp(model, 0.01, solver=Spectral(every=every), output="identity")
    for k in range(200):
        optimizer.zero_grad()
        x = torch.randn(8, 6) if k < 20 else torch.zeros(8, 6)
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        if k == 19:
            old = model.weight.detach().clone()
    assert torch.equal(model.weight, old)


def test_a_dead_channel_rests_and_the_others_go_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU())
    optimizer = LocoProp(model, 1e-3, solver=Spectral())
    for k in range(60):
        if k == 20:
            with torch.no_grad():
                model[0].bias[0] = -100.0
            old = model[0].weight.detach().clone()
        optimizer.zero_grad()
        (model(torch.randn(4, 3, 5, 5)) - 1).square().mean().backward()
        optimizer.step()
    moved = (model[0].weight.detach() - old).flatten(1).abs().sum(1)
    assert moved[0] == 0
    assert (moved[1:] > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients_of_any_size(scale):
    x, y = draw(50, 6).float(), draw(50, 4, seed=1).float()
    torch.manual_seed(0)
    start = nn.Linear(6, 4)
    ends = []
    for factor in (1.0, scale):
        model = copy.deepcopy(start)
        optimizer = LocoProp(model, 0.1, solver=Spectral(), output="identity")
        (model(x) - y).backward((model(x) - y).detach() * factor)
        optimizer.step()
        optimizer.close()
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ends[0], start.weight)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("d_in", [1, 6])
def test_a_bias_may_be_frozen_and_freed(every, d_in):
    model = nn.Linear(d_in, 4)
    optimizer = LocoProp(model, 0.01, solver=Spectral(every=every), output="identity")
    for free in (True, True, False, False, True, True):
        model.bias.requires_grad_(free)
        old = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        (model(torch.randn(8, d_in)) - 1).square().mean().backward()
        optimizer.step()
        assert not torch.equal(model.weight, old["weight"])
        assert torch.equal(model.bias, old["bias"]) == (not free)


def test_cross_attention_counts_each_projections_rows():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True, bias=False).double()
    optimizer = LocoProp(model, 0.01, solver=Spectral(damping=1e-9))
    q, kv = draw(16, 4, 8), draw(16, 100, 8, seed=1)
    old = model.in_proj_weight.detach().clone()
    (model(q, kv, kv)[0] * draw(16, 4, 8, seed=2)).sum().backward()
    optimizer.step()
    change = (model.in_proj_weight.detach() - old).chunk(3)
    moved = [(x @ w.T).square().mean().sqrt() for x, w in zip((q, kv, kv), change, strict=True)]
    assert all(0.006 < m < 0.013 for m in moved)


@pytest.mark.parametrize("loss", ["squared", "matching"])
def test_the_loss_matters_only_by_its_gradient(loss):
    x, y = draw(50, 6), draw(50, 4, seed=1)
    ends = []
    for options in ({"loss": loss}, {"target": NormalizedTarget(), "loss": "squared", "activation_lr": 0.01}):
        torch.manual_seed(0)
        model = nn.Linear(6, 4, dtype=torch.float64)
        optimizer = LocoProp(model, 0.1, solver=Spectral(), output="identity", **options)
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.close()
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"damping": 0.0}, "damping"),
        ({"average": 1.0}, "average"),
        ({"every": 0}, "every"),
        ({"iterations": 0}, "iterations"),
    ],
)
def test_bad_arguments(options, error):
    with pytest.raises(ValueError, match=error):
        Spectral(**options)
    assert "Spectral" in repr(Spectral())
