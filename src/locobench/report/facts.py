"""What one must know to trust or repeat a report: configuration, machine, versions, date, commit, and caveats."""

import json
from collections import Counter
from typing import Any

from locobench.methods import METHODS, label
from locobench.provenance import last_change
from locobench.report.means import clock, slowed
from locobench.report.results import Results
from locobench.report.summary import Summary
from locobench.report.words import search_caveats
from locobench.runfile import Row
from locobench.settings import counted_threads, machine_name

_SHARED = ("data", "model", "activation", "epochs", "schedule_epochs", "batch_size", "train_size", "protocol")
_ELSEWHERE = ("epochs", "schedule_epochs", "batch_size", "device", "threads", "machine", "versions")


def facts(results: Results, summary: Summary, command: str) -> list[tuple[str, str]]:
    """Name and value of each fact, in the order of the page."""
    config = results.config
    dates, commit = provenance(results)
    found = [
        (
            "problem",
            ", ".join(f"{key.replace('_', ' ')} {config[key]}" for key in _SHARED if config.get(key) is not None),
        ),
        ("images", f"{config.get('train_images', '?')} to train, {config.get('test_images', '?')} to test"),
        ("parameters", f"{config['parameters']:,}".replace(",", " ") if "parameters" in config else "?"),
        ("machine", machine(results)),
        ("versions", ", ".join(f"{name} {version}" for name, version in config.get("versions", {}).items()) or "?"),
        ("seeds", ", ".join(str(seed) for seed in sorted({run.config.get("seed", 0) for run in results.all_runs}))),
        ("dates of the runs", dates),
        ("commit", commit),
        ("command", command),
        *_of_study(results.info, config),
        (
            "default settings, overridden by the best settings above",
            "; ".join(f"{METHODS[m].label}: {METHODS[m].note}" for m in results.runs if m in METHODS),
        ),
    ]
    return [(name, value) for name, value in [*found, *caveats(results, summary)] if value]


def machine(results: Results) -> str:
    """On what the runs ran, with how many on each where there are several."""
    found = Counter(_machine(run.config) for run in results.all_runs)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{name} ({count} run{'' if count == 1 else 's'})" for name, count in found.most_common())


def _machine(config: Row) -> str:
    return f"{machine_name(config.get('machine', {}))}, {counted_threads(config.get('threads', '?'))}"


def provenance(results: Results) -> tuple[str, str]:
    """Dates and commits of the runs as they noted them, else of the last change to their files."""
    dates = sorted({run.config["date"] for run in results.all_runs if run.config.get("date")})
    commits = sorted({one for run in results.all_runs for one in (run.config.get("commit") or "").split(", ") if one})
    change = None if dates and commits else last_change(results.folder)
    if not dates and change is not None:
        dates = [change[0]]
    if not commits and change is not None:
        commits = [f"{change[1]} (of the files)"]
    elif commits and not all(run.config.get("commit") for run in results.all_runs):
        commits.append("others not noted")
    return " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "", ", ".join(commits)


def caveats(results: Results, summary: Summary) -> list[tuple[str, str]]:
    """What to mind when reading the numbers."""
    found = []
    if any(line.seeds > 1 for line in summary.lines):
        luck = "; how lucky the search was, it does not say: see the second best trial" if results.trials else ""
        rounds = ", of prices over the rounds" if any(line.step_spread is not None for line in summary.lines) else ""
        found.append(("spread", f"± is the standard deviation over the seeds of one setting{rounds}{luck}"))
    differing = [key for key in _ELSEWHERE if len({json.dumps(run.config.get(key)) for run in results.all_runs}) > 1]
    if differing:
        found.append(("not alike", f"the runs differ in {', '.join(differing).replace('_', ' ')}: compare with care"))
    clocks = {clock(runs) for runs in results.runs.values()}
    if len(clocks) > 1 and any(line.step_ratio is None for line in summary.lines):
        about = "seconds of runs on other threads or machines are not compared: no ÷ Adam where there is no price"
        found.append(("clocks", about))
    found.append(("prices", _of_prices(results, summary)))
    factors = {run.path.relative_to(results.folder): slowed(run) for run in results.all_runs}
    each = [f"{path} {factor:.1f} times" for path, factor in factors.items() if factor is not None]
    if each:
        found.append(
            ("seconds", f"paused or slowed, and drawn by the median of their epochs: {', '.join(each)} as long")
        )
    found += search_caveats(results)
    if results.from_search:
        names = ", ".join(line.label for line in summary.lines if line.method in results.from_search)
        found.append(("not rerun", f"the search's own best run, not fresh seeds: {names}"))
    for run in results.all_runs:
        if run.diverged:
            why = run.rows[-1].get("message", "no reason recorded")
            found.append(("diverged", f"{run.path.relative_to(results.folder)}: {why}"))
    return found


def _of_prices(results: Results, summary: Summary) -> str:
    """Where the times of steps come from."""
    if not summary.priced:
        return "÷ Adam is by the runs' own seconds; other work on the machine blurs them"
    blurred = (
        f"; *: not in that file, by the runs' own seconds: {', '.join(summary.blurred)}" if summary.blurred else ""
    )
    return f"steps are priced by `locobench speed` on {results.priced_on}{blurred}"


def _of_study(info: dict[str, Any], config: dict[str, Any]) -> list[tuple[str, str]]:
    """What `study.json` says besides what the runs say too: sampler, trials, search spaces …"""
    known = {"versions", "machine", "spaces", "widened", "continued"}
    named = [("space of", info.get("spaces") or {}), ("wider space of", info.get("widened") or {})]
    return [
        *[
            (f"study: {key.replace('_', ' ')}", _plain(value))
            for key, value in info.items()
            if key not in known and not (key in config and config[key] == value)
        ],
        *[("continued", f"{one.get('date')}, commit {one.get('commit')}") for one in info.get("continued") or []],
        *[(f"{what} {label(method)}", _plain(space)) for what, spaces in named for method, space in spaces.items()],
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_plain(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value)
