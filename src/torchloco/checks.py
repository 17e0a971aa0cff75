"""Checks of numeric arguments, so that every message says what was got and what is supported."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def check_range(name: str, value: Any, low: float, high: float = math.inf, *, inclusive: bool = False) -> None:
    """Raise unless `value` is a finite number above `low` (or equal, if `inclusive`) and below `high`.

    Raises:
        TypeError: Not a real number (a tensor of one element counts as one).
        ValueError: Outside the range, infinite or NaN.
    """
    if isinstance(value, bool) or not (isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or number < low or (number == low and not inclusive) or number >= high:
        above = f"{'at least' if inclusive else 'greater than'} {low:g}"
        below = "finite" if high == math.inf else f"less than {high:g}"
        raise ValueError(f"{name} must be {above} and {below}, got {number:g}")


def check_count(name: str, value: Any) -> None:
    """Raise unless `value` is a whole number of at least 1.

    Raises:
        TypeError: Not an int.
        ValueError: Less than 1.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number (int), got {value!r} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
