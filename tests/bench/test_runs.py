"""A run's file is readable after every epoch, and an interruption changes nothing but the clock."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from locobench import problems, runfile, runs
from locobench.data import Images
from locobench.errors import BenchError
from locobench.methods import METHODS, Method
from locobench.runfile import Row, RunFile
from locobench.schedules import constant, linear_decay
from locobench.settings import Settings
from locobench.training import Training

SETTINGS = Settings(
    method="adam",
    lr=1e-3,
    data="curves",
    model="standard",
    activation="tanh",
    epochs=4,
    schedule_epochs=5,
    batch_size=20,
    train_size=50,
    seed=3,
    device="cpu",
    threads=1,
)


RESULTS = Path(__file__).parent.parent.parent / "results"


def some_images() -> Images:
    pixels = torch.rand(70, 16, generator=torch.Generator().manual_seed(0))
    return Images(pixels[:50], pixels[50:], (4, 4))


class Interrupter:
    """Presses Ctrl-C in an epoch: in its first step, or just after its row was written."""

    def __init__(self, epoch: int, where: str) -> None:
        self.epoch, self.where, self.done, self.fresh = epoch, where, 0, 0

    def on_step(self, loss: float) -> None:
        if self.where == "step" and self.done + 1 == self.epoch:
            raise KeyboardInterrupt

    def on_epoch(self, row: Row, fresh: bool) -> None:
        self.done = row["epoch"]
        self.fresh += fresh
        if self.where == "epoch" and self.done == self.epoch:
            raise KeyboardInterrupt


def losses(run: RunFile) -> list[tuple[Any, ...]]:
    return [(row["epoch"], row["train_loss"], row["test_loss"], row["lr"]) for row in run.rows]


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_goes_on_from_its_checkpoint(tmp_path: Path, method: Method, monkeypatch: pytest.MonkeyPatch):
    if method.missing is not None:
        pytest.skip(method.missing)
    monkeypatch.setattr(problems, "_ENCODER", ([12], [8], [3]))
    settings = replace(SETTINGS, method=method.name, lr=method.lr / 3, epochs=3)
    (tmp_path / "whole").mkdir()
    whole = runs.carry_out(settings, some_images(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(settings, some_images(), tmp_path, Interrupter(3, "step"))
    last = Interrupter(0, "never")
    assert losses(runs.carry_out(settings, some_images(), tmp_path, last)) == losses(whole)
    assert last.fresh == 1


@pytest.mark.parametrize("method", ["adam", "rmsprop-tf", "locoprop-m", "locoprop-s"])
def test_an_interrupted_run_gives_the_very_same_losses(tmp_path: Path, method: str):
    settings = replace(SETTINGS, method=method)
    (tmp_path / "whole").mkdir()
    whole = runs.carry_out(settings, some_images(), tmp_path / "whole")
    for epoch, where in ((1, "step"), (2, "step"), (2, "epoch"), (3, "step"), (4, "step")):
        with pytest.raises(KeyboardInterrupt):
            runs.carry_out(settings, some_images(), tmp_path, Interrupter(epoch, where))
        finished = epoch if where == "epoch" else epoch - 1
        assert losses(runfile.read(tmp_path / f"{method}.jsonl")) == losses(whole)[:finished]
    last = Interrupter(0, "never")
    assert losses(runs.carry_out(settings, some_images(), tmp_path, last)) == losses(whole)
    assert last.fresh == 1, "only what was missing is computed"
    left = [f"{method}.jsonl", f"{method}.reconstructions.png"]
    assert sorted(path.name for path in tmp_path.glob("*.*")) == left


def test_an_interruption_between_the_two_writes_keeps_the_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save = RunFile.save

    def interrupted(run: RunFile) -> None:
        if len(run.rows) == 2:
            raise KeyboardInterrupt
        save(run)

    monkeypatch.setattr(RunFile, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(SETTINGS, some_images(), tmp_path)
    monkeypatch.undo()
    rest = Interrupter(0, "never")
    run = runs.carry_out(SETTINGS, some_images(), tmp_path, rest)
    assert rest.fresh == 2
    assert [row["epoch"] for row in run.rows] == [1, 2, 3, 4]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_runs import SETTINGS, Interrupter, runs, some_images

class Killer(Interrupter):
    def on_step(self, loss):
        if self.done == 2:
            os.kill(os.getpid(), signal.SIGKILL)

runs.carry_out(SETTINGS, some_images(), Path(sys.argv[2]), Killer(0, "never"))
"""


def test_kill_9_leaves_finished_epochs(tmp_path: Path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path)]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    path = tmp_path / "adam.jsonl"
    assert len(runfile.read(path).rows) == 2
    run = runs.carry_out(SETTINGS, some_images(), tmp_path)
    (tmp_path / "whole").mkdir()
    assert losses(run) == losses(runs.carry_out(SETTINGS, some_images(), tmp_path / "whole"))


