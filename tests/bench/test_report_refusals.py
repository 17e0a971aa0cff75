"""A report refuses what is damaged or does not belong together, and a failure leaves the page of before."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused
from PIL import Image
from reports import change_rows, page_of, shown

from locobench import runfile
from locobench.libraries import Library
from locobench.trials import best_trial, read_trials

RESULTS = Path(__file__).parent.parent.parent / "results"


@pytest.mark.parametrize(("key", "value"), [("protocol", 7), ("data", "mnist"), ("activation", "relu")])
def test_what_does_not_belong_together_is_refused_by_name(study: Path, key: str, value: object):
    file = study / "best" / "2" / "adam.jsonl"
    change_rows(file, lambda rows: [{**rows[0], key: value}, *rows[1:]])
    line = refused("report", study)
    assert f"results of different {key} do not go into one report" in line
    assert f"{value} in {file}" in line
    assert not (study / "report").exists()


def test_the_same_run_twice_is_refused(study: Path):
    shutil.copy(study / "best" / "1" / "adam.jsonl", study / "best" / "2" / "adam.jsonl")
    assert "are the same run" in refused("report", study)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("{half a", "Expecting property name"),
        ('{"method": "adam"}', "expected an object with"),
        ('["a list"]', "expected an object with"),
        ({"state": "lost"}, "state should be one of"),
        ({"lr": "high"}, "lr should be a positive number"),
        ({"train_loss": None}, "a finished trial should have a train_loss"),
        ({"train_loss": float("nan")}, "NaN is no number"),
        ({"train_loss": -1}, "train_loss should be a number of at least 0 or null"),
        ({"file": "../adam.jsonl"}, "file should be 'trials/"),
        ({"trial": 10**400}, "100000000000… (401 characters) is too large"),
        ({"params": 3}, "params should be an object"),
        ({"epochs": "all"}, "epochs should be a whole number of at least 0"),
    ],
)
def test_a_damaged_trial_is_named_by_file_and_line(study: Path, damage: object, reason: str):
    path = study / "trials.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = damage if isinstance(damage, str) else json.dumps({**json.loads(lines[2]), **damage})
    path.write_text("\n".join(lines) + "\n")
    line = refused("report", study)
    assert f"{path}, line 3 is damaged ({reason}" in line


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ({"commit": 3}, "commit should be a string or null, is 3"),
        ({"date": ["today"]}, "date should be a string or null"),
        ({"seed": "one"}, "seed should be a whole number of at least 0"),
        ({"seed": True}, "seed should be a whole number of at least 0"),
        ({"parameters": "many"}, "parameters should be a whole number of at least 0"),
        ({"threads": 0}, "threads should be a whole number of at least 1"),
        ({"machine": "mine"}, "machine should be an object"),
        ({"lr": 0}, "lr should be a positive number, is 0"),
        ({"initial_loss": -1}, "initial_loss should be a number of at least 0"),
        ({"parameters": 10**20}, "parameters should be a whole number"),
        ({"method": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_damaged_circumstances_of_a_run_are_named(study: Path, damage: dict[str, object], reason: str):
    path = study / "best" / "1" / "adam.jsonl"
    change_rows(path, lambda rows: [{**rows[0], **damage}, *rows[1:]])
    assert f"{path}, line 1 is damaged ({reason}" in refused("report", study)


@pytest.mark.parametrize("damage", ["[]", "null", "3", '"prices"', "[" * 200_000])
def test_a_file_of_prices_that_is_none_is_named(study: Path, damage: str):
    (study / "speed.json").write_text(damage)
    assert f"{study / 'speed.json'} is no file of `locobench speed`" in refused("report", study)


@pytest.mark.parametrize("name", ["study.json", "trials.jsonl", "best/1/adam.jsonl"])
def test_brackets_without_end_are_named(study: Path, name: str):
    (study / name).write_text("[" * 200_000)
    assert f"{study / name}" in refused("report", study)


def test_the_list_of_trials_is_no_run(study: Path, tmp_path: Path):
    line = refused("export", study / "trials.jsonl", "--tensorboard", tmp_path / "logs")
    assert f"lists the trials of a search and is no run file; those are in {study / 'trials'}" in line


def test_no_report_is_written_where_another_cannot_be(study: Path, tmp_path: Path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adam.jsonl").write_text("{half a")
    assert "adam.jsonl, line 1 is damaged" in refused("report", study, bad)
    assert not (study / "report").exists()


def test_the_same_trial_twice_is_named(study: Path):
    path = study / "trials.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[2]]))
    assert f"line {len(lines) + 1} is damaged ({json.loads(lines[2])['file']} for the second time)" in refused(
        "report", study
    )


def test_a_best_trial_that_is_not_the_searchs_is_named(study: Path):
    shutil.rmtree(study / "best")
    best = best_trial(read_trials(study / "trials.jsonl"), "adam")
    assert best is not None
    change_rows(best.file, lambda rows: rows[:-1])
    assert f"{best.file} is not the run that the search had there; restore it" in refused("report", study)


def test_a_best_trial_of_another_method_is_named(study: Path):
    shutil.rmtree(study / "best")
    for path in study.glob("trials/adam/*.jsonl"):
        change_rows(path, lambda rows: [{**row, "method": "sgd"} for row in rows])
    assert "is a run of sgd, where the search has one of adam" in refused("report", study)


def test_a_picture_of_another_kind_is_shown_and_a_damaged_one_leaves_nothing(study: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    picture, run = study / "best" / "1" / "adam.reconstructions.png", study / "best" / "1" / "adam.jsonl"
    Image.new("RGBA", (20, 4)).save(picture)
    shown("export", run, "--tensorboard", tmp_path / "logs")
    picture.write_bytes(b"none")
    assert "adam.reconstructions.png is damaged" in refused("export", run, "--tensorboard", tmp_path / "others")
    assert not list((tmp_path / "others").rglob("*"))
    Image.new("L", (20, 1)).save(picture)
    assert "is no row of images above another" in refused("report", study)


def test_a_damaged_picture_of_the_second_folder_leaves_the_first_as_it_is(study: Path, tmp_path: Path):
    other = Path(shutil.copytree(study, tmp_path / "other"))
    (other / "best" / "1" / "adam.reconstructions.png").write_bytes(b"none")
    assert "adam.reconstructions.png is damaged" in refused("report", study, other)
    assert not (study / "report").exists()
    assert not (other / "report").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", ["1", "3"]), ("steps", [1, 2]), ("steps", None), ("gradient", 1.7e308), ("dampings", [])],
)
def test_second_order_numbers_that_are_none_are_named(study: Path, tmp_path: Path, key: str, value: object):
    content = json.loads((RESULTS / "second-order.json").read_text())
    for layer in content["points"][0]["layers"]:
        if key == "dampings":
            layer["dampings"] = value
        for result in layer["dampings"]:
            if key == "gradient":
                result["gradient"] = dict.fromkeys(result["gradient"], value)
    if key == "steps":
        content["steps"] = value
    (tmp_path / "numbers.json").write_text(json.dumps(content))
    line = refused("report", study, "--second-order", tmp_path / "numbers.json")
    assert f"{tmp_path / 'numbers.json'} is no file of `locobench figure second-order`" in line
    assert not (study / "report").exists()


def test_other_damage_is_named(study: Path, tmp_path: Path):
    other = tmp_path / "second-order.json"
    other.write_text('{"points": []}')
    assert f"{other} is no file of" in refused("report", study, "--second-order", other)
    (study / "best" / "1" / "adam.reconstructions.png").write_bytes(b"none")
    assert "adam.reconstructions.png is damaged" in refused("report", study)
    (study / "study.json").write_text("{")
    assert "study.json is damaged" in refused("report", study)
    assert "is not a folder" in refused("report", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no runs" in refused("report", tmp_path / "empty")
    (tmp_path / "empty" / "study.json").write_text("{}")
    assert "study.json is damaged (no activation" in refused("report", tmp_path / "empty")
    (tmp_path / "empty" / "study.json").unlink()
    (tmp_path / "empty" / "trials.jsonl").touch()
    assert "holds no finished trial" in refused("report", tmp_path / "empty")


def test_missing_libraries_say_what_to_install(study: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Library, "missing", property(lambda self: self.module in ("plotly", "tensorboard")))
    assert refused("report", study).endswith("not installed: pip install plotly")
    assert refused("export", study).endswith("not installed: pip install tensorboard")
    assert not (study / "report").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from locobench import runfile
from locobench.report import write
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
runfile.os.replace = die
write.write(Path(sys.argv[1]))
"""


def test_kill_9_leaves_the_page_of_before(study: Path):
    out = study / "report"
    out.mkdir()
    (out / "report.html").write_text("the page of before")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(study)], timeout=120, env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert (out / "report.html").read_text() == "the page of before"
    assert page_of(study).rstrip().endswith("</html>")


def test_one_report_of_a_folder_at_a_time(study: Path):
    (study / "report").mkdir(exist_ok=True)
    with runfile.locked(study / "report"):
        assert "another process is writing to" in refused("report", study)
    shown("report", study)
