"""Runs as TensorBoard event files. Reads run files, runs nothing."""

import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from locobench.errors import BenchError
from locobench.libraries import TENSORBOARD
from locobench.reconstructions import grey, path_of
from locobench.runfile import RunFile, prepare_folder, read, read_folder


def export(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Write each run's losses, learning rate, configuration and reconstructions.

    Args:
        sources: Run files, or folders of them.
        folder: TensorBoard's log folder; a run that is in it already is replaced.

    Returns:
        The folder of each run, which is its name in TensorBoard.

    Raises:
        BenchError: TensorBoard is not installed, or a run cannot be read.
    """
    if TENSORBOARD.missing:
        raise BenchError(f"the export needs tensorboard, which is not installed: {TENSORBOARD.install}")
    for source in sources:
        if not source.exists():
            raise BenchError(f"{source} does not exist; name run files (*.jsonl) or folders of them")
    runs = [run for source in sources for run in (read_folder(source) if source.is_dir() else [read(source)])]
    unique = {run.path.resolve(): run for run in runs}
    prepare_folder(folder)
    root = Path(os.path.commonpath([path.parent for path in unique]))
    return [_write(run, folder / path.relative_to(root).with_suffix("")) for path, run in unique.items()]


def _write(run: RunFile, target: Path) -> Path:
    """Fill a neighbour, then put its events in the place of those that were there; nothing else is touched."""
    target.parent.mkdir(parents=True, exist_ok=True)
    neighbour = Path(tempfile.mkdtemp(prefix=".", suffix=".part", dir=target.parent))
    try:
        with _errors_told_once():
            _fill(run, neighbour)
        target.mkdir(parents=True, exist_ok=True)
        for earlier in target.glob("events.out.tfevents*"):
            earlier.unlink()
        for made in neighbour.iterdir():
            os.replace(made, target / made.name)
    finally:
        shutil.rmtree(neighbour, ignore_errors=True)
    return target


def _fill(run: RunFile, folder: Path) -> None:
    writer: Any = _writer()(str(folder))
    with writer:
        writer.add_text("configuration", f"```json\n{json.dumps(run.config, indent=2)}\n```")
        rows = [row for row in run.rows if row["train_loss"] is not None]
        # TensorBoard's relative time then shows seconds of training, without evaluation and interruptions.
        began = run.path.stat().st_mtime - (rows[-1]["seconds"] if rows else 0.0)
        for row in rows:
            for name, key in (("loss/train", "train_loss"), ("loss/test", "test_loss"), ("lr", "lr")):
                if key in row:
                    writer.add_scalar(name, row[key], row["epoch"], walltime=began + row["seconds"])
        picture = grey(path_of(run.path)) if rows else None
        if picture is not None:
            writer.add_image("reconstructions", np.asarray(picture), rows[-1]["epoch"], dataformats="HW")


@contextmanager
def _errors_told_once() -> Iterator[None]:
    """TensorBoard's thread raises a full disk's error in its caller as well: no traceback of the thread's own then."""
    usual = threading.excepthook
    threading.excepthook = lambda raised: None if isinstance(raised.exc_value, OSError) else usual(raised)
    try:
        yield
    finally:
        threading.excepthook = usual


def _writer() -> type[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
