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
from reports import change_rows, page_of, shown

from locobench import runfile
from locobench.libraries import Library


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
        ({"train_loss": float("nan")}, "train_loss should be a number or null"),
        ({"params": 3}, "params should be an object"),
    ],
)
def test_a_damaged_trial_is_named_by_file_and_line(study: Path, damage: object, reason: str):
    path = study / "trials.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = damage if isinstance(damage, str) else json.dumps({**json.loads(lines[2]), **damage})
    path.write_text("\n".join(lines) + "\n")
    line = refused("report", study)
    assert f"{path}, line 3 is damaged ({reason}" in line


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
