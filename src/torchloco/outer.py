"""What is done with a layer's displacement W̃ - W after its local problem is solved."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.checks import check_range
from torchloco.steps import refuse_closure


class OuterRule(ABC):
    """Turns displacements into updates. Yours needs `apply`; without a rule a displacement is applied as it is."""

    @property
    def name(self) -> str:
        """What a saved state belongs to."""
        return type(self).__name__

    def attach(self, params: list[Parameter]) -> list[Optimizer]:
        """Called once per layer: the optimizers whose state goes with this layer's parameters, if there are any."""
        return []

    @abstractmethod
    def apply(self, params: list[Parameter], old: Sequence[Tensor], outers: list[Optimizer], scale: float) -> None:
        """Replace the solved values in `params` by the new weights.

        Args:
            params: A layer's weight, and bias if it is learnt, at the values W̃ that the solver found.
            old: Their old values W.
            outers: What `attach` returned for this layer.
            scale: What a scheduler has made of the layer's lr since it was given, as a factor of at most 1.
        """


class Bounded(OuterRule):
    """Shortens a layer's displacement to at most `ratio` times the norm of its weights, weight and bias taken together.

    Args:
        ratio: Largest ‖W̃ - W‖ / ‖W‖, > 0; in Frobenius norms.
        floor: ‖W‖ counts as at least this, per root of the number of entries, so that weights at zero can move; > 0.

    Raises:
        TypeError: An argument is not a number.
        ValueError: It is not above 0.
    """

    def __init__(self, ratio: float = 0.01, *, floor: float = 1e-3) -> None:
        check_range("ratio", ratio, 0)
        check_range("floor", floor, 0)
        self.ratio = float(ratio)
        self.floor = float(floor)

    def apply(self, params: list[Parameter], old: Sequence[Tensor], outers: list[Optimizer], scale: float) -> None:
        """Shorten; see `OuterRule.apply`."""
        moved = _norm([p - w for p, w in zip(params, old, strict=True)])
        least = self.floor * float(sum(p.numel() for p in params)) ** 0.5
        limit = self.ratio * max(_norm(old), least)
        if moved > limit:
            for p, w in zip(params, old, strict=True):
                p.copy_(torch.lerp(w, p, limit / moved))

    def __repr__(self) -> str:
        return f"Bounded({self.ratio:g})"


class OuterOptimizer(OuterRule):
    """Hands W - W̃ as a gradient to an optimizer, which moves the old weights. A scheduler of lr scales its lr, too.

    With SGD at lr=1 the displacement is applied as it is.

    Args:
        optimizer: A `torch.optim.Optimizer` class such as AdamW or Muon, or any callable `(params, **options)`.
        biases: The same for the biases; default: `optimizer`, or AdamW where that is `torch.optim.Muon`, which takes
            matrices only: the weights of convolutions then go to AdamW as well.
        bias_options: Options of `biases` where they are another optimizer.
        options: Options of `optimizer`, such as `lr=0.02`.

    Raises:
        TypeError: Not callable, or an optimizer whose step needs a closure.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        *,
        biases: Callable[..., Optimizer] | None = None,
        bias_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        for given in (optimizer, biases):
            if given is not None and (not callable(given) or isinstance(given, Optimizer)):
                raise TypeError(
                    "the outer optimizer must be a torch.optim class or a factory (params, **options) → Optimizer, got "
                    f"{type(given).__name__}"
                )
            refuse_closure(given)
        self._matrices_only = optimizer is getattr(torch.optim, "Muon", None)
        if biases is None and self._matrices_only:
            biases = torch.optim.AdamW
        self.optimizer, self.options = optimizer, dict(options)
        self.biases, self.bias_options = biases, dict(bias_options or {})

    @property
    def name(self) -> str:
        """Names the optimizers too, since the saved state is their own."""
        names = [getattr(make, "__name__", "a factory") for make in (self.optimizer, self.biases) if make is not None]
        return f"OuterOptimizer of {' and '.join(names)}"

    def attach(self, params: list[Parameter]) -> list[Optimizer]:
        """One optimizer for all of them, or one for the weight and one for the bias."""
        if self.biases is None:
            made = [self.optimizer(params, **self.options)]
        else:
            first = 0 if self._matrices_only and params[0].dim() != 2 else 1
            made = [self.optimizer(params[:1], **self.options)] if first else []
            if len(params) > first:
                made.append(self.biases(params[first:], **self.bias_options))
        for outer in made:
            if not isinstance(outer, Optimizer):
                raise TypeError(f"the outer optimizer's factory returned {type(outer).__name__}, not an Optimizer")
        return made

    def apply(self, params: list[Parameter], old: Sequence[Tensor], outers: list[Optimizer], scale: float) -> None:
        """Take the optimizers' step from the old weights; see `OuterRule.apply`."""
        users = [p.grad for p in params]
        groups = [group for outer in outers for group in outer.param_groups]
        rates = [group["lr"] for group in groups]
        try:
            for p, w in zip(params, old, strict=True):
                p.grad = w - p.detach()
                p.copy_(w)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * scale
            for outer in outers:
                outer.step()
        finally:
            for p, grad in zip(params, users, strict=True):
                p.grad = grad
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def __repr__(self) -> str:
        parameters = inspect.signature(self.optimizer).parameters
        lr = {"lr": parameters["lr"].default} if "lr" in parameters and "lr" not in self.options else {}
        options = "".join(f", {key}={value!r}" for key, value in {**lr, **self.options}.items())
        biases = "" if self.biases is None else f", biases={getattr(self.biases, '__name__', self.biases)}"
        return f"OuterOptimizer({getattr(self.optimizer, '__name__', self.optimizer)}{options}{biases})"


def resolve_outer(outer: Any) -> OuterRule | None:
    """The given rule; `OuterOptimizer` of a torch.optim class or factory; None for none.

    Raises:
        TypeError: Something else.
    """
    if outer is None or isinstance(outer, OuterRule):
        return outer
    if (
        isinstance(outer, Optimizer)
        or not callable(outer)
        or (isinstance(outer, type) and issubclass(outer, OuterRule))
    ):
        raise TypeError(f"outer must be an OuterRule such as Bounded(0.01), or a torch.optim class, got {outer!r}")
    return OuterOptimizer(outer)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(t.norm()) for t in tensors))
