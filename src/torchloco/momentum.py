"""Steps of momentum in a diagonal metric that is renewed once per mini-batch: at less than half RMSProp's traffic."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from torchloco.checks import check_range
from torchloco.problem import Gradients
from torchloco.rmsprop import RMSProp
from torchloco.solvers import Task
from torchloco.steps import SCHEDULES, FirstOrderSteps, Schedule

_SMALLEST_UNIT = 1e-3
"""Below it what is kept of the momentum is scaled anew, before it grows out of its dtype's range; float16 has none."""


class MomentumSteps(FirstOrderSteps):
    """T steps with Adam's two averages, of which the mean square is renewed once per mini-batch, by the last gradient::

        m ← momentum · m + factor_j · ∇J(W̃)
        W̃ ← W̃ - lr · m / √(v + epsilon)                T times
        v ← decay · v + (1 - decay) · ∇J(W̃)²           once, with the gradient of the last step; v starts at ones

    Within a mini-batch v is fixed and m a sum of plain gradients, to which a matrix product can add the next one. On
    few rows of a linear layer, in the weights' dtype and without a regularizer, no gradient but the last is written to
    memory then: a step reads and writes the weights' size 10 times where `RMSProp` needs 22, and that is much of what
    such steps cost.

    The last gradient is that of few rows and of weights that have moved: v grows with the noise of the rows and with
    steps that are too long, if only for the next mini-batch. lr is on `RMSProp`'s scale, and wants to be about twice as
    high on 48 rows. As one gradient in T enters v, it wants a longer memory than RMSProp's.

    Args:
        steps: T, >= 1; None takes the layer's `local_steps`.
        schedule: factor_j; see `FirstOrderSteps`. It leaves the steps under way as they are; lr rescales them.
        momentum: Of the steps, over mini-batches, in (0, 1). What is kept is the mean (1 - momentum) · m.
        decay: Of v per mini-batch, in [0, 1).
        epsilon: Added to v inside the root, > 0; its unit is that of a squared gradient.
        local_rows: How many rows each step after the first looks at; see `FirstOrderSteps`.
        local_dtype: Of the products over the rows in those steps; see `FirstOrderSteps`.
        center: Whether inputs are taken relative to their mean; see `FirstOrderSteps`.
        keep_state: Whether v and m persist over mini-batches; otherwise v is always one.

    In a safe solve (`LocoProp(safe=True)`) v takes in the gradient at the weights where it ends. v and the mean have
    the weights' dtype: in bfloat16 a mean of momentum 0.998 does not decay, in float16 gradients below 1e-4 are lost in
    it. Keep the weights in float32 and use autocast.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: It is out of range.
    """

    def __init__(
        self,
        steps: int | None = None,
        schedule: str | Schedule = "linear",
        *,
        momentum: float = 0.998,
        decay: float = 0.98,
        epsilon: float = 1e-5,
        local_rows: float = 1.0,
        local_dtype: torch.dtype | None = None,
        center: bool = False,
        keep_state: bool = True,
    ) -> None:
        check_range("momentum", momentum, 0, 1)
        check_range("decay", decay, 0, 1, inclusive=True)
        check_range("epsilon", epsilon, 0)
        options = {"momentum": float(momentum), "decay": float(decay), "epsilon": float(epsilon)}
        super().__init__(
            RMSProp,
            steps,
            schedule,
            local_rows=local_rows,
            local_dtype=local_dtype,
            center=center,
            keep_state=keep_state,
            **options,
        )

    @property
    def name(self) -> str:
        """What a saved state belongs to."""
        return f"MomentumSteps{self._coordinates}"

    def _descend(self, task: Task) -> Gradients:
        steps, problem, momentum = self.steps or task.steps, task.problem, self.options["momentum"]
        sampled = self._sampled(problem, steps - 1)
        if sampled is None:
            return self._renew(task, super()._descend(task))
        averages = self._averages(task)
        means, roots = [m for _, m in averages], [self._inverse_root(v) for v, _ in averages]
        unit = 1.0  # m is means · unit, so that a step need not shrink them
        smallest = 1.0 if any(mean.dtype == torch.float16 for mean in means) else _SMALLEST_UNIT
        try:
            for j in range(steps):
                factor = self.schedule(j, steps)
                unit *= momentum
                if unit < smallest:
                    means, unit = [mean.mul_(unit) for mean in means], 1.0
                alpha = (1 - momentum) * factor / unit
                if j < steps - 1:
                    sampled.add_(means, task.values, j, alpha)
                else:
                    gradients = sampled.gradient(task.values, j) if j else problem.first_gradient()
                    for mean, gradient in zip(means, gradients, strict=True):
                        mean.add_(gradient, alpha=alpha)
                for p, root, mean, lr in zip(task.params, roots, means, task.lrs, strict=True):
                    p.addcmul_(root, mean, value=-float(lr) * unit / (1 - momentum))
        finally:  # also where a step was interrupted
            for mean in means:
                mean.mul_(unit)
        return self._renew(task, gradients)

    def _descend_safely(self, task: Task) -> Gradients:
        return self._renew(task, super()._descend_safely(task))

    def _step(self, task: Task, gradients: Gradients, j: int, shrink: float = 1.0) -> None:
        momentum, factor = self.options["momentum"], self.schedule(j, self.steps or task.steps)
        for p, g, (v, m), lr in zip(task.params, gradients, self._averages(task), task.lrs, strict=True):
            m.mul_(momentum).add_(g, alpha=(1 - momentum) * factor)
            p.addcmul_(self._inverse_root(v), m, value=-float(lr) * shrink / (1 - momentum))

    def _renew(self, task: Task, last: Gradients) -> Gradients:
        """Let v take in the last gradients."""
        decay = self.options["decay"]
        for (v, _), g in zip(self._averages(task), last, strict=True):
            v.mul_(decay).addcmul_(g, g, value=1 - decay)
        return last

    def _averages(self, task: Task) -> list[list[Tensor]]:
        """Of each parameter, v and m."""
        return [cast(RMSProp, task.inner).averages(p) for p in task.params]

    def _inverse_root(self, v: Tensor) -> Tensor:
        return torch.add(v, self.options["epsilon"]).rsqrt_()

    def __repr__(self) -> str:
        told = [] if self.steps is None else [f"steps={self.steps}"]
        if self.schedule is not SCHEDULES["linear"]:
            told.append(f"schedule={getattr(self.schedule, '__name__', self.schedule)}")
        told += [f"{name}={self.options[name]!r}" for name in ("momentum", "decay", "epsilon")]
        if self.local_rows != 1.0:
            told.append(f"local_rows={self.local_rows:g}")
        if self.local_dtype is not None:
            told.append(f"local_dtype={self.local_dtype}")
        if self.center:
            told.append("center=True")
        if not self.keep_state:
            told.append("keep_state=False")
        return f"MomentumSteps({', '.join(told)})"
