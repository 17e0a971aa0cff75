"""Sequences of several lengths: rows that the loss leaves out have no gradient, and no part in the local problem."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from torchloco import ConjugateGradient, Exact, LocoProp

LENGTHS = (5, 2, 7, 3)


class Tagger(nn.Module):
    """Attention with a mask, an MLP, a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.project = nn.Linear(6, 18), nn.Linear(6, 6)
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 3)

    def forward(self, x, kept):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None, :]))
        return self.head(x + self.down(torch.relu(self.up(x))))


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in LENGTHS]


def padded(length, filling):
    """Inputs, a mask of what is kept, and labels with -100 where nothing is asked."""
    xs = sequences()
    x = torch.full((len(xs), length, 6), filling, dtype=torch.float64)
    y = torch.full((len(xs), length), -100)
    for k, row in enumerate(xs):
        x[k, : len(row)], y[k, : len(row)] = row, row[:, :3].argmax(-1)
    return x, y != -100, y


def train(optimizer, model, parts, steps=3):
    """Losses of steps whose micro-batches are the parts, divided by the number of labels in all."""
    count = sum(int((y != -100).sum()) for _, _, y in parts)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for x, kept, y in parts:
            loss = F.cross_entropy(model(x, kept).flatten(0, 1), y.flatten(), reduction="sum") / count
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


def build(loss, solver):
    model = Tagger().double()
    return model, LocoProp(model, lr=1e-2, loss=loss, solver=solver, output=nn.CrossEntropyLoss())


def test_padded_rows_have_no_gradient():
    model, optimizer = build("matching", None)
    x, kept, y = padded(9, 0.5)
    F.cross_entropy(model(x, kept).flatten(0, 1), y.flatten()).backward()
    for layer in optimizer._layers.values():
        [capture] = layer.recorder.collected()
        rows = capture.g
        assert not rows[~kept][:, -6:].any(), (
            layer.name
        )  # of q, k, v: the values and keys of no one, queries without loss
        assert not rows[~kept].any(), layer.name
        assert rows[kept].any(), layer.name


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_one_plain_step_does_not_see_the_padding(loss):
    """With one step the gradient decides alone."""
    results = []
    for length, filling in ((7, 0.0), (12, 3.0)):
        model = Tagger().double()
        optimizer = LocoProp(model, lr=1e-2, loss=loss, local_steps=1, solver=torch.optim.SGD)
        train(optimizer, model, [padded(length, filling)])
        results.append(dict(model.named_parameters()))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_buckets_of_several_lengths():
    """Micro-batches of different lengths, without padding, are the padded batch of one plain step."""
    results = []
    whole = padded(7, 0.0)
    single = [(x[None], torch.ones(1, len(x), dtype=torch.bool), x[None, :, :3].argmax(-1)) for x in sequences()]
    for parts in ([whole], single):
        model = Tagger().double()
        optimizer = LocoProp(model, lr=1e-2, local_steps=1, solver=torch.optim.SGD)
        losses = train(optimizer, model, parts)
        results.append((losses, dict(model.named_parameters())))
    assert_close(*results, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_further_steps_do_not_see_the_padding(loss):
    results = []
    for length, filling in ((7, 0.0), (12, 0.5)):
        model, optimizer = build(loss, None)
        train(optimizer, model, [padded(length, filling)], steps=1)
        results.append(dict(model.named_parameters()))
    assert_close(*results, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [None, Exact(1.0), ConjugateGradient()], ids=["steps", "exact", "cg"])
def test_masked_keys_of_cross_attention_do_not_count(solver):
    """Query, key and value are three problems of different lengths then."""
    results = []
    for filling in (0.0, 7.0):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
        nn.init.normal_(attention.in_proj_bias)
        optimizer = LocoProp(attention, 1e-2, activation_lr=1.0, loss="squared", solver=solver)
        query, memory = torch.randn(2, 4, 8).double(), torch.randn(2, 5, 8).double()
        mask = torch.zeros(2, 5, dtype=torch.bool)
        mask[:, 3:] = True
        memory[mask] = filling
        before = attention.in_proj_weight.detach().clone()
        for _ in range(2):
            optimizer.zero_grad()
            attention(query, memory, memory, key_padding_mask=mask)[0].sub(1).square().sum().backward()
            optimizer.step()
        assert not torch.equal(attention.in_proj_weight, before)
        results.append(dict(attention.named_parameters()))
    assert_close(*results, rtol=1e-9, atol=1e-12)


def test_nothing_but_padding():
    """A batch that asks for nothing changes nothing."""
    model = Tagger().double()
    optimizer = LocoProp(model, lr=1e-2, solver=torch.optim.SGD)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, kept, _ = padded(8, 1.0)
    (0 * model(x, kept)).sum().backward()
    optimizer.step()
    assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
