"""LocoProp, written as slowly and as plainly as possible: what fast implementations are compared with.

Everything here is float64 on the CPU and every derivative comes from ``torch.autograd.grad`` of a scalar
that is written out. No code is shared with the library under test.

Notation (rows are samples): ``N`` rows in the mini-batch, a layer maps ``d_in`` to ``d_out`` units.

====================  ==================================================================  ===================
symbol                meaning                                                             shape
====================  ==================================================================  ===================
``X``                 what enters the layer                                               ``(N, d_in)``
``W``, ``b``          weight and bias at the start of the step                            ``(d_out, d_in)``,
                                                                                          ``(d_out,)``
``A = X Wᵀ + b``      pre-activations                                                     ``(N, d_out)``
``f``, ``Y = f(A)``   transfer function, post-activations                                 ``(N, d_out)``
``G = ∂L/∂A``         gradient of the network's loss at the pre-activations               ``(N, d_out)``
``γ``                 activation learning rate                                            scalar
====================  ==================================================================  ===================

The algorithm, for one mini-batch::

    forward: keep every A;  backward: G for every layer            (all at the old weights)
    for every layer, independently:
        leave out the rows with G = 0
        T ← A − γG      (loss "squared",  LocoProp-S)
        T ← f(A) − γG   (loss "matching", LocoProp-M)
        W̃, b̃ ← W, b
        for j = 0 … local_steps − 1:
            J(W̃, b̃) = ½‖X W̃ᵀ + b̃ − T‖²  or  Σ_rows F(X W̃ᵀ + b̃) − T·(X W̃ᵀ + b̃),   plus the regularizer
            W̃, b̃ ← one optimizer step on J with learning rate lr · schedule(j)
    replace every W, b by its W̃, b̃ together

Run as a script, this file prints the frozen trajectory and, with ``--write``, stores it next to the tests.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

FROZEN_FILE = Path(__file__).with_name("data") / "frozen_trajectory.json"


# ----------------------------------------------------------------------------------------------------
# Transfer functions f and their convex integrals F (∇F = f)
# ----------------------------------------------------------------------------------------------------


def _gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights, each ``(n,)``, of the quadrature on (-1, 1), from the Jacobi matrix."""
    k = torch.arange(1, n, dtype=torch.float64)
    beta = k / torch.sqrt(4 * k**2 - 1)
    nodes, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    return nodes, 2 * vectors[0] ** 2


def _softplus(a: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(a))


def _softplus_integral(a: Tensor) -> Tensor:
    """−Li₂(−eᵃ) = π²/12 + ∫₀ᵃ log(1 + eᵗ) dt, elementwise, the integral by 100-point quadrature."""
    nodes, weights = _gauss_legendre(100)
    u = (nodes + 1) / 2  # nodes on (0, 1); t = a·u
    integrand = _softplus(a.unsqueeze(-1) * u)
    return math.pi**2 / 12 + a * (integrand * weights / 2).sum(-1)


