"""How the learning rate goes over a run; step counts from 0."""

from collections.abc import Callable

Schedule = Callable[[int, int], float]
"""(step, steps) → factor on the base learning rate."""

WARM_UP = 0.05  # share of the steps


def linear_decay(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then linear decay to 0: every method's, unless its entry says."""
    warm_up = _warm_up_steps(steps)
    if step < warm_up:
        return constant(step, steps)
    return max(0.0, (steps - step) / max(1, steps - warm_up))


def constant(step: int, steps: int) -> float:
    """The same warm-up, then 1: for methods that average their weights instead of lowering the rate."""
    return min(1.0, (step + 1) / _warm_up_steps(steps))


def _warm_up_steps(steps: int) -> int:
    return max(1, round(WARM_UP * steps))
