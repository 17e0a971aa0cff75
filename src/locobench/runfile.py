"""A run's file: its configuration, then a row per epoch; whole after every epoch, whatever happens."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from locobench import plain_json
from locobench.errors import BenchError

Row = dict[str, Any]

_CONFIG_KEYS = {"method", "lr", "data", "model", "epochs", "steps_per_epoch"}
_WHOLE = {
    **dict.fromkeys(("epochs", "steps_per_epoch", "schedule_epochs", "batch_size", "threads", "pixels"), 1),
    **dict.fromkeys(("seed", "parameters", "train_images", "test_images"), 0),
}
_ABANDONED = 3600.0  # seconds after which nobody is still writing a file
LARGEST, MOST = 1e100, 10**12  # a number, a count
_TRIALS = "trials.jsonl"  # of a study: an export with a row per run, no run file
_EPOCH_KEYS = {"method", "epoch", "seconds", "train_loss", "test_loss"}


@dataclass
class RunFile:
    """The rows of `<method>.jsonl`.

    Attributes:
        path: Of the file.
        config: Its first row.
        rows: The epochs so far.
    """

    path: Path
    config: Row
    rows: list[Row]

    @property
    def diverged(self) -> bool:
        """Whether the run ended because the loss was not finite any more."""
        return bool(self.rows) and self.rows[-1].get("diverged", False)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.diverged or (bool(self.rows) and self.rows[-1]["epoch"] >= self.config["epochs"])

    @property
    def checkpoint(self) -> Path:
        """Where an unfinished run keeps what it needs to go on."""
        return self.path.with_suffix(".checkpoint")

    def save(self) -> None:
        """Write the file anew: a reader finds the old rows or the new ones, never half a row."""
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in [self.config, *self.rows]]
        write_atomically(self.path, lambda file: file.write_text("".join(lines), encoding="utf-8"))


def read(path: Path) -> RunFile:
    """Read a run's file; an error names the line that is not as it should be."""
    if path.name == _TRIALS:
        raise BenchError(f"{path} lists the trials of a search and is no run file; those are in {path.parent}/trials")
    run: RunFile | None = None
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            row = plain_json.loads(line)
            _expect(row, _CONFIG_KEYS if run is None else _EPOCH_KEYS)
            if run is None:
                _check_config(row)
                row.setdefault("params", {})  # files of before hyperparameters could be set
                run = RunFile(path, row, [])
            else:
                _check_epoch(row, run)
                run.rows.append(row)
        except ValueError as error:
            raise BenchError(
                f"{path}, line {number} is damaged ({error}); delete the file to begin this run anew"
            ) from None
    if run is None:
        raise BenchError(f"{path} is empty; delete it to begin this run anew")
    return run


def checked(run: RunFile, rows: list[Row]) -> list[Row]:
    """The rows of epochs, if they can be those of that run.

    Raises:
        ValueError: They cannot.
    """
    whole = RunFile(run.path, run.config, [])
    for row in rows:
        _expect(row, _EPOCH_KEYS)
        _check_epoch(row, whole)
        whole.rows.append(row)
    return whole.rows


def _expect(row: object, keys: set[str]) -> None:
    if not isinstance(row, dict) or keys - row.keys():
        raise ValueError(f"expected an object with {', '.join(sorted(keys))}")


def is_number(value: object) -> bool:
    """Whether it is a finite number of a size that can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def is_count(value: object, smallest: int) -> bool:
    """Whether it is a whole number of at least that, and none that nobody can have counted to."""
    return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= MOST


def check_params(params: object) -> None:
    """Raise a ValueError unless these are hyperparameters by name."""
    if not isinstance(params, dict):
        raise ValueError(f"params should be an object, is {params!r}")
    for name, value in params.items():
        if not is_number(value):
            raise ValueError(f"{name} among the params should be a number, is {value!r}")


def _check_config(row: Row) -> None:
    for key in ("method", "data", "model"):
        if not isinstance(row[key], str):
            raise ValueError(f"{key} should be a string, is {row[key]!r}")
    for key in ("date", "commit"):
        if not isinstance(row.get(key), str | None):
            raise ValueError(f"{key} should be a string or null, is {row[key]!r}")
    for key, smallest in _WHOLE.items():
        if key in row and not is_count(row[key], smallest):
            raise ValueError(f"{key} should be a whole number of at least {smallest}, is {row[key]!r}")
    check_params(row.get("params", {}))
    for key in ("machine", "versions", "optimizer"):
        if not isinstance(row.get(key, {}), dict):
            raise ValueError(f"{key} should be an object, is {row[key]!r}")
    if not is_number(row["lr"]) or row["lr"] <= 0:
        raise ValueError(f"lr should be a positive number, is {row['lr']!r}")
    _check_amount(row, "initial_loss", 0.0)


def _check_epoch(row: Row, before: RunFile) -> None:
    epoch = len(before.rows) + 1
    if row["epoch"] != epoch:
        raise ValueError(f"epoch should be {epoch}, is {row['epoch']!r}")
    if before.finished:
        raise ValueError(f"the run ended with epoch {epoch - 1}")
    if not isinstance(row.get("diverged", False), bool):
        raise ValueError(f"diverged should be true or false, is {row['diverged']!r}")
    _check_amount(row, "lr", 0.0)
    for key in ("seconds", "train_loss", "test_loss"):
        if key == "seconds" or row[key] is not None or not row.get("diverged"):
            _check_amount(row, key, None)
    if before.rows and row["seconds"] < before.rows[-1]["seconds"]:
        raise ValueError(f"seconds should not fall, are {row['seconds']!r} after {before.rows[-1]['seconds']!r}")


def _check_amount(row: Row, key: str, absent: float | None) -> None:
    """Seconds, rates and cross-entropies are not negative."""
    value: Any = row.get(key, absent)
    if not is_number(value) or value < 0:
        raise ValueError(f"{key} should be a number of at least 0, is {value!r}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep the folder to this process, where the system has file locks; the lock ends with the process."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                raise BlockingIOError  # who held the lock has taken the file away, and a third one may hold it
        except OSError:
            raise BenchError(f"another process is writing to {folder}; wait for it, or choose another folder") from None
        try:
            yield
        finally:
            (folder / ".lock").unlink(missing_ok=True)


def run_files(folder: Path) -> list[Path]:
    """The paths of all runs in a folder and the folders in it, in order."""
    return sorted(path for path in folder.rglob("*.jsonl") if path.name != _TRIALS)


def read_folder(folder: Path) -> list[RunFile]:
    """All runs in a folder and the folders in it, by path."""
    if not folder.is_dir():
        raise BenchError(f"{folder} is not a folder")
    paths = run_files(folder)
    if not paths:
        raise BenchError(f"{folder} holds no runs (*.jsonl); `locobench compare --out {folder}` makes some")
    return [read(path) for path in paths]


def prepare_folder(folder: Path) -> None:
    """Make the folder, and make sure that files can be written to it before hours are spent."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have tried at the same time
    except OSError as error:
        raise BenchError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a neighbour of `path`, then put it in its place in one go, with the rights that were there."""
    target = path.resolve()  # a link stays one
    neighbour = target.with_name(f"{target.name}.{os.getpid()}.part")
    for left in target.parent.glob(f"{escape(target.name)}.*.part"):  # by a process that was killed
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()
    try:
        write(neighbour)
        with open(neighbour, "rb+") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, neighbour)
        os.replace(neighbour, target)
    except BaseException as error:
        neighbour.unlink(missing_ok=True)  # half a file would take the room that a full disk lacks
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing to an open file does not say to which
        raise
