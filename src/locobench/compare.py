"""The main job: the same autoencoder trained by each of several methods, with live progress."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from locobench import data
from locobench.errors import BenchError
from locobench.methods import METHODS, Method, find
from locobench.runfile import Row, RunFile, locked, prepare_folder, read, run_files
from locobench.runs import carry_out, open_run
from locobench.settings import Settings, use_device
from locobench.table import label


def compare(all_settings: list[Settings], folder: Path, console: Console) -> list[RunFile]:
    """Carry out the runs one after the other; whatever the folder holds already is kept.

    Everything that can be wrong with the request is found before the first run begins.

    Args:
        all_settings: Of the runs; they share data and device.
        folder: For the run files.
        console: For the progress.
    """
    first = all_settings[0]
    use_device(first.device, first.threads)
    for settings in all_settings:
        find(settings.method).check(settings.lr, settings.params)
    if first.device == "cpu":
        caution([find(settings.method) for settings in all_settings], console)
    for path in run_files(folder):
        read(path)  # the table at the end is of all that is there
    prepare_folder(folder)
    with locked(folder):
        return _carry_out_all(all_settings, folder, console)


def caution(methods: Iterable[Method], console: Console, *decided: str) -> None:
    """Say what to know of methods before they run on this machine's processor, and what was decided on them."""
    for method in methods:
        if method.caution is not None:
            line = ", ".join([method.caution, *decided])
            console.print(f"{method.label}: {line}", style="yellow", markup=False, soft_wrap=True)


def _carry_out_all(all_settings: list[Settings], folder: Path, console: Console) -> list[RunFile]:
    first = all_settings[0]
    for settings in all_settings:
        open_run(settings, folder)
    images = data.load(first.data)
    if first.train_size is not None:
        images = images.first(first.train_size)
    steps = len(images.train) // first.batch_size
    if steps == 0:
        raise BenchError(f"--batch-size {first.batch_size} is more than the {len(images.train)} training images")
    with _Display(all_settings, steps, console) as display:
        return [display.follow(settings, images, folder) for settings in all_settings]


def parse_lrs(options: list[str]) -> dict[str, float]:
    """The learning rates of `--lr METHOD=VALUE` options, by method."""
    lrs = {}
    for option in options:
        name, _, value = option.partition("=")
        method = find(name.strip())
        try:
            lrs[method.name] = float(value)
        except ValueError:
            raise BenchError(f"--lr {option!r} is not of the form METHOD=NUMBER, such as adam=1e-3") from None
    return lrs


def parse_params(options: list[str]) -> dict[str, dict[str, float]]:
    """The hyperparameters of `--set METHOD.NAME=VALUE` options, by method and name."""
    params: dict[str, dict[str, float]] = {}
    for option in options:
        place, _, value = option.partition("=")
        method, _, name = place.partition(".")
        try:
            params.setdefault(find(method.strip()).name, {})[name.strip()] = float(value)
        except ValueError:
            raise BenchError(
                f"--set {option!r} is not of the form METHOD.NAME=NUMBER, such as adam.beta1=0.8"
            ) from None
    return params


class _Display(AbstractContextManager["_Display"]):
    """Progress over all runs; steps are weighted by what they cost, so that the time left is about right.

    It is redrawn by hand, between steps: a thread that redraws would run on the benchmark's clock.
    """

    def __init__(self, all_settings: list[Settings], steps: int, console: Console) -> None:
        self._console = console
        self._steps = steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            auto_refresh=False,
            transient=True,
        )
        total = sum(METHODS[s.method].cost * s.epochs * steps for s in all_settings)
        self._task = self._progress.add_task("", total=total)
        self._drawn = 0.0
        self._settings = all_settings[0]
        self._before = 0.0  # in steps of Adam: the runs before this one
        self._done = 0  # steps of this run
        self._latest = ""

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def follow(self, settings: Settings, images: data.Images, folder: Path) -> RunFile:
        """Carry out one run on display."""
        self._settings, self._done, self._latest = settings, 0, "starting"
        self._draw(now=True)
        run = carry_out(settings, images, folder, self)
        self._before += METHODS[settings.method].cost * settings.epochs * self._steps
        self._done = 0
        self._say(run)
        return run

    def on_step(self, loss: float) -> None:
        """Show the step that was taken."""
        self._done += 1
        self._latest = f"epoch {self._done // self._steps + 1}/{self._settings.epochs}, batch loss {loss:.1f}"
        self._draw()

    def on_epoch(self, row: Row, fresh: bool) -> None:
        """Show the epoch that ended; where nothing can be drawn over, print it."""
        self._done = row["epoch"] * self._steps
        if fresh and not self._console.is_terminal and row["train_loss"] is not None:
            self._console.print(
                f"{METHODS[row['method']].label}: epoch {row['epoch']}/{self._settings.epochs}, "
                f"train loss {row['train_loss']:.2f}, {row['seconds']:.1f} s"
            )
        if not fresh:
            self._draw(now=True)

    def _say(self, run: RunFile) -> None:
        last = run.rows[-1]
        if run.diverged:
            self._console.print(f"[bold]{label(run)}[/] diverged in epoch {last['epoch']}", highlight=False)
            return
        self._console.print(
            f"[bold]{label(run):14}[/] train {last['train_loss']:8.2f}   test {last['test_loss']:8.2f}   "
            f"{last['seconds']:7.1f} s   lr {run.config['lr']:.3g}",
            highlight=False,
        )

    def _draw(self, now: bool = False) -> None:
        if not now and monotonic() - self._drawn < 0.2:
            return
        self._drawn = monotonic()
        method = METHODS[self._settings.method]
        self._progress.update(
            self._task,
            description=f"[bold]{method.label}[/] {self._latest}",
            completed=self._before + method.cost * self._done,
            refresh=True,
        )
