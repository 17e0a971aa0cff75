"""What a report is about, read from a study folder or from a plain folder of run files."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from locobench import description, prices
from locobench.errors import BenchError
from locobench.runfile import Row, RunFile, read, read_folder
from locobench.trials import Trial, best_trial, read_trials

_PROBLEM = ("protocol", "data", "model", "activation", "train_size")


@dataclass(frozen=True)
class Results:
    """All that a report shows.

    Attributes:
        folder: Where it was read.
        runs: By method the runs of its best settings, one a seed.
        trials: Of the search; for a plain folder its runs, where they are more than one setting a method.
        info: The content of `study.json`, empty for a plain folder.
        from_search: Methods whose best settings were not run on fresh seeds: their run is the search's own.
        prices: Rows of `locobench speed` by method, empty where there is no such file.
        priced_on: On what these were measured.
        elsewhere: The same rows from further files, by on what they were measured.
    """

    folder: Path
    runs: dict[str, list[RunFile]]
    trials: list[Trial]
    info: dict[str, Any] = field(default_factory=dict)
    from_search: frozenset[str] = frozenset()
    prices: dict[str, Row] = field(default_factory=dict)
    priced_on: str = ""
    elsewhere: dict[str, dict[str, Row]] = field(default_factory=dict)

    @property
    def config(self) -> Row:
        """Of one of the runs: for what they share."""
        return next(iter(self.runs.values()))[0].config

    @property
    def planned(self) -> dict[str, int]:
        """How many trials each method of a search is to have; empty where there is no record of any."""
        if not self.info or not self.trials:
            return {}
        count, widened = self.info["trials"], self.info["widened"]
        return {method: count * (1 + len(widened.get(method, []))) for method in self.info["spaces"]}

    @property
    def outdated(self) -> list[str]:
        """Methods whose runs are of settings that were the best of the search only until it went on."""
        found = []
        for method, runs in self.runs.items():
            best = best_trial(self.trials, method) if self.info else None
            config = runs[0].config
            if best is not None and (best.lr, best.params) != (config["lr"], config["params"]):
                found.append(method)
        return found

    @property
    def all_runs(self) -> list[RunFile]:
        """Of all methods."""
        return [run for runs in self.runs.values() for run in runs]


def load(folder: Path, speed: Sequence[Path] = ()) -> Results:
    """Read a folder.

    Args:
        folder: A study, or a folder of run files as `locobench compare` writes them, or of such folders.
        speed: Files of `locobench speed`, of which the first gives the times and each other a column of its own; by
            default `speed.json` in the folder or next to it, where there is one.

    Raises:
        BenchError: It holds no run, a file is damaged, or the results do not belong together.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder} is not a folder")
    own = [path for path in (folder / "speed.json", folder.resolve().parent / "speed.json") if path.exists()]
    read_in = _study if (folder / "study.json").exists() or (folder / "trials.jsonl").exists() else _plain
    contents = [prices.read(file) for file in speed or own[:1]]
    if not contents:
        return read_in(folder)
    places = [prices.measured_on(content) for content in contents]
    if len(set(places)) < len(places):
        raise BenchError(
            f"prices from several files should be of different machines, got {' and '.join(map(str, speed))}, "
            f"which are of {', '.join(dict.fromkeys(places))}; name one file of each machine"
        )
    lists = [prices.rows_of(content) for content in contents]
    return replace(
        read_in(folder), prices=lists[0], priced_on=places[0], elsewhere=dict(zip(places[1:], lists[1:], strict=True))
    )


def _plain(folder: Path) -> Results:
    runs = read_folder(folder)
    _belong_together(runs)
    begun = [run for run in runs if run.rows]
    if not begun:
        raise BenchError(f"{folder} holds no run that has finished an epoch yet; report again later")
    chosen = _best_settings(begun)
    searched = {method for method in chosen if len({_settings(run) for run in runs if _method(run) == method}) > 1}
    trials = [_as_trial(run) for run in runs] if searched else []
    return Results(folder, chosen, trials)


