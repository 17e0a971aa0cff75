"""How commands report what a user can mend: one line, no traceback."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from locobench.errors import BenchError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def said(error: OSError) -> str:
    """What the system refused, and of which file."""
    hint = "; make room, then the same command continues" if error.errno in _FULL else ""
    return f"{error.filename or 'input or output'}: {error.strerror or error}{hint}"


@contextmanager
def plain_errors(resumable: bool = False) -> Iterator[None]:
    """Errors of the user's as one line and exit code 2, Ctrl-C as 130; bugs keep their traceback."""
    try:
        yield
    except BenchError as error:
        typer.echo(f"locobench: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"locobench: {said(error)}", err=True)
        raise typer.Exit(2) from None
    except UnicodeEncodeError as error:
        typer.echo(
            f"locobench: {error.object!a} cannot be written as {error.encoding}; rename the file or folder", err=True
        )
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        hint = "; finished epochs are kept, the same command continues" if resumable else ""
        typer.echo(f"\nlocobench: interrupted{hint}", err=True)
        raise typer.Exit(130) from None
