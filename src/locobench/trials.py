"""The trials of a search as its export, `trials.jsonl`, has them: what is read without Optuna."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locobench import plain_json
from locobench.errors import BenchError
from locobench.runfile import check_params, is_count, is_number

_KEYS = {"method", "trial", "state", "lr", "params", "train_loss", "test_loss", "epochs", "file"}
_STATES = ("finished", "pruned", "diverged", "unfinished")


@dataclass(frozen=True)
class Trial:
    """One setting that was tried in a search.

    Attributes:
        method: Name of the method.
        state: `finished`, `pruned`, `diverged` or `unfinished`.
        lr: Base learning rate.
        params: The other tuned settings.
        train_loss: The last one, None where there is none.
        test_loss: Likewise.
        epochs: That it lasted.
        file: Its run file, which need not be there any more.
    """

    method: str
    state: str
    lr: float
    params: dict[str, Any]
    train_loss: float | None
    test_loss: float | None
    epochs: int
    file: Path


def read_trials(path: Path) -> list[Trial]:
    """Read `trials.jsonl`; an error names the line that is not as it should be."""
    trials: list[Trial] = []
    known: set[Path] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            trial = _trial(checked(line), path.parent)
            if trial.file in known:
                raise ValueError(f"{trial.file.relative_to(path.parent)} for the second time")
            known.add(trial.file)
            trials.append(trial)
        except ValueError as error:
            raise BenchError(
                f"{path}, line {number} is damaged ({error}); `locobench tune --out {path.parent}` writes the file anew"
            ) from None
    return trials


def best_trial(trials: Sequence[Trial], method: str) -> Trial | None:
    """The finished trial of a method with the lowest train loss."""
    finished = [t for t in trials if t.method == method and t.state == "finished" and t.train_loss is not None]
    return min(finished, key=lambda t: t.train_loss or 0.0, default=None)


def run_file(method: str, number: int) -> str:
    """Where a trial's run file is in the study's folder."""
    return f"trials/{method}/{number:04d}.jsonl"


def checked(line: str) -> dict[str, Any]:
    """The row of a line of `trials.jsonl`.

    Raises:
        ValueError: Something in it is not as it should be.
    """
    row = plain_json.loads(line)
    if not isinstance(row, dict) or _KEYS - row.keys():
        raise ValueError(f"expected an object with {', '.join(sorted(_KEYS))}")
    if not isinstance(row["method"], str) or not is_count(row["trial"], 0):
        raise ValueError("method should be a string and trial a whole number")
    if row["file"] != run_file(row["method"], row["trial"]):
        raise ValueError(f"file should be {run_file(row['method'], row['trial'])!r}, is {row['file']!r}")
    if row["state"] not in _STATES:
        raise ValueError(f"state should be one of {', '.join(_STATES)}, is {row['state']!r}")
    if not is_number(row["lr"]) or row["lr"] <= 0:
        raise ValueError(f"lr should be a positive number, is {row['lr']!r}")
    check_params(row["params"])
    for key in ("train_loss", "test_loss"):
        if row[key] is not None and (not is_number(row[key]) or row[key] < 0):
            raise ValueError(f"{key} should be a number of at least 0 or null, is {row[key]!r}")
    if not is_number(row.get("seconds", 0.0)):
        raise ValueError(f"seconds should be a number, is {row['seconds']!r}")
    if not is_count(row["epochs"], 0):
        raise ValueError(f"epochs should be a whole number of at least 0, is {row['epochs']!r}")
    if row["state"] == "finished" and row["train_loss"] is None:
        raise ValueError("a finished trial should have a train_loss")
    return row


def _trial(row: dict[str, Any], folder: Path) -> Trial:
    names = ("method", "state", "lr", "params", "train_loss", "test_loss", "epochs")
    return Trial(**{name: row[name] for name in names}, file=folder / row["file"])
