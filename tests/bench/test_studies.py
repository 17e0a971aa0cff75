"""The studies' models train; their figures are not repeated here."""

import importlib
import math
from pathlib import Path

import pytest

STUDIES = Path(__file__).parent.parent.parent / "studies"


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(STUDIES)
    return importlib.import_module("models")


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["adamw", "muon", "locoprop-m", "exact-muon"])
def test_a_gpt_trains(models, method):
    problem = models.build("gpt", 0)
    problem.test = tuple(part[:20] for part in problem.test)
    result = models.train(problem, models.METHODS[method], 1e-4, seed=0, steps=3)
    assert result["failure"] is None
    assert len(result["losses"]) == 3
    assert result["losses"][0] == pytest.approx(math.log(100), abs=1)  # about as many characters, none known yet
    assert 0 <= result["test_accuracy"] <= 1


def test_a_run_that_fails_says_so(models):
    problem = models.build("gpt", 0)
    result = models.train(problem, models.METHODS["adamw"], math.inf, seed=0, steps=3)
    assert result["failure"] == "the loss is not finite"
    assert "test_loss" not in result


def test_the_documented_tables_are_those_of_the_files(models):
    page = (STUDIES.parent / "docs" / "models.md").read_text()
    tables = models.tables()
    assert set(tables) == {"cnn", "gpt", "mlp", "vit"}
    for table in tables.values():
        assert table in page
