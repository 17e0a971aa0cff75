"""RMSProp in TensorFlow's arithmetic, as an ordinary torch optimizer."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from torchloco import RMSProp


def by_hand(w, gradients, lr, decay, momentum, epsilon, outside=False):
    """One number through the recurrences, in Python floats."""
    v, m = 1.0, 0.0
    for k, g in enumerate(gradients):
        rate = lr[k] if isinstance(lr, list) else lr
        v = decay * v + (1 - decay) * g * g
        m = momentum * m + (1.0 if outside else rate) * g / math.sqrt(v + epsilon)
        w -= (rate if outside else 1.0) * m
    return w


def parameter(*values, dtype=torch.float64):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def drive(p, optimizer, gradients):
    for g in gradients:
        p.grad = torch.as_tensor(g, dtype=p.dtype).expand_as(p).clone()
        optimizer.step()


GRADIENTS = [0.5, -2.0, 0.01, 3.0, -0.2]
RATES = [0.1, 0.1, 0.0, 0.02, 0.02]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize(("decay", "epsilon"), [(0.9, 1e-5), (0.0, 1e-2), (0.99, 1e-10)])
def test_equals_the_recurrences(decay, epsilon, momentum):
    p = parameter(1.0, -2.0)
    drive(p, RMSProp([p], lr=0.1, decay=decay, momentum=momentum, epsilon=epsilon), GRADIENTS)
    expected = [by_hand(w, GRADIENTS, 0.1, decay, momentum, epsilon) for w in (1.0, -2.0)]
    assert p.tolist() == pytest.approx(expected, rel=1e-12)


def test_differs_from_torchs():
    p, q = parameter(1.0), parameter(1.0)
    drive(p, RMSProp([p], lr=0.1, decay=0.9, momentum=0.9, epsilon=1e-5), GRADIENTS)
    drive(q, torch.optim.RMSprop([q], lr=0.1, alpha=0.9, momentum=0.9, eps=1e-5), GRADIENTS)
    assert abs(p.item() - q.item()) > 0.01


def test_learning_rate_is_inside_the_momentum():
    """A changed rate leaves the steps under way as they are."""
    p = parameter(1.0)
    optimizer = RMSProp([p], lr=0.1, momentum=0.9, epsilon=1e-5)
    for g, rate in zip(GRADIENTS, RATES, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        drive(p, optimizer, [g])
    assert p.item() == pytest.approx(by_hand(1.0, GRADIENTS, RATES, 0.9, 0.9, 1e-5), rel=1e-12)


def test_learning_rate_outside_the_momentum_rescales_the_steps_under_way():
    p = parameter(1.0)
    optimizer = RMSProp([p], momentum=0.9, epsilon=1e-5, lr_outside=True)
    for g, rate in zip(GRADIENTS, RATES, strict=True):
        before = p.item()
        optimizer.param_groups[0]["lr"] = rate
        drive(p, optimizer, [g])
        assert (p.item() == before) == (rate == 0)
    assert p.item() == pytest.approx(by_hand(1.0, GRADIENTS, RATES, 0.9, 0.9, 1e-5, outside=True), rel=1e-12)
    assert abs(p.item() - by_hand(1.0, GRADIENTS, RATES, 0.9, 0.9, 1e-5)) > 0.01


def test_learning_rate_outside_the_momentum_equals_torchs_rmsprop():
    """But for v, which is made to start as torch's does, and epsilon, which is too small to matter."""
    p, q = parameter(1.0), parameter(1.0)
    ours = RMSProp([p], decay=0.9, momentum=0.9, epsilon=1e-30, lr_outside=True)
    theirs = torch.optim.RMSprop([q], alpha=0.9, momentum=0.9, eps=1e-30)
    ours.state[p]["mean_square"] = torch.zeros_like(p)
    for g, rate in zip(GRADIENTS, RATES, strict=True):
        for one, optimizer in ((p, ours), (q, theirs)):
            optimizer.param_groups[0]["lr"] = rate
            drive(one, optimizer, [g])
    assert p.item() == pytest.approx(q.item(), rel=1e-12)


@pytest.mark.parametrize("outside", [False, True])
def test_a_constant_rate_is_the_same_inside_and_outside(outside):
    p = parameter(1.0)
    drive(p, RMSProp([p], lr=0.1, momentum=0.9, epsilon=1e-5, lr_outside=outside), GRADIENTS)
    assert p.item() == pytest.approx(by_hand(1.0, GRADIENTS, 0.1, 0.9, 0.9, 1e-5), rel=1e-12)


@pytest.mark.parametrize(("momentum", "outside"), [(0.0, False), (0.9, False), (0.9, True)])
def test_a_weight_scales_the_gradients_of_a_step_alone(momentum, outside):
    """Those that entered before it go on as they are, with lr inside or outside."""
    weights = [1.0, 0.5, 0.0, 2.0, 1.0]
    p = parameter(1.0)
    optimizer = RMSProp([p], lr=0.1, momentum=momentum, epsilon=1e-5, lr_outside=outside)
    for g, weight in zip(GRADIENTS, weights, strict=True):
        optimizer.param_groups[0]["weight"] = weight
        drive(p, optimizer, [g])
    rates = [0.1 * weight for weight in weights]  # inside the momentum, a rate does the same
    assert p.item() == pytest.approx(by_hand(1.0, GRADIENTS, rates, 0.9, momentum, 1e-5), rel=1e-12)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_lr_outside_is_a_bool(value):
    with pytest.raises(TypeError, match="lr_outside must be True or False, got"):
        RMSProp([parameter(1.0)], lr_outside=value)


