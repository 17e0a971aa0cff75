"""The loss of a local problem: how far a layer's prediction is from its target, summed over rows.

A loss sees pre-activations A of shape (N, d_out), a target T of the same shape and the layer's transfer function. It
contributes its residual δ = ∂loss/∂A; the weight gradient is then δᵀX. Sums over rows, never means: the 1/N of a mean
network loss is in the target already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from torchloco.transfers import Transfer


def total(t: Tensor) -> Tensor:
    """The sum of all entries, in float64 where the device has it: differences of local losses are small."""
    return t.sum() if t.device.type == "mps" else t.sum(dtype=torch.float64)


class Loss(ABC):
    """The loss of a local problem. A loss of your own needs `residual`; `value` if its values are to be reported."""

    name: str = "loss"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "residual" in cls.__dict__ and "residual_" not in cls.__dict__:
            cls.residual_ = Loss.residual_  # type: ignore[method-assign]  # not one of another residual

    @abstractmethod
    def residual(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """δ = ∂loss/∂A, of shape (N, d_out)."""

    def residual_(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """The same, free to use the memory of `a` for it."""
        return self.residual(a, target, transfer)

    def value(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """The loss, a scalar: the sum over rows and units."""
        raise NotImplementedError(f"{type(self).__name__} has no value(); define it to report or compare local losses")

    def suits(self, transfer: Transfer) -> bool:
        """Whether the local problem is well posed with this transfer function."""
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class SquaredLoss(Loss):
    """½‖A - T‖² on pre-activations: δ = A - T. With `GradientTarget` this is LocoProp-S (paper, section 3)."""

    name = "squared"

    def residual(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """A - T."""
        return a - target

    def residual_(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """A - T, written over `a`."""
        return a.sub_(target)

    def value(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """½‖A - T‖²."""
        return total((a - target).square()) / 2


class MatchingLoss(Loss):
    """The Bregman divergence of the convex integral F of the transfer function f (paper, section 4).

    D = F(A) + F*(T) - T·A, so δ = f(A) - T. It is convex in the weights for every non-decreasing f and needs neither f′
    nor f⁻¹. With `MirrorTarget` this is LocoProp-M.
    """

    name = "matching"

    def residual(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """f(A) - T."""
        return transfer(a) - target

    def residual_(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """f(A) - T, written over `a` where f can be."""
        return transfer.apply_(a).sub_(target)

    def value(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """F(A) + F*(T) - T·A.

        Targets may leave the range of f; there F* is infinite and the value omits it, as it does where F* is not known.
        The value then is the divergence less a constant: it still falls when the divergence falls.

        Raises:
            ValueError: The integral of this transfer is not known.
        """
        if transfer.integral is None:
            raise ValueError(
                f"the convex integral of transfer {transfer.name!r} is not known, so its matching loss has no value; "
                "give Transfer(integral=...)"
            )
        integral = transfer.integral(a)
        by_entry = integral.shape == a.shape  # the differences are smaller than the sums
        value = total(integral - target * a) if by_entry else total(integral) - total(target * a)
        if transfer.conjugate is not None:
            value += total(torch.nan_to_num(transfer.conjugate(target), nan=0.0, posinf=0.0))
        return value

    def suits(self, transfer: Transfer) -> bool:
        """Only a monotone transfer has a convex matching loss."""
        return transfer.monotone


class PostActivationLoss(Loss):
    """½‖f(A) - T‖² on post-activations: δ = (f(A) - T)·f′(A).

    The penalty of ProxProp's activation step (Frerix et al. 2018) and of target propagation. Not convex in general.
    """

    name = "post-activation"

    def residual(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """(f(A) - T)·f′(A)."""
        return transfer.vjp(a, transfer(a) - target)

    def value(self, a: Tensor, target: Tensor, transfer: Transfer) -> Tensor:
        """½‖f(A) - T‖²."""
        return total((transfer(a) - target).square()) / 2
