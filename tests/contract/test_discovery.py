"""Which transfer function follows which layer is seen in the first forward pass, and said by repr and data."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchloco.transfers
from torchloco import LocoProp, Transfer, get_transfer, register_transfer


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


class Between(nn.Module):
    """A layer, something after it, and a second layer."""

    def __init__(self, between, d_mid=6, d_next=6):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, d_mid)
        self.second = nn.Linear(d_next, 3)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


def decided(model, x=None, criterion=None, **options):
    """The transfers' names by layer, after one training step."""
    x = torch.randn(4, 6) if x is None else x
    optimizer = LocoProp(model, **options)
    output = model(x)
    (criterion(output) if criterion else output.square().sum()).backward()
    optimizer.step()
    for info in optimizer.layers:
        assert info.transfer.name in repr(optimizer)
        assert info.source in repr(optimizer)
    return {info.name: info.transfer.name for info in optimizer.layers}


ACTIVATIONS = {
    "tanh": [nn.Tanh(), torch.tanh, F.tanh],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda a: a.sigmoid()],
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda a: a.relu_()],
    "leaky_relu": [nn.LeakyReLU(), F.leaky_relu],
    "leaky_relu(0.2)": [nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True), lambda a: F.leaky_relu(a, 0.2)],
    "elu": [nn.ELU(), F.elu],
    "elu(0.5)": [nn.ELU(0.5), lambda a: F.elu(a, 0.5)],
    "selu": [nn.SELU(), F.selu],
    "celu": [nn.CELU(), F.celu],
    "celu(0.5)": [nn.CELU(0.5), lambda a: F.celu(a, 0.5)],
    "softplus": [nn.Softplus(), F.softplus],
    "softplus(2)": [nn.Softplus(beta=2), lambda a: F.softplus(a, beta=2)],
    "hardtanh": [nn.Hardtanh(), F.hardtanh],
    "hardtanh(-2, 3)": [nn.Hardtanh(-2, 3), lambda a: F.hardtanh(a, -2, 3)],
    "relu6": [nn.ReLU6(), F.relu6],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
    "softsign": [nn.Softsign(), F.softsign],
    "logsigmoid": [nn.LogSigmoid(), F.logsigmoid],
    "softmax": [nn.Softmax(-1), nn.Softmax(1), lambda a: F.softmax(a, -1), torch.nn.Softmax(dim=-1)],
    "relu_squared": [lambda a: F.relu(a) ** 2, lambda a: torch.relu(a).square(), lambda a: a.relu().pow(2)],
    "gelu": [nn.GELU(), F.gelu, nn.GELU("tanh")],
    "silu": [nn.SiLU(), F.silu],
    "mish": [nn.Mish(), F.mish],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "identity": [nn.Identity(), lambda a: a],
}
FORMS = [(name, k) for name, forms in ACTIVATIONS.items() for k in range(len(forms))]


@pytest.mark.parametrize(("name", "k"), FORMS)
def test_activation(name, k):
    activation = ACTIVATIONS[name][k]
    model = Between(activation)
    optimizer = LocoProp(model)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    first, second = optimizer.layers
    assert second.transfer.name == "identity"
    head, _, parameters = name.partition("(")
    assert first.transfer.name.partition("(")[0] == head
    assert all(parameter in first.transfer.name for parameter in parameters.rstrip(")").split(", "))
    assert first.transfer.name in repr(optimizer)
    a = torch.randn(4, 6)
    if not isinstance(activation, nn.LogSoftmax | nn.GELU):  # found as their relatives, softmax and the exact GELU
        torch.testing.assert_close(first.transfer(a), activation(a.clone()))


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "hardswish"])
def test_not_monotone_takes_the_squared_loss_and_says_so(name):
    model = Between(ACTIVATIONS[name][0])
    optimizer = LocoProp(model)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()
    first, second = optimizer.layers
    assert (first.loss.name, second.loss.name) == ("squared", "matching")
    assert "GradientTarget" in repr(first.target)
    [line] = [line for line in repr(optimizer).splitlines() if line.split()[:1] == ["first"]]
    assert "squared" in line
    assert "GradientTarget" in line


