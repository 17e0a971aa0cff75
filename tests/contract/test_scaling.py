"""The local problems agree with `.grad` as the user left it, scaled, clipped or accumulated; or the step is refused."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp

PLAIN = torch.optim.SGD
"""Plain inner steps keep the scale of the gradient visible, which RMSProp may hide."""


def one_step(model, optimizer, x, y, factor=1.0, edit=None):
    optimizer.zero_grad()
    (nn.functional.mse_loss(model(x), y) * factor).backward()
    if edit is not None:
        edit(model)
    optimizer.step()


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("scale", [2.0**16, 3e-4])
def test_scaled_loss_with_unscaled_gradients(scale, loss, mlp, batches, values):
    """What torch.amp.GradScaler does."""

    def unscale(model):
        for p in model.parameters():
            p.grad /= scale

    results = []
    for factor, edit in ((1.0, None), (scale, unscale)):
        model = mlp()
        optimizer = LocoProp(model, lr=0.1, loss=loss, solver=PLAIN)
        for x, y in batches(3):
            one_step(model, optimizer, x, y, factor, edit)
        results.append(values(model))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_grad_scaler(mlp, batches, values):
    results = []
    for scaled in (False, True):
        model = mlp(dtype=torch.float32)
        optimizer = LocoProp(model, lr=0.1, solver=PLAIN)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for x, y in batches(3, dtype=torch.float32):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(values(model))
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_grad_scaler_skips_an_overflow(mlp, batches, values, same):
    model = mlp(dtype=torch.float32)
    optimizer = LocoProp(model, lr=0.1, solver=PLAIN)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=10**6)
    before = values(model)
    for factor in (1e30, 1.0):
        [(x, y)] = batches(1, dtype=torch.float32)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x), y) * factor).backward()
        scaler.step(optimizer)
        scaler.update(new_scale=1.0)
        assert same(values(model), before) == (factor != 1.0)


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_clip_by_norm_scales_the_problem(loss, mlp, batches, values):
    """As if the network's loss had been multiplied by the clip coefficient."""
    limit = 0.01
    clipped, scaled = mlp(), mlp()
    optimizers = [LocoProp(m, lr=0.1, loss=loss, solver=PLAIN) for m in (clipped, scaled)]
    for x, y in batches(3):
        norms = []
        one_step(
            clipped,
            optimizers[0],
            x,
            y,
            edit=lambda m, norms=norms: norms.append(nn.utils.clip_grad_norm_(m.parameters(), limit)),
        )
        assert norms[0] > 2 * limit, "nothing was clipped"
        one_step(scaled, optimizers[1], x, y, factor=(limit / (norms[0] + 1e-6)).item())
    assert_close(values(clipped), values(scaled), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: nn.utils.clip_grad_value_(m.parameters(), 1e-3),
        lambda m: [p.grad.add_(torch.randn_like(p)) for p in m.parameters()],
        lambda m: [p.grad.sign_() for p in m.parameters()],
    ],
    ids=["clip_grad_value_", "noise", "signs"],
)
def test_other_edits_are_refused(edit, mlp, batches, values, same):
    torch.manual_seed(0)
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    before = values(model)
    with pytest.raises(RuntimeError, match="layer '0'.*does not belong to the captured rows.*clip by value"):
        one_step(model, optimizer, x, y, edit=edit)
    assert same(values(model), before)
    one_step(model, optimizer, x, y)
    assert not same(values(model), before)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_accumulation_equals_the_big_batch(parts, loss, mlp, batches, values):
    big, small = mlp(), mlp()
    optimizers = [LocoProp(m, lr=1e-2, loss=loss) for m in (big, small)]
    for x, y in batches(3, rows=8):
        one_step(big, optimizers[0], x, y)
        optimizers[1].zero_grad()
        for micro_x, micro_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.mse_loss(small(micro_x), micro_y) / parts).backward()
        optimizers[1].step()
    assert_close(values(small), values(big), rtol=1e-9, atol=1e-12)


def test_parts_of_unequal_size(mlp, batches, values):
    big, small = mlp(), mlp()
    optimizers = [LocoProp(m, lr=1e-2) for m in (big, small)]
    [(x, y)] = batches(1, rows=8)
    one_step(big, optimizers[0], x, y)
    for micro_x, micro_y in zip(x.split([5, 3]), y.split([5, 3]), strict=True):
        (nn.functional.mse_loss(small(micro_x), micro_y, reduction="sum") / y.numel()).backward()
    optimizers[1].step()
    assert_close(values(small), values(big), rtol=1e-9, atol=1e-12)


