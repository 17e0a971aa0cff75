"""What several tests share: small models, batches, and the plain training loop."""

import pytest
import torch
from torch import nn


@pytest.fixture
def mlp():
    """A builder of Linear-activation-…-Linear models, the same for the same seed."""

    def build(*sizes, activation=nn.Tanh, bias=True, dtype=torch.float64, seed=0):
        sizes = sizes or (6, 5, 4, 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules = []
            for d_in, d_out in zip(sizes, sizes[1:], strict=False):
                modules += [nn.Linear(d_in, d_out, bias=bias, dtype=dtype), activation()]
        return nn.Sequential(*modules[:-1])

    return build


@pytest.fixture
def batches():
    """A builder of lists of (input, target); targets lie in [0, 1]."""

    def build(count, rows=8, d_in=6, d_out=3, dtype=torch.float64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        lead = (rows,) if isinstance(rows, int) else rows
        return [
            (
                torch.randn(*lead, d_in, generator=generator, dtype=torch.float64).to(dtype),
                torch.rand(*lead, d_out, generator=generator, dtype=torch.float64).to(dtype),
            )
            for _ in range(count)
        ]

    return build


@pytest.fixture
def train():
    """The training loop as users write it; returns the losses."""

    def run(model, optimizer, data, criterion=None):
        criterion = criterion or nn.MSELoss()
        losses = []
        for x, y in data:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def values():
    """Copies of a model's parameters by name."""

    def copy(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    return copy


@pytest.fixture
def same():
    """Whether two dicts of tensors are equal, bit for bit."""

    def check(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return check


@pytest.fixture
def one_thread():
    """For small models: on several threads they wait for each other for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
