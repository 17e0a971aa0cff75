"""The best settings of a study's methods, trained anew on fresh seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from locobench import study as studies
from locobench.compare import compare
from locobench.errors import BenchError
from locobench.methods import family, find, find_all
from locobench.methods.method import written
from locobench.runfile import RunFile, read
from locobench.runs import open_run, refuse_other_version
from locobench.settings import Settings
from locobench.study import Study
from locobench.trials import Trial, best_trial, read_trials


@dataclass(frozen=True)
class Best:
    """The best trial of a method.

    Attributes:
        trial: It.
        trials: How many have ended.
        total: How many there are to be.
    """

    trial: Trial
    trials: int
    total: int


def compare_tuned(folder: Path, seeds: Sequence[int], methods: str | None, console: Console) -> None:
    """Train each method with the best settings of the study in a folder, once for each seed; end with the table.

    Args:
        folder: Of the study.
        seeds: Other ones than the search had.
        methods: Comma-separated; None for all that have a finished trial.
        console: For progress and table.
    """
    study = studies.load(folder)
    if study.content["seed"] in seeds:
        raise BenchError(f"--seeds {study.content['seed']} is the one that {folder} was tuned with; choose fresh ones")
    found = best_trials(study)
    if not found:
        raise BenchError(f"{folder} has no finished trial yet; `locobench tune --out {folder}` goes on with it")
    chosen = list(found) if methods is None else [method.name for method in find_all(methods)]
    for name in chosen:
        if name not in found:
            raise BenchError(f"{folder} has no finished trial of {name}; there are: {', '.join(found)}")
    absent = [find(name) for name in chosen if find(name).missing is not None]
    present = [name for name in chosen if find(name).missing is None]
    for method in absent:
        console.print(f"{method.label}: not installed: {method.missing}", markup=False, soft_wrap=True)
    if not present:
        raise BenchError(f"{folder} has no method to compare that is installed")
    for name in present:
        if found[name].trials < found[name].total:
            line = f"{find(name).label}: best of {found[name].trials} of {found[name].total} trials so far"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name in present:
        if found[name].trial.file.exists():
            refuse_other_version(read(found[name].trial.file), find(name))
    plan = {seed: [_settings(study, found[name], seed) for name in present] for seed in seeds}
    _refuse_earlier_bests(plan, folder / "best")
    for seed, all_settings in plan.items():  # what is wrong with any is found before the first begins
        for settings in all_settings:
            earlier = open_run(settings, folder / "best" / str(seed))
            if earlier is not None:
                refuse_other_version(earlier, find(settings.method))
    runs: list[RunFile] = []
    for seed, all_settings in plan.items():
        console.print(f"seed {seed}", style="bold", highlight=False)
        runs += compare(all_settings, folder / "best" / str(seed), console)
    table = _table(study, found, present, runs)
    for method in absent:
        table.add_row(method.label, f"not installed: {method.missing}", *["–"] * 5)
    console.print(table)
    console.print(f"written: {folder / 'best'}", highlight=False, markup=False, soft_wrap=True)


def best_trials(study: Study) -> dict[str, Best]:
    """The finished trial with the lowest train loss of each method, by method, best first."""
    path = study.folder / "trials.jsonl"
    trials = read_trials(path) if path.exists() else []
    found = []
    for method in study.content["spaces"]:
        best = best_trial(trials, method)
        if best is not None:
            ended = sum(trial.method == method for trial in trials)
            found.append(Best(best, ended, study.total(method)))
    return {one.trial.method: one for one in sorted(found, key=lambda one: one.trial.train_loss or 0.0)}


def _refuse_earlier_bests(plan: dict[int, list[Settings]], folder: Path) -> None:
    """Runs of what was best before the search went on would otherwise pass for the best."""
    best = {one.method: (one.lr, dict(one.params)) for several in plan.values() for one in several}
    earlier = []
    for path in sorted(folder.glob("*/*.jsonl")):
        config = read(path).config
        if (config["lr"], config["params"]) != best.get(config["method"], (config["lr"], config["params"])):
            earlier.append(str(path))
    if earlier:
        raise BenchError(
            "the search has found better settings since these runs; take them away, then the same command makes them "
            f"anew: {' '.join(earlier)}"
        )


def _settings(study: Study, best: Best, seed: int) -> Settings:
    return study.settings(best.trial.method, {"lr": best.trial.lr, **best.trial.params}, seed)


def _table(study: Study, found: dict[str, Best], names: Sequence[str], runs: Sequence[RunFile]) -> Table:
    """Mean and spread over the seeds, best first."""
    content = study.content
    title = f"{content['data'].upper()}, {content['model']} {content['activation']}, {content['epochs']} epochs"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("method", "best settings", "train", "test", "seconds", "seeds", "trials"):
        table.add_column(heading, justify="left" if heading in ("method", "best settings") else "right")
    by_method = {name: [run for run in runs if run.config["method"] == name] for name in names}
    for name in sorted(names, key=lambda name: mean(_final(run, "train_loss") for run in by_method[name])):
        its_runs = by_method[name]
        diverged = sum(run.diverged for run in its_runs)
        table.add_row(
            find(name).label,
            written({"lr": found[name].trial.lr, **found[name].trial.params}),
            _spread(its_runs, "train_loss"),
            _spread(its_runs, "test_loss"),
            f"{mean(run.rows[-1]['seconds'] for run in its_runs):.1f}",
            f"{len(its_runs)}" + (f", {diverged} diverged" if diverged else ""),
            f"{found[name].trials}/{found[name].total}",
            style="bold" if family(name) == "LocoProp" else None,
        )
    return table


def _spread(runs: Sequence[RunFile], key: str) -> str:
    """Mean ± standard deviation over the runs that did not diverge."""
    values = [_final(run, key) for run in runs if not run.diverged]
    if not values:
        return "–"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def _final(run: RunFile, key: str) -> float:
    value: float | None = run.rows[-1][key]
    return float("inf") if value is None else value
