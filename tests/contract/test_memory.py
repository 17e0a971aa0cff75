"""What a step needs is freed after it; nothing grows with the number of steps."""

import gc
import weakref

import pytest
import torch
from torch import nn

from torchloco import LocoProp, recipes


def live_tensors():
    gc.collect()
    plain = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    return [t for t in plain if not torch._is_functional_tensor(t)]  # what torch.compile may have left


def held(storage):
    """How many tensors lie on a storage, besides the one given."""
    return sum(t.layout == torch.strided and t.untyped_storage().data_ptr() == storage for t in live_tensors())


def state_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(state_bytes, value.values())) if isinstance(value, dict) else 0


@pytest.mark.parametrize("free", ["step", "zero_grad", "close"])
def test_captures_are_freed(free, mlp, batches):
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    storage = x.untyped_storage().data_ptr()
    nn.functional.mse_loss(model(x), y).backward()
    assert held(storage) > 1, "the rows are needed by the step"
    getattr(optimizer, free)()
    assert held(storage) == 1


def test_captures_are_freed_when_the_step_is_refused(mlp, batches):
    model = mlp()
    optimizer = LocoProp(model)
    [(x, y)] = batches(1)
    storage = x.untyped_storage().data_ptr()
    (nn.functional.mse_loss(model(x), y) * float("inf")).backward()
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert held(storage) == 1


def test_forward_without_backward_keeps_nothing(mlp, batches, train):
    model = mlp()
    optimizer = LocoProp(model)
    train(model, optimizer, batches(1))
    [(x, _)] = batches(1, seed=3)
    storage = x.untyped_storage().data_ptr()
    model(x)
    assert held(storage) == 1


def test_graph_is_freed_by_the_first_step(mlp, batches, train):
    """What discovery reads off the first graph is let go with it."""
    model = mlp()
    optimizer = LocoProp(model)
    data = batches(1)
    alive = weakref.ref(data[0][0])
    train(model, optimizer, data)
    del data
    gc.collect()
    assert alive() is None


def test_graphs_do_not_pile_up_before_the_first_step(mlp, batches):
    """Passes with gradients but without a backward pass, as in a warm-up of running statistics."""
    model = mlp()
    optimizer = LocoProp(model)
    alive = []
    for _ in range(10):
        [(x, _)] = batches(1)
        alive.append(weakref.ref(x))
        model(x)
        del x
    gc.collect()
    assert sum(r() is not None for r in alive) <= 1
    assert optimizer.layers


def test_nothing_grows_over_the_steps(batches, train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    optimizer = LocoProp(model, lr=1e-3)
    data = batches(1)
    train(model, optimizer, data * 3)
    count, size = len(live_tensors()), state_bytes(dict(optimizer.state))
    assert size > 0
    train(model, optimizer, data * 50)
    assert state_bytes(dict(optimizer.state)) == size
    assert len(live_tensors()) == count


class Mixer(nn.Module):
    """A convolution, attention and a head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        return self.head(tokens + self.attention(tokens, tokens, tokens)[0]).mean(1)


@pytest.mark.parametrize("make", [LocoProp, recipes.spectral], ids=["steps", "spectral"])
def test_nothing_grows_over_200_steps_of_convolutions_and_attention(make):
    torch.manual_seed(0)
    model = Mixer()
    optimizer = make(model, lr=1e-3)
    x, y = torch.randn(4, 1, 6, 6), torch.randint(3, (4,))

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    train(5)
    count, size = len(live_tensors()), state_bytes(dict(optimizer.state))
    assert size > 0
    train(200)
    assert state_bytes(dict(optimizer.state)) == size
    assert len(live_tensors()) == count


def test_state_is_two_slots_per_parameter(mlp, batches, train):
    """The paper's RMSProp has a mean square and a momentum, and nothing else is kept between steps."""
    model = mlp()
    optimizer = LocoProp(model)
    train(model, optimizer, batches(3))
    assert state_bytes(dict(optimizer.state)) == 2 * sum(p.numel() * p.element_size() for p in model.parameters())
