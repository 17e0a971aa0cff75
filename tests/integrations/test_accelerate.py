"""Accelerate: the wrapped optimizer, accumulation, clipping, mixed precision, saved state."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from torchloco import LocoProp

accelerate = pytest.importorskip("accelerate", reason="pip install 'torchloco[integrations]'")


@pytest.fixture(autouse=True)
def fresh_state():
    """An Accelerator's settings are global."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield
    accelerate.state.AcceleratorState._reset_state(True)


def build(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    return model, LocoProp(model, **{"lr": 1e-3, "output": nn.CrossEntropyLoss(), **options})


def loader(batch=8, rows=64):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=batch)


def train(accelerator, model, optimizer, data, epochs=2, clip=None, scheduler=None):
    losses = []
    for _ in range(epochs):
        for x, y in data:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [None, 0.05])
def test_equals_the_plain_loop(clip, values, same):
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = build()
    losses = train(accelerator, *accelerator.prepare(model, optimizer, loader()), clip=clip)
    alone, own = build()
    expected = []
    for x, y in [*loader(), *loader()]:
        own.zero_grad()
        loss = nn.functional.cross_entropy(alone(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(alone.parameters(), clip)
        own.step()
        expected.append(loss.item())
    assert losses == expected
    assert same(values(model), values(alone))


def test_accumulation_equals_the_big_batch(values):
    results = []
    for size, parts in ((16, 1), (4, 4)):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts)
        model, optimizer = build(lr=1e-2, solver=torch.optim.SGD)
        train(accelerator, *accelerator.prepare(model, optimizer, loader(size)))
        results.append(values(model))
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_loss_falls(precision):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model, optimizer = build()
    scheduler = LinearLR(optimizer, 0.1, total_iters=8)
    prepared = accelerator.prepare(model, optimizer, loader(), scheduler)
    losses = train(accelerator, *prepared[:3], epochs=12, scheduler=prepared[3])
    assert losses[-1] < 0.8 * losses[0]


def test_resumes_exactly(tmp_path, values, same):
    results = []
    for resume in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = build()
        scheduler = LinearLR(optimizer, 0.1, total_iters=20)
        model, optimizer, data, scheduler = accelerator.prepare(model, optimizer, loader(), scheduler)
        if resume:
            accelerator.load_state(str(tmp_path / "state"))
        else:
            train(accelerator, model, optimizer, data, scheduler=scheduler)
            accelerator.save_state(str(tmp_path / "state"))
        results.append((train(accelerator, model, optimizer, data, scheduler=scheduler), values(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_unwrapped_model_is_the_one_that_is_trained(values, same):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, optimizer = build()
    prepared, optimizer, data = accelerator.prepare(model, optimizer, loader())
    train(accelerator, prepared, optimizer, data)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model
    assert same(values(unwrapped), values(model))


def test_prepared_before_the_optimizer_is_built(values, same):
    accelerator = accelerate.Accelerator(cpu=True)
    model, _ = build()
    _.close()
    model = accelerator.prepare(model)
    optimizer, data = accelerator.prepare(LocoProp(model, lr=1e-3), loader())
    losses = train(accelerator, model, optimizer, data, epochs=12)
    assert losses[-1] < 0.8 * losses[0]