SHAPES = {
    "view": lambda a: torch.tanh(a.view(2, 2, 6)).view(4, 6),
    "reshape": lambda a: torch.tanh(a.reshape(24)).reshape(4, 6),
    "transpose": lambda a: torch.tanh(a.t()).t(),
    "permute": lambda a: torch.tanh(a.view(2, 2, 6).permute(2, 0, 1)).permute(1, 2, 0).flatten(0, 1),
    "flatten": lambda a: torch.tanh(a.view(2, 2, 6).flatten(0, 1)),
    "unsqueeze": lambda a: torch.tanh(a.unsqueeze(1)).squeeze(1),
    "unflatten": lambda a: torch.tanh(a.unflatten(1, (2, 3))).flatten(1),
    "contiguous": lambda a: torch.tanh(a.t().contiguous()).t(),
    "clone": lambda a: torch.tanh(a.clone()),
    "dtype": lambda a: torch.tanh(a.double()).float(),
}


@pytest.mark.parametrize("change", SHAPES)
def test_seen_through_changes_of_shape(change):
    assert decided(Between(SHAPES[change]))["first"] == "tanh"


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_for_any_number_of_leading_dimensions(lead, bias, mlp):
    model = mlp(6, 5, 3, activation=lambda: nn.ReLU(inplace=True), bias=bias, dtype=torch.float32)
    assert decided(model, torch.randn(*lead, 6)) == {"0": "relu", "2": "identity"}


SOMETHING_ELSE = {
    "layer norm": lambda a: torch.tanh(F.layer_norm(a, (6,))),
    "batch norm": lambda a: torch.tanh(F.batch_norm(a, None, None, training=True)),
    "residual sum": lambda a: torch.tanh(a + torch.ones(4, 6)),
    "residual around an activation": lambda a: a + torch.tanh(a),
    "scaled": lambda a: torch.tanh(2 * a),
    "x * sigmoid(x)": lambda a: a * torch.sigmoid(a),
    "two activations": lambda a: torch.tanh(a) + torch.relu(a),
    "gated halves": lambda a: F.glu(torch.cat([a, a], -1)),
    "sine": torch.sin,
    "clamp": lambda a: a.clamp(-1, 1),
    "dropout": lambda a: torch.tanh(F.dropout(a, 0.5)),
    "relu to the third": lambda a: F.relu(a) ** 3,
}


@pytest.mark.parametrize("met", [name for name in SOMETHING_ELSE if name != "relu to the third"])
def test_something_else_first_is_identity(met):
    assert decided(Between(SOMETHING_ELSE[met]))["first"] == "identity"


def test_relu_to_another_power_is_relu():
    assert decided(Between(SOMETHING_ELSE["relu to the third"]))["first"] == "relu"


def test_layer_into_layer_is_identity(mlp):
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = LocoProp(model)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert [(i.transfer.name, i.source) for i in optimizer.layers[:2]] == [
        ("identity", "met a layer"),
        ("tanh", "met Tanh"),
    ]


def test_residual_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    found = decided(nn.Sequential(Block(), Block(), nn.Linear(6, 3)))
    assert found == {
        "0.up": "relu",
        "0.down": "identity",
        "1.up": "relu",
        "1.down": "identity",
        "2": "identity",
    }


def test_softmax_over_something_else_than_the_units_is_not_softmax():
    """Rows, or groups of units, are not what a layer's softmax normalises."""
    assert decided(Between(lambda a: torch.softmax(a, 0)))["first"] == "identity"
    assert decided(Between(lambda a: torch.softmax(a.view(4, 2, 3), -1).flatten(1)))["first"] == "identity"


def test_softmax_over_transposed_units_is_softmax():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            return F.cross_entropy(self.out(x).transpose(1, 2), torch.zeros(2, 5, dtype=torch.long))

    assert decided(Sequence(), torch.randn(2, 5, 6), lambda loss: loss) == {"out": "softmax"}


class Logits(nn.Module):
    """Logits of shape (batch, time, classes), given to the loss in some layout."""

    def __init__(self, change, width):
        super().__init__()
        self.out, self.change = nn.Linear(6, width), change

    def forward(self, x):
        logits = self.change(self.out(x))
        return F.cross_entropy(logits, torch.zeros(logits[:, 0].shape, dtype=torch.long))


