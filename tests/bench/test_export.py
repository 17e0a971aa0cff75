"""Runs as TensorBoard has them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import refused
from reports import shown

from locobench import runfile

RESULTS = Path(__file__).parent.parent.parent / "results"


def test_export_touches_nothing_but_its_own_events(finished_study: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    (run, *_) = sorted((finished_study / "best" / "1").glob("*.jsonl"))
    (tmp_path / "adam").mkdir()
    (tmp_path / "adam" / "adam.jsonl").write_bytes(run.read_bytes())
    (tmp_path / "adam.jsonl").write_bytes(run.read_bytes())
    for _ in range(2):
        shown("export", tmp_path / "adam", "--tensorboard", tmp_path)  # into the run's own folder
    assert (tmp_path / "adam" / "adam.jsonl").exists()
    assert len(list((tmp_path / "adam").glob("events.out.tfevents*"))) == 1
    shown("export", tmp_path, "--tensorboard", tmp_path / "tb")  # one run's place is the parent of another's
    assert all(list((tmp_path / "tb" / name).glob("events.out.tfevents*")) for name in ("adam", "adam/adam"))
    assert not list(tmp_path.rglob("*.part"))


def test_export_for_tensorboard(finished_study: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    best = finished_study / "best"
    out = tmp_path / "tb"
    said = shown("export", best, "--tensorboard", out)
    shown("export", best, "--tensorboard", out)
    assert f"written: {out / '1' / 'adam'}" in said
    (file,) = (out / "1" / "adam").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    rows = runfile.read(best / "1" / "adam.jsonl").rows
    found = events.Scalars("loss/train")
    assert [event.step for event in found] == [1, 2, 3]
    assert [event.value for event in found] == pytest.approx([row["train_loss"] for row in rows])
    assert found[2].wall_time - found[0].wall_time == pytest.approx(rows[2]["seconds"] - rows[0]["seconds"], abs=1e-3)
    assert events.Tags()["images"] == ["reconstructions"]
    assert "does not exist" in refused("export", tmp_path / "nothing", "--tensorboard", out)


def test_runs_whose_names_end_alike_do_not_replace_each_other(study: Path, tmp_path: Path):
    pytest.importorskip("tensorboard")
    shutil.copy(study / "best" / "1" / "adam.jsonl", tmp_path / "sgd.part.jsonl")
    shutil.copy(study / "best" / "1" / "sgd.jsonl", tmp_path / "sgd.jsonl")
    shown("export", tmp_path / "sgd.part.jsonl", tmp_path / "sgd.jsonl", "--tensorboard", tmp_path / "logs")
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["sgd", "sgd.part"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_disk_is_one_line(finished_study: Path, tmp_path: Path):
    """TensorBoard writes in a thread, whose own traceback would say it a second time."""
    pytest.importorskip("tensorboard")
    program = """
import resource, signal, sys
from locobench.cli import app
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that writing fails as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
app()
"""
    run, logs = finished_study / "best" / "1" / "adam.jsonl", tmp_path / "logs"
    command = [sys.executable, "-W", "ignore", "-c", program, "export", run, "--tensorboard", logs]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert "make room" in line
    assert not list(logs.rglob("*.part"))
