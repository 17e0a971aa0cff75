"""`locobench show`, and what `compare` ends with."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from locobench.plain_errors import plain_errors

if TYPE_CHECKING:
    from locobench.methods import Method


def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with the run files (*.jsonl), or of folders.")],
    best: Annotated[bool, typer.Option("--best", help="Only the best run of each method, as after a search.")] = False,
    speed: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file of `locobench speed`: take prices from it, not from the runs."),
    ] = None,
) -> None:
    """Draw the table and the plots of a folder of runs again, from its files alone.

    Works during a comparison as well: it shows what is finished so far.

    Example: locobench show runs/curves-standard-tanh-6-seed0
    """
    with plain_errors():
        draw(folder, best=best, speed=speed)


def draw(folder: Path, *, best: bool = False, speed: Path | None = None, absent: Sequence["Method"] = ()) -> None:
    """Draw table and plots, and print the table."""
    from locobench import table

    console = Console()
    drawn = table.draw(folder, best=best, speed=speed, absent=absent)
    console.print()
    console.print(drawn.table)
    for note in drawn.notes:
        console.print(note, style="dim", highlight=False, markup=False)
    for file in drawn.files:
        # One path a line, never wrapped: to be copied or clicked.
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)