def transfer(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The pair ``(f, F)`` of a transfer function and its convex integral.

    ``f`` maps ``(N, d)`` to ``(N, d)``; ``F`` maps ``(N, d)`` to ``(N,)``, one value per row (for the
    elementwise transfers the sum over the row's units), so that the gradient of ``F(a).sum()`` at ``a`` is
    ``f(a)``.

    Parameters are written in the name: ``"leaky_relu(0.1)"``, ``"elu(0.5)"``, ``"celu(2)"``,
    ``"hardtanh(-1, 2)"``. Left out, they are PyTorch's defaults. The formulas are the definitions themselves:
    some overflow for ``|a|`` above about 700 (``"elu"`` and its kin: ``a`` above about 700).
    """
    kind, _, inside = name.replace(" ", "").rstrip(")").partition("(")
    arguments = [float(part) for part in inside.split(",") if part]

    def per_row(integral):
        return lambda a: integral(a).sum(-1)

    if kind == "identity":
        return lambda a: a, per_row(lambda a: a**2 / 2)
    if kind == "tanh":
        return torch.tanh, per_row(lambda a: torch.log(torch.cosh(a)))
    if kind == "sigmoid":
        return lambda a: 1 / (1 + torch.exp(-a)), per_row(_softplus)
    if kind == "softmax":

        def softmax(a):
            return torch.exp(a) / torch.exp(a).sum(-1, keepdim=True)

        return softmax, lambda a: torch.log(torch.exp(a).sum(-1))
    if kind == "relu":
        return lambda a: torch.where(a > 0, a, 0), per_row(lambda a: torch.where(a > 0, a**2 / 2, 0))
    if kind == "leaky_relu":
        (slope,) = arguments or (0.01,)
        return (
            lambda a: torch.where(a > 0, a, slope * a),
            per_row(lambda a: torch.where(a > 0, a**2 / 2, slope * a**2 / 2)),
        )
    if kind == "relu_squared":
        return lambda a: torch.where(a > 0, a**2, 0), per_row(lambda a: torch.where(a > 0, a**3 / 3, 0))
    if kind == "softplus":
        return _softplus, per_row(_softplus_integral)
    if kind == "logsigmoid":  # f(a) = −softplus(−a), so F(a) = −Li₂(−e⁻ᵃ)
        return lambda a: -_softplus(-a), per_row(lambda a: _softplus_integral(-a))
    if kind in ("elu", "selu"):  # scale · (a or α(eᵃ − 1))
        scale, alpha = 1.0, (arguments or (1.0,))[0]
        if kind == "selu":
            scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
        return (
            lambda a: scale * torch.where(a > 0, a, alpha * (torch.exp(a) - 1)),
            per_row(lambda a: scale * torch.where(a > 0, a**2 / 2, alpha * (torch.exp(a) - 1 - a))),
        )
    if kind == "celu":
        (alpha,) = arguments or (1.0,)
        return (
            lambda a: torch.where(a > 0, a, alpha * (torch.exp(a / alpha) - 1)),
            per_row(lambda a: torch.where(a > 0, a**2 / 2, alpha**2 * (torch.exp(a / alpha) - 1) - alpha * a)),
        )
    if kind == "hardtanh":
        low, high = arguments or (-1.0, 1.0)

        def hardtanh(a):
            return torch.where(a < low, low, torch.where(a > high, high, a))

        def hardtanh_integral(a):
            above = torch.where(a > high, high * a - high**2 / 2, a**2 / 2)
            return torch.where(a < low, low * a - low**2 / 2, above)

        return hardtanh, per_row(hardtanh_integral)
    if kind == "hardsigmoid":  # (a + 3)/6 between −3 and 3, constant outside
        return (
            lambda a: torch.where(a < -3, 0, torch.where(a > 3, 1, (a + 3) / 6)),
            per_row(lambda a: torch.where(a < -3, 0, torch.where(a > 3, a, (a + 3) ** 2 / 12))),
        )
    if kind == "softsign":
        return lambda a: a / (1 + abs(a)), per_row(lambda a: abs(a) - torch.log(1 + abs(a)))
    raise ValueError(f"unknown transfer function: {name!r}")


# ----------------------------------------------------------------------------------------------------
# Inner optimizers. A rule is update(value, grad, lr, state) -> new value; `state` is a dict of its own.
# ----------------------------------------------------------------------------------------------------

Rule = Callable[[Tensor, Tensor, float, dict], Tensor]


def sgd() -> Rule:
    """w ← w − lr·g."""

    def update(value, grad, lr, state):
        return value - lr * grad

    return update


def momentum(momentum: float = 0.9) -> Rule:
    """Heavy ball as in ``torch.optim.SGD``: m ← momentum·m + g;  w ← w − lr·m  (lr outside the momentum)."""

    def update(value, grad, lr, state):
        state["m"] = momentum * state.get("m", torch.zeros_like(value)) + grad
        return value - lr * state["m"]

    return update


def adam(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8) -> Rule:
    """Adam as in ``torch.optim.Adam``: moments corrected for their zero start, epsilon outside the root."""

    def update(value, grad, lr, state):
        state["t"] = state.get("t", 0) + 1
        state["m"] = beta1 * state.get("m", torch.zeros_like(value)) + (1 - beta1) * grad
        state["v"] = beta2 * state.get("v", torch.zeros_like(value)) + (1 - beta2) * grad**2
        m_hat = state["m"] / (1 - beta1 ** state["t"])
        v_hat = state["v"] / (1 - beta2 ** state["t"])
        return value - lr * m_hat / (torch.sqrt(v_hat) + epsilon)

    return update


def rmsprop_tf(momentum: float = 0.999, decay: float = 0.9, epsilon: float = 1e-5) -> Rule:
    """RMSProp in TensorFlow-1 arithmetic.

    v starts at ones;  v ← decay·v + (1 − decay)·g²;  m ← momentum·m + lr·g/√(v + epsilon);  w ← w − m.
    """

    def update(value, grad, lr, state):
        state["v"] = decay * state.get("v", torch.ones_like(value)) + (1 - decay) * grad**2
        step = lr * grad / torch.sqrt(state["v"] + epsilon)
        state["m"] = momentum * state.get("m", torch.zeros_like(value)) + step
        return value - state["m"]

    return update


def rmsprop_lr_outside(momentum: float = 0.999, decay: float = 0.9, epsilon: float = 1e-5) -> Rule:
    """The same with a step's base learning rate outside of the momentum and the schedule's factor inside.

    m ← momentum·m + schedule(j)·g/√(v + epsilon);  w ← w − base lr·m.
    """

    def update(value, grad, lr, state):
        state["v"] = decay * state.get("v", torch.ones_like(value)) + (1 - decay) * grad**2
        step = (lr / state["base lr"]) * grad / torch.sqrt(state["v"] + epsilon)
        state["m"] = momentum * state.get("m", torch.zeros_like(value)) + step
        return value - state["base lr"] * state["m"]

    return update


def momentum_steps(momentum: float = 0.998, decay: float = 0.98, epsilon: float = 1e-5) -> Rule:
    """m ← momentum·m + schedule(j)·g;  w ← w − base lr·m/√(v + epsilon);  after the last step v takes in its g²."""

    def update(value, grad, lr, state):
        v = state.setdefault("v", torch.ones_like(value))
        state["m"] = momentum * state.get("m", torch.zeros_like(value)) + (lr / state["base lr"]) * grad
        if state["last"]:
            state["v"] = decay * v + (1 - decay) * grad**2
        return value - state["base lr"] * state["m"] / torch.sqrt(v + epsilon)

    return update


# ----------------------------------------------------------------------------------------------------
# The local problem of one layer
# ----------------------------------------------------------------------------------------------------


def affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``X Wᵀ + b``: ``(N, d_in), (d_out, d_in), (d_out,) -> (N, d_out)``."""
    return inputs @ weight.T if bias is None else inputs @ weight.T + bias


def local_target(loss: str, transfer_name: str, pre: Tensor, grad: Tensor, gamma: float) -> Tensor:
    """The target ``T`` ``(N, d_out)`` from the pre-activations ``A`` and ``G``, both ``(N, d_out)``.

    ``A − γG`` for the squared loss on pre-activations, ``f(A) − γG`` for the losses that look at ``f(A)``.
    """
    f, _ = transfer(transfer_name)
    return pre - gamma * grad if loss == "squared" else f(pre) - gamma * grad


def local_objective(
    loss: str,
    transfer_name: str,
    inputs: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    old_weight: Tensor,
    old_bias: Tensor | None,
    regularizer: float,
) -> Tensor:
    """The scalar that one layer minimises, a SUM over the rows (1/N is in the target already).

    ``"squared"``: ½‖A − T‖²;  ``"matching"``: Σ_rows F(A) − T·A (the constant F*(T) is left out);
    ``"squared_post"``: ½‖f(A) − T‖².  Plus (λ/2)(‖W̃ − W‖² + ‖b̃ − b‖²), λ = ``regularizer``.
    """
    f, integral = transfer(transfer_name)
    pre = affine(inputs, weight, bias)
    if loss == "squared":
        value = ((pre - target) ** 2).sum() / 2
    elif loss == "matching":
        value = integral(pre).sum() - (target * pre).sum()
    elif loss == "squared_post":
        value = ((f(pre) - target) ** 2).sum() / 2
    else:
        raise ValueError(f"unknown local loss: {loss!r}")
    value = value + regularizer / 2 * ((weight - old_weight) ** 2).sum()
    if bias is not None:
        value = value + regularizer / 2 * ((bias - old_bias) ** 2).sum()
    return value


def schedule_factor(schedule: str, j: int, local_steps: int) -> float:
    """What the learning rate of local step ``j = 0 … local_steps − 1`` is multiplied by."""
    if schedule == "linear":
        return max(1 - j / local_steps, 0.25)
    if schedule == "constant":
        return 1.0
    raise ValueError(f"unknown schedule: {schedule!r}")


# ----------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------


class Reference:
    """LocoProp on the chain  Linear → transfer → Linear → … → Linear → network loss.

    Args:
        weights: one ``(d_out, d_in)`` per linear layer, first layer first. Copied, as float64.
        biases: one ``(d_out,)`` per layer, or ``None`` for a layer (or for all layers) without bias.
        transfers: names of the transfers between the layers, one fewer than there are layers.
        output_transfer: the transfer that the network's loss applies to the last pre-activation (BCE with
            logits: ``"sigmoid"``, cross-entropy: ``"softmax"``, squared error: ``"identity"``). Only the last
            layer's local problem uses it; the forward pass does not.
        loss: local loss with its target: ``"matching"`` (LocoProp-M), ``"squared"`` (LocoProp-S) or
            ``"squared_post"`` (squared error after the transfer, towards f(A) − γG).
        activation_lr: γ.
        local_steps: number of optimizer steps on each layer's problem.
        lr: learning rate of the inner optimizer; local step ``j`` uses ``lr · schedule(j)``.
        optimizer: `sgd`, `momentum`, `adam` or `rmsprop_tf`, called. Its state persists from mini-batch to
            mini-batch, separately for every weight and bias.
        regularizer: λ of (λ/2)‖W̃ − W‖², biases included; W is the weight at the start of the step.
        schedule: ``"linear"``: max(1 − j/local_steps, 0.25), or ``"constant"``.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None] | None,
        transfers: list[str],
        output_transfer: str = "identity",
        *,
        loss: str = "matching",
        activation_lr: float = 10.0,
        local_steps: int = 10,
        lr: float = 1e-5,
        optimizer: Rule | None = None,
        regularizer: float = 0.0,
        schedule: str = "linear",
    ):
        assert len(transfers) == len(weights) - 1
        biases = [None] * len(weights) if biases is None else biases
        self.weights = [w.detach().to(torch.float64).clone() for w in weights]
        self.biases = [None if b is None else b.detach().to(torch.float64).clone() for b in biases]
        self.transfers = [*transfers, output_transfer]
        self.loss = loss
        self.activation_lr = activation_lr
        self.local_steps = local_steps
        self.lr = lr
        self.optimizer = rmsprop_tf() if optimizer is None else optimizer
        self.regularizer = regularizer
        self.schedule = schedule
        self.states = [{"weight": {}, "bias": {}} for _ in weights]

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """From ``x`` ``(N, d_0)`` every layer's X ``(N, d_in)`` and A ``(N, d_out)``, part of a graph."""
        inputs, pre_activations = [x.to(torch.float64)], []
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer > 0:
                f, _ = transfer(self.transfers[layer - 1])
                inputs.append(f(pre_activations[-1]))
            pre_activations.append(affine(inputs[-1], weight.clone().requires_grad_(), bias))
        return inputs, pre_activations

    def gradients(self, x: Tensor, network_loss: Callable[[Tensor], Tensor]):
        """``(L, [X, …], [A, …], [G, …])``, one of each per layer, from one forward and one backward."""
        inputs, pre_activations = self.forward(x)
        value = network_loss(pre_activations[-1])
        grads = torch.autograd.grad(value, pre_activations)
        return value.item(), [i.detach() for i in inputs], [a.detach() for a in pre_activations], list(grads)

    def solve_layer(self, layer: int, inputs: Tensor, pre: Tensor, grad: Tensor):
        """``local_steps`` optimizer steps on one layer's problem; the new ``(W̃, b̃)``, not yet in the network.

        ``inputs`` ``(N, d_in)``, ``pre`` and ``grad`` ``(N, d_out)``: X, A and G of this layer.
        """
        asked = (grad != 0).any(1)
        inputs, pre, grad = inputs[asked], pre[asked], grad[asked]
        name, state = self.transfers[layer], self.states[layer]
        old_weight, old_bias = self.weights[layer], self.biases[layer]
        target = local_target(self.loss, name, pre, grad, self.activation_lr)
        weight, bias = old_weight, old_bias
        for j in range(self.local_steps):
            for own in state.values():
                own.update({"base lr": self.lr, "last": j == self.local_steps - 1})
            lr = self.lr * schedule_factor(self.schedule, j, self.local_steps)
            weight = weight.detach().clone().requires_grad_()
            bias = None if bias is None else bias.detach().clone().requires_grad_()
            objective = local_objective(
                self.loss, name, inputs, target, weight, bias, old_weight, old_bias, self.regularizer
            )
            variables = [weight] if bias is None else [weight, bias]
            slopes = torch.autograd.grad(objective, variables)
            weight = self.optimizer(weight.detach(), slopes[0], lr, state["weight"])
            if bias is not None:
                bias = self.optimizer(bias.detach(), slopes[1], lr, state["bias"])
        return weight, bias

    def step(self, x: Tensor, network_loss: Callable[[Tensor], Tensor]) -> float:
        """One LocoProp step on the mini-batch ``x`` ``(N, d_0)``; the network's loss BEFORE the step.

        ``network_loss`` maps the last pre-activation ``(N, d_last)`` to a scalar.
        """
        value, inputs, pre_activations, grads = self.gradients(x, network_loss)
        solutions = [
            self.solve_layer(layer, inputs[layer], pre_activations[layer], grads[layer])
            for layer in range(len(self.weights))
        ]
        self.weights = [weight for weight, _ in solutions]
        self.biases = [bias for _, bias in solutions]
        return value


def exact_squared_solution(
    weight: Tensor,
    bias: Tensor | None,
    inputs: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    activation_lr: float,
    regularizer: float,
) -> tuple[Tensor, Tensor | None]:
    """The minimiser of ½‖X W̃ᵀ + b̃ − (A − γG)‖² + (λ/2)(‖W̃ − W‖² + ‖b̃ − b‖²).

    W_new = W − γ · ∂L/∂W · (C + λI)⁻¹ with C = XᵀX. With a bias, a column of ones is appended to X, b to W
    and ∂L/∂b to ∂L/∂W.

    ``weight`` and ``weight_grad`` = ∂L/∂W are ``(d_out, d_in)``, ``bias`` and ``bias_grad`` ``(d_out,)``,
    ``inputs`` ``(N, d_in)``.
    """
    if bias is not None:
        inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], dim=1)
        weight = torch.cat([weight, bias[:, None]], dim=1)
        weight_grad = torch.cat([weight_grad, bias_grad[:, None]], dim=1)
    second_moment = inputs.T @ inputs
    damped = second_moment + regularizer * torch.eye(len(second_moment), dtype=inputs.dtype)
    new = weight - activation_lr * weight_grad @ torch.linalg.inv(damped)
    return (new, None) if bias is None else (new[:, :-1], new[:, -1])


