"""Where a log axis of losses has its ticks: plain numbers, such as 50, 100, 200, also over less than a decade."""

_CUTS = (
    (5.0, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)),
    (15.0, (1, 1.5, 2, 3, 4, 5, 6, 7, 8)),
    (200.0, (1, 2, 3, 5)),
    (1e5, (1, 3)),
    (float("inf"), (1,)),
)
"""Up to which ratio of the ends an axis has which ticks in each decade."""


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis, more of them where it spans little."""
    if low <= 0:
        return []
    low, high = float(low), float(high)  # NumPy's would warn
    span = high / low
    cuts = next(cuts for most, cuts in _CUTS if span <= most)
    ticks = [float(f"{cut}e{power}") for power in range(-4, 12) for cut in cuts]
    return [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]
