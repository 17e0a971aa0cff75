"""What the tests of reports share."""

import json
from pathlib import Path

from commands import run

from locobench import runfile
from locobench.report import page, write
from locobench.report.results import load
from locobench.report.summary import summarize


def shown(*arguments: object) -> str:
    """What a command that succeeds writes, in wide lines."""
    result = run(*arguments, COLUMNS="200")
    assert result.exit_code == 0, result.output
    return result.stdout


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
