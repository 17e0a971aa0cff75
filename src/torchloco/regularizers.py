"""The regularizer of a local problem: what keeps the new weights near the old ones.

A regularizer is applied to a layer's weight and to its bias alike, as if the bias were one more column of the weight.
Any object with `gradient(new, old)` will do; those that derive from `Regularizer` can be added with `+`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from torchloco.checks import check_range


class Regularizer(ABC):
    """A penalty R(W̃, W) on the new weights W̃, given the old ones W. Yours needs `gradient`."""

    #: λ, where the second derivative of R is λ times the identity everywhere; None where it is not or is not known.
    curvature: float | None = None

    @abstractmethod
    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """∂R/∂W̃, of the shape of `new`."""

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """R, a scalar."""
        raise NotImplementedError(
            f"{type(self).__name__} has no value(); define it to report or compare local objectives"
        )

    def proximal(self, gradient: Tensor, old: Tensor) -> Tensor:
        """The W̃ that minimises ⟨gradient, W̃⟩ + R(W̃, W): one step of mirror descent in R's geometry."""
        raise NotImplementedError(f"{type(self).__name__} has no closed proximal step; use FirstOrderSteps with it")

    def __add__(self, other: Regularizer) -> Regularizer:
        return Sum(self, other)

    def __radd__(self, other: Any) -> Regularizer:
        return self if type(other) is int and other == 0 else Sum(other, self)  # 0: where sum() starts


class Sum(Regularizer):
    """The sum of regularizers, as `a + b` makes it; one of the two may be any object with `gradient(new, old)`.

    Raises:
        TypeError: A term without a gradient.
    """

    def __init__(self, *terms: Regularizer) -> None:
        self.terms: tuple[Regularizer, ...] = tuple(
            t for term in terms for t in (term.terms if isinstance(term, Sum) else (term,))
        )
        for term in self.terms:
            check_regularizer(term)

    @property
    def curvature(self) -> float | None:  # type: ignore[override]
        """The sum of the terms' curvatures, if all are known."""
        curvatures = [getattr(term, "curvature", None) for term in self.terms]
        return None if None in curvatures else sum(c for c in curvatures if c is not None)

    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """The sum of the terms' gradients."""
        return torch.stack([term.gradient(new, old) for term in self.terms]).sum(0)

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """The sum of the terms' values."""
        return torch.stack([term.value(new, old) for term in self.terms]).sum()

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms))


def check_regularizer(regularizer: Any) -> None:
    """Raise unless this is an object with a gradient.

    Raises:
        TypeError: It is not.
    """
    if isinstance(regularizer, type) or not callable(getattr(regularizer, "gradient", None)):
        raise TypeError(f"regularizer must be an object with a method gradient(new, old), got {regularizer!r}")


class _Scaled(Regularizer):
    """A regularizer with a strength λ.

    Args:
        strength: λ, > 0. The local loss is a sum over rows, so λ is in units of the eigenvalues of C = XᵀX.

    Raises:
        TypeError: `strength` is not a number.
        ValueError: `strength` is not above 0.
    """

    def __init__(self, strength: float) -> None:
        check_range("strength", strength, 0)
        self.strength = float(strength)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.strength:g})"


class _Ridge(_Scaled):
    """A regularizer whose second derivative is λ times the identity."""

    @property
    def curvature(self) -> float:  # type: ignore[override]
        """λ."""
        return self.strength


class SquaredDistance(_Ridge):
    """(λ/2)‖W̃ - W‖²: the proximal term of ridge regression, K-FAC's damping."""

    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """λ(W̃ - W)."""
        return (new - old).mul_(self.strength)

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """(λ/2)‖W̃ - W‖²."""
        return (new - old).square().sum() * (self.strength / 2)

    def proximal(self, gradient: Tensor, old: Tensor) -> Tensor:
        """W - gradient / λ, a step of gradient descent."""
        return old - gradient / self.strength


class WeightDecay(_Ridge):
    """(λ/2)‖W̃‖², which pulls towards zero and not towards the old weights."""

    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """λW̃."""
        return new * self.strength

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """(λ/2)‖W̃‖²."""
        return new.square().sum() * (self.strength / 2)


class RelativeEntropy(_Scaled):
    """`λ Σ (|w̃| log(|w̃|/|w|) - |w̃| + |w|)`, the Bregman divergence of the negative entropy.

    Meant for positive weights; of negative ones it takes the magnitudes. Its proximal step is the exponentiated
    gradient (Kivinen and Warmuth 1997), which changes no sign. A weight at zero could never move, and is refused.
    """

    def gradient(self, new: Tensor, old: Tensor) -> Tensor:
        """`λ sign(w) log(|w̃|/|w|)`."""
        return (new / self._nonzero(old)).abs().log().mul_(old.sign()).mul_(self.strength)

    def value(self, new: Tensor, old: Tensor) -> Tensor:
        """`λ Σ (|w̃| log(|w̃|/|w|) - |w̃| + |w|)`."""
        ratio = (new / self._nonzero(old)).abs()
        terms: Tensor = (torch.special.xlogy(ratio, ratio) - ratio + 1) * old.abs()
        return terms.sum() * self.strength

    def proximal(self, gradient: Tensor, old: Tensor) -> Tensor:
        """W · exp(-sign(W) · gradient / λ)."""
        factor: Tensor = torch.exp(gradient * old.sign() / -self.strength)
        new = self._nonzero(old) * factor
        least = torch.finfo(new.dtype).tiny  # what underflows could never move again
        return torch.where(new.abs() < least, old.sign() * least, new)

    def _nonzero(self, old: Tensor) -> Tensor:
        if not bool(old.all()):
            raise ValueError(
                "RelativeEntropy cannot move weights and biases that are zero, got some that are; initialise them "
                "otherwise, or use SquaredDistance"
            )
        return old
