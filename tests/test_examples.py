"""Every example runs as it stands and reports a falling loss."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
TRAINERS = ("accelerate", "lightning", "transformers")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # Lightning's own, and of its loaders
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, capsys):
    source = example.read_text()
    assert len(source.splitlines()) < 60
    for package in re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE):
        if package in TRAINERS:
            pytest.importorskip(package, reason="pip install 'torchloco[integrations]'")
    runpy.run_path(str(example), run_name="__main__")
    losses = [float(value) for value in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) > 1
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["accelerate_loop", "gpt", "hf_trainer", "image_classifier", "lightning_module"])
def test_only_the_optimizers_line_knows_of_it(name):
    """Besides the import; what it replaces stands beside it."""
    [path] = [path for path in EXAMPLES if path.stem == name]
    source = path.read_text().split('"""', 2)[2]
    assert len(re.findall("LocoProp", source)) == 2
    assert re.search(r"# torch\.optim\.AdamW\((model|self)\.parameters\(\), lr=\S+\)$", source, re.MULTILINE)
