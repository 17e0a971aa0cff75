"""Adding a method is as the documentation says, and every one does what its entry claims."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reports import change_rows
from test_runs import RESULTS, SETTINGS, some_images

from locobench import methods, problems, runfile, runs, spaces, styles
from locobench.errors import BenchError
from locobench.methods import METHODS, Method
from locobench.report.results import load
from locobench.report.summary import summarize
from locobench.stepping import evaluating
from locobench.training import Training

DOCS = (Path(__file__).parent.parent.parent / "docs" / "benchmark.md").read_text(encoding="utf-8")


def test_the_documented_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (entry,) = re.findall(r"^(Method\(.*?)```", DOCS, re.DOTALL | re.MULTILINE)
    (space,) = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert len(entry.splitlines()) + len(space.splitlines()) <= 10
    method = eval(entry, {"Method": Method, "torch": torch})
    monkeypatch.setitem(METHODS, method.name, method)
    searched = spaces.space(method.name, "mnist", space)
    assert set(searched) <= {"lr", *method.params}
    settings = replace(SETTINGS, method=method.name, lr=method.lr, params={"beta1": 0.8})
    run = runs.carry_out(settings, some_images(), tmp_path)
    assert run.finished
    assert run.config["params"] == {"beta1": 0.8}
    assert run.config["optimizer"]["betas"] == [0.8, 0.999]


def test_a_method_in_a_list_is_of_its_family(study: Path, monkeypatch: pytest.MonkeyPatch):
    """And may be the best first-order method of a report."""
    assert methods.family("adamax") == "other"
    adamax = replace(METHODS["adam"], name="adamax", label="Adamax")
    for known in (METHODS, methods.PRICED):
        monkeypatch.setitem(known, "adamax", adamax)
    monkeypatch.setitem(methods._LISTS, "first-order", [*methods.FIRST_ORDER_METHODS, adamax])
    for path in study.glob("best/*/adam.jsonl"):
        change_rows(path, lambda rows: [{**row, "method": "adamax"} for row in rows])
    best = summarize(load(study)).best_first_order
    assert best is not None
    assert best.label == "Adamax"


def test_every_method_has_a_look_of_its_own():
    looks = [styles.style(name) for name in methods.PRICED]
    assert len(set(looks)) == len(looks)
    assert len({look.colour for look in looks}) == len(looks)


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("shampoo", "graft_type", 3),
        ("shampoo", "preconditioning_compute_steps", 10),
        ("muon", "AdamW.lr", 1e-3),
        ("muon", "Muon.ns_steps", 5),
        ("kfac", "every", 10),
    ],
)
def test_what_nobody_chooses_is_noted_as_well(method: str, name: str, value: float):
    library = METHODS[method].library
    if library is not None:
        pytest.importorskip(library.module)
    assert METHODS[method].options(1e-3, {})[name] == value


@pytest.mark.parametrize("method", ["adamw", "nadam", "schedule-free", "foof-curvlinops"])
def test_new_methods_learn(tmp_path: Path, method: str):
    library = METHODS[method].library
    if library is not None:
        pytest.importorskip(library.module)
    settings = replace(SETTINGS, method=method, lr=1e-2)
    run = runs.carry_out(settings, some_images(), tmp_path)
    assert run.rows[-1]["train_loss"] < run.rows[0]["train_loss"]


def test_schedule_free_is_evaluated_at_its_average():
    pytest.importorskip("schedulefree")
    training = Training(replace(SETTINGS, method="schedule-free", lr=1e-2), some_images())
    row = training.train_epoch()
    at_training_weights = problems.mean_loss(training.model, training.train)
    assert training.optimizer.param_groups[0]["train_mode"]
    with evaluating(training.optimizer):
        assert problems.mean_loss(training.model, training.train) == pytest.approx(row["train_loss"], rel=1e-5)
    assert at_training_weights != pytest.approx(row["train_loss"], rel=1e-4)
    assert [training._method.schedule(step, 100) for step in (50, 99)] == [1, 1]


def test_a_file_from_before_hyperparameters_is_one_of_defaults(tmp_path: Path):
    path = runs.carry_out(SETTINGS, some_images(), tmp_path).path
    path.write_text(path.read_text().replace(', "params": {}', ""))
    assert '"params"' not in path.read_text()
    run = runs.open_run(SETTINGS, tmp_path)
    assert run is not None
    assert run.config["params"] == {}
    with pytest.raises(BenchError, match=r"params was \{\}, is \{'beta1': 0.5\}"):
        runs.open_run(replace(SETTINGS, params={"beta1": 0.5}), tmp_path)


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("adam", {"beta3": 0.5}, "unknown hyperparameter 'beta3' of adam; it has: beta1, beta2"),
        ("sgd", {"momentum": 0.5}, "sgd; it has none besides its learning rate"),
        ("adam", {"beta1": 2.0}, "adam does not take beta1 2: Invalid beta parameter"),
        ("locoprop-m", {"activation_lr": -1.0}, "locoprop-m does not take activation_lr -1"),
        ("kfac", {"damping": -1.0}, "kfac does not take damping -1: "),
        ("schedule-free", {"beta1": 0.0}, "schedule-free does not take beta1 0: "),
        ("locoprop-s-exact", {"damping": 1e90}, "locoprop-s-exact does not take damping 1e90: "),
    ],
)
def test_hyperparameters_that_a_method_does_not_take(method: str, params: dict[str, float], message: str):
    library = METHODS[method].library
    if library is not None:
        pytest.importorskip(library.module)
    with pytest.raises(BenchError, match=message):
        METHODS[method].check(1e-3, params)


def test_rates_on_curves_are_those_that_the_search_found():
    best: dict[str, runfile.RunFile] = {}
    for run in runfile.read_folder(RESULTS / "curves-search"):
        name = run.config["method"]
        if not run.diverged and (name not in best or run.rows[-1]["train_loss"] < best[name].rows[-1]["train_loss"]):
            best[name] = run
    assert best.keys() >= {"adam", "kfac", "locoprop-m", "muon", "shampoo", "soap"}
    assert {name: METHODS[name].rate("curves") for name in best} == {name: best[name].config["lr"] for name in best}
