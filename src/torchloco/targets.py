"""The target of a local problem: where a layer's prediction should go, given one forward and one backward pass.

A target is any callable that maps `LayerRows` to a tensor of shape (N, d_out). Targets made from the back-propagated
gradient say so by `gradient_scale`: with the loss they are made for, the residual at the old weights is known to be
that multiple of G, so that the first local gradient is the one autograd has computed already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from torchloco.losses import Loss, MatchingLoss, SquaredLoss
from torchloco.transfers import Transfer


@dataclass
class LayerRows:
    """What one forward and one backward pass left at a layer, as a matrix problem.

    Args:
        name: The layer's name in the model.
        x: X, the rows that entered, (N, d_in).
        a: A = X Wᵀ + b, the pre-activations at the old weights, (N, d_out).
        g: G = ∂L/∂A, the network loss's gradient at the pre-activations, (N, d_out); a mean's 1/N is in it.
        transfer: The layer's transfer function f.
        activation_lr: γ, the activation learning rate.
    """

    name: str
    x: Tensor
    a: Tensor
    g: Tensor
    transfer: Transfer
    activation_lr: float

    @cached_property
    def y(self) -> Tensor:
        """Y = f(A), the post-activations, (N, d_out)."""
        return self.transfer.apply_(self.a.clone())


TargetRule = Callable[[LayerRows], Tensor]


class Target:
    """Base of the targets made from the back-propagated gradient."""

    #: The loss whose residual at the old weights is `gradient_scale` · G for this target.
    loss: type[Loss]

    def __call__(self, rows: LayerRows) -> Tensor:
        """The target T, of shape (N, d_out)."""
        raise NotImplementedError

    def gradient_scale(self, rows: LayerRows) -> float:
        """γ: what G is multiplied by in T."""
        return rows.activation_lr

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class GradientTarget(Target):
    """T = A - γG, one gradient-descent step on the pre-activations; goes with `SquaredLoss` (LocoProp-S)."""

    loss = SquaredLoss

    def __call__(self, rows: LayerRows) -> Tensor:
        """A - γG."""
        return rows.a.sub(rows.g, alpha=self.gradient_scale(rows))


class MirrorTarget(Target):
    """T = f(A) - γG, one mirror-descent step; goes with `MatchingLoss` (LocoProp-M).

    The gradient at the PRE-activation is subtracted from the post-activation: a step in the dual space of F.
    """

    loss = MatchingLoss

    def __call__(self, rows: LayerRows) -> Tensor:
        """f(A) - γG."""
        y = rows.transfer.apply_(rows.a.clone())  # not the cached rows.y, so that it can be overwritten
        return y.sub_(rows.g, alpha=self.gradient_scale(rows))


def known_gradient_scale(rows: LayerRows, loss: Loss, target: TargetRule) -> float | None:
    """S where the residual at the old weights is s·G by construction, None where it must be computed.

    True for each gradient-made target with its own loss; with the identity transfer the squared and the matching loss
    are the same, and so are their targets.
    """
    if not isinstance(target, Target):
        return None
    made_for_it = type(loss) is target.loss
    same_for_identity = rows.transfer.name == "identity" and {type(loss), target.loss} <= {SquaredLoss, MatchingLoss}
    return target.gradient_scale(rows) if made_for_it or same_for_identity else None
