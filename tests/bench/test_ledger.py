"""A database that is lost, damaged, locked or shared is named, and costs no trial."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from searches import exported, results, search

from locobench import ledger
from locobench.errors import BenchError
from locobench.ledger import Ledger


@pytest.mark.parametrize("damage", [b"damaged", b""])
def test_a_damaged_database_is_named_and_made_anew_from_the_run_files(whole: Path, tmp_path: Path, damage: bytes):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "study.db").write_bytes(damage * 500)
    if damage:
        with pytest.raises(BenchError, match=r"study\.db is damaged.*delete it: the same command makes it anew"):
            search(tmp_path, "sgd,adam")
        (tmp_path / "study.db").unlink()
    assert search(tmp_path, "sgd,adam").fresh == [], "no epoch is repeated"
    assert results(tmp_path) == results(whole)
    assert exported(tmp_path) == exported(whole)


def test_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    search(tmp_path, "sgd", trials=1, epochs=1)
    monkeypatch.setattr(ledger, "_PATIENCE", 0.05)
    with sqlite3.connect(tmp_path / "study.db") as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BenchError, match=r"study\.db is held by another program .*the same command continues"):
            search(tmp_path, "sgd", trials=1, epochs=1)
        other.rollback()
    other.close()


def test_a_lost_database_costs_no_row_of_methods_that_are_not_tuned_now(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "study.db").unlink()
    (tmp_path / "trials" / "adam" / "0003.jsonl").unlink()
    search(tmp_path, "sgd")
    kept = [row for row in exported(whole) if (row["method"], row["trial"]) != ("adam", 3)]
    assert exported(tmp_path) == kept, "and a row without its file is not kept"


def test_a_lost_database_and_a_cut_line_cost_no_other_row(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "study.db").unlink()
    path = tmp_path / "trials.jsonl"
    lines = path.read_text().splitlines()
    (cut,) = [number for number, line in enumerate(lines) if "trials/adam/0003.jsonl" in line]
    lines[cut] = lines[cut][:40]
    path.write_text("\n".join([*lines, "[" * 200_000, '{"method": ["adam"]}']))
    search(tmp_path, "sgd")
    kept = [row for row in exported(whole) if (row["method"], row["trial"]) != ("adam", 3)]
    assert exported(tmp_path) == kept


@pytest.mark.parametrize(
    "damage",
    [
        "delete from trial_user_attributes",
        "update trial_user_attributes set value_json='\"x\"' where key='train_loss'",
        "update trial_user_attributes set value_json='NaN' where key='seconds'",
        "update trials set state='FOO' where number=1",
        "update trial_values set value=NULL",
        "delete from trial_values",
        "delete from trial_params",
        "drop table trial_params",
        "update trial_params set param_value=-5",
        "delete from trials where number=1",
        "delete from trials where number=1; update trials set state='WAITING' where number=2",
    ],
)
def test_a_damaged_database_is_named_and_costs_no_row(whole: Path, tmp_path: Path, damage: str):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    rows = (tmp_path / "trials.jsonl").read_bytes()
    with closing(sqlite3.connect(tmp_path / "study.db")) as database:
        database.executescript(damage)
        database.commit()
    with pytest.raises(BenchError, match=r"study\.db is damaged .*delete it: the same command makes it anew"):
        search(tmp_path, "sgd,adam")
    assert (tmp_path / "trials.jsonl").read_bytes() == rows
    (tmp_path / "study.db").unlink()
    search(tmp_path, "sgd,adam")
    assert sorted((tmp_path / "trials.jsonl").read_bytes().splitlines()) == sorted(rows.splitlines())


def test_a_study_of_another_program_in_the_database_is_left_alone(whole: Path, tmp_path: Path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    other = optuna.create_study(study_name="another", storage=f"sqlite:///{tmp_path / 'study.db'}")
    other.add_trial(optuna.trial.create_trial(value=1.0))
    search(tmp_path, "sgd")
    assert exported(tmp_path) == exported(whole)


def test_a_search_deleted_from_outside_is_named(tmp_path: Path):
    search(tmp_path, "sgd", trials=1, epochs=1)
    book = Ledger(tmp_path)
    (trial,) = book.trials("sgd")
    optuna.delete_study(study_name="sgd", storage=f"sqlite:///{tmp_path / 'study.db'}")
    with pytest.raises(BenchError, match=r"study\.db has lost .*The same command continues"):
        book.end(trial, TrialState.FAIL, [{"epoch": 1, "train_loss": 1.0, "test_loss": 1.0, "seconds": 1.0}])
    with pytest.raises(BenchError, match=r"study\.db has lost .*The same command continues"):
        book.trials("sgd")
    book.close()
    assert search(tmp_path, "sgd", trials=1, epochs=1).fresh == []
