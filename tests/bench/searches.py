"""What the tests of searches share, other processes among it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from test_runs import some_images

from locobench import curves, runfile, tuned
from locobench.methods import find_all
from locobench.plain_errors import plain_errors
from locobench.runfile import Row
from locobench.study import open_study
from locobench.tuning import Search

TINY = {"data": "curves", "epochs": 2, "trials": 4, "batch_size": 25, "train_size": 50, "threads": 1}


class Log:
    """Notes what happens, and may kill the process in an epoch of a trial."""

    def __init__(self, kill: tuple[str, int, int] | None = None, file: Path | None = None) -> None:
        self.began: list[tuple[str, int]] = []
        self.fresh: list[tuple[str, int, int]] = []
        self.kill, self.file = kill, file

    def on_trial(self, method: str, number: int) -> None:
        self.began.append((method, number))
        if self.file is not None:
            self.file.write_text(json.dumps(self.began))

    def on_step(self, loss: float) -> None:
        pass

    def on_epoch(self, row: Row, fresh: bool) -> None:
        epoch = (*self.began[-1], row["epoch"])
        if fresh:
            self.fresh.append(epoch)
        if epoch == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_end(self, method: str, number: int) -> None:
        pass

    def on_wait(self) -> None:
        pass


def search(folder: Path, methods: str, log: Log | None = None, widen: int = 0, **wanted: Any) -> Log:
    log = log or Log()
    open_study(folder, {**TINY, **wanted}, None)
    Search(folder, find_all(methods), some_images(), widen, log).run()
    return log


def results(folder: Path) -> dict[tuple[str, int], list[Any]]:
    """Of every trial's run file, what does not depend on the clock."""
    return {
        (path.parent.name, int(path.stem)): [
            run.config["lr"],
            run.config["params"],
            [(row["epoch"], row["train_loss"], row["test_loss"]) for row in run.rows],
        ]
        for path in sorted(folder.glob("trials/*/*.jsonl"))
        for run in [runfile.read(path)]
    }


def exported(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    return sorted(rows, key=lambda row: (row["method"], row["trial"]))


def subprocess_of(folder: Path, *arguments: object, stderr: int | None = None) -> "subprocess.Popen[bytes]":
    program = "import sys; sys.path.insert(0, sys.argv[1]); import searches; searches.child(*sys.argv[2:])"
    command = [sys.executable, "-W", "ignore", "-c", program, Path(__file__).parent, folder, *arguments]
    return subprocess.Popen([str(part) for part in command], stderr=stderr)


def child(folder: str, what: str, *more: str) -> None:
    """What a test's other process does."""
    curves.TRAIN_IMAGES, curves.TEST_IMAGES = 60, 20
    if what == "compare":
        from locobench import compare

        compare._Display.on_epoch = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        tuned.compare_tuned(Path(folder), [1, 2], None, Console(quiet=True))
    if what == "full":
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(more[0]), resource.RLIM_INFINITY))
        try:
            with plain_errors(resumable=True):
                search(Path(folder), "sgd,adam")
        except typer.Exit as ended:
            os._exit(ended.exit_code)
    kill = (more[0], int(more[1]), int(more[2])) if what == "kill" else None
    search(Path(folder), "sgd,adam", Log(kill, Path(folder) / "began.json"))
