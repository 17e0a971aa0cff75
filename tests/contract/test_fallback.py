"""What is in no supported layer is trained by the fallback optimizer, and said so."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from torchloco import LocoProp

pytestmark = pytest.mark.usefixtures("one_thread")


class Tagger(nn.Module):
    """Embedding, recurrence, norm, a free parameter, and two linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.cell = nn.RNN(4, 4, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 5)
        self.scale = nn.Parameter(torch.ones(5))
        self.out = nn.Linear(5, 7, bias=False)

    def forward(self, words):
        h, _ = self.cell(self.embed(words))
        return self.out(torch.tanh(self.hidden(self.norm(h))) * self.scale)


OTHERS = [
    "scale",
    "embed.weight",
    *(f"cell.{kind}_{of}_l0" for kind in ("weight", "bias") for of in ("ih", "hh")),
    "norm.weight",
    "norm.bias",
]


@pytest.fixture
def words():
    return [torch.randint(0, 7, (3, 6), generator=torch.Generator().manual_seed(k)) for k in range(4)]


def fit(model, optimizer, data):
    losses = []
    for x in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), x.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_named_in_repr_and_data():
    optimizer = LocoProp(Tagger(), output="softmax")
    assert sorted(optimizer.fallback_parameters) == sorted(OTHERS)
    assert [info.name for info in optimizer.layers] == ["hidden", "out"]
    [line] = [line for line in repr(optimizer).splitlines() if "fallback:" in line]
    assert "AdamW" in line
    assert all(name in line for name in OTHERS)


def test_no_fallback_is_no_mention(mlp):
    optimizer = LocoProp(mlp())
    assert optimizer.fallback_parameters == []
    assert "fallback" not in repr(optimizer)


def test_model_trains(words):
    model = Tagger()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = fit(model, LocoProp(model, lr=1e-3, output="softmax"), words * 15)
    assert losses[-1] < 0.7 * losses[0]
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    ("fallback", "plain"),
    [
        (None, torch.optim.AdamW),
        (torch.optim.SGD, torch.optim.SGD),
        (lambda ps: torch.optim.Adam(ps, lr=0.01), lambda ps: torch.optim.Adam(ps, lr=0.01)),
    ],
    ids=["AdamW", "a class", "a factory"],
)
def test_equals_the_plain_optimizer(fallback, plain, words):
    """With tiny local steps the layers rest, so that the others go as with the plain optimizer alone."""
    a, b = Tagger(), Tagger()
    optimizer = LocoProp(a, lr=1e-30, fallback=fallback)
    alone = plain([p for name, p in b.named_parameters() if name in OTHERS])
    assert sorted(optimizer.fallback_parameters) == sorted(OTHERS)
    for x in words:
        assert fit(a, optimizer, [x]) == fit(b, alone, [x])
        b.zero_grad()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert type(alone).__name__ in repr(optimizer)


def test_chosen_by_a_group_with_its_own_options(mlp, batches, train):
    model = mlp()
    groups = [{"params": ["0", "2"]}, {"params": ["4"], "fallback": True, "lr": 0.5, "weight_decay": 0.0}]
    optimizer = LocoProp(model, params=groups, fallback=torch.optim.SGD)
    assert optimizer.fallback_parameters == ["4.weight", "4.bias"]
    assert [info.name for info in optimizer.layers] == ["0", "2"]
    before = model[4].weight.detach().clone()
    train(model, optimizer, batches(1))
    torch.testing.assert_close(model[4].weight.detach(), before - 0.5 * model[4].weight.grad)


def test_tied_weights_go_to_it():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(7, 4)
            self.hidden = nn.Linear(4, 4)
            self.out = nn.Linear(4, 7)
            self.out.weight = self.embed.weight

        def forward(self, words):
            return self.out(torch.tanh(self.hidden(self.embed(words))))

    model = Tied()
    optimizer = LocoProp(model, lr=1e-3)
    assert sorted(optimizer.fallback_parameters) == ["embed.weight", "out.bias"]
    assert [info.name for info in optimizer.layers] == ["hidden"]
    data = [torch.arange(7).reshape(1, 7)] * 60
    losses = fit(model, optimizer, data)
    assert losses[-1] < losses[0]
    assert model.out.weight is model.embed.weight


def test_tied_linear_layers_go_to_it(batches, train):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 3)).double()
    model[2].weight = model[0].weight
    optimizer = LocoProp(model)
    assert sorted(optimizer.fallback_parameters) == ["0.bias", "0.weight", "2.bias"]
    before = model[0].weight.detach().clone()
    train(model, optimizer, batches(1))
    assert not torch.equal(before, model[0].weight)


def test_attention_does_not_go_to_it():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    optimizer = LocoProp(model, lr=1e-4)
    assert [info.name for info in optimizer.layers] == ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert all(name.startswith("norm") for name in optimizer.fallback_parameters)
    x = torch.randn(4, 5, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    # the keys' bias has no influence on attention, and a gradient of rounding errors only
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_computed_weights_go_to_it(mlp, batches, train):
    model = mlp()
    parametrizations.weight_norm(model[2])
    optimizer = LocoProp(model)
    assert [info.name for info in optimizer.layers] == ["0", "4"]
    assert all(name.startswith("2.") for name in optimizer.fallback_parameters)
    assert len(optimizer.fallback_parameters) == 3
    train(model, optimizer, batches(2))


def test_subclass_with_another_forward_goes_to_it(mlp):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    optimizer = LocoProp(nn.Sequential(Doubled(6, 5), mlp(5, 3, dtype=torch.float32)))
    assert optimizer.fallback_parameters == ["0.weight", "0.bias"]


def test_plain_subclass_is_a_layer():
    class Named(nn.Linear):
        pass

    assert [info.name for info in LocoProp(nn.Sequential(Named(6, 5))).layers] == ["0"]


def test_parameters_of_several_dtypes(mlp, batches, train):
    class Mixed(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float32))

        def forward(self, x):
            return self.body(x) * self.scale

    model = Mixed(mlp())
    optimizer = LocoProp(model)
    train(model, optimizer, batches(2))
    assert not torch.equal(model.scale, torch.ones(3))


def test_failing_fallback_leaves_the_layers_as_they_were():
    """AdamW refuses sparse gradients; by then no layer may have moved."""
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    optimizer = LocoProp(model, lr=1e-2)
    before = model[1].weight.detach().clone()
    model(torch.arange(7)).square().sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(model[1].weight, before)


def test_sparse_gradients_with_an_optimizer_for_them():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 3))
    optimizer = LocoProp(model, lr=1e-2, fallback=lambda ps: torch.optim.SparseAdam(ps, lr=0.1))
    before = [p.detach().clone() for p in model.parameters()][:2]
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=False))


@pytest.mark.filterwarnings("ignore:.*is (deprecated|not supported):DeprecationWarning")
def test_scripted_parts_go_to_it():
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), scripted, nn.Linear(6, 3))
    optimizer = LocoProp(model)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(7, 5)).square().mean().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))
    assert [info.transfer.name for info in optimizer.layers] == ["tanh", "identity"]
    assert optimizer.fallback_parameters == ["2.0.weight", "2.0.bias"]
