"""A study's trials in Optuna's SQLite storage: which there are, who works on which, and how they ended."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import SQLAlchemyError

from locobench.errors import BenchError
from locobench.methods import METHODS
from locobench.proposals import Point, distributions, from_optuna, to_optuna
from locobench.runfile import Row, write_atomically
from locobench.spaces import Space
from locobench.study import brief_lock
from locobench.trials import checked, run_file

_PATIENCE = 60.0  # seconds that SQLite waits for another process
_STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "diverged"}


class Ledger:
    """The trials of a study.

    Args:
        folder: Of the study; `study.db` is made where there is none.
    """

    def __init__(self, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder = folder
        self.path = folder / "study.db"
        url = URL.create("sqlite", database=str(self.path)).render_as_string()
        with self._plain_errors(), brief_lock(folder, "db"):
            self._storage = optuna.storages.RDBStorage(url, {"connect_args": {"timeout": _PATIENCE}})
        self._ids: dict[str, int] = {}

    def close(self) -> None:
        """Let go of the file."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def trials(self, method: str) -> list[FrozenTrial]:
        """All trials of a method, by number."""
        with self._plain_errors():
            found = sorted(self._storage.get_all_trials(self._id(method)), key=lambda trial: trial.number)
            if [trial.number for trial in found] != list(range(len(found))):
                raise ValueError(f"trials of {method} are missing")
            for trial in found:
                if trial.state.is_finished():
                    _check(method, trial)
            return found

    def add(self, method: str, number: int, space: Space, point: Point) -> None:
        """Write a trial down for whoever comes first, unless there is one of that number."""
        waiting = optuna.trial.create_trial(
            state=TrialState.WAITING, params=to_optuna(space, point), distributions=distributions(space)
        )
        with self._plain_errors():
            if self._storage.get_n_trials(self._id(method)) == number:
                self._storage.create_new_trial(self._id(method), waiting)

    @contextmanager
    def claim(self, method: str, number: int) -> Iterator[FrozenTrial | None]:
        """The trial, kept from all other processes; None if another has it or has ended it.

        A trial that was begun by a process that is no more can be claimed: locks end with their processes.
        """
        try:
            with FileLock(self.folder / ".locks" / f"{method}-{number:04d}.lock", timeout=0):
                trial = self.trials(method)[number]
                if trial.state == TrialState.WAITING:
                    with self._plain_errors():
                        self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                yield None if trial.state.is_finished() else trial
        except Timeout:
            yield None

    def end(self, trial: FrozenTrial, state: TrialState, rows: list[Row]) -> None:
        """Write down how a claimed trial ended: COMPLETE, PRUNED or (diverged) FAIL."""
        last = rows[-1]
        with self._plain_errors():
            for row in rows:
                if row["train_loss"] is not None:
                    self._storage.set_trial_intermediate_value(trial._trial_id, row["epoch"], row["train_loss"])
            for key in ("train_loss", "test_loss", "seconds"):
                self._storage.set_trial_user_attr(trial._trial_id, key, last[key])
            self._storage.set_trial_user_attr(trial._trial_id, "epochs", last["epoch"])
            values = [last["train_loss"]] if state == TrialState.COMPLETE else None
            self._storage.set_trial_state_values(trial._trial_id, state, values)

    def export(self) -> None:
        """Write trials.jsonl: a row for each trial that has ended.

        Rows of trials that the database does not have, which may have been lost, stay while their run files are there.
        """
        with brief_lock(self.folder, "export"):
            with self._plain_errors():
                names = [study.study_name for study in self._storage.get_all_studies()]
            methods = [name for name in names if name in METHODS]  # others are not of this benchmark
            rows = [
                _row(method, trial) for method in methods for trial in self.trials(method) if trial.state in _STATES
            ]
            rows += self._rows_without(rows)
            text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            write_atomically(self.folder / "trials.jsonl", lambda file: file.write_text(text, encoding="utf-8"))

    def _rows_without(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What trials.jsonl has besides these rows."""
        known = {row["file"] for row in rows}
        try:
            lines = (self.folder / "trials.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:  # none yet
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # a damaged line takes no other with it
                row = checked(line)
                if row["file"] not in known and (self.folder / row["file"]).is_file():
                    found.append(row)
        return found

    def _id(self, method: str) -> int:
        if method not in self._ids:
            try:
                self._ids[method] = self._storage.get_study_id_from_name(method)
            except KeyError:
                with brief_lock(self.folder, "db"):
                    self._ids[method] = self._get_or_make(method)
        return self._ids[method]

    def _get_or_make(self, method: str) -> int:
        try:
            return self._storage.create_new_study([StudyDirection.MINIMIZE], method)
        except optuna.exceptions.DuplicatedStudyError:
            return self._storage.get_study_id_from_name(method)

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError) as error:
            raise BenchError(f"{self.path} {_reason(error)}") from error
        except KeyError as error:
            raise BenchError(
                f"{self.path} has lost what this process was at work on; another program deleted it. The same command "
                "continues"
            ) from error
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise BenchError(f"{self.path} {_reason(error)}") from error


def point(trial: FrozenTrial) -> Point:
    """What a trial tries, by the method's names, `lr` first."""
    found = from_optuna(trial.params)
    return {"lr": found.pop("lr"), **found}


def best(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial with the lowest train loss."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    return min(finished, key=lambda trial: (trial.value, trial.number), default=None)


def _check(method: str, trial: FrozenTrial) -> None:
    """Raise a ValueError where an ended trial is not as `end` leaves it."""
    try:
        row = checked(json.dumps(_row(method, trial)))
    except KeyError as error:
        raise ValueError(f"trial {trial.number} of {method} lacks {error}") from error
    if trial.state == TrialState.COMPLETE and trial.value != row["train_loss"]:
        raise ValueError(f"trial {trial.number} of {method} has two losses")


def _row(method: str, trial: FrozenTrial) -> dict[str, Any]:
    params = point(trial)
    return {
        "method": method,
        "trial": trial.number,
        "state": _STATES[trial.state],
        "lr": params.pop("lr"),
        "params": params,
        **{key: trial.user_attrs[key] for key in ("train_loss", "test_loss", "epochs", "seconds")},
        "file": run_file(method, trial.number),
    }


def _reason(error: BaseException) -> str:
    """What SQLite says, at the bottom of a chain of errors, and what to do about it."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "locked" in said:
        return f"is held by another program ({said}); close it, then the same command continues"
    if any(words in said for words in ("full", "readonly", "unable to open", "I/O error")):
        return f"cannot be written ({said}); make room or give the right to write, then the same command continues"
    return (
        f"is damaged or of another version of optuna ({said}); delete it: the same command makes it anew from the "
        "run files, and repeats none"
    )
