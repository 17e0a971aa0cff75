"""Transfer functions: F′ = f, overflow-safe, with the conjugates that make Bregman divergences."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import torchloco.transfers as tf
from torchloco import MatchingLoss, Transfer, get_transfer, register_transfer, registry, transfer_names

ALL = {name: get_transfer(name) for name in transfer_names()} | {
    t.name: t
    for t in (tf.leaky_relu(0.2), tf.leaky_relu(0.0), tf.elu(0.5), tf.celu(0.3), tf.hardtanh(-2, 3), tf.softplus(2.5))
}
INTEGRABLE = [name for name, t in ALL.items() if t.integral]
CONJUGATE = [name for name, t in ALL.items() if t.conjugate]
TORCH = {
    "identity": lambda a: a,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softmax": lambda a: torch.softmax(a, -1),
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "leaky_relu(0.2)": lambda a: F.leaky_relu(a, 0.2),
    "leaky_relu(0)": torch.relu,
    "relu_squared": lambda a: torch.relu(a) ** 2,
    "softplus": F.softplus,
    "softplus(2.5)": lambda a: F.softplus(a, 2.5),
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "celu(0.3)": lambda a: F.celu(a, 0.3),
    "hardtanh": F.hardtanh,
    "hardtanh(-2, 3)": lambda a: F.hardtanh(a, -2, 3),
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}


#: Their derivatives have single precision in torch's own float64 backward, or a threshold.
ROUNDED_BY_TORCH = {"hardsigmoid", "celu(0.3)", "softplus", "softplus(2.5)"}


def grid(dtype=torch.float64, reach=30.0):
    """Rows of four pre-activations, dense around zero, that meet no kink exactly."""
    half = torch.logspace(-4, torch.log10(torch.tensor(reach)).item(), 250, dtype=torch.float64) * 1.000123
    values = torch.cat([-half.flip(0), half])
    return torch.stack([values, values.roll(7), values.roll(101), values.roll(211)], -1).to(dtype)


def inside(name):
    """Pre-activations, and post-activations of others, where F* is finite."""
    reach = {"softmax": 5.0, "sigmoid": 8.0, "tanh": 6.0, "softsign": 30.0}.get(name, 30.0)
    return grid(reach=reach)


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("elu(")])
def test_is_torchs_function(name):
    assert_close(ALL[name](grid()), TORCH[name](grid()))


def test_elu_with_another_alpha():
    assert_close(tf.elu(0.5)(grid()), F.elu(grid(), 0.5))
    assert_close(tf.elu(0.5, 2.0)(grid()), 2 * F.elu(grid(), 0.5))


@pytest.mark.parametrize("name", INTEGRABLE)
def test_integral_has_the_function_as_its_derivative(name):
    transfer = ALL[name]
    a = grid().requires_grad_()
    (derivative,) = torch.autograd.grad(transfer.integral(a).sum(), a)
    assert_close(derivative, transfer(a.detach()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", [n for n, t in ALL.items() if t.derivative])
def test_derivative(name):
    transfer = ALL[name]
    a = grid().requires_grad_()
    (derivative,) = torch.autograd.grad(transfer(a).sum(), a)
    rtol = 1e-6 if name in ROUNDED_BY_TORCH else 1e-9
    assert_close(transfer.derivative(a.detach()), derivative, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("name", [n for n, t in ALL.items() if t.derivative or not t.elementwise])
def test_vector_jacobian_product(name):
    transfer = ALL[name]
    a = grid().requires_grad_()
    r = torch.cos(7 * grid())
    (expected,) = torch.autograd.grad(transfer(a), a, r)
    rtol = 1e-6 if name in ROUNDED_BY_TORCH else 1e-9
    assert_close(transfer.vjp(a.detach(), r), expected, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("name", [n for n, t in ALL.items() if t.in_place])
def test_in_place_version(name):
    transfer = ALL[name]
    expected, a = transfer(grid()), grid()
    result = transfer.apply_(a)
    assert_close(result, expected, rtol=1e-14, atol=1e-300)
    assert result.data_ptr() == a.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_function_leaves_its_argument(name):
    transfer, a = ALL[name], grid()
    transfer(a)
    for part in (transfer.integral, transfer.derivative):
        if part is not None:
            part(a)
    assert torch.equal(a, grid())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_finite_far_out(name, dtype):
    transfer = ALL[name]
    far = torch.tensor([1e4, 1e3, 100.0, 89.0, 20.5, 0.0], dtype=dtype)
    a = torch.stack([far, -far, far.flip(0), -far.flip(0)], -1)
    for part in (transfer, transfer.integral, transfer.derivative):
        if part is not None:
            value = part(a)
            assert value.isfinite().all()
            assert value.dtype == dtype


@pytest.mark.parametrize("name", INTEGRABLE)
def test_float32_follows_float64(name):
    transfer = ALL[name]
    a = grid(torch.float32)
    assert_close(transfer(a).double(), transfer(a.double()), rtol=2e-5, atol=1e-6)
    assert_close(transfer.integral(a).double(), transfer.integral(a.double()), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", INTEGRABLE)
def test_only_monotone_functions_have_an_integral(name):
    assert ALL[name].monotone
    if ALL[name].elementwise:
        values = ALL[name](grid()[:, :1])
        assert (values.diff(dim=0) >= 0).all()


def test_not_monotone_is_said():
    assert {n for n, t in ALL.items() if not t.monotone} == {"gelu", "silu", "mish", "hardswish"}
    assert not tf.leaky_relu(-0.5).monotone
    assert not MatchingLoss().suits(get_transfer("gelu"))


@pytest.mark.parametrize("name", CONJUGATE)
def test_fenchel_young_equality(name):
    """F(a) + F*(f(a)) = a · f(a)."""
    transfer, a = ALL[name], inside(name)
    y = transfer(a)
    pairing = a * y if transfer.elementwise else (a * y).sum(-1, keepdim=True)
    # f(a) is rounded, and F* is steep near the ends of its range
    assert_close(transfer.integral(a) + transfer.conjugate(y), pairing, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONJUGATE)
def test_conjugate_is_infinite_outside_the_range(name):
    transfer = ALL[name]
    outside = {
        "relu": -0.5,
        "leaky_relu(0)": -0.5,
        "relu_squared": -0.5,
        "hardtanh": 1.5,
        "hardtanh(-2, 3)": 3.5,
        "relu6": 6.5,
        "softsign": 1.5,
        "tanh": 1.5,
        "sigmoid": -0.5,
    }
    if name in outside:
        assert not transfer.conjugate(torch.full((1, 1), outside[name], dtype=torch.float64)).isfinite().any()


@pytest.mark.parametrize("name", CONJUGATE)
def test_matching_loss_is_a_divergence(name):
    """At least zero everywhere, zero where the prediction is the target, more elsewhere."""
    transfer, loss = ALL[name], MatchingLoss()
    a = inside(name)
    for row in range(0, len(a), 25):
        at_target = loss.value(a[row : row + 1], transfer(a[row : row + 1]), transfer).item()
        scale = 1 + a[row].square().sum().item()
        assert abs(at_target) < 1e-9 * scale
        for other in range(0, len(a), 60):
            value = loss.value(a[other : other + 1], transfer(a[row : row + 1]), transfer).item()
            assert value > -1e-9 * (scale + a[other].square().sum().item() ** 1.5)
    first, last = a[150:151], a[350:351]
    assert loss.value(first, transfer(last), transfer) > 1e-3


def test_relu_divergence_is_zero_where_both_are_off():
    loss, relu = MatchingLoss(), get_transfer("relu")
    a = torch.tensor([[-3.0, -0.1]])
    assert loss.value(a, torch.zeros(1, 2), relu) == 0


@pytest.mark.parametrize("name", ["tanh", "relu", "softmax", "softplus", "sigmoid"])
def test_value_for_targets_outside_the_range(name):
    """The constant F*(T) is left out there; the value stays finite and its differences are the divergence's."""
    transfer, loss = ALL[name], MatchingLoss()
    target = torch.tensor([[1.7, -0.4, 0.2, 2.0]], dtype=torch.float64)
    a = grid()[200:201]
    difference = loss.value(a + 0.5, target, transfer) - loss.value(a, target, transfer)
    expected = (transfer.integral(a + 0.5) - transfer.integral(a)).sum() - 0.5 * target.sum()
    assert_close(difference, expected, rtol=1e-9, atol=1e-9)


