"""Known algorithms as choices of loss, target, regularizer and solver.

Each recipe builds a `LocoProp` for a model; further keyword arguments go to its constructor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchloco.anderson import Anderson
from torchloco.checks import check_range
from torchloco.exact import ConjugateGradient, Exact
from torchloco.momentum import MomentumSteps
from torchloco.optimizer import LocoProp
from torchloco.regularizers import RelativeEntropy, SquaredDistance
from torchloco.solvers import ProximalStep
from torchloco.spectral import Spectral
from torchloco.steps import FirstOrderSteps
from torchloco.targets import NormalizedTarget

FAST_ROWS = 48
"""Rows that a step of the fast variants looks at; a count, since that and not the share makes the sampling error."""


def locoprop_m(model: nn.Module, lr: float = 1e-5, *, paper: bool = True, **options: Any) -> LocoProp:
    """LocoProp-M: matching loss, mirror-descent target, ten steps of RMSProp.

    Args:
        model: The network.
        lr: Base learning rate of the local steps, > 0.
        paper: Whether every local step is over all rows, as in the paper; else those after the first look at 48 rows
            each, which costs a fraction of it.
        options: Further arguments of `LocoProp`.
    """
    return _built("locoprop_m", model, {"lr": lr, "loss": "matching", **_steps(paper)}, options)


def locoprop_s(model: nn.Module, lr: float = 1e-5, *, paper: bool = True, **options: Any) -> LocoProp:
    """LocoProp-S: squared loss, gradient-descent target, ten steps of RMSProp.

    Args:
        model: The network.
        lr: Base learning rate of the local steps, > 0.
        paper: See `locoprop_m`.
        options: Further arguments of `LocoProp`.
    """
    return _built("locoprop_s", model, {"lr": lr, "loss": "squared", **_steps(paper)}, options)


def locoprop_m_normalized(
    model: nn.Module, lr: float = 1e-4, *, activation_lr: float = 0.02, momentum: float = 0.998, **options: Any
) -> LocoProp:
    """LocoProp-M on 48 rows for runs whose learning rate decays to 0: everything follows its schedule.

    Targets are normalized and their γ follows the learning rate; the local steps, `MomentumSteps`, take it outside
    their momentum, which spans many mini-batches, so that steps under way follow it, too. On MNIST's deep autoencoder
    this got further than the paper's settings at a lower price (docs/performance.md); γ depends neither on the batch
    nor on the reduction.

    Args:
        model: The network.
        lr: Base learning rate of the local steps, > 0.
        activation_lr: γ, how far the targets are on average, in (0, 1].
        momentum: Of the local steps, in (0, 1).
        options: Further arguments of `LocoProp`.

    Raises:
        ValueError: A number outside its range.
    """
    return _normalized("locoprop_m_normalized", model, lr, activation_lr, momentum, options)


def locoprop_m_centered(
    model: nn.Module, lr: float = 1e-4, *, activation_lr: float = 0.02, momentum: float = 0.998, **options: Any
) -> LocoProp:
    """`locoprop_m_normalized` with inputs relative to their mean in every local problem (`MomentumSteps(center=True)`).

    What to begin with for autoencoders, above all with ReLU, where inputs are nowhere negative and their mean is most
    of the curvature that bounds lr.

    Args:
        model: The network.
        lr: Base learning rate of the local steps, > 0.
        activation_lr: γ, how far the targets are on average, in (0, 1].
        momentum: Of the local steps, in (0, 1).
        options: Further arguments of `LocoProp`.

    Raises:
        ValueError: A number outside its range.
    """
    return _normalized("locoprop_m_centered", model, lr, activation_lr, momentum, options, center=True)


def backprop(model: nn.Module, lr: float, **options: Any) -> LocoProp:
    """Stochastic gradient descent: one plain local step, which is back-propagation's.

    Args:
        model: The network.
        lr: The learning rate of SGD, > 0.
        options: Further arguments of `LocoProp`.
    """
    solver = FirstOrderSteps(torch.optim.SGD, schedule="constant")
    return _built("backprop", model, {"lr": lr, **_ONE_STEP, "solver": solver}, options)


def sgd_momentum(model: nn.Module, lr: float, momentum: float = 0.9, **options: Any) -> LocoProp:
    """Stochastic gradient descent with (heavy-ball) momentum: one plain local step whose inner state persists.

    `MomentumTarget` carries the momentum of each unit instead, which is the same for biases and for constant inputs.

    Args:
        model: The network.
        lr: The learning rate of SGD, > 0.
        momentum: Its momentum, in [0, 1).
        options: Further arguments of `LocoProp`.
    """
    check_range("momentum", momentum, 0, 1, inclusive=True)
    solver = FirstOrderSteps(torch.optim.SGD, schedule="constant", momentum=momentum)
    return _built("sgd_momentum", model, {"lr": lr, **_ONE_STEP, "solver": solver}, options)


def locoprop_s_exact(model: nn.Module, activation_lr: float, damping: float = 1.0, **options: Any) -> LocoProp:
    """LocoProp-S solved exactly, with damping relative to the mean of C's diagonal.

    Args:
        model: The network.
        activation_lr: γ, the step size, > 0.
        damping: λ in units of C's mean diagonal entry, > 0.
        options: Further arguments of `LocoProp`.
    """
    chosen = {"activation_lr": activation_lr, "loss": "squared", "solver": Exact(damping)}
    return _built("locoprop_s_exact", model, chosen, options)


def locoprop_m_anderson(
    model: nn.Module, activation_lr: float = 10.0, memory: int = 5, iterations: int = 10, **options: Any
) -> LocoProp:
    """LocoProp-M solved by Anderson-accelerated gradient steps.

    Args:
        model: The network.
        activation_lr: γ, the step size, > 0.
        memory: How many earlier differences are combined, >= 1.
        iterations: Gradients of the local problem per step, >= 1.
        options: Further arguments of `LocoProp`.
    """
    chosen = {"activation_lr": activation_lr, "solver": Anderson(memory, iterations)}
    return _built("locoprop_m_anderson", model, chosen, options)


def foof(model: nn.Module, lr: float, damping: float, **options: Any) -> LocoProp:
    """W ← W - lr · ∂L/∂W · (XᵀX + damping · I)⁻¹: LocoProp-S solved exactly (FOOF, Benzing 2022).

    Args:
        model: The network.
        lr: Step size, > 0; multiplies a gradient in which a mean loss's 1/N is, against XᵀX, which is a sum.
        damping: λ, > 0, absolute.
        options: Further arguments of `LocoProp`.
    """
    chosen = {"activation_lr": lr, "loss": "squared", "solver": Exact(damping, relative=False)}
    return _built("foof", model, chosen, options)


def spectral(
    model: nn.Module, lr: float = 0.01, momentum: float = 0.95, damping: float = 0.1, every: int = 1, **options: Any
) -> LocoProp:
    """Steepest descent in the spectral norm of the pre-activations: Muon that knows its inputs (see `Spectral`).

    What to begin with for convolutional networks and transformers; what is no layer goes to `fallback`.

    Args:
        model: The network.
        lr: Root mean square by which a step moves each pre-activation, > 0; search 0.003 to 0.1.
        momentum: Of the gradients, in [0, 1).
        damping: In units of the mean square of a layer's inputs, > 0; towards infinity the steps become Muon's.
        every: The inputs' second moments are renewed in every so many steps, >= 1.
        options: Further arguments of `LocoProp`, but those of targets and local steps, which have no part in it.
    """
    useless = sorted({"loss", "target", "activation_lr", "local_steps"} & options.keys())
    if useless:
        raise TypeError(f"recipes.spectral has no use for {', '.join(useless)}: only the gradient's direction counts")
    chosen = {"lr": lr, "solver": Spectral(momentum, damping=damping, every=every)}
    return _built("spectral", model, chosen, options)


def implicit_sgd(model: nn.Module, lr: float, **options: Any) -> LocoProp:
    """The proximal point of each layer's quadratic: W ← argmin ½‖XW̃ᵀ - (A - G)‖² + ‖W̃ - W‖² / (2 lr).

    For one linear layer under L = ½‖A - T‖² this is implicit SGD: the minimum of L + ‖W̃ - W‖² / (2 lr).

    Args:
        model: The network.
        lr: The step size, > 0; large ones do not diverge.
        options: Further arguments of `LocoProp`.
    """
    check_range("lr", lr, 0)
    chosen = {"activation_lr": 1.0, "loss": "squared", "solver": Exact(1 / lr, relative=False)}
    return _built("implicit_sgd", model, chosen, options)


def proxprop(model: nn.Module, activation_lr: float, lr: float, iterations: int = 3, **options: Any) -> LocoProp:
    """Proximal back-propagation: implicit weight steps by conjugate gradients (Frerix et al. 2018, algorithm 2).

    Args:
        model: The network.
        activation_lr: γ, the explicit step on the pre-activations, > 0.
        lr: τ, the weights' proximal step, > 0: the penalty is ‖W̃ - W‖² / (2τ).
        iterations: Of conjugate gradients, >= 1.
        options: Further arguments of `LocoProp`.
    """
    check_range("lr", lr, 0)
    chosen = {
        "activation_lr": activation_lr,
        "loss": "squared",
        "regularizer": SquaredDistance(1 / lr),
        "solver": ConjugateGradient(iterations, tolerance=0.0),
    }
    return _built("proxprop", model, chosen, options)


def exponentiated_gradient(model: nn.Module, lr: float, **options: Any) -> LocoProp:
    """W ← W · exp(-lr · ∂L/∂W) for positive weights (Kivinen and Warmuth 1997); negative ones move by their magnitude.

    Args:
        model: The network; no weight or bias of its layers may be zero.
        lr: The learning rate, > 0.
        options: Further arguments of `LocoProp`.
    """
    chosen = {"activation_lr": lr, "regularizer": RelativeEntropy(1.0), "solver": ProximalStep()}
    return _built("exponentiated_gradient", model, chosen, options)


_ONE_STEP = {"activation_lr": 1.0, "local_steps": 1}


def _steps(paper: bool) -> dict[str, Any]:
    return {} if paper else {"solver": FirstOrderSteps(local_rows=FAST_ROWS)}


def _normalized(
    recipe: str,
    model: nn.Module,
    lr: float,
    activation_lr: float,
    momentum: float,
    options: dict[str, Any],
    center: bool = False,
) -> LocoProp:
    """Targets at a distance of γ and steps on few rows, both of which follow the schedule."""
    solver = MomentumSteps(momentum=momentum, local_rows=FAST_ROWS, center=center)
    check_range("activation_lr", activation_lr, 0)
    if activation_lr > 1:
        raise ValueError(
            f"{recipe} takes an activation_lr of at most 1, the mean distance of the targets (about 0.02), "
            f"got {activation_lr:g}"
        )
    target = NormalizedTarget(follow_lr=True)
    chosen = {"lr": lr, "loss": "matching", "activation_lr": activation_lr, "target": target, "solver": solver}
    return _built(recipe, model, chosen, options)


def _built(recipe: str, model: nn.Module, chosen: dict[str, Any], options: dict[str, Any]) -> LocoProp:
    """The optimizer, unless the user chose otherwise what makes the recipe."""
    twice = sorted(chosen.keys() & options.keys())
    if twice:
        raise TypeError(f"recipes.{recipe} chooses {', '.join(twice)} itself; build LocoProp(...) for another choice")
    return LocoProp(model, **chosen, **options)
