"""Autocast and the gradient scaler: the steps are the full-precision ones up to the rounding of the lower precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


def data(count=20):
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(64, 16, generator=generator) for _ in range(count)]
    return [(x, x[:, :4].argmax(1)) for x in xs]


def train(model, optimizer, batches, dtype=None, scaler=None, clip=None):
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_plain_step_up_to_rounding(dtype, loss):
    moves = []
    for lower in (None, dtype):
        model = network()
        before = [p.detach().clone() for p in model.parameters()]
        train(model, LocoProp(model, lr=1e-3, loss=loss, solver=torch.optim.SGD), data(1), lower)
        moves.append(torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]))
    assert (moves[1] - moves[0]).norm() < 10 * torch.finfo(dtype).eps * moves[0].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_learns(dtype):
    """In bfloat16 without, in float16 with the scaler, clipped besides."""
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14) if dtype == torch.float16 else None
    optimizer = LocoProp(model, lr=1e-4, output=nn.CrossEntropyLoss())
    losses = train(model, optimizer, data(40), dtype, scaler, clip=1.0)
    assert losses[-1] < 0.6 * losses[0]
    found = {info.name: info.transfer.name for info in optimizer.layers}
    assert found == {"0": "relu", "3": "tanh", "5": "softmax"}
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_scalers_scale_does_not_matter():
    """Powers of two are exact: the same steps, bit for bit, in float32."""
    results = []
    for scale in (2.0**4, 2.0**16):
        model = network()
        optimizer = LocoProp(model, lr=1e-4)
        train(model, optimizer, data(3), None, torch.amp.GradScaler("cpu", init_scale=scale))
        results.append([p.detach().clone() for p in model.parameters()])
    assert_close(*results, rtol=1e-5, atol=1e-6)


def test_an_overflow_is_skipped_and_training_goes_on():
    model = network()
    optimizer = LocoProp(model, lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    x, y = data(1)[0]
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, [(x * 1e30, y)], torch.float16, scaler)
    assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert scaler.get_scale() < 2.0**20
    scaler.update(new_scale=2.0**10)
    losses = train(model, optimizer, data(40), torch.float16, scaler)
    assert losses[-1] < 0.7 * losses[0]


def test_a_part_in_autocast():
    model = network()
    optimizer = LocoProp(model, lr=1e-4)
    losses = []
    for x, y in data(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            h = model[:3](x)
        loss = F.cross_entropy(model[3:](h.float()), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_rounded_gradients_are_not_taken_for_wrong_ones(mode):
    """Small layers, whose gradient's entries nearly cancel in one direction or another."""
    for seed in range(6):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
        dtype = torch.bfloat16 if mode == "weights" else torch.float32
        optimizer = LocoProp(model.to(dtype), lr=1e-4)
        for _ in range(40):
            x = torch.randn(8, 6)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
                loss = F.cross_entropy(model(x.to(dtype)), x[:, :3].argmax(1))
            loss.backward()
            optimizer.step()