def test_a_finished_run_is_never_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = runs.carry_out(SETTINGS, some_images(), tmp_path)
    before = first.path.read_bytes()
    monkeypatch.setattr(Training, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert losses(runs.carry_out(SETTINGS, some_images(), tmp_path)) == losses(first)
    assert first.path.read_bytes() == before


def test_the_file(tmp_path: Path):
    run = runs.carry_out(replace(SETTINGS, method="sgd"), some_images(), tmp_path)
    config, *rows = [json.loads(line) for line in run.path.read_text().splitlines()]
    assert config["method"] == "sgd"
    assert config["steps_per_epoch"] == 2, "the last, partial batch is dropped"
    assert {"torch", "torchloco", "python"} <= config["versions"].keys()
    assert config["machine"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert {"method", "epoch", "seconds", "train_loss", "test_loss"} <= rows[0].keys()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_another_configuration_is_refused(tmp_path: Path):
    runs.carry_out(replace(SETTINGS, epochs=1), some_images(), tmp_path)
    with pytest.raises(BenchError, match=r"adam\.jsonl.*lr was 0\.001, is 0\.1; seed was 3, is 4\); choose") as error:
        runs.open_run(replace(SETTINGS, epochs=1, lr=0.1, seed=4), tmp_path)
    assert "batch_size" not in str(error.value)


def test_a_run_names_every_commit_that_worked_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for epoch, commit in ((2, "1130fb1"), (3, "1130fb1"), (4, "ca1c0bb")):
        monkeypatch.setattr(runs, "commit", lambda commit=commit: commit)
        with pytest.raises(KeyboardInterrupt):
            runs.carry_out(SETTINGS, some_images(), tmp_path, Interrupter(epoch, "step"))
    monkeypatch.setattr(runs, "commit", lambda: None)
    assert runs.carry_out(SETTINGS, some_images(), tmp_path).config["commit"] == "1130fb1, ca1c0bb"
    monkeypatch.setattr(runs, "commit", lambda: "not at work")
    assert runs.carry_out(SETTINGS, some_images(), tmp_path).config["commit"] == "1130fb1, ca1c0bb"


def test_an_unfinished_run_does_not_go_on_under_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(SETTINGS, some_images(), tmp_path, Interrupter(2, "step"))
    monkeypatch.setattr(runs, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(BenchError, match="versions was"):
        runs.carry_out(SETTINGS, some_images(), tmp_path)


@pytest.mark.parametrize("damage", ["{half a row", '["a list"]', '{"method": "adam"}', "NaN"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str):
    path = runs.carry_out(replace(SETTINGS, epochs=2, schedule_epochs=2), some_images(), tmp_path).path
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damage]) + "\n")
    with pytest.raises(BenchError, match=r"adam\.jsonl, line 3 is damaged"):
        runfile.read(path)


def test_an_empty_file_and_a_damaged_checkpoint_are_named(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(SETTINGS, some_images(), tmp_path, Interrupter(2, "step"))
    (tmp_path / "adam.checkpoint").write_bytes(b"damaged")
    with pytest.raises(BenchError, match=r"adam\.checkpoint is damaged.*delete it"):
        runs.carry_out(SETTINGS, some_images(), tmp_path)
    (tmp_path / "adam.jsonl").write_text("")
    with pytest.raises(BenchError, match=r"adam\.jsonl is empty"):
        runs.carry_out(SETTINGS, some_images(), tmp_path)


def test_epochs_without_a_checkpoint_are_not_thrown_away(tmp_path: Path):
    path = runs.carry_out(SETTINGS, some_images(), tmp_path).path
    cut = "".join(path.read_text().splitlines(keepends=True)[:-1])
    path.write_text(cut)
    said = rf"adam\.jsonl has {SETTINGS.epochs - 1} epochs of {SETTINGS.epochs} and no checkpoint to go on from"
    with pytest.raises(BenchError, match=said):
        runs.carry_out(SETTINGS, some_images(), tmp_path)
    assert path.read_text() == cut


@pytest.mark.parametrize("change", [{"rows": [1, 2]}, {"settings": {"lr": 0.5}}, {"rows": None}], ids=str)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, change: dict[str, Any]):
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(SETTINGS, some_images(), tmp_path, Interrupter(2, "epoch"))
    path, before = tmp_path / "adam.checkpoint", (tmp_path / "adam.jsonl").read_text()
    torch.save({**torch.load(path, weights_only=True), **change}, path)
    with pytest.raises(BenchError, match=r"adam\.checkpoint is damaged .*delete it and adam\.jsonl"):
        runs.carry_out(SETTINGS, some_images(), tmp_path)
    assert (tmp_path / "adam.jsonl").read_text() == before


def test_a_file_that_is_a_link_stays_one_and_keeps_its_rights(tmp_path: Path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "there").chmod(0o600)
    (tmp_path / "here").symlink_to("there")
    runfile.write_atomically(tmp_path / "here", lambda file: file.write_text("new"))
    assert (tmp_path / "here").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def test_deleting_the_file_begins_the_run_anew(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(SETTINGS, some_images(), tmp_path, Interrupter(3, "step"))
    (tmp_path / "adam.jsonl").unlink()
    anew = Interrupter(0, "never")
    runs.carry_out(SETTINGS, some_images(), tmp_path, anew)
    assert anew.fresh == SETTINGS.epochs


@pytest.mark.parametrize("method", ["sgd", "locoprop-m"])
def test_a_diverged_run_is_written_down_as_such(tmp_path: Path, method: str):
    settings = replace(SETTINGS, method=method, lr=1e35)
    run = runs.carry_out(settings, some_images(), tmp_path)
    assert run.diverged
    assert run.finished
    last = runfile.read(run.path).rows[-1]
    assert (last["train_loss"], last["diverged"]) == (None, True)
    assert any(word in last["message"] for word in ("inf", "nan", "diverged"))
    assert not run.checkpoint.exists()


def test_a_mistake_in_a_program_is_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def wrong(*_: object) -> None:
        _a, _b = (1, 2, 3)

    monkeypatch.setattr(torch.optim.Adam, "step", wrong)
    with pytest.raises(ValueError, match="too many values"):
        runs.carry_out(SETTINGS, some_images(), tmp_path)


def test_every_method_starts_and_shuffles_alike():
    orders, starts = [], []
    for method in ("adam", "locoprop-m"):
        training = Training(replace(SETTINGS, method=method), some_images())
        orders.append([training._seed_epoch(epoch).tolist() for epoch in (0, 1)])
        starts.append([p.detach().clone() for p in training.model.parameters()])
        training.close()
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_the_schedule_rises_over_5_percent_and_falls_to_0():
    factors = [linear_decay(step, 200) for step in range(201)]
    assert factors[:10] == [pytest.approx((n + 1) / 10) for n in range(10)]
    assert factors[10] == 1
    assert factors[105] == pytest.approx(0.5)
    assert factors[200] == 0
    assert linear_decay(0, 1) == constant(0, 1) == 1, "even a single step trains"
    assert [constant(step, 200) for step in range(200)] == [*factors[:10], *[1.0] * 190]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"schedule_epochs": 3}, "--schedule-epochs must be at least 4, got 3"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"train_size": 0}, "--train-size must be at least 1"),
        ({"lr": float("nan")}, "learning rate of adam must be a positive number, got nan"),
        ({"lr": -1.0}, "got -1.0"),
    ],
)
def test_numbers_that_make_no_sense(change: dict[str, Any], message: str):
    with pytest.raises(BenchError, match=message):
        replace(SETTINGS, **change)


