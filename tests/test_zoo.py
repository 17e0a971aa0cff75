"""What trains with AdamW trains with LocoProp(model), and with one plain local step it trains like SGD."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp, recipes
from zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(name):
    torch.manual_seed(0)
    return ZOO[name]()


def train(problem, optimizer, steps):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = problem.loss(problem.model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(rate):
    return lambda params: torch.optim.SGD(params, lr=rate)


@pytest.mark.parametrize("name", ZOO)
def test_trains_out_of_the_box(name):
    adamw = build(name)
    losses = train(adamw, torch.optim.AdamW(adamw.model.parameters()), 30)
    assert losses[-1] < losses[0]
    problem = build(name)
    optimizer = LocoProp(problem.model, output=problem.output)
    before = {key: p.detach().clone() for key, p in problem.model.named_parameters()}
    losses = train(problem, optimizer, 30)
    assert losses[-1] < losses[0]
    still = [n for n, p in problem.model.named_parameters() if p.grad is not None and torch.equal(p, before[n])]
    assert not [n for n in still if problem.model.get_parameter(n).grad.any()]


@pytest.mark.parametrize("name", ZOO)
def test_trains_by_spectral_steps(name):
    problem = build(name)
    losses = train(problem, recipes.spectral(problem.model, output=problem.output), 30)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.usefixtures("double")
def test_one_plain_step_is_sgd(name, loss):
    rate, gamma = 0.01, 4.0
    plain, problem = build(name), build(name)
    expected = train(plain, torch.optim.SGD(plain.model.parameters(), lr=rate * gamma), 3)
    optimizer = LocoProp(
        problem.model,
        lr=rate,
        activation_lr=gamma,
        local_steps=1,
        loss=loss,
        solver=torch.optim.SGD,
        output=problem.output,
        fallback=sgd(rate * gamma),
    )
    assert_close(train(problem, optimizer, 3), expected, rtol=1e-9, atol=1e-12)
    assert_close(dict(problem.model.named_parameters()), dict(plain.model.named_parameters()), rtol=1e-9, atol=1e-12)
    assert_close(dict(problem.model.named_buffers()), dict(plain.model.named_buffers()), rtol=1e-9, atol=1e-12)


class Gan:
    """A generator and a discriminator; each has its optimizer and steps in turn."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.optimizers = make(self.generator), make(self.discriminator)

    def run(self, steps):
        torch.manual_seed(1)
        losses = []
        for _ in range(steps):
            real, fake = torch.randn(32, 2) + 3, self.generator(torch.randn(32, 3))
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            scores = self.discriminator(torch.cat([real, fake.detach()])).squeeze(1)
            labels = torch.cat([torch.ones(32), torch.zeros(32)])
            loss = F.binary_cross_entropy_with_logits(scores, labels)
            loss.backward()
            self.optimizers[1].step()
            self.optimizers[0].zero_grad()
            score = self.discriminator(fake).squeeze(1)
            F.binary_cross_entropy_with_logits(score, torch.ones(32)).backward()
            self.optimizers[0].step()
            losses.append(loss.item())
        return losses


@pytest.mark.usefixtures("double")
def test_two_optimizers_in_turns_are_sgd():
    """The generator's pass leaves rows at the discriminator, which the next zero_grad clears."""
    own = Gan(lambda m: LocoProp(m, lr=0.01, activation_lr=4.0, local_steps=1, solver=torch.optim.SGD))
    plain = Gan(lambda m: torch.optim.SGD(m.parameters(), lr=0.04))
    assert_close(own.run(5), plain.run(5), rtol=1e-9, atol=1e-12)
    for a, b in ((own.generator, plain.generator), (own.discriminator, plain.discriminator)):
        assert_close(dict(a.named_parameters()), dict(b.named_parameters()), rtol=1e-9, atol=1e-12)


def test_two_optimizers_in_turns():
    losses = Gan(lambda m: LocoProp(m, lr=1e-4)).run(20)
    assert all(0 < loss < 10 for loss in losses)