OVER_UNITS = {
    "transposed": (lambda a: a.transpose(1, 2), (2, 5, 6), "softmax"),
    "permuted": (lambda a: a.permute(0, 2, 1), (2, 5, 6), "softmax"),
    "movedim": (lambda a: a.movedim(-1, 1), (2, 5, 6), "softmax"),
    "mT of a square": (lambda a: a.mT, (2, 3, 6), "softmax"),
    "flattened": (lambda a: a.flatten(0, 1), (2, 5, 6), "softmax"),
    "flattened, as many rows as units": (lambda a: a.flatten(0, 1), (1, 3, 6), "softmax"),
    "image": (lambda a: a.view(2, 5, 4, 3).permute(0, 3, 1, 2), (2, 20, 6), "softmax"),
    "image of as many rows as units": (lambda a: a.unsqueeze(2).permute(0, 3, 1, 2), (3, 3, 6), "softmax"),
    "rows of a square, not units": (lambda a: a, (2, 3, 6), "identity"),
    "time of a square, not units": (lambda a: a.transpose(1, 2).transpose(1, 2), (2, 3, 6), "identity"),
    "batch, transposed": (lambda a: a.t(), (3, 6), "identity"),
    "batch, in front of the units": (lambda a: a.transpose(0, 1), (3, 4, 6), "identity"),
}


@pytest.mark.parametrize("case", OVER_UNITS)
def test_cross_entropy_over_the_units_or_not(case):
    """As many rows as units do not deceive it."""
    change, shape, name = OVER_UNITS[case]
    assert decided(Logits(change, 3), torch.randn(shape), lambda loss: loss) == {"out": name}


GATES = {
    "swiglu": (F.silu, {"gate": "silu", "up": "identity", "down": "identity"}),
    "geglu": (F.gelu, {"gate": "gelu", "up": "identity", "down": "identity"}),
    "reglu": (F.relu, {"gate": "relu", "up": "identity", "down": "identity"}),
    "glu": (torch.sigmoid, {"gate": "sigmoid", "up": "identity", "down": "identity"}),
    "bilinear": (lambda a: a, {"gate": "identity", "up": "identity", "down": "identity"}),
}


@pytest.mark.parametrize("gate", GATES)
def test_gated_units(gate):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 6)

        def forward(self, x):
            return x + self.down(GATES[gate][0](self.gate(x)) * self.up(x))

    assert decided(Gated()) == GATES[gate][1]


@pytest.mark.parametrize(
    "fused", [lambda a: F.glu(a), lambda a: F.silu(a[..., :3]) * a[..., 3:]], ids=["F.glu", "halves"]
)
def test_gated_halves_of_one_layer(fused):
    """Gate and value in one matrix: no one function of the units."""
    assert decided(Between(fused, d_next=3))["first"] == "identity"


@pytest.mark.parametrize("tail", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.RMSNorm(6), nn.Dropout(0.5), nn.PReLU()])
def test_a_module_before_the_activation(tail):
    assert decided(Between(nn.Sequential(tail, nn.ReLU())))["first"] == "identity"


@pytest.mark.parametrize("tail", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.RMSNorm(6), nn.Dropout(0.5)])
def test_a_module_after_the_activation(tail):
    assert decided(Between(nn.Sequential(nn.ReLU(inplace=True), tail)))["first"] == "relu"


class Heads(nn.Module):
    """Logits, probabilities by a sigmoid, and a value."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 5)
        self.classes, self.flags, self.value = nn.Linear(5, 3), nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return {"classes": self.classes(h), "flags": (torch.sigmoid(self.flags(h)), self.value(h))}


def test_output_for_several_heads():
    """It goes to every head that ends untransformed; the others are named."""

    def loss(out):
        return out["classes"].logsumexp(-1).mean() + out["flags"][0].mean() + out["flags"][1].square().mean()

    found = {"trunk": "tanh", "classes": "softmax", "flags": "sigmoid"}
    assert decided(Heads(), criterion=loss, output="softmax") == {**found, "value": "softmax"}
    named = decided(Heads(), criterion=loss, output="softmax", transfers={"value": "identity"})
    assert named == {**found, "value": "identity"}


def test_criterion_inside_the_model_agrees_with_output():
    """No warning that output= goes unused, whether the model shows its loss or not."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.criterion = nn.Linear(6, 3), nn.CrossEntropyLoss()

        def forward(self, x):
            return self.criterion(self.out(x), torch.zeros(len(x), dtype=torch.long))

    assert decided(Own(), criterion=lambda loss: loss, output=nn.CrossEntropyLoss()) == {"out": "softmax"}
    with pytest.warns(UserWarning, match="output= names 'sigmoid'"):
        assert decided(Own(), criterion=lambda loss: loss, output="sigmoid") == {"out": "softmax"}


