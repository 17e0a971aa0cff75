"""A method's mean losses over its seeds, its time, and how long it takes to another one's loss."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from statistics import fmean, median, stdev

from locobench.runfile import RunFile

_UNEVEN = 1.25  # times as long as by the median of its epochs: such a run was paused or slowed


@dataclass(frozen=True)
class Mean:
    """Of a number over the seeds.

    Attributes:
        value: The mean.
        spread: Standard deviation over the seeds, None where there is one seed.
    """

    value: float
    spread: float | None

    @property
    def text(self) -> str:
        """For people: 51.20 ± 0.13."""
        return number(self.value) + (f" ± {number(self.spread)}" if self.spread is not None else "")


@dataclass(frozen=True)
class Curve:
    """The mean over a method's seeds after each epoch that all of them have finished; diverged runs are left out.

    Attributes:
        epochs: 1, 2, …
        seconds: Of training, mean; of runs that were paused or slowed for a while, by the median of their epochs.
        adam_steps: The same in steps of Adam, None where the price is not known.
        train: Train losses.
        test: Test losses.
        start: Mean train loss before the first step, None where the runs' files do not say it.
        epoch_cost: Time of an epoch: in steps of Adam where prices are known, else the runs' median in seconds.
        clock: What the seconds depend on: device, threads and machine; None where the time is in steps of Adam.
    """

    epochs: list[int]
    seconds: list[float]
    adam_steps: list[float] | None
    train: list[Mean]
    test: list[Mean]
    start: float | None
    epoch_cost: float | None
    clock: str | None


def number(value: float) -> str:
    """A loss or its spread with as many digits as say something."""
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"


def curve_of(runs: list[RunFile], price: float | None, priced: bool) -> Curve:
    """The mean curve of a method's runs.

    Args:
        runs: One a seed.
        price: Of a step in steps of Adam, None where it is not known.
        priced: Whether times are prices, of those that have one, and not seconds.
    """
    used = [run for run in runs if not run.diverged]
    length = min((len(run.rows) for run in used), default=0)

    def over(key: str) -> list[Mean]:
        return [_mean(run.rows[i][key] for run in used) for i in range(length)]

    epochs = list(range(1, length + 1))
    steps = used[0].config["steps_per_epoch"] if used else 0
    per_epoch = price * steps if price and used else None
    step = median_step(used)
    starts = [run.config.get("initial_loss") for run in used]
    known = [start for start in starts if start is not None]
    return Curve(
        epochs,
        [fmean(_seconds(run, epoch) for run in used) for epoch in epochs],
        None if per_epoch is None else [epoch * per_epoch for epoch in epochs],
        over("train_loss"),
        over("test_loss"),
        fmean(known) if known and len(known) == len(starts) else None,
        per_epoch if priced else step * steps if step else None,
        None if priced or not used else clock(used),
    )


def _seconds(run: RunFile, epoch: int) -> float:
    """At the end of an epoch; as if all had taken their median where the run was paused."""
    if slowed(run) is None:
        return float(run.rows[epoch - 1]["seconds"])
    return epoch * median(_steps(run)) * float(run.config["steps_per_epoch"])


def _mean(values: Iterable[float]) -> Mean:
    found = list(values)
    return Mean(fmean(found), stdev(found) if len(found) > 1 else None)


def clock(runs: list[RunFile]) -> str:
    """What the runs' seconds depend on besides the method, as text that can be compared."""
    return json.dumps(
        sorted(
            {
                json.dumps([run.config.get(key) for key in ("device", "threads", "machine")], sort_keys=True)
                for run in runs
            }
        )
    )


def median_step(runs: list[RunFile]) -> float | None:
    """Median over all epochs of the seconds per step."""
    found = [step for run in runs for step in _steps(run)]
    return median(found) if found else None


def _steps(run: RunFile) -> list[float]:
    """Seconds per step in each epoch."""
    ends = [0.0, *(row["seconds"] for row in run.rows if row["train_loss"] is not None)]
    return [(b - a) / run.config["steps_per_epoch"] for a, b in zip(ends, ends[1:], strict=False)]


def slowed(run: RunFile) -> float | None:
    """How many times longer a run took than if all its epochs had been like the median; None where that is little."""
    steps = _steps(run)
    typical = median(steps) if steps else 0.0
    factor = fmean(steps) / typical if typical else 1.0
    return factor if factor > _UNEVEN else None


def time_ratio(curves: dict[str, Curve], method: str, other: str | None) -> float | None:
    """Time until the mean train loss is at most the other method's final one ÷ the other method's time.

    An epoch's time is its price, or the median over a method's epochs, so that a pause in one of them does not count.
    """
    if other is None or other not in curves or not curves[other].train:
        return None
    own, its = curves[method], curves[other]
    if not own.train or not own.epoch_cost or not its.epoch_cost or own.clock != its.clock:
        return None
    return _epochs_until(own, its.train[-1].value) * own.epoch_cost / (len(its.epochs) * its.epoch_cost)


def _epochs_until(curve: Curve, target: float) -> float:
    """After how many epochs the train loss is at most a target, infinite where it never is.

    Between the ends of epochs the loss is taken to fall on a straight line. Where the loss before the first step is not
    known, the first epoch counts as a whole.
    """
    before = curve.start
    if before is not None and before <= target:
        return 0.0
    for done, mean in enumerate(curve.train):
        if mean.value <= target:
            return done + (1.0 if before is None else (before - target) / (before - mean.value))
        before = mean.value
    return inf
