"""Adapters on frozen layers, as LoRA has them: what is frozen rests, the adapters are layers of their own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp


class LoRA(nn.Module):
    """A frozen layer with a low-rank term beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.fixture
def adapted(mlp):
    def build():
        model = mlp()
        torch.manual_seed(3)
        model[0], model[2] = LoRA(model[0]), LoRA(model[2])
        model[4].requires_grad_(False)
        return model

    return build


def test_only_the_adapters_train(adapted, batches, train, values):
    model = adapted()
    optimizer = LocoProp(model, lr=1e-3)
    assert [info.name for info in optimizer.layers] == ["0.a", "0.b", "2.a", "2.b"]
    assert optimizer.fallback_parameters == []
    before = values(model)
    losses = train(model, optimizer, batches(1) * 30)
    assert losses[-1] < losses[0]
    after = values(model)
    for name in before:
        assert torch.equal(before[name], after[name]) == (".a." not in name and ".b." not in name), name
    # What follows the low-rank term is the sum with the frozen layer's output.
    assert [info.transfer.name for info in optimizer.layers] == ["identity"] * 4


def test_one_plain_step_is_sgd(adapted, batches, train, values):
    plain, model = adapted(), adapted()
    trained = [p for p in plain.parameters() if p.requires_grad]
    data = batches(4)
    expected = train(plain, torch.optim.SGD(trained, lr=0.4), data)
    optimizer = LocoProp(model, lr=0.1, activation_lr=4.0, local_steps=1, solver=torch.optim.SGD)
    assert_close(train(model, optimizer, data), expected, rtol=1e-9, atol=1e-12)
    assert_close(values(model), values(plain), rtol=1e-9, atol=1e-12)


def test_frozen_layers_keep_no_rows(adapted, batches):
    model = adapted()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    nn.functional.mse_loss(model(x), y).backward()
    assert {layer.name for layer in optimizer._layers.values() if layer.recorder.collected()} == {
        "0.a",
        "0.b",
        "2.a",
        "2.b",
    }
    assert not model[0].base._forward_hooks


def test_adapters_merged_into_the_weights(adapted, batches, train):
    """Writing to frozen weights between steps is the user's to do."""
    model = adapted()
    optimizer = LocoProp(model, lr=1e-3)
    train(model, optimizer, batches(3))
    [(x, _)] = batches(1, seed=4)
    before = model(x)
    with torch.no_grad():
        for lora in (model[0], model[2]):
            lora.base.weight += lora.b.weight @ lora.a.weight
            lora.b.weight.zero_()
    assert_close(model(x), before)
    train(model, optimizer, batches(2))
