"""The library equals the slow float64 reference, which shares no code with it."""

import json
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import nn

import reference as ref
from torchloco import FirstOrderSteps, LocoProp, MomentumSteps, RMSProp, SquaredDistance

MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "identity": nn.Identity, "softplus": nn.Softplus}
INNER = {
    "rmsprop_tf": (ref.rmsprop_tf(), partial(FirstOrderSteps)),
    "rmsprop_tf without momentum": (
        ref.rmsprop_tf(momentum=0.0),
        partial(FirstOrderSteps, RMSProp, momentum=0.0, epsilon=1e-5),
    ),
    "rmsprop with lr outside": (ref.rmsprop_lr_outside(), partial(FirstOrderSteps, lr_outside=True)),
    "metric of the last gradient": (ref.momentum_steps(), partial(MomentumSteps)),
    "sgd": (ref.sgd(), partial(FirstOrderSteps, torch.optim.SGD)),
    "momentum": (ref.momentum(0.9), partial(FirstOrderSteps, torch.optim.SGD, momentum=0.9)),
    # Adam divides a gradient that is zero but for rounding by its own size, unless epsilon is large.
    "adam": (ref.adam(epsilon=1e-2), partial(FirstOrderSteps, torch.optim.Adam, eps=1e-2)),
}


def chain(weights, biases, transfers):
    """A float64 model of the reference's weights."""
    modules = []
    for w, b, transfer in zip(weights, biases, [*transfers, None], strict=True):
        linear = nn.Linear(w.shape[1], w.shape[0], bias=b is not None, dtype=torch.float64)
        with torch.no_grad():
            linear.weight.copy_(w)
            if b is not None:
                linear.bias.copy_(b)
        modules.append(linear)
        if transfer is not None:
            modules.append(MODULES[transfer]())
    return nn.Sequential(*modules)


def linears(model):
    return [m for m in model if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("loss", ["matching", "squared"])
@settings(max_examples=8, deadline=None)
@example([4, 5, 1, 5], 6, True, "relu", "sigmoid", 0.0, "linear", 1, 181)  # gradients of rounding size
@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    rows=st.integers(1, 8),
    bias=st.booleans(),
    hidden=st.sampled_from(["tanh", "relu", "sigmoid", "identity"]),
    output=st.sampled_from(["sigmoid", "identity", "softmax"]),
    regularizer=st.sampled_from([0.0, 0.3]),
    schedule=st.sampled_from(["linear", "constant"]),
    local_steps=st.integers(1, 6),
    seed=st.integers(0, 999),
)
def test_equals_reference(inner, loss, sizes, rows, bias, hidden, output, regularizer, schedule, local_steps, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = [draw(o, i) for i, o in zip(sizes, sizes[1:], strict=False)]
    biases = [draw(o) if bias else None for o in sizes[1:]]
    transfers = [hidden] * (len(weights) - 1)
    lr, gamma = 0.01, 2.0
    rule, solver_with = INNER[inner]
    solver = solver_with(schedule=schedule)
    slow = ref.Reference(
        [w.clone() for w in weights],
        [None if b is None else b.clone() for b in biases],
        transfers,
        output,
        loss=loss,
        activation_lr=gamma,
        local_steps=local_steps,
        lr=lr,
        optimizer=rule,
        regularizer=regularizer,
        schedule=schedule,
    )
    model = chain(weights, biases, transfers)
    fast = LocoProp(
        model,
        lr=lr,
        activation_lr=gamma,
        local_steps=local_steps,
        loss=loss,
        regularizer=SquaredDistance(regularizer) if regularizer else None,
        solver=solver,
        output=output,
        transfers={str(2 * i): hidden for i in range(len(transfers))} if hidden == "identity" else None,
    )
    for _ in range(3):
        x, t = draw(rows, sizes[0]), draw(rows, sizes[-1])

        def network_loss(a, t=t):
            return nn.functional.binary_cross_entropy_with_logits(a, t.sigmoid(), reduction="sum") / a.shape[0]

        fast.zero_grad()
        value = network_loss(model(x))
        value.backward()
        fast.step()
        assert value.item() == pytest.approx(slow.step(x, network_loss), rel=1e-10)
        # A run that diverges multiplies rounding by as much as it multiplies the weights.
        assume(all(w.abs().max() < 1e6 for w in slow.weights))
        for linear, w, b in zip(linears(model), slow.weights, slow.biases, strict=True):
            torch.testing.assert_close(linear.weight.detach(), w.detach(), rtol=1e-9, atol=1e-11)
            if b is not None:
                torch.testing.assert_close(linear.bias.detach(), b.detach(), rtol=1e-9, atol=1e-11)
        slow.lr = fast.param_groups[0]["lr"] = 0.7 * slow.lr  # as a scheduler does


@pytest.mark.parametrize("recipe", ref.FROZEN_RECIPES)
def test_frozen_trajectory(recipe):
    """The losses and weights in data/frozen_trajectory.json came from reference.py, written independently.

    They were computed once by ``python tests/reference.py --write``. Do not regenerate them to make this pass: a
    difference is a change of the algorithm.
    """
    frozen = json.loads(ref.FROZEN_FILE.read_text())[recipe]
    weights, biases = ref.frozen_parameters()
    model = chain(weights, biases, ["tanh", "identity", "tanh"])
    optimizer = LocoProp(
        model, lr=float(recipe.rsplit("lr", 1)[1]), loss={"M": "matching", "S": "squared"}[recipe[0]], output="sigmoid"
    )
    for k, (loss, step) in enumerate(zip(frozen["losses"], frozen["steps"], strict=True)):
        x = ref.frozen_batch(k)
        optimizer.zero_grad()
        value = ref.bce_sum_mean(x)(model(x))
        value.backward()
        optimizer.step()
        assert value.item() == pytest.approx(loss, rel=1e-10)
        for linear, layer in zip(linears(model), step, strict=True):
            for expression, expected in layer.items():
                got = eval(expression, {"W": linear.weight.detach(), "b": linear.bias.detach()})  # noqa: S307
                assert float(got) == pytest.approx(expected, rel=1e-9, abs=1e-11), expression
    x = ref.frozen_batch(0)
    assert ref.bce_sum_mean(x)(model(x)).item() == pytest.approx(frozen["final_loss"], rel=1e-10)
