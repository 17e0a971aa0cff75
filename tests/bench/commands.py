"""The command line as the tests call it."""

from typer.testing import CliRunner, Result

from locobench.cli import app


def run(*arguments: object, **environment: str) -> Result:
    """What `locobench ARGUMENTS` did."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def refused(*arguments: object) -> str:
    """The one line that a refused command says."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("locobench: ")
    return line