def test_a_state_of_before_there_was_lr_outside():
    p = parameter(1.0)
    optimizer = RMSProp([p], lr=0.1, momentum=0.9)
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["lr_outside"], state["param_groups"][0]["weight"]
    optimizer.load_state_dict(state)
    drive(p, optimizer, GRADIENTS)
    assert p.item() == pytest.approx(by_hand(1.0, GRADIENTS, 0.1, 0.9, 0.9, 1e-10))


def test_slots_start_at_one_and_zero():
    p = parameter(1.0, 2.0)
    optimizer = RMSProp([p], lr=0.0, decay=0.5, momentum=0.5)
    drive(p, optimizer, [2.0])
    assert optimizer.state[p]["mean_square"].tolist() == [2.5, 2.5]
    assert optimizer.state[p]["momentum"].tolist() == [0.0, 0.0]
    assert p.tolist() == [1.0, 2.0]


def test_without_momentum_there_is_no_momentum_slot():
    p = parameter(1.0)
    optimizer = RMSProp([p])
    drive(p, optimizer, GRADIENTS)
    assert list(optimizer.state[p]) == ["mean_square"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_large_tensors(momentum, layout, dtype):
    """However the arithmetic is cut into pieces, each entry goes its own way."""
    shape = (700, 900)
    generator = torch.Generator().manual_seed(0)
    start, first, second = (torch.randn(shape, generator=generator, dtype=dtype) for _ in range(3))
    p = nn.Parameter((start if layout == "contiguous" else start.t().contiguous().t()).clone())
    optimizer = RMSProp([p], lr=0.1, momentum=momentum, epsilon=1e-5)
    w, v, m = start.double(), 1.0, 0.0
    for g in (first, second, first):
        p.grad = g.clone() if layout == "contiguous" else g.t().contiguous().t()
        optimizer.step()
        v = 0.9 * v + 0.1 * g.double() ** 2
        m = momentum * m + 0.1 * g.double() / (v + 1e-5).sqrt()
        w = w - m
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(p.detach().double(), w, rtol=tolerance, atol=tolerance)


def test_gradient_of_another_layout():
    p = nn.Parameter(torch.zeros(600, 500, dtype=torch.float64))
    optimizer = RMSProp([p], lr=0.1)
    g = torch.randn(500, 600, dtype=torch.float64).t()
    p.grad = g
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.1 * g / (0.9 + 0.1 * g**2 + 1e-10).sqrt())


def test_param_groups_have_options_of_their_own():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = RMSProp([{"params": [a]}, {"params": [b], "lr": 0.01, "momentum": 0.5, "decay": 0.8}], lr=0.1)
    for g in GRADIENTS:
        for p in (a, b):
            p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    assert a.item() == pytest.approx(by_hand(1.0, GRADIENTS, 0.1, 0.9, 0.0, 1e-10))
    assert b.item() == pytest.approx(by_hand(1.0, GRADIENTS, 0.01, 0.8, 0.5, 1e-10))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("decay", 1.0),
        ("decay", -0.1),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("momentum", math.nan),
        ("epsilon", 0.0),
        ("epsilon", -1e-5),
    ],
)
@pytest.mark.parametrize("through", ["constructor", "group", "add_param_group"])
def test_out_of_range(through, option, value):
    p, q = parameter(1.0), parameter(1.0)
    make = {
        "constructor": lambda: RMSProp([p], **{option: value}),
        "group": lambda: RMSProp([{"params": [p], option: value}]),
        "add_param_group": lambda: RMSProp([p]).add_param_group({"params": [q], option: value}),
    }[through]
    with pytest.raises(ValueError, match=f"{option} must be .*, got"):
        make()


@pytest.mark.parametrize("option", ["lr", "decay", "momentum", "epsilon"])
@pytest.mark.parametrize("value", ["0.1", None, True])
def test_not_a_number(option, value):
    with pytest.raises(TypeError, match=f"{option} must be a number, got"):
        RMSProp([parameter(1.0)], **{option: value})


def test_rate_as_a_tensor():
    p = parameter(1.0)
    drive(p, RMSProp([p], lr=torch.tensor(0.1, dtype=torch.float64)), GRADIENTS)
    assert p.item() == pytest.approx(by_hand(1.0, GRADIENTS, 0.1, 0.9, 0.0, 1e-10))


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = RMSProp(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_state_dict_round_trip():
    p, q = parameter(1.0, 2.0), parameter(1.0, 2.0)
    optimizer = RMSProp([p], lr=0.1, momentum=0.9)
    drive(p, optimizer, GRADIENTS[:3])
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        q.copy_(p)
    other = RMSProp([q], lr=0.5)
    other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.1
    drive(p, optimizer, GRADIENTS[3:])
    drive(q, other, GRADIENTS[3:])
    assert torch.equal(p, q)


def test_trains_a_model_under_a_scheduler(mlp, batches, train):
    model = mlp(dtype=torch.float32)
    optimizer = RMSProp(model.parameters(), lr=1e-2, momentum=0.5)
    scheduler = StepLR(optimizer, 20, 0.1)
    losses = []
    for batch in batches(1, dtype=torch.float32) * 60:
        losses += train(model, optimizer, [batch])
        scheduler.step()
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_closure_and_missing_gradients():
    p, q = parameter(1.0), parameter(1.0)
    optimizer = RMSProp([p, q], lr=0.1)

    def closure():
        loss = (p * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert p.item() < 1.0
    assert q.item() == 1.0
    assert q not in optimizer.state