def test_softplus_integral_is_the_dilogarithm():
    """-Li₂(-eᵃ): π²/12 at zero, e^a far below, a²/2 + π²/6 far above."""
    integral = get_transfer("softplus").integral
    a = torch.tensor([0.0, -30.0, 40.0, 1.0], dtype=torch.float64)
    pi2 = torch.pi**2
    exact = torch.tensor([pi2 / 12, 9.3576229688e-14, 800 + pi2 / 6, 1.8062860704447743], dtype=torch.float64)
    assert_close(integral(a), exact, rtol=1e-10, atol=0)


def test_unknown_integral_is_said():
    with pytest.raises(ValueError, match=r"integral of transfer 'gelu'.*Transfer\(integral="):
        MatchingLoss().value(grid(), grid(), get_transfer("gelu"))


@pytest.mark.parametrize("name", ["gelu", "tanh", "softmax"])
def test_a_derivative_that_is_not_given_is_autograds(name):
    known = get_transfer(name)
    unknown = dataclasses.replace(known, derivative=None)
    a, r = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    leaf = a.clone().requires_grad_()
    (expected,) = torch.autograd.grad(known(leaf), leaf, r)
    with torch.no_grad():
        assert_close(unknown.vjp(a, r), expected, rtol=1e-10, atol=1e-12)


