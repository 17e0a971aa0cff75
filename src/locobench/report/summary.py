"""The table of a report: a line for each method, and what they are measured against."""

from dataclasses import dataclass
from math import inf

from locobench.methods import METHODS, Family, family, label
from locobench.methods.method import written
from locobench.report.means import Curve, Mean, clock, curve_of, median_step, time_ratio
from locobench.report.results import Results
from locobench.runfile import Row, RunFile


@dataclass(frozen=True)
class Line:
    """A method's line of the table.

    Attributes:
        method: Its name.
        label: For people.
        settings: The best ones.
        trials: Of the search, None where there was none.
        second_best: Train loss of the second best of the finished trials, None where there are no two.
        planned: How many these are to be in the end, None where that is not known.
        diverged: Trials that diverged; of the runs shown, where there was no search.
        seeds: Runs that were averaged.
        status: Epochs done, or what went wrong.
        curve: Its mean curve.
        step_ratio: A step's time ÷ Adam's.
        step_spread: Its standard deviation over the rounds of `locobench speed`, None where that is not known.
        elsewhere: Ratio and spread by each further file of prices that has the method, by on what they were measured.
        measured: Whether the ratio is by `locobench speed`, not by the runs' own seconds.
        bytes_ratio: The optimizer's bytes ÷ Adam's.
        to_adam: Time to Adam's final loss ÷ Adam's time, infinite where it never gets there, None where not known.
        to_first_order: The same for the best first-order method's final loss and time.
    """

    method: str
    label: str
    settings: str
    trials: int | None
    second_best: float | None
    planned: int | None
    diverged: int
    seeds: int
    status: str
    curve: Curve
    step_ratio: float | None
    step_spread: float | None
    elsewhere: dict[str, tuple[float, float | None]]
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
        lines: Best final train loss first; methods of which a run diverged after all others.
        absent: Methods of the search that could not run, by label, and what to install.
        best_first_order: Its line, None where there is no first-order method.
        priced: Whether prices come from `locobench speed`, not from the runs' own seconds.
        elsewhere: On what the further files of prices were measured.
    """

    lines: list[Line]
    absent: dict[str, str]
    best_first_order: Line | None
    priced: bool
    elsewhere: tuple[str, ...] = ()

    def line(self, method: str) -> Line | None:
        """Of a method, None where it took no part."""
        return next((line for line in self.lines if line.method == method), None)

    @property
    def blurred(self) -> list[str]:
        """Methods whose step ratio is by their runs' own seconds, which other work may have blurred."""
        return [line.label for line in self.lines if line.step_ratio is not None and not line.measured]

    def best(self, kind: Family) -> Line | None:
        """The lowest final train loss of a family."""
        return next((line for line in self.lines if family(line.method) == kind and line.train), None)


def summarize(results: Results) -> Summary:
    """Compute everything that the table and the headline need."""
    ratios = _step_ratios(results)
    prices = ratios if results.prices else {}
    curves = {method: curve_of(runs, prices.get(method), bool(prices)) for method, runs in results.runs.items()}
    final = {method: curve.train[-1].value for method, curve in curves.items() if curve.train}
    sound = {method: loss for method, loss in final.items() if not any(run.diverged for run in results.runs[method])}
    first_order = min((m for m in sound if family(m) == "first-order"), key=sound.__getitem__, default=None)
    lines = [
        Line(
            method=method,
            label=label(method),
            settings=written({"lr": runs[0].config["lr"], **runs[0].config["params"]}),
            trials=sum(trial.method == method for trial in results.trials) or None,
            second_best=_second_best(results, method),
            planned=results.planned.get(method),
            diverged=_diverged(results, method),
            seeds=len(runs),
            status=_status(runs),
            curve=curves[method],
            step_ratio=ratios.get(method),
            step_spread=results.prices.get(method, {}).get("time_spread") if method != "adam" else None,
            elsewhere={where: _price(rows[method]) for where, rows in results.elsewhere.items() if method in rows},
            measured=method in results.prices,
            bytes_ratio=results.prices.get(method, {}).get("bytes_ratio"),
            to_adam=time_ratio(curves, method, "adam"),
            to_first_order=time_ratio(curves, method, first_order),
        )
        for method, runs in results.runs.items()
    ]
    lines.sort(key=lambda line: (line.method not in sound, final.get(line.method, inf)))
    best = next((line for line in lines if line.method == first_order), None)
    return Summary(lines, _absent(results), best, bool(results.prices), tuple(results.elsewhere))


def _price(row: Row) -> tuple[float, float | None]:
    return (1.0, None) if row["method"] == "adam" else (row["time_ratio"], row.get("time_spread"))


def _step_ratios(results: Results) -> dict[str, float]:
    """Time of a step ÷ Adam's: by `locobench speed`, or by the medians of the runs' epochs where it has no price."""
    steps = {method: median_step(runs) for method, runs in results.runs.items()}
    adam = steps.get("adam")
    alike = {method for method, runs in results.runs.items() if adam and clock(runs) == clock(results.runs["adam"])}
    own = {method: step / adam for method, step in steps.items() if step and adam and method in alike}
    measured = {method: row["time_ratio"] for method, row in results.prices.items()}
    return own | measured | ({"adam": 1.0} if "adam" in own | measured else {})  # not what noise makes of it


def _second_best(results: Results, method: str) -> float | None:
    """How much of the best setting was luck: a search that has found a region finds it twice."""
    best: dict[str, float] = {}
    for trial in results.trials:
        if trial.method == method and trial.state == "finished" and trial.train_loss is not None:
            setting = written({"lr": trial.lr, **trial.params})
            best[setting] = min(trial.train_loss, best.get(setting, inf))
    return sorted(best.values())[1] if len(best) > 1 else None


def _diverged(results: Results, method: str) -> int:
    if results.trials:
        return sum(trial.method == method and trial.state == "diverged" for trial in results.trials)
    return sum(run.diverged for run in results.runs[method])


def _status(runs: list[RunFile]) -> str:
    wanted = runs[0].config["epochs"]
    diverged = sum(run.diverged for run in runs)
    if diverged:
        return "diverged" if len(runs) == 1 else f"{diverged} of {len(runs)} seeds diverged"
    done = min(len(run.rows) for run in runs)
    return f"{wanted}" if done >= wanted else f"{done}/{wanted}"


def _absent(results: Results) -> dict[str, str]:
    """Methods that the study names and of which it has no run."""
    spaces = results.info.get("spaces") or {}
    named = [*spaces, *dict.fromkeys(trial.method for trial in results.trials)]
    found = {}
    for method in dict.fromkeys(named):
        if method not in results.runs:
            missing = METHODS[method].missing if method in METHODS else None
            found[label(method)] = f"not installed: {missing}" if missing else "no trial finished"
    return found