def _study(folder: Path) -> Results:
    described = folder / "study.json"
    info = description.read(described) if described.exists() else {}
    path = folder / "trials.jsonl"
    trials = read_trials(path) if path.exists() else []
    best = folder / "best"
    runs = [read(file) for file in sorted(best.rglob("*.jsonl"))] if best.is_dir() else []
    chosen = _best_settings([run for run in runs if run.rows])
    alone = [run for method in dict.fromkeys(t.method for t in trials) if method not in chosen
             for run in _best_of_search(trials, method)]  # fmt: skip
    if not chosen and not alone:
        raise BenchError(
            f"{folder} holds no finished trial and no run of a best setting yet; `locobench tune` and "
            "`locobench compare --tuned` make them"
        )
    chosen |= {_method(run): [run] for run in alone}
    _belong_together([*runs, *alone], info, described)
    return Results(folder, chosen, trials, info, frozenset(_method(run) for run in alone))


def _best_of_search(trials: list[Trial], method: str) -> list[RunFile]:
    """The run of a method's best finished trial, if there is one and its file is there."""
    best = best_trial([trial for trial in trials if trial.file.exists()], method)
    if best is None:
        return []
    run = read(best.file)
    if _method(run) != method:
        raise BenchError(f"{best.file} is a run of {_method(run)}, where the search has one of {method}; restore it")
    last = run.rows[-1]["train_loss"] if run.rows else None
    if (run.config["lr"], run.config["params"], last) != (best.lr, best.params, best.train_loss):
        raise BenchError(f"{best.file} is not the run that the search had there; restore it")
    return [run]


def ceiling(trials: Sequence[Trial]) -> float:
    """The upper edge: well above every method's best trial, where losses of thousands would flatten the rest."""
    best: dict[str, float] = {}
    for trial in trials:
        if trial.train_loss is not None and trial.state != "diverged":
            best[trial.method] = min(trial.train_loss, best.get(trial.method, trial.train_loss))
    return 2 * max(best.values(), default=1.0)


def _method(run: RunFile) -> str:
    name: str = run.config["method"]
    return name


def _settings(run: RunFile) -> str:
    """Everything that tells runs of a method apart, besides the seed."""
    config = run.config
    keys = ("lr", "params", "epochs", "schedule_epochs", "batch_size")
    return json.dumps([config.get(key) or ({} if key == "params" else None) for key in keys], sort_keys=True)


def _as_trial(run: RunFile) -> Trial:
    losses = [row for row in run.rows if row["train_loss"] is not None]
    last = None if run.diverged or not losses else losses[-1]
    return Trial(
        _method(run),
        "diverged" if run.diverged else "finished" if run.finished else "unfinished",
        run.config["lr"],
        run.config.get("params") or {},
        last["train_loss"] if last else None,
        last["test_loss"] if last else None,
        len(run.rows),
        run.path,
    )


def _best_settings(runs: Iterable[RunFile]) -> dict[str, list[RunFile]]:
    """Of each method the runs with the settings that end lowest; finished ones before those under way."""
    groups: dict[str, dict[str, list[RunFile]]] = {}
    for run in runs:
        groups.setdefault(_method(run), {}).setdefault(_settings(run), []).append(run)
    chosen = {method: min(by_settings.values(), key=_rank) for method, by_settings in groups.items()}
    for group in chosen.values():
        seeds: dict[object, RunFile] = {}
        for run in group:
            other = seeds.setdefault(run.config.get("seed"), run)
            if other is not run:
                raise BenchError(
                    f"{other.path} and {run.path} are the same run (same settings, same seed), which would count "
                    "as two seeds; take one of them away"
                )
    return chosen


def _rank(runs: list[RunFile]) -> tuple[bool, bool, float]:
    losses = [row["train_loss"] for run in runs for row in run.rows[-1:] if row["train_loss"] is not None]
    return (
        any(run.diverged for run in runs),
        not all(run.finished for run in runs),
        fmean(losses) if losses else float("inf"),
    )


def _belong_together(runs: list[RunFile], info: dict[str, Any] | None = None, path: Path | None = None) -> None:
    """Refuse results of different protocols or problems, by name."""
    problem = info or {}
    for key in _PROBLEM:
        found: dict[str, tuple[Any, Path]] = {}
        if key in problem and path is not None:
            found[json.dumps(problem[key])] = (problem[key], path)
        for run in runs:
            value = run.config.get(key)
            found.setdefault(json.dumps(value), (value, run.path))
        if len(found) > 1:
            each = ", ".join(f"{value} in {file}" for value, file in found.values())
            raise BenchError(
                f"results of different {key.replace('_', ' ')} do not go into one report: {each}; "
                "report on folders of one kind each"
            )
