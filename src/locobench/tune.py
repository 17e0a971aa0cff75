"""The job of `locobench tune`: a search in this process or in several, with a live table."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from locobench import data, tune_table
from locobench import study as studies
from locobench.compare import caution
from locobench.data import Images
from locobench.errors import BenchError
from locobench.ledger import Ledger
from locobench.methods import Method, find, find_all
from locobench.plain_errors import said
from locobench.runfile import Row
from locobench.settings import use_device
from locobench.study import Study
from locobench.tuning import Search, check

_REDRAW = 0.5  # seconds


def tune(
    study: Study, methods: Sequence[Method], absent: Sequence[Method], widenings: int, workers: int, console: Console
) -> None:
    """Carry out all trials that are left; end with the table and with warnings of best settings on an edge.

    Args:
        study: The study.
        methods: To be tuned.
        absent: Methods whose library is missing; they get a line in the table.
        widenings: How often a space may grow.
        workers: Processes that work on it.
        console: For table and warnings.
    """
    use_device(study.content["device"], study.content["threads"])
    images = load_images(study)
    study = study.with_methods([method.name for method in methods])
    if study.content["device"] == "cpu":
        caution(methods, console)
    check(study, methods)  # here, so that several workers need not all say the same
    with Display(study, methods, absent, console) as display:
        if workers == 1:
            Search(study.folder, methods, images, widenings, display).run()
        else:
            _share(study.folder, methods, widenings, workers, display)
        display.finish()


def load_images(study: Study) -> Images:
    """The images of the study's problem, enough for a batch."""
    content = study.content
    images = data.load(content["data"])
    if content["train_size"] is not None:
        images = images.first(content["train_size"])
    if content["batch_size"] > len(images.train):
        raise BenchError(f"--batch-size {content['batch_size']} is more than the {len(images.train)} training images")
    return images


def _share(folder: Path, methods: Sequence[Method], widenings: int, workers: int, display: "Display") -> None:
    """Let processes do the work, and follow what they write down."""
    names = ",".join(method.name for method in methods)
    context = multiprocessing.get_context("spawn")
    arguments = (folder, names, widenings, os.getpid())
    processes: list[BaseProcess] = [context.Process(target=work, args=arguments) for _ in range(workers)]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            display.on_wait()
            sleep(_REDRAW)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    codes = [process.exitcode for process in processes if process.exitcode]
    if codes:
        raise BenchError(
            f"{len(codes)} of {workers} workers stopped (exit code {codes[0]}); the same command continues"
        )


def work(folder: Path, names: str, widenings: int, parent: int) -> None:
    """What a worker's process does; errors of the user's are one line here as well."""
    try:
        study = studies.load(folder)
        use_device(study.content["device"], study.content["threads"])
        Search(folder, find_all(names), load_images(study), widenings, _Quiet(parent)).run()
    except (BenchError, OSError) as error:
        print(f"locobench: {said(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class _Quiet:
    """A worker's observer: it shows nothing, and stops when nobody follows the work any more."""

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def on_trial(self, method: str, number: int) -> None:
        """Nothing to show."""

    def on_step(self, loss: float) -> None:
        """End with the process that began this one, even if it was killed."""
        if os.getppid() != self._parent:
            raise KeyboardInterrupt

    def on_epoch(self, row: Row, fresh: bool) -> None:
        """Nothing to show."""

    def on_end(self, method: str, number: int) -> None:
        """Nothing to show."""

    def on_wait(self) -> None:
        """As in a step."""
        self.on_step(0.0)


class Display(AbstractContextManager["Display"]):
    """The live table. It is redrawn by hand, between steps: a thread would run on the benchmark's clock."""

    def __init__(self, study: Study, methods: Sequence[Method], absent: Sequence[Method], console: Console) -> None:
        self._study, self._methods, self._absent, self._console = study, methods, absent, console
        self._ledger = Ledger(study.folder)
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0
        self._now = "starting"
        self._latest = ""
        self._ended = self._all_ended()
        self._table = self._make_table()

    def __enter__(self) -> "Display":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._ledger.close()

    def on_trial(self, method: str, number: int) -> None:
        """Say which trial is under way."""
        self._now, self._latest = f"{find(method).label}, trial {number}", "starting"
        self._renew()

    def on_step(self, loss: float) -> None:
        """Show the step that was taken."""
        if monotonic() - self._drawn > _REDRAW:
            self._latest = f"batch loss {loss:.1f}"
            self._draw()

    def on_epoch(self, row: Row, fresh: bool) -> None:
        """Show the epoch that ended."""
        if row["train_loss"] is not None:
            self._now = f"{self._now.split(', epoch')[0]}, epoch {row['epoch']}/{self._study.content['epochs']}"
            self._latest = f"train loss {row['train_loss']:.2f}"
            self._draw()

    def on_end(self, method: str, number: int) -> None:
        """Say how the trial ended."""
        self._tell_ended()

    def on_wait(self) -> None:
        """Look at what other processes have done."""
        self._now, self._latest = "waiting for the other processes", ""
        self._tell_ended()

    def finish(self) -> None:
        """The last table, and the warnings."""
        self._tell_ended()
        self._live.stop()
        self._study = studies.load(self._study.folder)
        self._console.print(self._make_table())
        for warning in tune_table.warnings(self._study, self._ledger, self._methods):
            self._console.print(warning, style="yellow", highlight=False, markup=False, soft_wrap=True)
        written = self._study.folder / "trials.jsonl"
        self._console.print(f"written: {written}", highlight=False, markup=False, soft_wrap=True)

    def _tell_ended(self) -> None:
        """A line for each trial that has ended since the last look."""
        ended = self._all_ended()
        for method, number in sorted(ended - self._ended):
            trials = self._ledger.trials(method)
            line = tune_table.sentence(method, trials[number], trials)
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        self._ended = ended
        self._renew()

    def _all_ended(self) -> set[tuple[str, int]]:
        return {
            (method.name, trial.number)
            for method in self._methods
            for trial in self._ledger.trials(method.name)
            if trial.state.is_finished()
        }

    def _make_table(self) -> Table:
        return tune_table.table(self._study, self._ledger, self._methods, self._absent)

    def _renew(self) -> None:
        self._study = studies.load(self._study.folder)
        self._table = self._make_table()
        self._draw()

    def _draw(self) -> None:
        self._drawn = monotonic()
        self._table.caption = ": ".join(part for part in (self._now, self._latest) if part)
        if self._console.is_terminal:
            self._live.update(self._table, refresh=True)
