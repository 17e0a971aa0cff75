"""The numbers of a report: mean curves, times to a target, and what follows from them in words."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from statistics import fmean, median, stdev
from typing import Any

from locobench.methods import METHODS
from locobench.report.study import Study
from locobench.runfile import RunFile
from locobench.styles import FIRST_ORDER, LOCOPROP, SECOND_ORDER, family

_UNEVEN = 1.25


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


@dataclass(frozen=True)
class Line:
    """A method's line of the table.

    Attributes:
        method: Its name.
        label: For people.
        settings: The best ones.
        trials: Of the search, None where there was none.
        planned: How many these are to be in the end, None where that is not known.
        diverged: Trials that diverged; of the runs shown, where there was no search.
        seeds: Runs that were averaged.
        status: Epochs done, or what went wrong.
        curve: Its mean curve.
        step_ratio: A step's time ÷ Adam's.
        bytes_ratio: The optimizer's bytes ÷ Adam's.
        measured: Whether that ratio is by `locobench speed`, not by the runs' own seconds.
        to_adam: Time to Adam's final loss ÷ Adam's time, infinite where it never gets there, None where not known.
        to_first_order: The same for the best first-order method's final loss and time.
    """

    method: str
    label: str
    settings: str
    trials: int | None
    planned: int | None
    diverged: int
    seeds: int
    status: str
    curve: Curve
    step_ratio: float | None
    measured: bool
    bytes_ratio: float | None
    to_adam: float | None
    to_first_order: float | None

    @property
    def train(self) -> Mean | None:
        """Final train loss."""
        return self.curve.train[-1] if self.curve.train else None

    @property
    def test(self) -> Mean | None:
        """Final test loss."""
        return self.curve.test[-1] if self.curve.test else None


@dataclass(frozen=True)
class Summary:
    """What a report says.

    Attributes:
        lines: Best final train loss first; methods without one last.
        absent: Methods of the search that could not run, by label, and what to install.
        best_first_order: Its line, None where there is no first-order method.
        priced: Whether prices come from `locobench speed`, not from the runs' own seconds.
    """

    lines: list[Line]
    absent: dict[str, str]
    best_first_order: Line | None
    priced: bool

    def line(self, method: str) -> Line | None:
        """Of a method, None where it took no part."""
        return next((line for line in self.lines if line.method == method), None)

    @property
    def blurred(self) -> list[str]:
        """Methods whose step ratio is by their runs' own seconds, which other work may have blurred."""
        return [line.label for line in self.lines if line.step_ratio is not None and not line.measured]

    def best(self, kind: str) -> Line | None:
        """The lowest final train loss of a family."""
        return next((line for line in self.lines if family(line.method) == kind and line.train), None)


def label(method: str) -> str:
    """The method's name for people; one that is not in the table any more keeps its own."""
    return METHODS[method].label if method in METHODS else method


def number(value: float) -> str:
    """A loss or its spread with as many digits as say something."""
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"


def summarize(study: Study) -> Summary:
    """Compute everything that the table and the headline need."""
    ratios = _step_ratios(study)
    prices = ratios if study.prices else {}
    curves = {method: _curve(runs, prices.get(method), bool(prices)) for method, runs in study.runs.items()}
    final = {method: curve.train[-1].value for method, curve in curves.items() if curve.train}
    first_order = min((m for m in final if family(m) == FIRST_ORDER), key=final.__getitem__, default=None)
    lines = [
        Line(
            method=method,
            label=label(method),
            settings=settings_text(runs[0].config),
            trials=sum(trial.method == method for trial in study.trials) or None,
            planned=study.planned.get(method),
            diverged=_diverged(study, method),
            seeds=len(runs),
            status=_status(runs),
            curve=curves[method],
            step_ratio=ratios.get(method),
            measured=method in study.prices,
            bytes_ratio=study.prices.get(method, {}).get("bytes_ratio"),
            to_adam=_time_ratio(curves, method, "adam"),
            to_first_order=_time_ratio(curves, method, first_order),
        )
        for method, runs in study.runs.items()
    ]
    lines.sort(key=lambda line: final.get(line.method, float("inf")))
    best = next((line for line in lines if line.method == first_order), None)
    return Summary(lines, _absent(study), best, bool(study.prices))


def settings_text(config: dict[str, Any]) -> str:
    """The tuned settings in words."""
    tuned = {"lr": config["lr"], **(config.get("params") or {})}
    return ", ".join(f"{key} {_setting(value)}" for key, value in tuned.items())


