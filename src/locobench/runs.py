"""Carrying out a run so that an interruption costs at most the epoch under way."""

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from locobench import reconstructions
from locobench.data import Images
from locobench.errors import BenchError
from locobench.libraries import Library
from locobench.methods import Method, find
from locobench.methods.method import described
from locobench.provenance import also, commit, today
from locobench.runfile import Row, RunFile, checked, read, write_atomically
from locobench.settings import Settings, machine, versions
from locobench.stepping import evaluating
from locobench.training import Diverged, Training


class Watcher(Protocol):
    """What follows a run: the command line's progress display, for one."""

    def on_step(self, loss: float) -> None:
        """A step was taken; off the clock."""

    def on_epoch(self, row: Row, fresh: bool) -> None:
        """An epoch ended, or (not `fresh`) was found in the file of an earlier call."""


def open_run(settings: Settings, folder: Path, name: str | None = None) -> RunFile | None:
    """The run of that method (or of that name) in the folder, or None; an error if its settings are other ones."""
    path = _path(settings, folder, name)
    if not path.exists():
        return None
    run = read(path)
    _refuse_differences(run, settings.as_row(), run.config)
    if not run.finished:
        # The promise of the very same losses, and times of one machine only, hold a run in one place.
        _refuse_differences(run, {"versions": versions(), "machine": machine(settings.device)}, run.config)
    return run


def carry_out(
    settings: Settings, images: Images, folder: Path, watcher: Watcher | None = None, name: str | None = None
) -> RunFile:
    """Do a run, or what is left of it.

    Nothing is repeated that the folder already holds: a finished run is returned as it is, an interrupted one
    goes on after the last epoch it finished and gives the losses that it would have given in one go.

    Args:
        settings: Of the run.
        images: Its data.
        folder: For its file.
        watcher: Is told of steps and epochs.
        name: Of the file, without its suffix; by default the method's.
    """
    run = open_run(settings, folder, name)
    if run is None or not run.finished:
        training = Training(settings, images)
        if run is None:
            run = RunFile(_path(settings, folder, name), _config(settings, training, images), [])
            run.checkpoint.unlink(missing_ok=True)  # of a run whose file was deleted: to begin it anew
        noted = run.config.get("optimizer", {})  # other versions may note less of it
        now = {key: value for key, value in described(training.optimizer).items() if key in noted}
        _refuse_differences(run, {"optimizer": now}, {"optimizer": {key: noted[key] for key in now}})
        run.config["commit"] = also(run.config.get("commit"), commit())
        _resume(run, training)
        run.save()
        _report(run.rows, watcher)
        _train(run, training, watcher)
    else:
        _report(run.rows, watcher)
    run.checkpoint.unlink(missing_ok=True)
    return run


def refuse_other_version(run: RunFile, method: Method) -> None:
    """Raise where a method is not what it was when this run was made: hyperparameters that nobody chooses differ.

    What one of the two does not mention is not compared, nor what was chosen: learning rate and searched ones.

    Raises:
        BenchError: Names the file, the differences and the commit that wrote it.
    """
    then = run.config.get("optimizer", {})
    chosen = {"lr", *run.config["params"]}
    try:
        now = method.options(run.config["lr"], run.config["params"])
    except (ValueError, TypeError) as error:
        raise BenchError(
            f"{run.path}, line 1 is damaged ({method.name} does not take its lr and params: {error}); restore the file"
        ) from error
    differing = [
        f"{key} was {then[key]!r}, is {value!r}"
        for key, value in now.items()
        if key in then and key not in chosen and then[key] != value
    ]
    if differing:
        raise BenchError(
            f"{run.path} was made with another {method.name} ({'; '.join(differing)}): runs of both do not mix. Go on "
            f"with the version that made it (commit {run.config.get('commit')}), or choose another folder"
        )


def _path(settings: Settings, folder: Path, name: str | None) -> Path:
    return folder / f"{name or settings.method}.jsonl"


