"""Steps of momentum in a diagonal metric that is renewed once per mini-batch: RMSProp at half the traffic of memory."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from torchloco.checks import check_range
from torchloco.problem import Gradients
from torchloco.rmsprop import RMSProp
from torchloco.solvers import Task
from torchloco.steps import SCHEDULES, FirstOrderSteps, Schedule


class MomentumSteps(FirstOrderSteps):
    """T steps of `RMSProp` with lr outside its momentum, its mean square renewed by the first gradient alone::

        v ← decay · v + (1 - decay) · ∇J(W)²            once per mini-batch; v starts at ones
        m ← momentum · m + factor_j · ∇J(W̃) / √(v + epsilon)
        W̃ ← W̃ - lr · m                                 T times

    Within a mini-batch the metric √(v + epsilon) is fixed, so that m · √(v + epsilon) is a sum of plain gradients, to
    which a matrix product can add the next one. On few rows of a linear layer, in the weights' dtype and without a
    regularizer, no gradient is written to memory then: a step reads and writes the weights' size 10 times where RMSProp
    needs 22, and that is most of what such steps cost.

    v has seen the gradients over all rows only. Those on few rows are larger by their noise, so lr wants to be lower
    than RMSProp's, by about a third on 48 rows; and as one gradient in T enters v, it wants a longer memory. RMSProp's
    v grows with the gradients of steps that are too long; this one knows nothing of them within a mini-batch, so that
    four times the best lr may diverge, at which RMSProp still trains.

    Args:
        steps: T, >= 1; None takes the layer's `local_steps`.
        schedule: factor_j; see `FirstOrderSteps`. As there with `RMSProp(lr_outside=True)`, it leaves the steps under
            way as they are.
        momentum: Of the steps, over mini-batches, in (0, 1).
        decay: Of v per mini-batch, in [0, 1).
        epsilon: Added to v inside the root, > 0; its unit is that of a squared gradient.
        local_rows: How many rows each step after the first looks at; see `FirstOrderSteps`.
        local_dtype: Of the products over the rows in those steps; see `FirstOrderSteps`.
        keep_state: Whether v and m persist over mini-batches, or start anew with each; then a small decay is wanted, as
            v has but one gradient to learn from.

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
            keep_state=keep_state,
            lr_outside=True,
            **options,
        )

    @property
    def name(self) -> str:
        """What a saved state belongs to."""
        return "MomentumSteps"

    def _descend(self, task: Task) -> None:
        if any(p.dtype == torch.float16 for p in task.params):  # it has not the range for sums of plain gradients
            return super()._descend(task)
        steps, problem = self.steps or task.steps, task.problem
        sampled = self._sampled(problem, steps - 1)
        further = None if sampled is not None else self._further(problem, steps - 1)
        first = problem.first_gradient()
        averages = self._renewed(task, first)
        momentum = self.options["momentum"]
        roots = [self._inverse_root(v) for v, _ in averages]
        sums: list[Tensor] = []
        try:
            for (_, m), root in zip(averages, roots, strict=True):
                sums.append(m.div_(root))  # a sum of plain gradients, until the end
            for j in range(steps):
                factor = self.schedule(j, steps)
                if j and sampled is not None:
                    sampled.add_(sums, task.values, j, momentum, factor)
                else:
                    gradients = first if further is None or not j else further(task.values, j)
                    for total, gradient in zip(sums, gradients, strict=True):
                        total.mul_(momentum).add_(gradient, alpha=factor)
                for p, root, total, lr in zip(task.params, roots, sums, task.lrs, strict=True):
                    p.addcmul_(root, total, value=-float(lr))
        finally:  # also where a step was interrupted: m has its own unit again
            for total, root in zip(sums, roots, strict=False):
                total.mul_(root)

    def _step(self, task: Task, gradients: Gradients, j: int, shrink: float = 1.0) -> None:
        """A step as it is written, for safe solves and where the other form has not the range."""
        fresh = not cast(RMSProp, task.inner).state[task.params[0]]  # also where a safe solve began anew
        averages = self._renewed(task, gradients) if j == 0 or fresh else self._averages(task)
        factor = self.schedule(j, self.steps or task.steps)
        for p, g, (v, m), lr in zip(task.params, gradients, averages, task.lrs, strict=True):
            m.mul_(self.options["momentum"]).addcmul_(g, self._inverse_root(v), value=factor)
            p.sub_(m, alpha=float(lr) * shrink)

    def _renewed(self, task: Task, gradients: Gradients) -> list[list[Tensor]]:
        averages, decay = self._averages(task), self.options["decay"]
        for (v, _), g in zip(averages, gradients, strict=True):
            v.mul_(decay).addcmul_(g, g, value=1 - decay)
        return averages

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
        if not self.keep_state:
            told.append("keep_state=False")
        return f"MomentumSteps({', '.join(told)})"