def test_units_that_go_different_ways_are_identity():
    class Gaussian(nn.Module):
        """Half of the units are returned as they are, the other half through softplus."""

        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 4)

        def forward(self, x):
            mean, spread = self.out(x).chunk(2, -1)
            return mean, F.softplus(spread)

    assert decided(Gaussian(), criterion=lambda pair: (pair[0] / pair[1]).square().sum()) == {"out": "identity"}


def test_seen_through_full_backward_hooks():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.LogSoftmax(1))
    for module in model:
        module.register_full_backward_hook(lambda *_: None)
    optimizer = LocoProp(model)
    F.nll_loss(model(torch.randn(4, 6, requires_grad=True)), torch.zeros(4, dtype=torch.long)).backward()
    optimizer.step()
    assert [info.transfer.name for info in optimizer.layers] == ["tanh", "softmax"]


def test_what_a_forward_hook_makes_of_the_output_is_not_the_pre_activation():
    """The optimizer is built after the hook, but sees what the layer itself has returned."""
    results = []
    for hooked in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Identity() if hooked else Doubled(), nn.Tanh(), nn.Linear(5, 3))
        if hooked:
            model[0].register_forward_hook(lambda module, args, output: 2 * output)
        optimizer = LocoProp(model, lr=1e-3)
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
        assert [info.transfer.name for info in optimizer.layers] == ["identity", "identity"]
    torch.testing.assert_close(*results)


def test_one_activation_module_in_many_places():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
            self.activation = nn.ReLU(inplace=True)

        def forward(self, x):
            for k, layer in enumerate(self.layers):
                x = layer(x)
                x = self.activation(x) if k in (0, 1) else x
            return x

    assert list(decided(Shared()).values()) == ["relu", "relu", "identity", "identity"]


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(torchloco.transfers, "_registry", dict(torchloco.transfers._registry))
    monkeypatch.setattr(torchloco.registry, "_modules", dict(torchloco.registry._modules))


@pytest.mark.usefixtures("clean_registry")
def test_registered_module():
    class Arctan(nn.Module):
        def forward(self, x):
            return torch.atan(x) * 1.0

    assert decided(Between(Arctan()))["first"] == "identity"
    register_transfer(Transfer("arctan", torch.atan), Arctan)
    assert decided(Between(Arctan()))["first"] == "arctan"
    assert decided(nn.Sequential(nn.Linear(6, 3), Arctan()))["0"] == "arctan"


OUTPUTS = [
    ("sigmoid", "sigmoid"),
    (get_transfer("tanh"), "tanh"),
    (nn.BCEWithLogitsLoss(), "sigmoid"),
    (nn.BCEWithLogitsLoss, "sigmoid"),
    (F.binary_cross_entropy_with_logits, "sigmoid"),
    (nn.CrossEntropyLoss(label_smoothing=0.1), "softmax"),
    (nn.CrossEntropyLoss, "softmax"),
    (F.cross_entropy, "softmax"),
    (nn.MSELoss(), "identity"),
    (nn.MSELoss, "identity"),
    (F.mse_loss, "identity"),
    (None, "identity"),
]


