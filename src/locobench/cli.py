"""The `locobench` command."""

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from locobench import __version__
from locobench.commands.compare import compare
from locobench.commands.figure import figure
from locobench.commands.report import export, report
from locobench.commands.show import show
from locobench.commands.speed import speed
from locobench.commands.tune import tune

app = typer.Typer(
    name="locobench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Trains a deep autoencoder with LocoProp and with the usual optimizers, on the same initial weights "
    "and batches, and compares them by epoch, by second and by byte.\n\n"
    "Start with `locobench compare`: it needs no download and ends with a table and two plots.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Show the version, or nothing: the commands do the work."""
    if version:
        typer.echo(f"locobench {__version__}")
        raise typer.Exit


for command in (compare, show, figure, speed, tune, report, export):
    app.command()(command)


def main() -> None:
    """Entry point of the command."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does: a letter that is missing ends no run
    app()
