"""The promise of safe solving: no solver leaves a layer's local objective worse than it began."""

from __future__ import annotations

import math

from torchloco.losses import Loss
from torchloco.regularizers import Regularizer
from torchloco.solvers import Solver, Task

_TRIES = 10
_CUT = 0.25


def check_safe(loss: Loss, regularizer: Regularizer | None) -> None:
    """Raise unless the local objective has a value that can be followed.

    Raises:
        ValueError: The loss or the regularizer has none.
    """
    terms = getattr(regularizer, "terms", [] if regularizer is None else [regularizer])
    for part, base in [(loss, Loss), *((term, Regularizer) for term in terms)]:
        value = getattr(type(part), "value", None)
        if value is None or value is base.value:  # type: ignore[attr-defined]
            raise ValueError(
                f"safe=True follows the local objective, and {part!r} has no value(); define it, or leave safe=False"
            )


def solve_safely(solver: Solver, task: Task) -> None:
    """Solve; while the objective is above its old value, cut the displacement, and in the end take it back."""
    began = float(task.problem.value(task.problem.old))
    if not math.isfinite(began):
        raise RuntimeError(
            f"layer {task.problem.rows.name!r}: the value of its local objective is not finite; look at its target and "
            "regularizer, or lower activation_lr"
        )
    solver.solve(task)
    for _ in range(_TRIES):
        value = float(task.problem.value(task.values))
        if value <= began:
            return
        if not math.isfinite(value):
            task.forget()
            break
        for p, old in zip(task.params, task.problem.old, strict=True):
            p.lerp_(old, 1 - _CUT)
    for p, old in zip(task.params, task.problem.old, strict=True):
        p.copy_(old)
