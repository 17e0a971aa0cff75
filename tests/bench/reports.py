"""What the tests of reports share."""

import json
from pathlib import Path

from typer.testing import CliRunner

from locobench import runfile
from locobench.cli import app
from locobench.report import page, write
from locobench.report.study import load
from locobench.report.summary import summarize


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def page_of(folder: Path) -> str:
    """The page alone, which is quicker than all that the command draws."""
    study = load(folder)
    return page.render(study, summarize(study), write.title_of(study), "the command", None)


def change_rows(path: Path, change) -> None:
    """Rewrite a run file."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def last_losses(folder: Path, method: str) -> list[float]:
    return [runfile.read(path).rows[-1]["train_loss"] for path in sorted(folder.glob(f"best/*/{method}.jsonl"))]
