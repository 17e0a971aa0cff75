"""What a user meets: help, results, and errors of one line."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from commands import refused, run
from reports import change_rows, shown

from locobench import __version__, choices, compare, curves, data, problems
from locobench.choices import MAIN_METHODS, MORE_METHODS
from locobench.cli import app
from locobench.libraries import Library
from locobench.methods import METHODS

RESULTS = Path(__file__).parent.parent.parent / "results"
# One thread: two that wait for each other on a busy machine take a hundred times as long.
TINY = ["compare", "--train-size", "200", "--batch-size", "50", "--threads", "1", "--epochs", "2"]


@pytest.fixture(autouse=True)
def wide_terminal_and_quick_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(curves, "TRAIN_IMAGES", 300)
    monkeypatch.setattr(curves, "TEST_IMAGES", 100)


def test_compares_all_methods_and_shows_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Nothing here depends on the widths, and where bfloat16 is slow Muon takes minutes at full width.
    monkeypatch.setattr(problems, "_ENCODER", ([100], [50], [25, 10]))
    out = tmp_path / "results"
    result = run(*TINY, "--methods", "all", "--out", out)
    assert result.exit_code == 0, result.output
    assert set(METHODS) == {*MAIN_METHODS, *MORE_METHODS}
    rows = {}
    for name in METHODS:
        config, *rows[name] = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert (config["method"], config["lr"]) == (name, METHODS[name].rate("curves"))
        assert [row["epoch"] for row in rows[name]] == [1, 2]
    table = (out / "table.md").read_text()
    for name, method in METHODS.items():
        assert method.label in result.stdout
        assert f"| {method.label} |" in table
        assert f"{rows[name][-1]['train_loss']:.2f}" in table
    for file in ("table.md", "epochs.png", "seconds.png"):
        assert f"written: {out / file}" in result.stdout
    assert (out / "epochs.png").read_bytes().startswith(b"\x89PNG")
    drawn = {"table.md", "epochs.png", "seconds.png"}
    images = {f"{name}.reconstructions.png" for name in METHODS}
    assert {path.name for path in out.iterdir()} == drawn | images | {f"{name}.jsonl" for name in METHODS}

    (out / "table.md").unlink()
    (out / "seconds.png").unlink()
    before = {path: path.read_bytes() for path in out.glob("*.jsonl")}
    again = run("show", out)
    assert again.exit_code == 0
    assert (out / "table.md").read_text() == table
    assert (out / "seconds.png").exists()
    assert before == {path: path.read_bytes() for path in out.glob("*.jsonl")}


def test_a_caution_is_said_before_the_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "sgd", replace(METHODS["sgd"], caution="slow [here]"))
    result = run(*TINY, "--methods", "adam,sgd", "--out", tmp_path / "runs")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("SGD: slow [here]\n")
    assert result.stdout.count("slow") == 1
    result = run(
        "tune", "--tier", "smoke", "--trials", "1", "--epochs", "1", "--methods", "sgd", "--out", tmp_path / "study"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.count("SGD: slow [here]") == 1


def test_what_is_slow_here_runs_only_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in MAIN_METHODS:
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], caution=None if name == "adam" else "slow"))
    result = run(*TINY, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert f"{METHODS['sgd'].label}: slow, left out\n" in result.stdout
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["adam.jsonl"]


def test_a_diverged_method_does_not_stop_the_others(tmp_path: Path):
    result = run(*TINY, "--methods", "sgd,adam", "--lr", "sgd=1e38", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "SGD diverged in epoch 1" in result.stdout
    table = (tmp_path / "table.md").read_text()
    assert "| SGD | 1e+38 | – | – |" in table
    assert "| Adam | 0.01 |" in table


def test_a_method_whose_library_is_missing_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nowhere = Library("no_such_module", "pip install no-such-module")
    monkeypatch.setitem(METHODS, "soap", replace(METHODS["soap"], library=nowhere))
    result = run(*TINY, "--methods", "soap,sgd", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "not installed: pip install no-such-module" in result.stdout
    table = (tmp_path / "table.md").read_text()
    assert "| SOAP | – |" in table
    assert "| not installed: pip install no-such-module |" in table
    assert "| SGD | 0.03 |" in table
    assert refused(*TINY, "--methods", "soap", "--out", tmp_path / "none").endswith(
        "soap is not installed: pip install no-such-module"
    )


@pytest.mark.parametrize("command", [[], *([command.callback.__name__] for command in app.registered_commands)])
def test_help(command: list[str]):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    if command:
        assert "Example: locobench" in result.stdout
        named = [Path(word) for word in re.findall(r"\bresults/[\w./-]+", result.stdout)]
        assert all((RESULTS.parent / path).exists() for path in named)


def test_help_names_every_choice():
    text = " ".join(run("compare", "--help").stdout.replace("│", " ").split())
    for name in (*METHODS, *choices.DATA_NAMES, *choices.MODEL_NAMES, *choices.ACTIVATIONS):
        assert name in text


def test_version():
    assert run("--version").stdout == f"locobench {__version__}\n"


def test_unknown_method():
    line = refused("compare", "--methods", "adam,locopop-m")
    assert "unknown method 'locopop-m'; did you mean 'locoprop-m'?" in line
    assert all(name in line for name in METHODS)


def test_unknown_data_and_model():
    for option in ("--data", "--model", "--activation"):
        result = run("compare", option, "nonsense")
        assert result.exit_code == 2
        assert "nonsense" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", 0], "--epochs must be at least 1, got 0"),
        (["--epochs", 5, "--schedule-epochs", 4], "--schedule-epochs must be at least 5, got 4"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--train-size", 100, "--batch-size", 101], "--batch-size 101 is more than the 100 training images"),
        (["--seed", -1], "--seed must be at least 0, got -1"),
        (["--threads", 0], "--threads must be at least 1, got 0"),
        (["--device", "cuda:99"], "--device cuda:99 is not available here"),
        (["--device", "toaster"], "--device toaster is not available here"),
        (["--lr", "adam"], "--lr 'adam' is not of the form METHOD=NUMBER"),
        (["--lr", "adam=fast"], "'adam=fast' is not of the form"),
        (["--lr", "adam=-1"], "learning rate of adam must be a positive number, got -1.0"),
        (["--lr", "adm=1"], "did you mean 'adam'?"),
        (["--lr", "sgd=1", "--methods", "adam"], "--lr is given for sgd, which --methods leaves out"),
        (["--set", "adam=1"], "unknown hyperparameter '' of adam; it has: beta1, beta2"),
        (["--set", "adam.beta1"], "--set 'adam.beta1' is not of the form METHOD.NAME=NUMBER"),
        (["--set", "adam.beta1=inf"], "beta1 of adam must be a number of at most 1e+100, got inf"),
        (["--set", "soap.beta1=1"], "--set is given for soap, which --methods leaves out"),
        (["--seeds", "1"], "--seeds goes with --tuned; use --seed"),
        (["--methods", ","], "no method named"),
    ],
)
def test_what_cannot_be_done_is_said_at_once(tmp_path: Path, arguments: list[object], message: str):
    assert message in refused("compare", "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.glob("out/*"))


def test_an_unwritable_folder(tmp_path: Path):
    (tmp_path / "file").write_text("")
    line = refused(*TINY, "--out", tmp_path / "file" / "results")
    assert f"cannot write to {tmp_path / 'file' / 'results'}" in line
    assert f"cannot write to {tmp_path / 'file'}" in refused(*TINY, "--out", tmp_path / "file")


def test_a_folder_of_another_comparison_is_refused_before_anything_runs(tmp_path: Path):
    assert run(*TINY, "--methods", "sgd", "--out", tmp_path).exit_code == 0
    line = refused(*TINY, "--methods", "adam,sgd", "--seed", 1, "--out", tmp_path)
    assert "sgd.jsonl is of a run with another configuration (seed was 0, is 1)" in line
    assert not (tmp_path / "adam.jsonl").exists()


def test_runs_that_differ_are_marked_in_the_table(tmp_path: Path):
    run(*TINY, "--methods", "sgd", "--out", tmp_path)
    result = run(*TINY, "--methods", "adam", "--seed", 1, "--out", tmp_path)
    assert "the runs differ in seed" in result.stdout


def test_a_name_that_looks_like_markup_is_shown_as_it_is(study: Path):
    for path in study.glob("best/1/*.jsonl"):
        change_rows(path, lambda rows: [{**row, "method": "[/odd]"} for row in rows])
    assert "[/odd]" in shown("show", study / "best" / "1")


def test_a_name_that_looks_like_a_formula_or_a_cell_is_shown_as_it_is(study: Path):
    for path in study.glob("best/1/*.jsonl"):
        change_rows(path, lambda rows: [{**row, "method": "$\\frac$|\nx"} for row in rows])
    shown("show", study / "best" / "1")
    assert "| $\\frac$\\| x |" in (study / "best" / "1" / "table.md").read_text()


def test_show_without_runs(tmp_path: Path):
    assert "holds no runs" in refused("show", tmp_path)
    assert "is not a folder" in refused("show", tmp_path / "nowhere")
    (tmp_path / "adam.jsonl").write_text("{half a")
    assert "adam.jsonl, line 1 is damaged" in refused("show", tmp_path)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "carry_out", interrupted)
    result = run(*TINY, "--out", tmp_path)
    assert result.exit_code == 130
    assert "the same command continues" in result.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_for_real(tmp_path: Path):
    command = [sys.executable, "-m", "locobench", *TINY[:-1], "5000", "--methods", "sgd", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    deadline = time.monotonic() + 60
    file = tmp_path / "sgd.jsonl"
    while time.monotonic() < deadline and not (file.exists() and len(file.read_text().splitlines()) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "locobench: interrupted; finished epochs are kept, the same command continues"
    shown = run("show", tmp_path)
    assert "/5000" in shown.stdout


def test_an_image_set_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCOBENCH_DATA", str(tmp_path))
    (tmp_path / data.NPZ_FILES["usps"]).write_bytes(b"damaged")
    assert "usps.npz is damaged" in refused("compare", "--data", "usps", "--out", tmp_path / "out")


def test_speed(tmp_path: Path):
    out = tmp_path / "new" / "speed.json"
    result = run(
        "speed", "--methods", "sgd,locoprop-m", "--rounds", 2, "--batch-size", 20, "--threads", 1, "--out", out
    )
    assert result.exit_code == 0, result.output
    assert "LocoProp-M" in result.stdout
    assert f"written: {out}" in result.stdout
    written = json.loads(out.read_text())
    sgd, locoprop = written["prices"]
    assert (sgd["state_bytes"], sgd["bytes_ratio"]) == (0, 0)
    assert locoprop["bytes_ratio"] > 0.9
    assert locoprop["peak_ratio"] > sgd["peak_ratio"] > 0
    assert locoprop["gflops"] > 0
    assert len(locoprop["round_seconds"]) == len(locoprop["round_adam_seconds"]) == written["rounds"] == 2
    assert {"versions", "machine", "batch_size", "threads"} <= written.keys()


def test_speed_refuses_nonsense(tmp_path: Path):
    assert "--rounds must be at least 1, got 0" in refused("speed", "--rounds", 0)
    assert "is a folder" in refused("speed", "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("speed", "--out", tmp_path / "file" / "speed.json")


def test_shows_the_best_of_a_search_with_measured_prices(tmp_path: Path):
    for lr in ("1e-3", "1e-9"):
        assert run(*TINY, "--methods", "adam", "--lr", f"adam={lr}", "--out", tmp_path / "adam" / lr).exit_code == 0
    assert run(*TINY, "--methods", "sgd", "--out", tmp_path / "sgd").exit_code == 0
    speed = tmp_path / "speed.json"
    speed.write_text(json.dumps({"prices": [{"method": "sgd", "time_ratio": 1.5}]}))
    result = run("show", tmp_path, "--best", "--speed", speed)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "table.md").read_text()
    assert "| 1.50 | 3.0 | 2 |" in table  # a price of 1.5, two epochs
    assert "| Adam | 0.001 |" in table
    assert "1e-09" not in table
    assert "Adam 2" in table
    assert run("show", tmp_path).exit_code == 0
    assert "1e-09" in (tmp_path / "table.md").read_text()
    speed.write_text("{}")
    assert "no file of `locobench speed`" in refused("show", tmp_path, "--speed", speed)
    assert "cannot be read" in refused("show", tmp_path, "--speed", tmp_path / "missing.json")
