"""A layer called several times in one pass is one local problem over the rows of all calls."""

import pytest
import torch
from torch import nn

from torchloco import LocoProp


class Siamese(nn.Module):
    """One layer on both halves of the input, called twice or once on the stacked halves."""

    def __init__(self, twice):
        super().__init__()
        torch.manual_seed(0)
        self.twice = twice
        self.shared = nn.Linear(3, 4, dtype=torch.float64)
        self.out = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x):
        if self.twice:
            left, right = (torch.tanh(self.shared(half)) for half in x.chunk(2, -1))
        else:
            left, right = torch.tanh(self.shared(torch.cat(x.chunk(2, -1)))).chunk(2)
        return self.out(left * right)


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_two_calls_equal_one_call_on_all_rows(loss, batches, train, values):
    results = []
    for twice in (True, False):
        model = Siamese(twice)
        optimizer = LocoProp(model, lr=1e-2, loss=loss)
        train(model, optimizer, batches(4))
        assert [info.transfer.name for info in optimizer.layers] == ["tanh", "identity"]
        results.append(values(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_not_merely_the_last_call(batches, train, values):
    """The rows of the first call matter: another first half, another step."""
    results = []
    for shift in (0.0, 1.0):
        model = Siamese(True)
        optimizer = LocoProp(model, lr=1e-2, params=["shared"])
        [(x, y)] = batches(1)
        x[:, :3] += shift
        train(model, optimizer, [(x, y)])
        results.append(values(model)["shared.weight"])
    assert not torch.allclose(*results, rtol=1e-6)


def test_calls_with_and_without_an_activation_are_identity(batches, train):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(6, 6, dtype=torch.float64)
            self.out = nn.Linear(6, 3, dtype=torch.float64)

        def forward(self, x):
            return self.out(self.shared(torch.tanh(self.shared(x))))

    model = Both()
    optimizer = LocoProp(model)
    train(model, optimizer, batches(1))
    assert optimizer.layers[0].transfer.name == "identity"
    assert "Tanh" in optimizer.layers[0].source
    assert "layer" in optimizer.layers[0].source


def test_one_call_used_in_the_loss(batches, values):
    """Of two calls, only the one that the backward pass reached counts."""
    results = []
    for extra in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 3, dtype=torch.float64))
        optimizer = LocoProp(model, lr=1e-2)
        [(x, y)] = batches(1)
        output = model(x)
        if extra:
            model(x + 1)
        nn.functional.mse_loss(output, y).backward()
        optimizer.step()
        results.append(values(model)["0.weight"])
    assert torch.equal(*results)