@pytest.mark.parametrize(("output", "name"), OUTPUTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_output_names_the_last_transfer(output, name, mlp):
    assert decided(mlp(dtype=torch.float32), output=output) == {"0": "tanh", "2": "tanh", "4": name}


def test_output_of_a_subclassed_criterion(mlp):
    class Mine(nn.BCEWithLogitsLoss):
        pass

    assert decided(mlp(dtype=torch.float32), output=Mine())["4"] == "sigmoid"


def test_an_activation_at_the_end_comes_before_output():
    with pytest.warns(UserWarning, match="no layer's pre-activations are the model's output: 0: tanh"):
        found = decided(nn.Sequential(nn.Linear(6, 3), nn.Tanh()), output="sigmoid")
    assert found == {"0": "tanh"}


def test_transfers_override_what_is_seen(mlp):
    model = mlp(dtype=torch.float32)
    found = decided(model, transfers={"0": "relu", "4": get_transfer("sigmoid")}, output="softmax")
    assert found == {"0": "relu", "2": "tanh", "4": "sigmoid"}


def test_given_transfers_are_known_before_the_first_pass(mlp):
    optimizer = LocoProp(mlp(), transfers={"0": "tanh"}, output="sigmoid")
    assert [i.transfer and i.transfer.name for i in optimizer.layers] == ["tanh", None, None]
    assert [i.source for i in optimizer.layers] == ["transfers="] + ["not known before the first forward pass"] * 2
    assert "not known before the first forward pass" in repr(optimizer)


def test_decided_once(mlp):
    """What the first pass showed stays, as does what was given."""
    model = mlp(6, 3, dtype=torch.float32)
    optimizer = LocoProp(model, output="sigmoid")
    for _ in range(2):
        optimizer.zero_grad()
        torch.tanh(model(torch.randn(4, 6))).sum().backward()
        optimizer.step()
    assert optimizer.layers[0].transfer.name == "sigmoid"
    assert optimizer.layers[0].source == "output="


LOSSES = {
    "sigmoid": lambda a: F.binary_cross_entropy_with_logits(a, torch.ones_like(a)),
    "softmax": lambda a: F.cross_entropy(a, torch.zeros(len(a), dtype=torch.long)),
    "identity": lambda a: F.mse_loss(a, torch.ones_like(a)),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("returns", ["loss", "tuple", "dict"])
def test_model_that_computes_its_own_loss(name, returns):
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            output = self.out(x)
            loss = LOSSES[name](output)
            return {"loss": loss, "tuple": (loss, output.detach()), "dict": {"loss": loss}}[returns]

    def loss_of(result):
        return {"loss": lambda: result, "tuple": lambda: result[0], "dict": lambda: result["loss"]}[returns]()

    assert decided(WithLoss(), criterion=loss_of) == {"out": name}


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2), nn.Sigmoid())
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 6))
        self.end = nn.Sigmoid()

    def encode(self, x):
        return self.encoder(x)

    def decode(self, code):
        return self.decoder(code)

    def probabilities(self, code):
        return self.end(self.decode(code))


def test_parts_called_without_the_model():
    model = Autoencoder()
    optimizer = LocoProp(model, output="sigmoid")
    x = torch.rand(4, 6)
    F.binary_cross_entropy_with_logits(model.decode(model.encode(x)), x).backward()
    optimizer.step()
    assert [i.transfer.name for i in optimizer.layers] == ["tanh", "sigmoid", "relu", "sigmoid"]


def test_activation_after_the_last_layer_without_the_model():
    """The model's forward never runs; its last activation is seen all the same."""
    model = Autoencoder()
    optimizer = LocoProp(model)
    x = torch.rand(4, 6)
    F.binary_cross_entropy(model.probabilities(model.encode(x)), x).backward()
    optimizer.step()
    assert [i.transfer.name for i in optimizer.layers] == ["tanh", "sigmoid", "relu", "sigmoid"]


def test_a_bare_layer_is_a_model():
    assert decided(nn.Linear(6, 3), output="sigmoid") == {"": "sigmoid"}


def test_data_of_a_layer(mlp):
    optimizer = LocoProp(mlp(), loss="squared")
    info = optimizer.layers[0]
    assert (info.name, info.shape) == ("0", (5, 6))
    assert (info.loss.name, repr(info.target)) == ("squared", "GradientTarget()")
    assert repr(info.solver).startswith("FirstOrderSteps(RMSProp")
    for word in ("5 × 6", "squared", "GradientTarget", "momentum=0.999", "lr=1e-05", "activation_lr=10"):
        assert word in repr(optimizer)


def test_frozen_layer_after_a_layer():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3).requires_grad_(False))
    assert decided(model) == {"0": "identity"}
