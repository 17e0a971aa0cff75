"""Every example runs as it stands and reports a falling loss."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, capsys):
    assert len(example.read_text().splitlines()) < 60
    runpy.run_path(str(example), run_name="__main__")
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) > 1
    assert losses[-1] < losses[0]
