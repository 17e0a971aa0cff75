"""The commands that only read runs: `report` and `export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from locobench.errors import BenchError
from locobench.plain_errors import plain_errors

README = Path("README.md")


def report(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="DIR...", help="Studies, or folders with run files (*.jsonl) or of such folders; a report each."
        ),
    ] = None,
    speed: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Prices of `locobench speed`. Default: speed.json in DIR or next to it; else the runs' seconds. Given "
            "again, with prices of another machine: a column of its own.",
        ),
    ] = None,
    second_order: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The JSON of `locobench figure second-order`, to be shown on the page too."),
    ] = None,
    readme: Annotated[
        bool,
        typer.Option(
            "--readme",
            help="Also rewrite the block between the comments results:begin and results:end in ./README.md. "
            "Without DIR: from the folders that the block names.",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="With --readme: write nothing, fail where the block is out of date.")
    ] = False,
) -> None:
    """Write a page, plots and a table about studies or runs, from their files alone.

    DIR/report/report.html holds everything in one file and opens without a network: losses against epochs and time,
    a table to sort, the trials of the search, reconstructions, the local losses, and the configuration. Next to it are
    the plots as PNG and the table as Markdown. Works during a study as well.

    Example: locobench report results/curves --speed results/speed.json

    Example: locobench report --readme --check
    """
    with plain_errors():
        from locobench.report import readme as block
        from locobench.report.write import write_all

        if check and not readme:
            raise BenchError("--check goes with --readme")
        chosen, priced = folders or [], speed or []
        if readme and not chosen:
            if priced:
                raise BenchError("--speed needs a DIR; without one the block's own command is used")
            chosen, priced = block.recorded(README)
        if not chosen:
            raise BenchError("name a folder: a study or one with run files, such as runs/curves-standard-tanh-6-seed0")
        if check:
            if not block.is_current(README, chosen, priced):
                raise BenchError(f"the results in {README} are out of date; `locobench report --readme` writes them")
            typer.echo(f"up to date: {README}")
            return
        if readme:
            block.check(README, chosen, priced)
        made = write_all(chosen, speed=priced, second_order=second_order)
        if readme and block.rewrite(README, chosen, priced):
            made.append(README)
        _say(made)


def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run files (*.jsonl), or folders of them.")],
    tensorboard: Annotated[Path, typer.Option(metavar="DIR", help="TensorBoard's log folder.")] = Path(
        "runs/tensorboard"
    ),
) -> None:
    """Write runs as TensorBoard event files: losses, learning rate, configuration, reconstructions.

    Time in TensorBoard is that of training alone. A run that was exported before is replaced.

    Example: locobench export runs/curves-standard-tanh-6-seed0 --tensorboard runs/tensorboard
    """
    with plain_errors():
        from locobench.tensorboard import export as job

        _say(job(runs, tensorboard))


def _say(files: list[Path]) -> None:
    console = Console()
    for file in files:
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)
