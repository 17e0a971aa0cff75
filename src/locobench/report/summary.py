"""The table of a report: a line for each method, and what they are measured against."""

from dataclasses import dataclass
from typing import Any

from locobench.methods import METHODS
from locobench.report.means import Curve, Mean, clock, curve_of, median_step, time_ratio
from locobench.report.study import Study
from locobench.runfile import RunFile
from locobench.styles import FIRST_ORDER, family


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


def summarize(study: Study) -> Summary:
    """Compute everything that the table and the headline need."""
    ratios = _step_ratios(study)
    prices = ratios if study.prices else {}
    curves = {method: curve_of(runs, prices.get(method), bool(prices)) for method, runs in study.runs.items()}
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
            to_adam=time_ratio(curves, method, "adam"),
            to_first_order=time_ratio(curves, method, first_order),
        )
        for method, runs in study.runs.items()
    ]
    lines.sort(key=lambda line: final.get(line.method, float("inf")))
    best = next((line for line in lines if line.method == first_order), None)
    return Summary(lines, _absent(study), best, bool(study.prices))


def label(method: str) -> str:
    """The method's name for people; one that is not in the table any more keeps its own."""
    return METHODS[method].label if method in METHODS else method


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


def _step_ratios(study: Study) -> dict[str, float]:
    """Time of a step ÷ Adam's: by `locobench speed`, or by the medians of the runs' epochs where it has no price."""
    steps = {method: median_step(runs) for method, runs in study.runs.items()}
    adam = steps.get("adam")
    alike = {method for method, runs in study.runs.items() if adam and clock(runs) == clock(study.runs["adam"])}
    own = {method: step / adam for method, step in steps.items() if step and adam and method in alike}
    return own | {method: row["time_ratio"] for method, row in study.prices.items()}


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