# ----------------------------------------------------------------------------------------------------
# A frozen trajectory: a small autoencoder without any random numbers
# ----------------------------------------------------------------------------------------------------

FROZEN_SIZES = [6, 5, 3, 5, 6]
FROZEN_TRANSFERS = [
    "tanh",
    "identity",
    "tanh",
]  # the 3-unit code is linear; the output's sigmoid is in the loss
FROZEN_BATCHES, FROZEN_ROWS = 4, 7
FROZEN_RECIPES = {
    "M_rmsprop_tf_lr1e-3": {"loss": "matching", "lr": 1e-3},
    "S_rmsprop_tf_lr1e-3": {"loss": "squared", "lr": 1e-3},
    "M_rmsprop_tf_lr1e-5": {"loss": "matching", "lr": 1e-5},
    "S_rmsprop_tf_lr1e-5": {"loss": "squared", "lr": 1e-5},
}


def bce_sum_mean(x: Tensor) -> Callable[[Tensor], Tensor]:
    """The autoencoder's loss: binary cross-entropy of logits ``z`` ``(N, d)`` against ``x`` ``(N, d)``,
    SUM over the d pixels, MEAN over the N rows: Σ log(1 + eᶻ) − x·z."""
    return lambda z: (torch.log(1 + torch.exp(z)) - x * z).sum(-1).mean()


