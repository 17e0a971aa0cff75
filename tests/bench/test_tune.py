"""A search finds every trial's end once, whatever interrupts it and however many processes share it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from rich.console import Console
from searches import TINY, exported, results, search, subprocess_of
from test_runs import some_images

from locobench import data, proposals, runfile, study, tune, tune_table, tuned
from locobench.errors import BenchError
from locobench.ledger import Ledger
from locobench.methods import METHODS, find_all
from locobench.runfile import Row
from locobench.study import Study, open_study
from locobench.tuning import method_rounds


def test_files_of_a_search(whole: Path):
    rows = exported(whole)
    assert [(row["method"], row["trial"]) for row in rows] == [(m, k) for m in ("adam", "sgd") for k in range(4)]
    for row in rows:
        run = runfile.read(whole / row["file"])
        assert (row["lr"], row["params"], row["epochs"]) == (run.config["lr"], run.config["params"], len(run.rows))
        assert (row["train_loss"], row["test_loss"]) == (run.rows[-1]["train_loss"], run.rows[-1]["test_loss"])
    first = rows[0]
    assert first["lr"] == METHODS["adam"].rate("curves")
    assert first["params"] == METHODS["adam"].params, "a method's default is its first trial"
    assert len({row["lr"] for row in rows}) == len(rows)
    content = json.loads((whole / "study.json").read_text())
    assert content.keys() >= {*TINY, "model", "seed", "sampler", "pruner", "protocol", "versions", "machine", "spaces"}
    assert content["spaces"]["sgd"] == {"lr": [1e-3, 0.3]}
    assert not list(whole.rglob("*.checkpoint"))


def test_kill_9_loses_one_epoch_and_repeats_no_trial(whole: Path, tmp_path: Path):
    assert subprocess_of(tmp_path, "kill", "adam", 1, 1).wait(timeout=120) == -signal.SIGKILL
    lines = (tmp_path / "trials.jsonl").read_text().splitlines()
    log = search(tmp_path, "sgd,adam")
    assert log.began[0] == ("adam", 1), "the interrupted trial goes on"
    assert ("adam", 1, 1) not in log.fresh
    assert ("adam", 1, 2) in log.fresh
    assert not {(row["method"], row["trial"]) for row in map(json.loads, lines)} & set(log.began)
    assert results(tmp_path) == results(whole)
    assert exported(tmp_path) == exported(whole)
    assert search(tmp_path, "sgd,adam").began == []


def test_two_processes_share_a_search(whole: Path, tmp_path: Path):
    open_study(tmp_path, TINY, None)
    other = subprocess_of(tmp_path, "share")
    began = tmp_path / "began.json"
    deadline = time.monotonic() + 100
    while not began.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    mine = search(tmp_path, "sgd,adam").began
    assert other.wait(timeout=100) == 0
    theirs = [tuple(trial) for trial in json.loads(began.read_text())]
    assert sorted([*mine, *theirs]) == [(method, k) for method in ("adam", "sgd") for k in range(4)]
    assert mine
    assert theirs
    assert results(tmp_path) == results(whole), "trial k is the same however the work is shared"


def test_a_live_trial_is_not_taken(tmp_path: Path):
    search(tmp_path, "sgd", trials=1)
    book = Ledger(tmp_path)
    space = study.load(tmp_path).phases("sgd")[0].whole
    book.add("sgd", 1, space, {"lr": 0.01})
    book.add("sgd", 1, space, {"lr": 0.02})
    with book.claim("sgd", 1) as mine, Ledger(tmp_path).claim("sgd", 1) as theirs:
        assert mine is not None
        assert theirs is None
    with book.claim("sgd", 1) as abandoned:
        assert abandoned is not None
        assert abandoned.state == TrialState.RUNNING
    with book.claim("sgd", 0) as ended:
        assert ended is None
    assert len(book.trials("sgd")) == 2
    book.close()


def test_a_diverged_trial_counts_and_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "sgd", replace(METHODS["sgd"], searched={"curves": 1e35}))
    described = open_study(tmp_path, TINY, None)
    content = {**described.content, "spaces": {"sgd": {"lr": [1e-3, 1e36]}}}
    (tmp_path / "study.json").write_text(json.dumps(content))
    log = search(tmp_path, "sgd")
    assert len(log.began) == 4
    first = exported(tmp_path)[0]
    assert (first["state"], first["train_loss"], first["epochs"]) == ("diverged", None, 1)


def test_methods_take_turns_by_rounds(tmp_path: Path):
    began = search(tmp_path, "sgd,momentum", epochs=1).began
    assert began == [(method, k) for pair in ((0, 1), (2,), (3,)) for method in ("sgd", "momentum") for k in pair]


def test_the_pruner_is_lenient_and_looks_at_earlier_rounds_only(whole: Path):
    book = Ledger(whole)
    history = [replaced(trial, [60.0, 50.0, 40.0, 30.0, 20.0]) for trial in book.trials("adam")]
    book.close()

    def rows(*losses: float) -> list[Row]:
        return [{"epoch": epoch, "train_loss": loss} for epoch, loss in enumerate(losses, start=1)]

    assert all(words in proposals.PRUNER for words in ("from 60 %", "of three quarters", "once four")), "its identity"
    assert not proposals.is_hopeless(rows(90, 80), 5, history), "too early"
    assert proposals.is_hopeless(rows(90, 80, 70), 5, history)
    assert not proposals.is_hopeless(rows(60, 50, 40), 5, history)
    assert not proposals.is_hopeless(rows(90, 80, 70), 5, history[:3]), "too few to compare with"
    assert not proposals.is_hopeless(rows(90, 80, 70, 60, 50), 5, history), "it is through"
    spread = [
        replaced(trial, [90.0, 80.0, loss]) for trial, loss in zip(history, (20.0, 30.0, 40.0, 50.0), strict=True)
    ]
    assert not proposals.is_hopeless(rows(90, 80, 42), 5, spread), "the third quartile of the others is 42.5"
    assert proposals.is_hopeless(rows(90, 80, 43), 5, spread)


def replaced(trial: Any, losses: list[float]) -> Any:
    trial.intermediate_values = dict(enumerate(losses, start=1))
    return trial


def test_a_pruned_trial_is_written_down_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(proposals, "is_hopeless", lambda rows, epochs, history: bool(history) and len(rows) < epochs)
    search(tmp_path, "sgd")
    rows = exported(tmp_path)
    assert [(row["state"], row["epochs"]) for row in rows] == [("finished", 2)] * 2 + [("pruned", 1)] * 2
    assert not list(tmp_path.rglob("*.checkpoint"))
    (tmp_path / "study.db").unlink()
    assert search(tmp_path, "sgd").fresh == [], "not even with a new database"
    assert exported(tmp_path) == rows


def test_a_best_value_on_the_edge_is_said_and_widened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "sgd", replace(METHODS["sgd"], searched={"curves": 1e-3}))
    wanted = {"trials": 2, "epochs": 1}
    content = {**open_study(tmp_path, {**TINY, **wanted}, None).content, "spaces": {"sgd": {"lr": [1e-6, 1e-3]}}}
    (tmp_path / "study.json").write_text(json.dumps(content))
    search(tmp_path, "sgd", **wanted)
    book = Ledger(tmp_path)
    (warning,) = tune_table.warnings(study.load(tmp_path), book, find_all("sgd"))
    book.close()
    assert "SGD: the best lr, 0.001, is on the upper edge of [1e-06, 0.001]" in warning
    assert "--widen 1 adds as many trials with lr = [1e-06, 0.032]" in warning
    log = search(tmp_path, "sgd", widen=1, **wanted)
    assert log.began == [("sgd", 2), ("sgd", 3)], "only what is new"
    (widening,) = study.load(tmp_path).content["widened"]["sgd"]
    assert widening == {"space": {"lr": [1e-6, 0.032]}, "new": {"lr": [1e-3, 0.032]}}
    assert 1e-3 <= results(tmp_path)["sgd", 2][0] <= 0.032
    assert search(tmp_path, "sgd", **wanted).began == []


def test_a_new_study_that_is_refused_leaves_no_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "load", lambda _: some_images())
    with pytest.raises(BenchError, match="--batch-size 51 is more than the 50"):
        open_study(tmp_path, {**TINY, "batch_size": 51}, None, check=tune.load_images)
    assert tmp_path.exists(), "it was there before"
    with pytest.raises(BenchError, match="--batch-size 51"):
        open_study(tmp_path / "new", {**TINY, "batch_size": 51}, None, check=tune.load_images)
    assert not (tmp_path / "new").exists()
    assert open_study(tmp_path, TINY, None, check=tune.load_images).content["batch_size"] == 25


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": 5}, "optimizer should be an object"),
        ({"params": {"momentum": "x"}}, "momentum among the params should be a number"),
        ({"params": {"zz": 1.0}}, "momentum does not take its lr and params"),
        ({"lr": -1.0}, "lr should be a positive number"),
        ({"lr": 10**400}, "1000000000.*is too large"),
    ],
)
def test_a_trial_of_impossible_settings_is_named(tmp_path: Path, change: Row, said: str):
    search(tmp_path, "momentum", trials=1, epochs=1)
    path = tmp_path / "trials" / "momentum" / "0000.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]))
    with pytest.raises(BenchError, match=rf"momentum/0000\.jsonl, line 1 is damaged \({said}"):
        search(tmp_path, "momentum", trials=1, epochs=1)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
@pytest.mark.parametrize("limit", [0, 50_000, 1_000_000])
def test_a_full_disk_is_one_line_and_the_same_command_continues(whole: Path, tmp_path: Path, limit: int):
    process = subprocess_of(tmp_path, "full", limit, stderr=subprocess.PIPE)
    (line,) = process.communicate(timeout=120)[1].decode().strip().splitlines()
    assert process.returncode == 2
    assert str(tmp_path) in line
    assert "make room" in line
    assert "the same command continues" in line
    assert not list(tmp_path.rglob("*.part"))
    search(tmp_path, "sgd,adam")
    assert results(tmp_path) == results(whole)
    assert exported(tmp_path) == exported(whole)


def test_another_problem_is_refused_by_name(whole: Path):
    with pytest.raises(BenchError, match=r"holds another study \(epochs was 2, is 3\)"):
        open_study(whole, {"epochs": 3, "trials": 4}, None)
    with pytest.raises(BenchError, match=r"data was 'curves', is 'mnist'; epochs was 2, is 10; trials was 4, is 12"):
        open_study(whole, {}, "short")
    assert open_study(whole, {}, None).content == study.load(whole).content, "a folder needs no other options"


def test_trials_of_a_method_that_has_changed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    search(tmp_path, "sgd,momentum", trials=1, epochs=1)
    changed = replace(METHODS["sgd"], build=lambda model, lr: torch.optim.SGD(model.parameters(), lr, dampening=0.5))
    monkeypatch.setitem(METHODS, "sgd", changed)
    told = r"sgd/0000\.jsonl was made with another sgd \(dampening was 0.*, is 0\.5\).*commit .*, or choose another"
    with pytest.raises(BenchError, match=told):
        search(tmp_path, "sgd", trials=1, epochs=1)
    with pytest.raises(BenchError, match=told):
        tuned.compare_tuned(tmp_path, [1], "sgd", Console(quiet=True))
    assert not list((tmp_path / "best").rglob("*.jsonl"))
    assert search(tmp_path, "momentum", trials=1, epochs=1).began == [], "the others go on"


def test_a_run_on_a_fresh_seed_of_a_method_that_has_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "load", lambda _: some_images())
    search(tmp_path, "sgd", trials=1, epochs=1)
    tuned.compare_tuned(tmp_path, [1], None, Console(quiet=True))
    path = tmp_path / "best" / "1" / "sgd.jsonl"
    path.write_text(path.read_text().replace('"dampening": 0', '"dampening": 0.5'))
    with pytest.raises(BenchError, match=r"best/1/sgd\.jsonl was made with another sgd \(dampening was 0\.5"):
        tuned.compare_tuned(tmp_path, [1, 2], None, Console(quiet=True))


def test_a_study_notes_under_what_it_was_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "commit", lambda: "1130fb1")
    begun = open_study(tmp_path, TINY, None).content
    assert begun["commit"] == "1130fb1"
    assert open_study(tmp_path, TINY, None).content == begun
    monkeypatch.setattr(study, "commit", lambda: "ca1c0bb")
    for _ in range(2):
        content = open_study(tmp_path, TINY, None).content
        assert content["commit"] == "1130fb1"
        assert [one["commit"] for one in content["continued"]] == ["ca1c0bb"]
    monkeypatch.setattr(study, "versions", lambda: {"torch": "9"})
    content = open_study(tmp_path, TINY, None).content
    assert [one["versions"] == {"torch": "9"} for one in content["continued"]] == [False, True]
    assert study.load(tmp_path).content == content


def test_another_protocol_is_refused(tmp_path: Path):
    content = {**open_study(tmp_path, TINY, None).content, "protocol": 99}
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(BenchError, match="is of protocol 99, this is 1: their results do not mix"):
        open_study(tmp_path, TINY, None)


def test_a_damaged_description(tmp_path: Path):
    (tmp_path / "study.json").write_text('{"half": ')
    with pytest.raises(BenchError, match=r"study\.json is damaged"):
        open_study(tmp_path, TINY, None)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(BenchError, match=r"study\.json is damaged \(no .*trials"):
        open_study(tmp_path, TINY, None)


def test_a_damaged_run_file_is_named(tmp_path: Path):
    search(tmp_path, "sgd", trials=1)
    path = tmp_path / "trials" / "sgd" / "0000.jsonl"
    path.write_text(path.read_text() + "{half")
    (tmp_path / "study.db").unlink()
    with pytest.raises(BenchError, match=r"sgd/0000\.jsonl, line 4 is damaged"):
        search(tmp_path, "sgd", trials=1)


def test_a_worker_without_a_parent_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tune, "load_images", lambda _: some_images())
    open_study(tmp_path, {**TINY, "trials": 1}, None)
    with pytest.raises(SystemExit) as ended:
        tune.work(tmp_path, "sgd", 0, parent=-1)
    assert ended.value.code == 130
    tune.work(tmp_path, "sgd", 0, parent=os.getppid())
    assert len(exported(tmp_path)) == 1


def test_rounds():
    described = Study(Path(), {"spaces": {"sgd": {"lr": [1, 2]}}, "widened": {}, "trials": 12})
    assert [(one.start, one.stop) for one in method_rounds(described, "sgd")] == [(0, 6), (6, 9), (9, 12)]
    entry = {"space": {"lr": [1, 4]}, "new": {"lr": [2, 4]}}
    again = Study(Path(), {**described.content, "widened": {"sgd": [entry]}})
    assert [one.start for one in method_rounds(again, "sgd")] == [0, 6, 9, 12, 18, 21]
    assert again.total("sgd") == 24
