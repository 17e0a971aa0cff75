"""The search for each method's best settings: trials are planned, claimed, carried out and written down."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Protocol

from optuna.trial import FrozenTrial, TrialState

from locobench import ledger as ledgers
from locobench import proposals, spaces, study
from locobench.data import Images
from locobench.ledger import Ledger
from locobench.methods import Method, find
from locobench.proposals import Point
from locobench.runfile import Row, RunFile, read
from locobench.runs import carry_out, open_run, refuse_other_version
from locobench.study import Study

_POLL = 0.5  # seconds between two looks at what other processes have done


class Observer(Protocol):
    """What follows a search: the command line's table, for one."""

    def on_trial(self, method: str, number: int) -> None:
        """A trial begins, or goes on."""

    def on_step(self, loss: float) -> None:
        """A step was taken; off the clock."""

    def on_epoch(self, row: Row, fresh: bool) -> None:
        """An epoch of the trial ended, or (not `fresh`) was found in its file."""

    def on_end(self, method: str, number: int) -> None:
        """The trial was ended and written down."""

    def on_wait(self) -> None:
        """Nothing to do but to wait for other processes."""


@dataclass(frozen=True)
class Round:
    """Trials that are planned together, when all before them have ended.

    Attributes:
        start: The first.
        stop: The one after the last.
        phase: Their space.
    """

    start: int
    stop: int
    phase: study.Phase


class _Pruned(Exception):
    """The trial is not worth the rest of its epochs."""


class _Watcher:
    """Passes a run's news on, and ends the run where it is hopeless."""

    def __init__(self, observer: Observer, epochs: int, history: Sequence[FrozenTrial]) -> None:
        self._observer, self._epochs, self._history = observer, epochs, history
        self._rows: list[Row] = []

    def on_step(self, loss: float) -> None:
        self._observer.on_step(loss)

    def on_epoch(self, row: Row, fresh: bool) -> None:
        self._observer.on_epoch(row, fresh)
        self._rows.append(row)
        hopeful = row["train_loss"] is None or not self._history
        if not hopeful and proposals.is_hopeless(self._rows, self._epochs, self._history):
            raise _Pruned


