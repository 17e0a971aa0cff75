"""`locobench tune` and `compare --tuned` on the command line."""

import json
import signal
import sys
from dataclasses import replace
from math import inf, nextafter
from pathlib import Path

import pytest
from commands import refused, run
from searches import exported, subprocess_of

from locobench import curves, runfile, study
from locobench.libraries import Library
from locobench.methods import METHODS


@pytest.fixture
def quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(curves, "TRAIN_IMAGES", 60)
    monkeypatch.setattr(curves, "TEST_IMAGES", 20)


@pytest.mark.usefixtures("quick_curves")
def test_the_command_and_its_best_on_fresh_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nowhere = Library("no_such_module", "pip install no-such-module")
    monkeypatch.setitem(METHODS, "soap", replace(METHODS["soap"], library=nowhere))
    options = ["--data", "curves", "--epochs", 2, "--trials", 2, "--batch-size", 25, "--train-size", 50, "--threads", 1]
    result = run("tune", *options, "--methods", "sgd,soap,adam", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "not installed: pip install no-such-module" in result.stdout
    assert "Adam: trial 0 (lr 0.01, beta1 0.9, beta2 0.999) finished, train loss" in result.stdout
    assert len(exported(tmp_path)) == 4
    losses = {row["method"]: inf for row in exported(tmp_path)}
    best = {}
    for row in exported(tmp_path):
        if row["train_loss"] < losses[row["method"]]:
            losses[row["method"]], best[row["method"]] = row["train_loss"], row

    again = run("tune", "--out", tmp_path)
    assert again.exit_code == 0, again.output
    assert study.methods_of(tmp_path) == ["sgd", "adam"], "it goes on with its own methods"
    assert len(exported(tmp_path)) == 4, "which have had their trials"

    assert subprocess_of(tmp_path, "compare").wait(timeout=120) == -signal.SIGKILL
    (killed,) = tmp_path.glob("best/*/*.jsonl")
    before = runfile.read(killed).rows
    assert [row["epoch"] for row in before] == [1]
    result = run("compare", "--tuned", tmp_path, "--seeds", "1,2")
    assert result.exit_code == 0, result.output
    assert "±" in result.stdout
    assert runfile.read(killed).rows[0] == before[0], "what was done is kept"
    for seed in (1, 2):
        for name, row in best.items():
            trained = runfile.read(tmp_path / "best" / str(seed) / f"{name}.jsonl")
            assert trained.finished
            assert (trained.config["seed"], trained.config["lr"], trained.config["params"]) == (
                seed,
                row["lr"],
                row["params"],
            )
    assert sorted(path.name for path in tmp_path.glob("best/1/*.jsonl")) == ["adam.jsonl", "sgd.jsonl"]

    files = {path: path.read_bytes() for path in tmp_path.glob("best/*/*.jsonl")}
    assert run("compare", "--tuned", tmp_path, "--seeds", "1,2").exit_code == 0
    assert files == {path: path.read_bytes() for path in files}, "nothing is repeated"

    better = {**best["sgd"], "trial": 9, "file": "trials/sgd/0009.jsonl", "lr": 0.5, "train_loss": 0.0, "seconds": 1.0}
    with (tmp_path / "trials.jsonl").open("a") as file:
        file.write(json.dumps(better) + "\n")
    refused = run("compare", "--tuned", tmp_path, "--seeds", "2,3")
    assert refused.exit_code == 2
    paths = " ".join(str(tmp_path / "best" / str(seed) / "sgd.jsonl") for seed in (1, 2))
    assert f"better settings since these runs; take them away, then the same command makes them anew: {paths}" in (
        refused.stderr
    )
    assert files == {path: path.read_bytes() for path in tmp_path.glob("best/*/*.jsonl")}

    for arguments, message in [
        (["--seeds", "0,1"], "--seeds 0 is the one that"),
        (["--seeds", "-1"], "--seeds must be at least 0"),
        (["--epochs", 3, "--lr", "sgd=1"], "--epochs, --lr cannot be given with --tuned"),
        (["--methods", "muon"], "has no finished trial of muon; there are: "),
    ]:
        refused = run("compare", "--tuned", tmp_path, *arguments)
        assert refused.exit_code == 2
        assert message in refused.stderr
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    (tmp_path / "trials.jsonl").write_text("\n".join([*lines[:2], "{half"]))
    assert "trials.jsonl, line 3 is damaged" in run("compare", "--tuned", tmp_path).stderr
    (tmp_path / "trials.jsonl").unlink()
    assert "has no finished trial yet" in run("compare", "--tuned", tmp_path).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", 0], "--trials must be at least 1, got 0"),
        (["--trials", 10**15], "--trials must be at most 100000, got 1000000000000000"),
        (["--epochs", 0], "--epochs must be at least 1, got 0"),
        (["--workers", 0], "--workers must be at least 1, got 0"),
        (["--widen", -1], "--widen must be at least 0, got -1"),
        (["--methods", "adm"], "did you mean 'adam'?"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[object], message: str):
    result = run("tune", "--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists(), "nothing is left behind"


OTHER = {"lr": [1, 2], "x": [1, 2]}  # a space with one name more


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("spaces", 3, "spaces is 3"),
        ("spaces", {"sgd": {}}, "the space of sgd should be an object with a range of lr, is {}"),
        ("spaces", {"sgd": {"lr": [1, "x"]}}, "the space of sgd: lr must be [low, high]"),
        ("spaces", {"sgd": {"lr": [2, 1]}}, "the space of sgd: lr: a log range needs 0 < low < high"),
        ("spaces", {"sgd": {"lr": "12"}}, "the space of sgd: lr must be [low, high]"),
        (
            "spaces",
            {"sgd": {"lr": [1e99, nextafter(1e99, inf)]}},
            "the space of sgd: lr: 1e+99 and 1.0000000000000001e+99",
        ),
        ("widened", [], "widened is []"),
        ("widened", {"sgd": [dict.fromkeys(("space", "new"), OTHER)]}, "widened, sgd is ['lr', 'x']"),
        ("widened", {"sgd": [{}]}, "widened, sgd is {}, should be space and new"),
        ("widened", {"nobody": []}, "widened, nobody is []"),
        ("trials", "x", "trials is 'x', should be a whole number of at least 1"),
        ("trials", True, "trials is True"),
        ("trials", 10**9, "trials is 1000000000, should be at most 100000"),
        ("threads", 10**11, "threads is 100000000000, should be at most 4096"),
        ("data", "\ud800", "half a surrogate pair"),
        ("trials", float("nan"), "NaN is no number"),
        ("epochs", None, "epochs is None"),
        ("batch_size", 0, "batch_size is 0"),
        ("train_size", 2.5, "train_size is 2.5"),
        ("data", 7, "data is 7, should be a string"),
        ("threads", [1], "threads is [1]"),
        ("continued", "often", "continued is 'often', should be a list"),
        ("continued", [1], "an entry of continued is 1"),
        ("commit", 3, "commit is 3, should be a string or null"),
    ],
)
def test_a_damaged_description_is_named(whole: Path, tmp_path: Path, key: str, value: object, reason: str):
    content = json.loads((whole / "study.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps({**content, key: value}))
    for arguments in (["tune", "--out"], ["compare", "--tuned"], ["report"]):
        assert f"study.json is damaged ({reason}" in refused(*arguments, tmp_path)


def test_a_method_of_a_study_that_is_none_here_is_named(whole: Path, tmp_path: Path):
    content = json.loads((whole / "study.json").read_text())
    content["spaces"]["foo"] = content["spaces"]["sgd"]
    (tmp_path / "study.json").write_text(json.dumps(content))
    line = refused("tune", "--out", tmp_path)
    assert "study.json has spaces of foo, which are no methods here; name those to go on with by --methods" in line


def test_a_library_that_is_broken_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_module.py").write_text("raise ImportError('cannot import name x from torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert Library("broken_module", "pip install it").missing


def test_fresh_seeds_without_the_libraries_of_the_search(whole: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith(("locobench.tuned", "locobench.study", "filelock"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "filelock", None)
    refused = run("compare", "--tuned", whole)
    assert refused.exit_code == 2
    assert "--tuned needs filelock: pip install" in refused.stderr


def test_tune_needs_a_folder_that_it_can_write_to(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in run("tune", "--out", tmp_path / "file").stderr
    assert "holds no study" in run("compare", "--tuned", tmp_path).stderr
