"""The paper's solver: steps of a first-order optimizer on the local problem."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchloco.centering import centered
from torchloco.checks import check_count, check_range
from torchloco.losses import Loss
from torchloco.problem import Gradients, LocalProblem, Size
from torchloco.regularizers import Regularizer
from torchloco.rmsprop import RMSProp
from torchloco.sampling import SampledGradients
from torchloco.solvers import Solver, Task

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

_NO_LONGER_FALLS = 1e-4
"""A step whose fall is below this share of the whole fall so far is the last one of a safe solve."""


def check_rows(rows: float) -> float:
    """The given fraction or number of rows: a float in (0, 1], or an int of at least 1.

    Raises:
        TypeError: Not a number.
        ValueError: Out of range.
    """
    if isinstance(rows, int) and not isinstance(rows, bool) and rows != 1:
        check_count("local_rows", rows)
        return rows
    check_range("local_rows", rows, 0)
    if rows > 1:
        raise ValueError(f"local_rows must be a fraction in (0, 1] or a whole number of rows, got {rows!r}")
    return float(rows)


def refuse_closure(optimizer: Any) -> None:
    """Raise for an optimizer class whose step needs a closure, as LBFGS does.

    Raises:
        TypeError: It does.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise TypeError(f"{optimizer.__name__}.step needs a closure, which cannot be given here; use another")