def test_units_may_be_mixed_in_other_ways_than_softmax():
    onto_ball = Transfer("ball", lambda a: a / (1 + a.square().sum(-1, keepdim=True)).sqrt(), elementwise=False)
    a, r = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    jacobians = torch.stack([torch.autograd.functional.jacobian(onto_ball.function, row) for row in a])
    assert_close(onto_ball.vjp(a, r), torch.einsum("nij,ni->nj", jacobians, r), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "near"), [("tahn", "tanh"), ("Sigmoid", "sigmoid"), ("leakyrelu", "leaky_relu"), ("soft_max", "softmax")]
)
def test_unknown_name_suggests_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"'{wrong}'.*did you mean '{near}'.*register_transfer"):
        get_transfer(wrong)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="'qqq'; known: .*hardtanh.*tanh"):
        get_transfer("qqq")


@pytest.mark.parametrize("wrong", [None, 3, nn.Tanh(), torch.tanh])
def test_not_a_transfer(wrong):
    with pytest.raises(TypeError, match=f"got {type(wrong).__name__}"):
        get_transfer(wrong)


def test_get_transfer_returns_objects_as_they_are():
    own = Transfer("own", torch.atan)
    assert get_transfer(own) is own
    assert repr(own) == "Transfer(own)"


def test_names_are_sorted_and_all_known():
    assert transfer_names() == sorted(transfer_names())
    for name in transfer_names():
        assert get_transfer(name).name == name


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(tf, "_registry", dict(tf._registry))
    monkeypatch.setattr(registry, "_modules", dict(registry._modules))


@pytest.mark.usefixtures("clean_registry")
class TestRegister:
    class Arctan(nn.Module):
        pass

    def test_known_by_name_and_module(self):
        class Special(self.Arctan):
            pass

        own = Transfer("arctan", torch.atan)
        assert register_transfer(own, self.Arctan) is own
        assert get_transfer("arctan") is own
        assert "arctan" in transfer_names()
        assert registry.transfer_of_module(self.Arctan()) is own
        assert registry.transfer_of_module(Special()) is own
        assert registry.transfer_of_module(nn.Tanh()) is None

    def test_taken_name(self):
        with pytest.raises(ValueError, match="'tanh' is registered already; choose another name"):
            register_transfer(Transfer("tanh", torch.atan))
        assert get_transfer("tanh").function is torch.tanh

    @pytest.mark.parametrize("wrong", [torch.atan, "arctan", None])
    def test_not_a_transfer(self, wrong):
        with pytest.raises(TypeError, match="takes a torchloco.Transfer, got"):
            register_transfer(wrong)

    @pytest.mark.parametrize("wrong", [nn.Tanh(), torch.atan, int], ids=["an instance", "a function", "another class"])
    def test_not_a_module_class(self, wrong):
        with pytest.raises(TypeError, match="nn.Module classes"):
            register_transfer(Transfer("arctan", torch.atan), wrong)
        assert "arctan" not in transfer_names()
