"""Where a log axis of losses has its ticks: plain numbers, such as 50, 100, 200, also over less than a decade."""


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis, more of them where it spans little."""
    if low <= 0:
        return []
    finest = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    span = high / low
    cuts = finest if span < 5 else (1, 2, 3, 5) if span < 200 else (1, 3) if span < 1e5 else (1,)
    ticks = [float(f"{cut}e{power}") for power in range(-4, 12) for cut in cuts]
    return [tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]
