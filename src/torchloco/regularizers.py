"""The regularizer of a local problem: what keeps the new weights near the old ones.

A regularizer is any object with `gradient(new, old)`; applied to a layer's weight and to its bias alike, as if
the bias were one more column of the weight.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from torchloco.checks import check_range


class Regularizer(Protocol):
    """What a solver asks of a regularizer."""

    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """∂/∂new, of the shape of `new`."""

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """The penalty, a scalar."""


class SquaredDistance:
    """(λ/2)‖W̃ - W‖²: the proximal term of ridge regression, K-FAC's damping.

    Args:
        strength: λ, > 0, in units of the eigenvalues of C = XᵀX (a sum over rows).

    Raises:
        TypeError: `strength` is not a number.
        ValueError: `strength` is not above 0.
    """

    def __init__(self, strength: float) -> None:
        check_range("strength", strength, 0)
        self.strength = float(strength)

    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """λ(W̃ - W)."""
        return (new - old).mul_(self.strength)

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """(λ/2)‖W̃ - W‖²."""
        return (new - old).square().sum() * (self.strength / 2)

    def __repr__(self) -> str:
        return f"SquaredDistance({self.strength:g})"
