"""How a local problem is solved. A solver changes a layer's parameters in place and knows nothing of hooks."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.losses import Loss
from torchloco.problem import LocalProblem
from torchloco.regularizers import Regularizer
from torchloco.rmsprop import RMSProp

Schedule = Callable[[int, int], float]
"""The factor on the learning rate of local step j of T, j = 0 … T-1."""


def linear_with_floor(j: int, steps: int) -> float:
    """max(1 - j/T, 0.25), the authors' schedule."""
    return max(1 - j / steps, 0.25)


def constant(j: int, steps: int) -> float:
    """1 in every local step."""
    return 1.0


def cosine(j: int, steps: int) -> float:
    """Half a cosine, from 1 at the first local step towards 0 after the last."""
    return (1 + math.cos(math.pi * j / steps)) / 2


SCHEDULES: dict[str, Schedule] = {"linear": linear_with_floor, "constant": constant, "cosine": cosine}


def refuse_closure(optimizer: Any) -> None:
    """Raise for an optimizer class whose step needs a closure, as LBFGS does.

    Raises:
        TypeError: It does.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"{optimizer.__name__}.step needs a closure, which cannot be given here; use another")


class Solver(ABC):
    """Solves local problems."""

    @property
    def name(self) -> str:
        """What a saved state belongs to."""
        return type(self).__name__

    def attach(self, params: list[Parameter], lr: float) -> Optimizer | None:
        """Called once per layer: the optimizer whose state goes with this layer's parameters, if there is one."""
        return None

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:  # noqa: B027 - most solvers take every problem
        """Refuse local problems that this solver cannot solve.

        Raises:
            ValueError: Names what is not supported and what to use instead.
        """

    @abstractmethod
    def solve(
        self,
        problem: LocalProblem,
        params: list[Parameter],
        inner: Optimizer | None,
        lrs: Sequence[float],
        steps: int,
    ) -> None:
        """Move `params` (weight, and bias if it is learnt) from the old values towards the problem's minimum.

        Args:
            problem: The local problem; its `weight` and `bias` are copies of the old values.
            params: The parameters, changed in place. Their `.grad` is as before when this returns.
            inner: What `attach` returned for this layer.
            lrs: The learning rate of each parameter.
            steps: T, the number of local steps.
        """


class ProximalStep(Solver):
    """W̃ = argmin ⟨∇, W̃⟩ + R(W̃, W) with ∇ the local loss's gradient at W: one step in the regularizer's geometry.

    With `SquaredDistance` it is a step of gradient descent, with `RelativeEntropy` an exponentiated-gradient step. `lr`
    and `local_steps` have no part in it: γ / λ is the step size. It costs no matrix product.
    """

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """The regularizer must have a closed proximal step."""
        if type(getattr(regularizer, "proximal", None)) is not MethodType or (
            isinstance(regularizer, Regularizer) and type(regularizer).proximal is Regularizer.proximal
        ):
            raise ValueError(
                f"ProximalStep needs a regularizer with a proximal step (SquaredDistance, RelativeEntropy), got "
                f"{regularizer!r}; use FirstOrderSteps with it"
            )

    def solve(
        self,
        problem: LocalProblem,
        params: list[Parameter],
        inner: Optimizer | None,
        lrs: Sequence[float],
        steps: int,
    ) -> None:
        """Take the step; see `Solver.solve`."""
        assert problem.regularizer is not None
        for p, gradient in zip(params, problem.first_gradient(regularized=False), strict=True):
            p.copy_(problem.regularizer.proximal(gradient, p.data))

    def __repr__(self) -> str:
        return "ProximalStep()"


class FirstOrderSteps(Solver):
    """T steps of a first-order optimizer on the local problem, the paper's solver.

    The gradient of the first step is the one that autograd computed; each further step costs two matrix products over
    the rows, 4·N·d_in·d_out multiply-adds counted as two operations each. The squared loss takes its gradients from
    C = XᵀX wherever that is cheaper; the result is the same to rounding.

    Args:
        optimizer: A `torch.optim.Optimizer` class, or any callable `(param_groups, lr=...)` that returns an optimizer.
            Its state persists over mini-batches. Default: the authors' `RMSProp`, with momentum 0.999, decay 0.9 and
            epsilon 1e-5.
        schedule: Factor on lr in local step j of T: "linear" (max(1 - j/T, 0.25), the authors'), "constant", "cosine",
            or a callable (j, T) → factor.
        options: Further arguments of the optimizer, such as `momentum=0.9`.

    Raises:
        TypeError: `optimizer` or `schedule` is not callable, or the optimizer needs a closure, as LBFGS does.
        ValueError: No schedule of that name.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] | None = None,
        *,
        schedule: str | Schedule = "linear",
        **options: Any,
    ) -> None:
        if optimizer is None:
            optimizer, options = RMSProp, {"momentum": 0.999, "decay": 0.9, "epsilon": 1e-5, **options}
        if not callable(optimizer) or isinstance(optimizer, Optimizer):
            raise TypeError(
                f"the inner optimizer must be a torch.optim class or a factory (param_groups, lr=...) → Optimizer, got "
                f"{type(optimizer).__name__}; the layers' parameters are given to it when it is attached"
            )
        refuse_closure(optimizer)
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(
                f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}, or a callable (j, T) → factor"
            )
        if not (isinstance(schedule, str) or callable(schedule)):
            raise TypeError(f"schedule must be a name or a callable (j, T) → factor, got {type(schedule).__name__}")
        self.optimizer = optimizer
        self.options = options
        self.schedule: Schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule

    @property
    def name(self) -> str:
        """Names the inner optimizer too, since the saved state is its own."""
        return f"FirstOrderSteps of {getattr(self.optimizer, '__name__', 'a factory')}"

    def attach(self, params: list[Parameter], lr: float) -> Optimizer:
        """An inner optimizer with one group per parameter, since weight and bias may differ in lr."""
        inner = self.optimizer([{"params": [p]} for p in params], lr=lr, **self.options)
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"the inner optimizer's factory returned {type(inner).__name__}, not a torch.optim.Optimizer"
            )
        return inner

    def solve(
        self,
        problem: LocalProblem,
        params: list[Parameter],
        inner: Optimizer | None,
        lrs: Sequence[float],
        steps: int,
    ) -> None:
        """Take T steps; see `Solver.solve`."""
        assert inner is not None  # attach() always returns one
        further = problem.gram_gradient if problem.prefers_gram(steps - 1) else problem.gradient
        users = [p.grad for p in params]
        try:
            for j in range(steps):
                gradients = problem.first_gradient() if j == 0 else further([p.data for p in params])
                for p, g, group, lr in zip(params, gradients, inner.param_groups, lrs, strict=True):
                    p.grad = g
                    group["lr"] = lr * self.schedule(j, steps)
                inner.step()
        finally:
            for p, grad in zip(params, users, strict=True):
                p.grad = grad

    def __repr__(self) -> str:
        name = getattr(self.optimizer, "__name__", repr(self.optimizer))
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return f"FirstOrderSteps({name}{options}, schedule={getattr(self.schedule, '__name__', self.schedule)})"