class Search:
    """One process's part in a search; any number of them work on the same folder.

    Args:
        folder: Of the study, which is there already.
        methods: To be tuned, the most wanted first.
        images: Of the study's problem.
        widenings: How often the space of a method may grow, if its best settings are on the edge.
        observer: Is told what happens.
    """

    def __init__(
        self, folder: Path, methods: Sequence[Method], images: Images, widenings: int, observer: Observer
    ) -> None:
        self._methods = [method.name for method in methods]
        self._study = study.load(folder).with_methods(self._methods)
        check(self._study, methods)
        self._ledger = Ledger(folder)
        self._images, self._widenings, self._observer = images, widenings, observer

    def run(self) -> None:
        """Work until every trial of every method has ended."""
        with self._open():
            self._ledger.export()  # an interruption may have come between a trial's end and this
            while True:
                if self._work_once():
                    continue
                if self._is_done():
                    break
                self._observer.on_wait()
                sleep(_POLL)

    @contextmanager
    def _open(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._ledger.close()

    def _work_once(self) -> bool:
        """Carry out the next trial that is free: methods take turns by rounds, so that all have had equal trials."""
        self._study = study.load(self._study.folder)
        for method in self._methods:
            self._widen(method)
        rounds = {method: method_rounds(self._study, method) for method in self._methods}
        for turn in range(max(len(one) for one in rounds.values())):
            for method, its_rounds in rounds.items():
                if turn < len(its_rounds) and self._work_on(method, its_rounds[turn]):
                    return True
        return False

    def _work_on(self, method: str, its_round: Round) -> bool:
        trials = self._ledger.trials(method)
        before = trials[: its_round.start]
        if len(before) < its_round.start or not all(trial.state.is_finished() for trial in before):
            return False  # other processes are at it
        if len(trials) < its_round.stop:
            with study.brief_lock(self._study.folder, f"{method}-plan"):
                for number, point in enumerate(self._plan(method, its_round, before), start=its_round.start):
                    self._ledger.add(method, number, its_round.phase.whole, point)
            trials = self._ledger.trials(method)
        for trial in trials[its_round.start : its_round.stop]:
            if not trial.state.is_finished():
                with self._ledger.claim(method, trial.number) as claimed:
                    if claimed is not None:
                        self._carry_out(method, claimed, before)
                        return True
        return False

    def _plan(self, method: str, its_round: Round, before: list[FrozenTrial]) -> list[Point]:
        count = its_round.stop - its_round.start
        seed = f"{self._study.content['seed']} {method} {its_round.start}"
        if its_round.start > its_round.phase.start:
            return proposals.promising(its_round.phase.whole, before, count, seed)
        if its_round.start > 0:
            return proposals.sobol_points(its_round.phase.new, count, seed)
        return [self._default(method), *proposals.sobol_points(its_round.phase.new, count - 1, seed)]

    def _default(self, method: str) -> Point:
        known = find(method)
        values = {"lr": known.rate(self._study.content["data"]), **known.params}
        return {name: values[name] for name in self._study.phases(method)[0].whole}

    def _carry_out(self, method: str, trial: FrozenTrial, before: list[FrozenTrial]) -> None:
        self._observer.on_trial(method, trial.number)
        settings = self._study.settings(method, ledgers.point(trial))
        folder, name = self._study.folder / "trials" / method, f"{trial.number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        watcher = _Watcher(self._observer, settings.epochs, before)
        try:
            _end_again(open_run(settings, folder, name), settings.epochs, before)
            run = carry_out(settings, self._images, folder, watcher, name)
            state = TrialState.FAIL if run.diverged else TrialState.COMPLETE
        except _Pruned:
            run = read(folder / f"{name}.jsonl")
            state = TrialState.PRUNED
        self._ledger.end(trial, state, run.rows)
        if state == TrialState.PRUNED:
            run.checkpoint.unlink(missing_ok=True)
        self._ledger.export()
        self._observer.on_end(method, trial.number)

    def _widen(self, method: str) -> None:
        """Let the space grow if all of its trials have ended and the best is on its edge."""
        phases = self._study.phases(method)
        if len(phases) > self._widenings:
            return
        trials = self._ledger.trials(method)
        if sum(trial.state.is_finished() for trial in trials) < self._study.total(method):
            return
        best = ledgers.best(trials)
        if best is not None and spaces.edges(phases[-1].whole, ledgers.point(best)):
            self._study = self._study.widen(method, ledgers.point(best), len(phases))

    def _is_done(self) -> bool:
        ended = {
            method: sum(trial.state.is_finished() for trial in self._ledger.trials(method)) for method in self._methods
        }
        now = study.load(self._study.folder)
        return all(count >= now.total(method) for method, count in ended.items())


def check(described: Study, methods: Sequence[Method]) -> None:
    """Refuse methods that do not take what the study searches, or that have changed since their trials; by name."""
    for method in methods:
        searched = described.phases(method.name)[0].whole
        method.check(method.lr, {name: method.params.get(name, 0.0) for name in searched if name != "lr"})
        for path in sorted((described.folder / "trials" / method.name).glob("*.jsonl")):
            refuse_other_version(read(path), method)


def _end_again(run: RunFile | None, epochs: int, history: Sequence[FrozenTrial]) -> None:
    """Prune a run that was pruned before study.db was lost; it has no checkpoint, and would begin anew."""
    ended = run is not None and not run.finished and not run.checkpoint.exists()
    if run is not None and ended and proposals.is_hopeless(run.rows, epochs, history):
        raise _Pruned


def method_rounds(described: Study, method: str) -> list[Round]:
    """All rounds of a method."""
    found = []
    for phase in described.phases(method):
        starts = [phase.start + start for start in proposals.round_starts(described.trials)]
        found += [Round(start, stop, phase) for start, stop in zip(starts, starts[1:], strict=False)]
    return found