def test_two_losses_of_one_forward(mlp, batches, values):
    """Two backward passes through one graph add up, as their sum would."""
    results = []
    for separate in (False, True):
        model = mlp()
        optimizer = LocoProp(model, lr=1e-2, solver=PLAIN, local_steps=1)
        [(x, y)] = batches(1)
        output = model(x)
        losses = [nn.functional.mse_loss(output, y), output.square().mean()]
        if separate:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        else:
            sum(losses).backward()
        optimizer.step()
        results.append(values(model))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_stale_gradients_are_refused(mlp, batches, train, values, same):
    """Without zero_grad the gradient is of two batches, the rows of one."""
    model = mlp()
    optimizer = LocoProp(model, lr=1e-3)
    first, second = batches(2)
    train(model, optimizer, [first])
    nn.functional.mse_loss(model(second[0]), second[1]).backward()
    before = values(model)
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    assert same(values(model), before)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_cleared_through_the_model(set_to_none, mlp, batches, values, same):
    """model.zero_grad() is as good as optimizer.zero_grad() where every batch has a step."""
    a, b = mlp(), mlp()
    optimizers = [LocoProp(m, lr=1e-3) for m in (a, b)]
    for x, y in batches(3):
        for model, optimizer in ((a, optimizers[0]), (b, optimizers[1])):
            if model is a:
                optimizer.zero_grad(set_to_none=set_to_none)
            else:
                model.zero_grad(set_to_none=set_to_none)
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert same(values(a), values(b))


def test_passes_without_a_step_cleared_through_the_model(mlp, batches, train, values, same):
    """As of a discriminator that the generator's loss goes through."""
    a, b = mlp(), mlp()
    data = batches(4)
    train(a, LocoProp(a, lr=1e-3), data[1::2])
    optimizer = LocoProp(b, lr=1e-3)
    for (other, _), (x, y) in zip(data[::2], data[1::2], strict=True):
        b(other).mean().backward()
        b.zero_grad()
        nn.functional.mse_loss(b(x), y).backward()
        optimizer.step()
    assert same(values(a), values(b))


def test_gradients_cleared_between_forward_and_backward(mlp, batches, train, values, same):
    a, b = mlp(), mlp()
    data = batches(3)
    train(a, LocoProp(a, lr=1e-3), data)
    optimizer = LocoProp(b, lr=1e-3)
    for x, y in data:
        loss = nn.functional.mse_loss(b(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(values(a), values(b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vanishing_gradient_is_not_taken_for_a_wrong_one(dtype):
    """At a least-squares optimum GᵀX is rounding error, though no row of G is zero."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200, 5, dtype=dtype), torch.ones(200, 1, dtype=dtype)], 1)
    y = torch.randn(200, 2, dtype=dtype)
    model = nn.Sequential(nn.Linear(6, 2, bias=False, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y).solution.t())
    best = model[0].weight.detach().clone()
    optimizer = LocoProp(model, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (nn.functional.mse_loss(model(x), y) * 0.3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert_close(model[0].weight.detach(), best, rtol=1e-2, atol=1e-3)


@pytest.fixture(params=[False, True], ids=["subnormals", "flushed"])
def flush(request):
    """Whether the CPU takes subnormal numbers for zero."""
    if not torch.set_flush_denormal(request.param):
        pytest.skip("this CPU cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_at_the_end_of_the_range_are_not_taken_for_wrong_ones(flush, dtype):
    """As of the first of many layers: what is left of their digits differs from sum to sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(dtype)
    optimizer = LocoProp(model, lr=1e-3)
    for exponent in range(0, 10) if dtype == torch.float16 else range(30, 46):
        optimizer.zero_grad()
        model[1](model[0](torch.randn(50, 6, dtype=dtype)) * 10.0**-exponent).square().mean().backward()
        optimizer.step()


def test_gradients_of_another_pass_are_refused_in_float16(mlp):
    """However small they are, as long as some of their digits are left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).half()
    optimizer = LocoProp(model, lr=1e-3)
    (model(torch.randn(50, 6).half()).square().mean() * 3e-2).backward()
    model[0].weight.grad = model[0].weight.grad.roll(1, 0)
    with pytest.raises(RuntimeError, match="layer '0': its gradient does not belong"):
        optimizer.step()


def test_zero_gradient(mlp, batches):
    """A pass without any error is a step like others."""
    model = mlp(6, 3)
    optimizer = LocoProp(model, lr=1e-3)
    [(x, _)] = batches(1)
    before = model[0].weight.detach().clone()
    one_step(model, optimizer, x, model(x).detach())
    assert_close(model[0].weight.detach(), before)