def _setting(value: Any) -> str:
    """A number with three digits, small ones as 3e-4."""
    if not isinstance(value, float):
        return str(value)
    if 1e-2 <= abs(value) < 1e4 or value == 0:
        return f"{value:.3g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _curve(runs: list[RunFile], price: float | None, priced: bool) -> Curve:
    used = [run for run in runs if not run.diverged]
    length = min((len(run.rows) for run in used), default=0)

    def over(key: str) -> list[Mean]:
        return [_mean(run.rows[i][key] for run in used) for i in range(length)]

    epochs = list(range(1, length + 1))
    steps = used[0].config["steps_per_epoch"] if used else 0
    per_epoch = price * steps if price and used else None
    median_step = _median_step(used)
    starts = [run.config.get("initial_loss") for run in used]
    known = [start for start in starts if start is not None]
    return Curve(
        epochs,
        [fmean(_seconds(run, epoch) for run in used) for epoch in epochs],
        None if per_epoch is None else [epoch * per_epoch for epoch in epochs],
        over("train_loss"),
        over("test_loss"),
        fmean(known) if known and len(known) == len(starts) else None,
        per_epoch if priced else median_step * steps if median_step else None,
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


def _step_ratios(study: Study) -> dict[str, float]:
    """Time of a step ÷ Adam's: by `locobench speed`, or by the medians of the runs' epochs where it has no price."""
    steps = {method: _median_step(runs) for method, runs in study.runs.items()}
    adam = steps.get("adam")
    alike = {method for method, runs in study.runs.items() if adam and clock(runs) == clock(study.runs["adam"])}
    own = {method: step / adam for method, step in steps.items() if step and adam and method in alike}
    return own | {method: row["time_ratio"] for method, row in study.prices.items()}


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


def _median_step(runs: list[RunFile]) -> float | None:
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


def _time_ratio(curves: dict[str, Curve], method: str, other: str | None) -> float | None:
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


def _diverged(study: Study, method: str) -> int:
    if study.trials:
        return sum(trial.method == method and trial.state == "diverged" for trial in study.trials)
    return sum(run.diverged for run in study.runs[method])


def _status(runs: list[RunFile]) -> str:
    wanted = runs[0].config["epochs"]
    diverged = sum(run.diverged for run in runs)
    if diverged:
        return "diverged" if len(runs) == 1 else f"{diverged} of {len(runs)} seeds diverged"
    done = min(len(run.rows) for run in runs)
    return f"{wanted}" if done >= wanted else f"{done}/{wanted}"


def _absent(study: Study) -> dict[str, str]:
    """Methods that the study names and of which it has no run."""
    spaces = study.info.get("spaces") or {}
    named = [*spaces, *dict.fromkeys(trial.method for trial in study.trials)]
    found = {}
    for method in dict.fromkeys(named):
        if method not in study.runs:
            missing = METHODS[method].missing if method in METHODS else None
            found[label(method)] = f"not installed: {missing}" if missing else "no trial finished"
    return found


def search_caveats(study: Study) -> list[tuple[str, str]]:
    """What is not as it should be in the end, or not alike for all: numbers of trials, and runs of earlier bests."""
    counts = {method: sum(trial.method == method for trial in study.trials) for method in study.planned}
    found = []
    lacking = [m for m, count in counts.items() if count < study.planned[m]]
    if lacking:
        each = ", ".join(f"{label(m)} {counts[m]} of {study.planned[m]}" for m in lacking)
        found.append(("search", f"the search is not finished, its best settings may still change: {each} trials"))
    if len(set(counts.values())) > 1:
        groups: dict[int, list[str]] = {}
        for method, count in counts.items():
            groups.setdefault(count, []).append(label(method))
        each = "; ".join(f"{count}: {', '.join(groups[count])}" for count in sorted(groups, reverse=True))
        found.append(("trials", f"the methods have not had equal numbers of trials: {each}"))
    if study.outdated:
        names = ", ".join(label(method) for method in study.outdated)
        found.append(("outdated", f"the search has found better settings since these runs on fresh seeds: {names}"))
    return found


def headline(study: Study, summary: Summary) -> list[str]:
    """What the data says, in sentences."""
    shown = [line for line in summary.lines if line.train]
    if not shown:
        return ["No run has a loss to show: all of them diverged."]
    ours, rival = summary.best(LOCOPROP), summary.best_first_order
    first = ours or shown[0]
    if first.train is None:
        return []
    data, epochs = study.config["data"].upper(), _epochs(first)
    sentence = f"After {epochs} on {data}, {first.label} is at a train loss of {first.train.text}"
    if rival and rival is not first and rival.train:
        sentence += f", {_compared(first.train, rival.train)} the best first-order method, {rival.label}, at "
        sentence += rival.train.text
        if len(rival.curve.epochs) != len(first.curve.epochs):
            sentence += f" after {_epochs(rival)}"
    sentences = [f"{sentence}."]
    second = summary.best(SECOND_ORDER)
    if second and second is not first and second.train:
        sentences.append(f"The best second-order or matrix method, {second.label}, is at {second.train.text}.")
    sentences += _times(first, summary)
    if any(line.status != shown[0].status for line in shown):
        sentences.append("Not all runs are of the same length or finished.")
    if any(count > sum(trial.method == method for trial in study.trials) for method, count in study.planned.items()):
        sentences.append("The search is not finished.")
    if max(line.seeds for line in shown) == 1:
        sentences.append("One seed each: how far results scatter is not known.")
    return sentences


def _epochs(line: Line) -> str:
    count = len(line.curve.epochs)
    return "one epoch" if count == 1 else f"{count} epochs"


def _compared(own: Mean, other: Mean) -> str:
    gap = other.value - own.value
    if own.spread is not None and other.spread is not None and abs(gap) <= max(own.spread, other.spread):
        return "within the spread of seeds of"
    return "below" if gap > 0 else "above"


def _times(first: Line, summary: Summary) -> list[str]:
    """How long it takes to the losses of Adam and of the best first-order method, and who is there before it."""
    goals = {"adam": {line.method: line.to_adam for line in summary.lines}}
    if summary.best_first_order is not None:
        goals[summary.best_first_order.method] = {line.method: line.to_first_order for line in summary.lines}
    reached, missed = [], []
    for method, ratios in goals.items():
        line, ratio = summary.line(method), ratios[first.method]
        if line is None or line is first or line.train is None or ratio is None:
            continue
        if ratio == inf:
            missed.append(f"{line.label}'s")
            continue
        known = {other: its for other, its in ratios.items() if its is not None and its < ratio}
        earliest = min(known, key=known.__getitem__, default=None)
        before = "" if earliest is None else f" ({label(earliest)} in {known[earliest]:.2f})"
        reached.append(f"{line.label}'s final loss in {ratio:.2f} × {line.label}'s time{before}")
    sentences = [f"By the clock it reaches {' and '.join(reached)}."] if reached else []
    if missed:
        sentences.append(f"It does not get down to {' or '.join(missed)} final loss within its run.")
    return sentences