def _train(run: RunFile, training: Training, watcher: Watcher | None) -> None:
    on_step = watcher.on_step if watcher else None
    if not run.finished:
        training.warm_up()
    try:
        while not run.finished:
            try:
                row = training.train_epoch(on_step)
            except Diverged as reason:
                row = _diverged_row(training, str(reason))
            run.rows.append(row)
            if not run.finished:
                # The checkpoint comes first and holds the rows as well: an interruption between the two
                # writes does not cost the epoch.
                _save_checkpoint(run, training)
            elif not run.diverged:
                with evaluating(training.optimizer):
                    path = reconstructions.path_of(run.path)
                    reconstructions.save(training.model, training.test, training.shape, path)
            run.save()
            if watcher:
                watcher.on_epoch(row, fresh=True)
    finally:
        training.close()


def _save_checkpoint(run: RunFile, training: Training) -> None:
    state = {"settings": training.settings.as_row(), "rows": run.rows, **training.state_dict()}
    write_atomically(run.checkpoint, lambda path: _save(state, path))


def _save(state: Row, path: Path) -> None:
    """As torch.save, which hides what the system says (a full disk, say) behind an error of its own."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def _resume(run: RunFile, training: Training) -> None:
    """Put rows and training back to the last epoch that was finished."""
    if not run.checkpoint.exists():
        if run.rows:
            raise BenchError(
                f"{run.path} has {len(run.rows)} epochs of {run.config['epochs']} and no checkpoint to go on from; "
                f"restore {run.checkpoint.name}, or delete the file to begin this run anew"
            )
        return
    try:
        with safe_globals(_classes(run.checkpoint, find(training.settings.method).library)):
            state = torch.load(run.checkpoint, map_location=training.device, weights_only=True)
        settings = training.settings.as_row()
        if state.pop("settings", settings) != settings:  # earlier versions did not note them
            raise ValueError("it is of another run")
        rows = checked(run, state.pop("rows"))
        training.load_state_dict(state)
    except Exception as error:  # torch.load fails in as many ways as there are kinds of damage
        raise BenchError(
            f"{run.checkpoint} is damaged ({_reason(error)}); delete it and {run.path.name} to begin the run anew"
        ) from error
    run.rows = rows


def _reason(error: Exception) -> str:
    """In one line; what torch says of a damaged file fills a page."""
    return str(error) if isinstance(error, ValueError) and len(str(error)) < 200 else type(error).__name__


def _classes(checkpoint: Path, library: Library | None) -> list[Any]:
    """What a checkpoint holds of the classes of its method's own library: Shampoo keeps its state in such objects."""
    if library is None:
        return []
    known = f"{library.load().__name__}."
    names = [name for name in get_unsafe_globals_in_checkpoint(checkpoint) if name.startswith(known)]
    return [getattr(import_module(module), name) for module, _, name in (one.rpartition(".") for one in names)]


def _report(rows: list[Row], watcher: Watcher | None) -> None:
    for row in rows:
        if watcher:
            watcher.on_epoch(row, fresh=False)


def _diverged_row(training: Training, message: str) -> Row:
    return {
        "method": training.settings.method,
        "epoch": training.epoch + 1,
        "seconds": training.seconds,
        "train_loss": None,
        "test_loss": None,
        "diverged": True,
        "message": message,
    }


def _config(settings: Settings, training: Training, images: Images) -> Row:
    return {
        **settings.as_row(),
        "train_images": len(images.train),
        "test_images": len(images.test),
        "pixels": images.train.shape[1],
        "parameters": training.parameters,
        "steps_per_epoch": training.steps_per_epoch,
        "initial_loss": training.initial_loss(),
        "optimizer": described(training.optimizer),
        "versions": versions(),
        "machine": machine(settings.device),
        "date": today(),
        "commit": commit(),
    }


def _refuse_differences(run: RunFile, wanted: Row, found: Row) -> None:
    differing = [
        f"{key} was {found.get(key)!r}, is {value!r}" for key, value in wanted.items() if found.get(key) != value
    ]
    if differing:
        raise BenchError(
            f"{run.path} is of a run with another configuration ({'; '.join(differing)}); "
            "choose another --out, or delete the file"
        )
