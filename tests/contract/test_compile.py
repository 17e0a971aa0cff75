"""torch.compile before or after the optimizer is built gives the plain model's steps, or an error that says why."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp

# dynamo looks at `.grad` of the tensors that it hands over a graph break
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


class Block(nn.Module):
    """Attention and an MLP on tokens, with its parts as a transformer has them."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(x + self.down(torch.relu(self.up(x))))


def network(kind):
    torch.manual_seed(0)
    if kind == "transformer":
        return Block()
    return nn.Sequential(
        *(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        *(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
    )


def data(kind, count=3):
    generator = torch.Generator().manual_seed(1)
    if kind == "transformer":
        tokens = [torch.randint(11, (4, 5), generator=generator) for _ in range(count)]
        return [(t, t.flip(1)) for t in tokens]
    xs = [torch.randn(8, 6, generator=generator) for _ in range(count)]
    return [(x, x[:, :3].argmax(1)) for x in xs]


def train(called, optimizer, batches):
    torch.manual_seed(2)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(called(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def build(model, **options):
    return LocoProp(model, lr=1e-3, output=nn.CrossEntropyLoss(), **options)


def compiled(model, how, backend):
    if how == "in place":
        model.compile(backend=backend)
        return model
    return torch.compile(model, backend=backend)


def found(optimizer):
    return [info.transfer.name for info in optimizer.layers]


@pytest.mark.parametrize(
    ("kind", "backend", "when", "how"),
    [
        ("mlp", "eager", "after", "wrapped"),
        ("mlp", "aot_eager", "before", "wrapped"),
        ("mlp", "aot_eager", "after", "wrapped"),
        ("mlp", "aot_eager", "after", "in place"),
        ("transformer", "aot_eager", "after", "wrapped"),
    ],
)
def test_as_the_plain_model(kind, backend, when, how, values):
    plain, model = network(kind), network(kind)
    expected = build(plain)
    losses = train(plain, expected, data(kind))
    if when == "before":
        called = compiled(model, how, backend)
        optimizer = build(called if how == "wrapped" else model)
    else:
        optimizer = build(model)
        called = compiled(model, how, backend)
    assert_close(train(called, optimizer, data(kind)), losses, rtol=1e-5, atol=1e-5)
    assert found(optimizer) == found(expected)
    assert_close(values(model), values(plain), rtol=1e-4, atol=1e-5)
    assert_close(dict(model.named_buffers()), dict(plain.named_buffers()), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler; install g++")
def test_inductor(values):
    plain, model = network("mlp"), network("mlp")
    for net in (plain, model):  # inductor draws its own random numbers
        net[5].p = 0.0
    expected, optimizer = build(plain), build(model)
    losses = train(plain, expected, data("mlp"))
    assert_close(train(torch.compile(model), optimizer, data("mlp")), losses, rtol=1e-5, atol=1e-5)
    assert found(optimizer) == found(expected)
    assert_close(values(model), values(plain), rtol=1e-4, atol=1e-5)


def test_a_part_of_the_model(values):
    plain, model = network("transformer"), network("transformer")
    expected, optimizer = build(plain), build(model)
    losses = train(plain, expected, data("transformer"))
    model.up.compile(backend="aot_eager")
    model.qkv.compile(backend="aot_eager")
    assert_close(train(model, optimizer, data("transformer")), losses, rtol=1e-5, atol=1e-5)
    assert found(optimizer) == found(expected)
    assert_close(values(model), values(plain), rtol=1e-4, atol=1e-5)


def test_parts_called_without_the_model(values, same):
    """Its forward never runs, so that nothing shows what follows."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network("mlp")

    model = Pair()
    optimizer = build(model)
    body = torch.compile(model.body, backend="aot_eager")
    before = values(model)
    with pytest.raises(RuntimeError, match="'body.0' is inside code compiled by torch.compile.*transfers="):
        train(body, optimizer, data("mlp"))
    assert same(values(model), before)
    optimizer.close()
    torch._dynamo.reset()
    names = {"body.0": "tanh", "body.2": "identity", "body.6": "relu", "body.8": "softmax"}
    named = build(model, transfers=names)
    assert len(train(torch.compile(model.body, backend="aot_eager"), named, data("mlp"))) == 3
    assert found(named) == list(names.values())


def test_called_before_the_optimizer_is_built(values, same):
    model = network("mlp")
    called = torch.compile(model, backend="aot_eager")
    [(x, y), *_] = data("mlp")
    F.cross_entropy(called(x), y).backward()
    optimizer = build(model)
    before = values(model)
    with pytest.raises(RuntimeError, match=r"before the first call of a model compiled.*torch\._dynamo\.reset"):
        train(called, optimizer, data("mlp"))
    assert same(values(model), before)
    torch._dynamo.reset()
    assert len(train(called, optimizer, data("mlp"))) == 3


def test_discovery_leaves_randomness_and_buffers(values, same):
    """The second run of the first pass is not seen in what follows it."""
    states = []
    for names in ({"0": "tanh", "2": "identity", "6": "relu", "8": "softmax"}, {}):  # named: no second run
        torch._dynamo.reset()
        model = network("mlp")
        optimizer = build(model, transfers=names)
        train(torch.compile(model, backend="aot_eager"), optimizer, data("mlp"))
        states.append((torch.get_rng_state(), dict(model.state_dict())))
    assert torch.equal(states[0][0], states[1][0])
    assert same(states[0][1], states[1][1])