def test_a_batch_larger_than_the_data():
    with pytest.raises(BenchError, match="--batch-size 60 is more than the 50 training images"):
        Training(replace(SETTINGS, batch_size=60), some_images())


@pytest.mark.parametrize(
    "line",
    [
        '{"method": "adam", "epoch": 2, "seconds": 1.0, "train_loss": 1.0, "test_loss": 1.0}',
        '{"method": "adam", "epoch": 1, "seconds": null, "train_loss": 1.0, "test_loss": 1.0}',
        '{"method": "adam", "epoch": 1, "seconds": 1.0, "train_loss": "x", "test_loss": 1.0}',
        '{"method": "adam", "epoch": 1, "seconds": 1.0, "train_loss": NaN, "test_loss": 1.0}',
    ],
)
def test_a_row_with_wrong_values_is_named(tmp_path: Path, line: str):
    config = '{"method": "adam", "lr": 0.1, "data": "curves", "model": "standard", "epochs": 2, "steps_per_epoch": 3}'
    path = tmp_path / "adam.jsonl"
    path.write_text(f"{config}\n{line}\n")
    with pytest.raises(BenchError, match=r"adam.jsonl, line 2 is damaged"):
        runfile.read(path)


def test_a_second_process_is_refused(tmp_path: Path):
    with runfile.locked(tmp_path), pytest.raises(BenchError, match="another process"), runfile.locked(tmp_path):
        pass
    with runfile.locked(tmp_path):
        pass


def test_rows_that_would_pass_for_others_are_named(tmp_path: Path):
    """Infinity by another spelling, a truth value, and more epochs than there were to be."""
    text = (RESULTS / "curves" / "adam.jsonl").read_text()
    lines = text.splitlines()
    last = json.loads(lines[-1])
    for line, reason in [
        (json.dumps(last).replace(str(last["train_loss"]), "1e999"), "1e999 is too large"),
        (json.dumps({**last, "train_loss": True}), "train_loss should be a number of at least 0, is True"),
    ]:
        (tmp_path / "adam.jsonl").write_text("\n".join([*lines[:-1], line]))
        with pytest.raises(BenchError, match=rf"line {len(lines)} is damaged \({reason}"):
            runfile.read(tmp_path / "adam.jsonl")
    (tmp_path / "adam.jsonl").write_text("\n".join([*lines, json.dumps({**last, "epoch": last["epoch"] + 1})]))
    with pytest.raises(BenchError, match=rf"line {len(lines) + 1} is damaged \(the run ended with epoch 6"):
        runfile.read(tmp_path / "adam.jsonl")


def test_a_lock_on_a_file_that_was_taken_away_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fcntl = pytest.importorskip("fcntl")
    flock = fcntl.flock

    def late(file, how):
        (tmp_path / ".lock").unlink()  # by the process that had it, between our opening and our locking
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BenchError, match="another process is writing"), runfile.locked(tmp_path):
        pass