def frozen_parameters() -> tuple[list[Tensor], list[Tensor]]:
    """W_l[o, i] = √(6/(d_in + d_out)) · cos((l + 1) + (o + 1)(i + 2));  b_l[o] = 0.1 · sin(l + o + 1)."""
    weights, biases = [], []
    for layer, (d_in, d_out) in enumerate(pairwise(FROZEN_SIZES)):
        limit = math.sqrt(6 / (d_in + d_out))
        rows = [[limit * math.cos((layer + 1) + (o + 1) * (i + 2)) for i in range(d_in)] for o in range(d_out)]
        weights.append(torch.tensor(rows, dtype=torch.float64))
        biases.append(torch.tensor([0.1 * math.sin(layer + o + 1) for o in range(d_out)], dtype=torch.float64))
    return weights, biases


def frozen_batch(batch: int) -> Tensor:
    """x[n, i] = ½ + ½ · sin((r + 1)(i + 1)) with r = 7·batch + n: ``(7, 6)``, values in [0, 1]."""
    start = batch * FROZEN_ROWS
    rows = [
        [0.5 + 0.5 * math.sin((r + 1) * (i + 1)) for i in range(FROZEN_SIZES[0])]
        for r in range(start, start + FROZEN_ROWS)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def frozen_trajectory() -> dict[str, dict]:
    """Every recipe of ``FROZEN_RECIPES`` for four mini-batches, as plain numbers.

    All recipes: γ = 10, 10 local steps, schedule ``"linear"``, `rmsprop_tf` with momentum 0.999, decay 0.9,
    epsilon 1e-5, no regularizer.

    For each recipe: ``losses``, the loss of batches 0 … 3, each before its own step; ``final_loss``, the loss
    of batch 0 after the last step; ``steps``, for each step a list over the layers of the layer's new
    ``W[0, 0]``, ``W[-1, -1]``, ``b[0]``, ``W.sum()``, ``(W * W).sum()``, ``b.sum()`` by these names.
    """
    result = {}
    for name, settings in FROZEN_RECIPES.items():
        network = Reference(
            *frozen_parameters(),
            FROZEN_TRANSFERS,
            "sigmoid",
            activation_lr=10.0,
            local_steps=10,
            optimizer=rmsprop_tf(momentum=0.999, decay=0.9, epsilon=1e-5),
            schedule="linear",
            **settings,
        )
        losses, steps = [], []
        for batch in range(FROZEN_BATCHES):
            x = frozen_batch(batch)
            losses.append(network.step(x, bce_sum_mean(x)))
            steps.append(
                [
                    {
                        "W[0, 0]": weight[0, 0].item(),
                        "W[-1, -1]": weight[-1, -1].item(),
                        "b[0]": bias[0].item(),
                        "W.sum()": weight.sum().item(),
                        "(W * W).sum()": (weight * weight).sum().item(),
                        "b.sum()": bias.sum().item(),
                    }
                    for weight, bias in zip(network.weights, network.biases, strict=True)
                ]
            )
        x = frozen_batch(0)
        final_loss = network.gradients(x, bce_sum_mean(x))[0]
        result[name] = {"losses": losses, "final_loss": final_loss, "steps": steps}
    return result


if __name__ == "__main__":
    text = json.dumps(frozen_trajectory(), indent=1)
    print(text)
    if "--write" in sys.argv[1:]:
        FROZEN_FILE.parent.mkdir(exist_ok=True)
        FROZEN_FILE.write_text(text + "\n", encoding="utf-8")
