"""The reference implementation checked against itself, finite differences and closed forms."""

import json

import pytest
import torch
from torch import Tensor

import reference as ref

TORCH_TRANSFERS = {
    "identity": torch.nn.Identity(),
    "tanh": torch.nn.Tanh(),
    "sigmoid": torch.nn.Sigmoid(),
    "softmax": torch.nn.Softmax(dim=-1),
    "relu": torch.nn.ReLU(),
    "leaky_relu(0.2)": torch.nn.LeakyReLU(0.2),
    "relu_squared": lambda a: torch.relu(a) ** 2,
    "softplus": torch.nn.Softplus(threshold=100),
    "elu(1)": torch.nn.ELU(),
    "elu(0.7)": torch.nn.ELU(0.7),
    "celu(1.5)": torch.nn.CELU(1.5),
    "selu": torch.nn.SELU(),
    "hardtanh(-1, 1)": torch.nn.Hardtanh(),
    "hardtanh(-0.5, 2)": torch.nn.Hardtanh(-0.5, 2.0),
    "hardsigmoid": torch.nn.Hardsigmoid(),
    "softsign": torch.nn.Softsign(),
    "logsigmoid": torch.nn.LogSigmoid(),
}
TRANSFERS = list(TORCH_TRANSFERS)


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def equal(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def frozen_network(biases: bool = True, transfers=None, output="sigmoid", **settings) -> ref.Reference:
    weights, b = ref.frozen_parameters()
    return ref.Reference(weights, b if biases else None, transfers or ref.FROZEN_TRANSFERS, output, **settings)


def plain_loss(weights, biases, transfers, x, network_loss) -> Tensor:
    """The network's loss from scratch, for ordinary back-propagation at the weights."""
    h = x
    for layer, weight in enumerate(weights):
        h = h @ weight.T if biases[layer] is None else torch.nn.functional.linear(h, weight, biases[layer])
        if layer < len(weights) - 1:
            h = TORCH_TRANSFERS[transfers[layer]](h)
    return network_loss(h)


def plain_gradients(network: ref.Reference, x: Tensor, network_loss):
    """∂L/∂W and ∂L/∂b of every layer by ordinary back-propagation."""
    weights = [w.clone().requires_grad_() for w in network.weights]
    biases = [None if b is None else b.clone().requires_grad_() for b in network.biases]
    value = plain_loss(weights, biases, network.transfers, x, network_loss)
    weight_grads = torch.autograd.grad(value, weights, retain_graph=True)
    bias_grads = [None if b is None else torch.autograd.grad(value, b, retain_graph=True)[0] for b in biases]
    return list(weight_grads), bias_grads


# ------------------------------------------------------------------------------------------------- transfers


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfer_is_torchs_and_the_derivative_of_its_integral(name):
    f, integral = ref.transfer(name)
    a = torch.cat([numbers(20, 4, scale=3.0), torch.zeros(1, 4, dtype=torch.float64)]).requires_grad_()
    equal(f(a), TORCH_TRANSFERS[name](a))
    assert integral(a).shape == (21,)
    (slope,) = torch.autograd.grad(integral(a).sum(), a)
    equal(slope, f(a.detach()))


@pytest.mark.parametrize("name", TRANSFERS)
def test_integral_by_finite_differences_and_convexity(name):
    f, integral = ref.transfer(name)
    a, direction, h = numbers(50, 4, scale=2.0), numbers(50, 4, seed=1), 1e-5
    difference = (integral(a + h * direction) - integral(a - h * direction)) / (2 * h)
    equal(difference, (f(a) * direction).sum(-1), 1e-4 if "hard" in name else 1e-5)
    b = numbers(50, 4, seed=2, scale=2.0)
    divergence = integral(b) - integral(a) - (f(a) * (b - a)).sum(-1)
    assert (divergence >= -1e-12).all()


def test_softplus_integral_is_the_dilogarithm():
    _, integral = ref.transfer("softplus")
    terms = torch.arange(1, 400, dtype=torch.float64)
    a = torch.tensor([[-0.5], [-1.0], [-4.0]], dtype=torch.float64)
    equal(integral(a), -((-torch.exp(a)) ** terms / terms**2).sum(-1))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown transfer"):
        ref.transfer("gelu")


# ------------------------------------------------------------------------------------------ inner optimizers


@pytest.mark.parametrize(
    ("rule", "torch_optimizer"),
    [
        (ref.sgd(), lambda p: torch.optim.SGD(p, lr=0.1)),
        (ref.momentum(0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        (ref.adam(), lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_rules_are_torchs(rule, torch_optimizer):
    value, state = numbers(3, 2), {}
    parameter = torch.nn.Parameter(value.clone())
    optimizer = torch_optimizer([parameter])
    for t in range(6):
        optimizer.param_groups[0]["lr"] = lr = 0.1 / (t + 1)
        parameter.grad = numbers(3, 2, seed=t + 1)
        optimizer.step()
        value = rule(value, numbers(3, 2, seed=t + 1), lr, state)
        equal(value, parameter.detach())


def test_rmsprop_tf_by_hand():
    """Two steps: v = 0.9 + 0.1·4 = 1.3, then 1.27; each momentum term keeps the lr it was made with."""
    rule, state = ref.rmsprop_tf(momentum=0.5, decay=0.9, epsilon=0.14), {}
    value = rule(torch.tensor([1.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64), 0.12, state)
    first = 0.12 * 2 / 1.44**0.5  # 0.2
    assert value.item() == pytest.approx(1 - first, rel=1e-14)
    value = rule(value, torch.tensor([-1.0], dtype=torch.float64), 0.06, state)
    second = 0.5 * first - 0.06 / (0.9 * 1.3 + 0.1 + 0.14) ** 0.5
    assert value.item() == pytest.approx(1 - first - second, rel=1e-14)


def test_schedule():
    factors = [ref.schedule_factor("linear", j, 10) for j in range(10)]
    assert factors == pytest.approx([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25])
    assert ref.schedule_factor("constant", 7, 10) == 1


# --------------------------------------------------------------------------------------------- the algorithm


def test_pre_activation_gradients_by_finite_differences():
    """G of every layer: move one pre-activation, run the rest of the network, look at the loss."""
    network = frozen_network()
    x, h = ref.frozen_batch(0), 1e-5
    loss = ref.bce_sum_mean(x)
    _, _, pre_activations, grads = network.gradients(x, loss)

    def loss_from(layer: int, pre: Tensor) -> float:
        for later in range(layer, len(network.weights) - 1):
            y = TORCH_TRANSFERS[network.transfers[later]](pre)
            pre = y @ network.weights[later + 1].T + network.biases[later + 1]
        return loss(pre).item()

    for layer, (pre, grad) in enumerate(zip(pre_activations, grads, strict=True)):
        for n in (0, 6):
            for o in range(pre.shape[1]):
                bump = torch.zeros_like(pre)
                bump[n, o] = h
                slope = (loss_from(layer, pre + bump) - loss_from(layer, pre - bump)) / (2 * h)
                assert grad[n, o].item() == pytest.approx(slope, abs=1e-9)


def test_network_loss_is_bce_with_logits():
    x, z = ref.frozen_batch(1), numbers(7, 6, scale=3.0)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(z, x, reduction="sum") / 7
    equal(ref.bce_sum_mean(x)(z), expected)


@pytest.mark.parametrize("loss", ["matching", "squared"])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("transfers", [["tanh", "identity", "tanh"], ["relu", "softplus", "leaky_relu(0.2)"]])
def test_one_sgd_step_is_backpropagation(loss, biases, transfers):
    gamma, h = 7.0, 0.03
    network = frozen_network(
        biases, transfers, loss=loss, activation_lr=gamma, local_steps=1, lr=h, optimizer=ref.sgd()
    )
    for batch in range(2):
        x = ref.frozen_batch(batch)
        weight_grads, bias_grads = plain_gradients(network, x, ref.bce_sum_mean(x))
        weights = [w - gamma * h * g for w, g in zip(network.weights, weight_grads, strict=True)]
        old_biases = network.biases
        network.step(x, ref.bce_sum_mean(x))
        for layer in range(4):
            equal(network.weights[layer], weights[layer])
            if biases:
                equal(network.biases[layer], old_biases[layer] - gamma * h * bias_grads[layer])
            else:
                assert network.biases[layer] is None


@pytest.mark.parametrize("loss", ["matching", "squared"])
def test_the_first_residual_is_gamma_g(loss):
    for name in TRANSFERS:
        inputs, weight, bias, g = (
            numbers(7, 4),
            numbers(3, 4, seed=1),
            numbers(3, seed=2),
            numbers(7, 3, seed=3),
        )
        pre = ref.affine(inputs, weight, bias)
        target = ref.local_target(loss, name, pre, 10 * g, 2.5)
        bias.requires_grad_()
        weight.requires_grad_()
        value = ref.local_objective(loss, name, inputs, target, weight, bias, weight.detach(), bias.detach(), 3.0)
        slope, bias_slope = torch.autograd.grad(value, [weight, bias])
        equal(slope, 25 * g.T @ inputs, 1e-11)
        equal(bias_slope, 25 * g.sum(0), 1e-11)


def test_identity_makes_both_losses_the_same():
    networks = [
        frozen_network(transfers=["identity"] * 3, output="identity", loss=loss, lr=1e-3, local_steps=5)
        for loss in ("matching", "squared", "squared_post")
    ]
    for batch in range(3):
        x = ref.frozen_batch(batch)
        losses = [network.step(x, lambda z, x=x: ((z - x) ** 2).sum() / 7) for network in networks]
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)
    for other in networks[1:]:
        for layer in range(4):
            equal(other.weights[layer], networks[0].weights[layer])
            equal(other.biases[layer], networks[0].biases[layer])


def with_ones(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_squared_loss_with_sgd_has_a_closed_form(biases, steps):
    """W_T − W = −hγ · ∂L/∂W · Σ_{j<T} (I − hC)^j with C = XᵀX, the bias as a column of ones."""
    gamma, h = 10.0, 0.02
    network = frozen_network(
        biases,
        loss="squared",
        activation_lr=gamma,
        local_steps=steps,
        lr=h,
        optimizer=ref.sgd(),
        schedule="constant",
    )
    x = ref.frozen_batch(2)
    old = network.weights, network.biases
    _, inputs, _, _ = network.gradients(x, ref.bce_sum_mean(x))
    weight_grads, bias_grads = plain_gradients(network, x, ref.bce_sum_mean(x))
    network.step(x, ref.bce_sum_mean(x))
    for layer in range(4):
        rows, grad, change = inputs[layer], weight_grads[layer], network.weights[layer] - old[0][layer]
        if biases:
            rows, grad = with_ones(rows), torch.cat([grad, bias_grads[layer][:, None]], 1)
            change = torch.cat([change, (network.biases[layer] - old[1][layer])[:, None]], 1)
        eye = torch.eye(rows.shape[1], dtype=torch.float64)
        powers = sum(torch.linalg.matrix_power(eye - h * rows.T @ rows, j) for j in range(steps))
        equal(change, -h * gamma * grad @ powers)


@pytest.mark.parametrize("biases", [True, False])
def test_exact_solution_is_the_minimum_and_what_many_steps_reach(biases):
    gamma, damping = 10.0, 2.0
    network = frozen_network(
        biases, loss="squared", activation_lr=gamma, local_steps=400, lr=0.08, optimizer=ref.sgd(),
        regularizer=damping, schedule="constant",
    )  # fmt: skip
    x = ref.frozen_batch(3)
    old = network.weights, network.biases
    _, inputs, pre_activations, grads = network.gradients(x, ref.bce_sum_mean(x))
    weight_grads, bias_grads = plain_gradients(network, x, ref.bce_sum_mean(x))
    network.step(x, ref.bce_sum_mean(x))
    for layer in range(4):
        weight, bias = ref.exact_squared_solution(
            old[0][layer],
            old[1][layer],
            inputs[layer],
            weight_grads[layer],
            bias_grads[layer],
            gamma,
            damping,
        )
        target = ref.local_target("squared", "identity", pre_activations[layer], grads[layer], gamma)
        variables = [v.requires_grad_() for v in (weight, bias) if v is not None]
        value = ref.local_objective(
            "squared", "identity", inputs[layer], target, weight, bias, old[0][layer], old[1][layer], damping
        )
        for slope in torch.autograd.grad(value, variables):
            equal(slope, torch.zeros_like(slope), 1e-11)
        equal(network.weights[layer], weight.detach(), 1e-10)
        if biases:
            equal(network.biases[layer], bias.detach(), 1e-10)


def test_heavy_damping_gives_back_sgd():
    inputs, weight, grad = numbers(9, 4), numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    new, _ = ref.exact_squared_solution(weight, None, inputs, grad, None, 1e9 * 0.3, 1e9)
    equal(new, weight - 0.3 * grad, 1e-6)


def test_all_layers_use_the_old_weights():
    """Solving the layers one by one, last or first, from the same forward pass gives what `step` gives."""
    stepped, by_hand = frozen_network(lr=1e-3), frozen_network(lr=1e-3)
    x = ref.frozen_batch(0)
    _, inputs, pre, grads = by_hand.gradients(x, ref.bce_sum_mean(x))
    solved = {layer: by_hand.solve_layer(layer, inputs[layer], pre[layer], grads[layer]) for layer in (3, 1, 0, 2)}
    stepped.step(x, ref.bce_sum_mean(x))
    for layer, (weight, bias) in solved.items():
        assert torch.equal(weight, stepped.weights[layer])
        assert torch.equal(bias, stepped.biases[layer])


def test_optimizer_state_persists_and_the_schedule_restarts():
    """Momentum of the first mini-batch still moves the weights when the second has no gradient at all."""
    network = frozen_network(
        loss="squared", local_steps=2, lr=0.01, optimizer=ref.rmsprop_tf(momentum=0.9), activation_lr=10.0
    )
    x = ref.frozen_batch(0)
    network.step(x, ref.bce_sum_mean(x))
    network.activation_lr = 0.0
    before, m = network.weights[0], network.states[0]["weight"]["m"]
    network.local_steps = 1  # at γ = 0 the first local gradient is zero
    network.step(x, ref.bce_sum_mean(x))
    equal(network.weights[0], before - 0.9 * m)


def test_a_regularizer_keeps_the_weights_nearer():
    distances = []
    for regularizer in (0.0, 10.0):
        network = frozen_network(lr=0.01, optimizer=ref.sgd(), regularizer=regularizer)
        old, x = network.weights, ref.frozen_batch(0)
        network.step(x, ref.bce_sum_mean(x))
        distances.append([(new - w).norm().item() for new, w in zip(network.weights, old, strict=True)])
    assert all(near < far for far, near in zip(*distances, strict=True))


def test_frozen_trajectory():
    stored = json.loads(ref.FROZEN_FILE.read_text(encoding="utf-8"))
    computed = ref.frozen_trajectory()
    assert computed.keys() == stored.keys()
    for name, trajectory in computed.items():
        assert trajectory["losses"] == pytest.approx(stored[name]["losses"], rel=1e-9)
        assert trajectory["final_loss"] == pytest.approx(stored[name]["final_loss"], rel=1e-9)
        for new, old in zip(trajectory["steps"], stored[name]["steps"], strict=True):
            for new_layer, old_layer in zip(new, old, strict=True):
                assert new_layer == pytest.approx(old_layer, rel=1e-9, abs=1e-11)