class FirstOrderSteps(Solver):
    """T steps of a first-order optimizer on the local problem, the paper's solver.

    The gradient of the first step is the one that autograd computed; each further step costs two matrix products over
    the rows, 2·N·d_in·d_out multiply-adds. Squared losses take their gradients from C = XᵀX wherever that is cheaper;
    the result is the same to rounding.

    In a safe solve (`LocoProp(safe=True)`) the local objective is followed: a step that lets it rise is taken back and
    the rest are half as long, the solve ends when it no longer falls, and the best weights seen are kept.

    Args:
        optimizer: A `torch.optim.Optimizer` class, or any callable `(param_groups, lr=...)` that returns an optimizer.
            Default: the authors' `RMSProp`, with momentum 0.999, decay 0.9 and epsilon 1e-5.
        steps: T, >= 1; None takes the layer's `local_steps`.
        schedule: Factor on lr in local step j of T: "linear" (max(1 - j/T, 0.25), the authors'), "constant", "cosine",
            or a callable (j, T) → factor. With `RMSProp(lr_outside=True)` it is one on the step's gradient, and leaves
            the steps under way as they are.
        local_rows: How many rows each step after the first looks at: a fraction in (0, 1] or a whole number of rows.
            The batch is cut into parts of about that size, which the steps take in turn. The first step's gradient is
            that of all rows, and the others only estimate how it has changed since; their mean is unchanged. A safe
            solve looks at all rows, in the weights' precision.
        local_dtype: Of the products over the rows in those steps, such as torch.bfloat16; default: the weights' own.
            Weights, averages and pre-activations keep theirs.
        center: Whether layers with a bias take their inputs relative to the mini-batch's mean μ, and b̃ + W̃ μ as the
            bias: the same local problem without the part of its curvature that the mean makes, which allows larger
            steps. One plain step is then no longer back-propagation's. Layers without a bias, and attention whose
            queries and keys differ in number, are as they are. Costs one or two passes over the weight per mini-batch.
            Keep the weights in float32 with it: b̃ + W̃ μ is rounded as they are, and may be much larger than b̃.
        keep_state: Whether the optimizer's state persists over mini-batches, as in the paper, or starts anew with each.
        options: Further arguments of the optimizer, such as `momentum=0.9`.

    Raises:
        TypeError: `optimizer` or `schedule` is not callable, the optimizer needs a closure, as LBFGS does, `steps`
            is no whole number, or `center` no bool.
        ValueError: No schedule of that name; `steps` is below 1.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] | None = None,
        steps: int | None = None,
        schedule: str | Schedule = "linear",
        *,
        local_rows: float = 1.0,
        local_dtype: torch.dtype | None = None,
        center: bool = False,
        keep_state: bool = True,
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
        if steps is not None:
            check_count("steps", steps)
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(
                f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}, or a callable (j, T) → factor"
            )
        if not (isinstance(schedule, str) or callable(schedule)):
            raise TypeError(f"schedule must be a name or a callable (j, T) → factor, got {type(schedule).__name__}")
        self.optimizer = optimizer
        self.steps = steps
        self.options = options
        self.schedule: Schedule = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self.local_rows = check_rows(local_rows)
        if local_dtype is not None and not (isinstance(local_dtype, torch.dtype) and local_dtype.is_floating_point):
            raise TypeError(
                f"local_dtype must be a floating-point torch.dtype such as torch.bfloat16, got {local_dtype!r}"
            )
        self.local_dtype = local_dtype
        if not isinstance(center, bool):
            raise TypeError(f"center must be True or False, got {center!r}")
        self.center = center
        self.keep_state = bool(keep_state)

    @property
    def name(self) -> str:
        """Names the inner optimizer too, since the saved state is its own, and where lr is: m is in units of that."""
        outside = " with lr outside" if self.options.get("lr_outside") else ""
        return f"FirstOrderSteps of {getattr(self.optimizer, '__name__', 'a factory')}{outside}{self._coordinates}"

    @property
    def _coordinates(self) -> str:
        """In which the state's gradients are, for `name`."""
        return " with centered inputs" if self.center else ""

    def check(self, loss: Loss, regularizer: Regularizer | None) -> None:
        """Centered inputs and a regularizer do not go together: it would see another bias."""
        if self.center and regularizer is not None:
            raise ValueError(
                "center=True takes no regularizer, which would be about b̃ + W̃ μ instead of the bias, got "
                f"{regularizer!r}; leave one of the two out"
            )

    def attach(self, params: list[Parameter], lr: float) -> Optimizer:
        """An inner optimizer with one group per parameter, since weight and bias may differ in lr."""
        inner = self.optimizer([{"params": [p]} for p in params], lr=lr, **self.options)
        if not isinstance(inner, Optimizer):
            raise TypeError(
                f"the inner optimizer's factory returned {type(inner).__name__}, not a torch.optim.Optimizer"
            )
        return inner

    def solve(self, task: Task) -> None:
        """Take T steps; see `Solver.solve`."""
        assert task.inner is not None  # attach() always returns one
        if not self.keep_state:
            task.forget()
        users = [p.grad for p in task.params]
        try:
            with centered(task) if self.center else nullcontext(task) as own:
                (self._descend_safely if own.safe else self._descend)(own)
        finally:
            for p, grad in zip(task.params, users, strict=True):
                p.grad = grad

    def _descend(self, task: Task) -> Gradients:
        """All steps; returns the last one's gradients."""
        steps, problem = self.steps or task.steps, task.problem
        further = self._further(problem, steps - 1)
        for j in range(steps):
            gradients = problem.first_gradient() if j == 0 else further(task.values, j)
            self._step(task, gradients, j)
        return gradients

    def _further(self, problem: LocalProblem, count: int) -> Callable[[list[Tensor], int], Gradients]:
        """How the gradients after the first are computed, from the new weights and the number of the step."""
        sampled = self._sampled(problem, count)
        if sampled is not None:
            return sampled.gradient
        form = problem.gram_gradient if problem.size.prefers_gram(count) else problem.gradient
        return lambda new, j: form(new)

    def _sampled(self, problem: LocalProblem, count: int) -> SampledGradients | None:
        """The cheaper gradients, unless they are to be exact, or are so at no higher price."""
        size, own = problem.size, problem.weight.dtype
        parts = self._parts(size.n)
        gram = size.prefers_gram(count, parts)
        if self.local_dtype in (None, own) and (parts == 1 or gram):
            return None
        return SampledGradients(problem, parts, self.local_dtype or own, gram)

    def _parts(self, n: int) -> int:
        share = self.local_rows if isinstance(self.local_rows, float) else self.local_rows / max(1, n)
        return max(1, round(1 / share)) if share < 1 else 1

    def _descend_safely(self, task: Task) -> Gradients:
        """Steps that let the objective fall; returns the gradients at the weights where they end."""
        steps, problem = self.steps or task.steps, task.problem
        evaluate = _evaluation(problem, steps)
        value, gradients = evaluate(task.values)
        first = best = value
        kept, at_best = [p.clone() for p in task.values], [g.clone() for g in gradients]
        shrink = 1.0
        for j in range(steps):
            self._step(task, gradients, j, shrink)
            value, gradients = evaluate(task.values)
            if not value < best:  # also if it is not a number
                shrink /= 2
                if not math.isfinite(value):
                    task.forget()
                for p, old in zip(task.params, kept, strict=True):
                    p.copy_(old)
                gradients = [g.clone() for g in at_best]
                continue
            fall, best = best - value, value
            for source, target in zip([*task.values, *gradients], [*kept, *at_best], strict=True):
                target.copy_(source)
            if fall <= _NO_LONGER_FALLS * (first - best):
                break
        return at_best

    def _step(self, task: Task, gradients: Gradients, j: int, shrink: float = 1.0) -> None:
        assert task.inner is not None
        factor = self.schedule(j, self.steps or task.steps)
        for p, g, group, lr in zip(task.params, gradients, task.inner.param_groups, task.lrs, strict=True):
            p.grad = g
            if group.get("lr_outside", False):  # steps under way shrink, and know nothing of the schedule
                group["lr"], group["weight"] = lr * shrink, factor
            else:
                group["lr"] = lr * shrink * factor
        task.inner.step()

    def multiply_adds(self, size: Size, steps: int) -> int:
        """Those of T - 1 gradients, in the cheaper form; the first is autograd's."""
        steps = self.steps or steps
        if size.safe:  # all rows, also for the first gradient and after the last step
            return size.gradients(steps + 1)
        return size.gradients(steps - 1, self._parts(size.n))

    def __repr__(self) -> str:
        name = getattr(self.optimizer, "__name__", repr(self.optimizer))
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        steps = "" if self.steps is None else f", steps={self.steps}"
        keep = "" if self.keep_state else ", keep_state=False"
        rows = "" if self.local_rows == 1.0 else f", local_rows={self.local_rows:g}"
        dtype = "" if self.local_dtype is None else f", local_dtype={self.local_dtype}"
        schedule = getattr(self.schedule, "__name__", self.schedule)
        center = ", center=True" if self.center else ""
        return f"FirstOrderSteps({name}{steps}{options}, schedule={schedule}{rows}{dtype}{center}{keep})"


def _evaluation(problem: LocalProblem, count: int) -> Callable[[list[Tensor]], tuple[float, Gradients]]:
    """Value and gradients at given weights, in the cheaper form."""
    form = problem.gram_value_and_gradient if problem.size.prefers_gram(count) else problem.value_and_gradient

    def evaluate(new: list[Tensor]) -> tuple[float, Gradients]:
        value, gradients = form(new)
        return float(value), gradients

    return evaluate
