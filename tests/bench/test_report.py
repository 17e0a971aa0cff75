"""A report says what the files say, whatever is missing in them, and refuses what does not belong together."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from commands import refused
from reports import change_rows, last_losses, page_of, shown

from locobench.errors import BenchError
from locobench.libraries import Library
from locobench.report import cells, charts, facts, write
from locobench.report.results import load
from locobench.report.summary import summarize
from locobench.report.words import headline
from locobench.trials import best_trial

RESULTS = Path(__file__).parent.parent.parent / "results"


def test_the_numbers_are_those_of_the_files(finished_study: Path):
    study = load(finished_study)
    summary = summarize(study)
    for method in ("locoprop-m", "adam", "rmsprop", "sgd"):
        line = summary.line(method)
        a, b = last_losses(finished_study, method)
        assert line.train.value == pytest.approx((a + b) / 2)
        assert line.train.spread == pytest.approx(abs(a - b) / 2**0.5)
        assert (line.seeds, line.status) == (2, "3")
    ours, sgd, adam = summary.line("locoprop-m"), summary.line("sgd"), summary.line("adam")
    assert (ours.trials, ours.diverged, sgd.diverged) == (2, 0, 1)
    assert (ours.step_ratio, ours.bytes_ratio, ours.measured) == (7.5, 1.0, True)
    assert summary.line("rmsprop").measured is False
    assert summary.blurred == ["RMSProp"]
    assert ours.curve.adam_steps == [15.0, 30.0, 45.0], "two steps an epoch, 7.5 times Adam's"
    assert adam.to_adam == 1
    losses = [study.runs["locoprop-m"][0].config["initial_loss"], *(mean.value for mean in ours.curve.train)]
    target = adam.train.value
    epochs = next(
        (i + (a - target) / (a - b) for i, (a, b) in enumerate(pairwise(losses)) if b <= target), float("inf")
    )
    assert ours.to_adam == pytest.approx(7.5 * epochs / 3)
    assert [line.train.value for line in summary.lines] == sorted(line.train.value for line in summary.lines)


def with_losses(folder: Path, method: str, start: float | None, losses: list[float], seconds: list[float]) -> None:
    """Put these numbers into the run files of all seeds."""

    def change(rows):
        config = {key: value for key, value in rows[0].items() if key != "initial_loss"}
        config |= {} if start is None else {"initial_loss": start}
        numbers = zip(rows[1:], losses, seconds, strict=True)
        return [config, *({**row, "train_loss": loss, "seconds": end} for row, loss, end in numbers)]

    for path in folder.glob(f"best/*/{method}.jsonl"):
        change_rows(path, change)


@pytest.mark.parametrize(
    ("start", "losses", "epochs"),
    [
        (100.0, [50.0, 30.0, 20.0], 1.5),
        (100.0, [40.0, 30.0, 20.0], 1.0),
        (100.0, [20.0, 10.0, 5.0], 0.75),
        (None, [20.0, 10.0, 5.0], 1.0),
        (None, [60.0, 35.0, 5.0], 1.8),
        (30.0, [50.0, 20.0, 5.0], 0.0),
        (30.0, [20.0, 10.0, 5.0], 0.0),
        (100.0, [60.0, 50.0, 41.0], float("inf")),
    ],
)
def test_the_time_to_a_loss_is_interpolated(study: Path, start: float | None, losses: list[float], epochs: float):
    with_losses(study, "adam", 100.0, [60.0, 50.0, 40.0], [1.0, 2.0, 3.0])
    with_losses(study, "locoprop-m", start, losses, [1.0, 2.0, 3.0])
    assert summarize(load(study)).line("locoprop-m").to_adam == pytest.approx(7.5 * epochs / 3)


def test_a_pause_does_not_count_as_time_to_a_loss(study: Path):
    (study / "speed.json").unlink()
    with_losses(study, "adam", 100.0, [60.0, 50.0, 40.0], [1.0, 2.0, 1000.0])
    with_losses(study, "locoprop-m", 100.0, [60.0, 40.0, 30.0], [500.0, 504.0, 508.0])
    loaded = load(study)
    assert summarize(loaded).line("locoprop-m").to_adam == pytest.approx(2 * 4 / 3)
    said = dict(facts.caveats(loaded, summarize(loaded)))["seconds"]
    assert "best/1/adam.jsonl 333.3 times" in said
    assert "best/2/locoprop-m.jsonl 42.3 times" in said


def test_files_written(study: Path):
    said = shown("report", study)
    out = study / "report"
    names = {"report.html", "table.md", "sensitivity.png"}
    names |= {f"{name}.png" for name in ("train-epochs", "train-seconds", "train-adam-steps", "test-epochs")}
    assert {path.name for path in out.iterdir()} == names
    assert all(f"written: {out / name}" in said for name in names)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith("png"))
    table = (out / "table.md").read_text()
    ours = summarize(load(study)).line("locoprop-m")
    assert re.search(rf"\| LocoProp-M \| {ours.train.text} \| .* \| 2 \| .* \| lr 1e-3 \|", table)
    assert "RMSProp" in table
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("await Plotly.newPlot") == 1
    assert text.count("* plotly.js v") == 1, "its JavaScript is in it, once"
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', text), "nothing is loaded"
    for label in ("LocoProp-M", "Adam", "RMSProp", "SGD"):
        assert f"Their reconstructions by {label}" in text


def test_what_an_earlier_report_drew_is_taken_away(study: Path):
    shown("report", study)
    assert (study / "report" / "train-adam-steps.png").exists()
    (study / "speed.json").unlink()
    said = shown("report", study)
    assert "train-adam-steps.png" not in said
    assert not (study / "report" / "train-adam-steps.png").exists()


def test_prices_next_to_the_folder_are_taken(study: Path):
    assert load(study / "best" / "1").prices == {}
    shutil.copy(study / "speed.json", study / "best" / "speed.json")
    assert load(study / "best" / "1").prices.keys() == load(study).prices.keys()


def test_seconds_on_other_numbers_of_threads_are_not_compared(study: Path):
    """A ratio of them would be one of machines."""
    (study / "speed.json").unlink()
    for seed in ("1", "2"):
        for file in (study / "best" / seed).glob("locoprop-m.jsonl"):
            change_rows(file, lambda rows: [{**rows[0], "threads": 7}, *rows[1:]])
    loaded = load(study)
    summary = summarize(loaded)
    ours, sgd = summary.line("locoprop-m"), summary.line("sgd")
    assert (ours.step_ratio, ours.to_adam, ours.to_first_order) == (None, None, None)
    assert sgd.step_ratio is not None
    assert sgd.to_adam is not None
    assert "are not compared" in dict(facts.caveats(loaded, summary))["clocks"]


def test_a_plain_folder_of_runs(study: Path):
    folder = study / "best" / "1"
    summary = summarize(load(folder))
    assert {line.method for line in summary.lines} == {"locoprop-m", "adam", "rmsprop", "sgd"}
    assert all(line.train.spread is None and line.trials is None for line in summary.lines)
    assert "One seed each" in " ".join(headline(load(folder), summary))
    assert 'id="sensitivity"' not in page_of(folder)


def test_a_search_without_reruns_shows_its_best_trials(study: Path):
    shutil.rmtree(study / "best")
    loaded = load(study)
    best = min(
        (json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines() if '"adam"' in line),
        key=lambda row: row["train_loss"],
    )
    assert loaded.runs["adam"][0].path == study / best["file"]
    assert loaded.from_search == {"locoprop-m", "adam", "sgd"}
    assert "not fresh seeds" in page_of(study)


def test_a_search_that_is_not_finished_says_so(study: Path):
    info = json.loads((study / "study.json").read_text())
    space = info["spaces"]["sgd"]
    wider = {"trials": 3, "widened": {"sgd": [{"space": space, "new": space}]}}
    (study / "study.json").write_text(json.dumps({**info, **wider}))
    rows = (study / "trials.jsonl").read_text().splitlines()
    (study / "trials.jsonl").write_text("\n".join(rows[1:]) + "\n")
    loaded = load(study)
    summary = summarize(loaded)
    assert "The search is not finished." in headline(loaded, summary)
    markdown = cells.markdown(summary)
    assert re.search(r"\| Adam .* \| 2/3 \| .* \| lr 1e-3 \|", markdown)
    assert re.search(r"\| SGD .* \| 2/6 \| .* \| lr 0.01 \|", markdown)
    caveats = dict(facts.caveats(loaded, summary))
    assert "LocoProp-M 1 of 3, Adam 2 of 3, RMSProp 0 of 3, SGD 2 of 6 trials" in caveats["search"]
    assert "trials" not in caveats, "which would say the same once more"


def test_methods_that_had_more_trials_and_best_settings_on_an_edge_are_named(study: Path):
    info = json.loads((study / "study.json").read_text())
    rows = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["method"] in ("adam", "sgd")]
    more = [
        {**row, "trial": row["trial"] + 2, "file": f"trials/sgd/{row['trial'] + 2:04d}.jsonl"}
        for row in kept
        if row["method"] == "sgd"
    ]
    (study / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*kept, *more]))
    rate = best_trial(load(study).trials, "sgd").lr
    space = {"lr": [rate, 1e3 * rate]}
    spaces = {"adam": {"lr": [1e-6, 1e3]}, "sgd": {"lr": [rate, 2 * rate]}}
    widened = {"sgd": [{"space": space, "new": space}]}
    (study / "study.json").write_text(json.dumps({**info, "trials": 2, "spaces": spaces, "widened": widened}))
    loaded = load(study)
    caveats = dict(facts.caveats(loaded, summarize(loaded)))
    assert caveats["trials"].endswith(": 4: SGD; 2: Adam")
    assert caveats["edges"].endswith(f": SGD lr {rate:g} of [{rate:g}, {1e3 * rate:g}]")
    assert "search" not in caveats


def test_only_methods_with_an_unusual_number_of_trials_are_named_where_there_are_many(study: Path):
    counts = {"rmsprop": 4, "adam": 2, "locoprop-m": 2, "sgd": 2}
    row = json.loads((study / "trials.jsonl").read_text().splitlines()[0])
    rows = [
        {**row, "method": method, "trial": number, "file": f"trials/{method}/{number:04d}.jsonl"}
        for method, count in counts.items()
        for number in range(count)
    ]
    (study / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = json.loads((study / "study.json").read_text())
    space = {"lr": [1e-6, 1e3]}
    widened = {"rmsprop": [{"space": space, "new": space}]}
    (study / "study.json").write_text(
        json.dumps({**info, "trials": 2, "spaces": dict.fromkeys(counts, space), "widened": widened})
    )
    loaded = load(study)
    assert dict(facts.caveats(loaded, summarize(loaded)))["trials"].endswith(": 4: RMSProp; 2: the others")


def test_a_finished_search_has_nothing_to_say_about_trials(study: Path):
    info = json.loads((study / "study.json").read_text())
    spaces = {method: info["spaces"][method] for method in ("adam", "sgd")}
    (study / "study.json").write_text(json.dumps({**info, "spaces": spaces}))
    loaded = load(study)
    assert not {"search", "trials"} & dict(facts.caveats(loaded, summarize(loaded))).keys()
    assert "The search is not finished." not in headline(loaded, summarize(loaded))


def test_runs_of_what_was_best_before_the_search_went_on_are_named(study: Path):
    rows = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    better = {**rows[2], "lr": 0.5, "train_loss": 1.0}
    worse = {**rows[4], "trial": 9, "file": "trials/sgd/0009.jsonl", "lr": 0.5, "train_loss": 9e4}
    (study / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [better, rows[4], worse]))
    loaded = load(study)
    assert loaded.outdated == ["adam"]
    assert dict(facts.caveats(loaded, summarize(loaded)))["outdated"].endswith("on fresh seeds: Adam")


def test_the_searches_that_are_kept_here():
    study = load(RESULTS / "curves-search", [RESULTS / "speed.json"])
    summary = summarize(study)
    assert summary.line("adam").trials == 6
    assert summary.line("locoprop-m").settings == "lr 1e-4"
    assert len(study.trials) == len([*(RESULTS / "curves-search").rglob("*.jsonl")])
    rounds = json.loads((RESULTS / "speed.json").read_text())["rounds"]
    assert (
        f"by `locobench speed` on AMD EPYC, 2 threads, {rounds} rounds" in dict(facts.caveats(study, summary))["prices"]
    )
    figure = charts.sensitivity(study.trials)
    assert sum(len(trace.x) for trace in figure.data) == len(study.trials)


def test_unfinished_and_single(study: Path):
    change_rows(study / "best" / "1" / "adam.jsonl", lambda rows: rows[:2])
    (study / "best" / "2" / "sgd.jsonl").unlink()
    summary = summarize(load(study))
    adam = summary.line("adam")
    assert (adam.status, adam.curve.epochs) == ("1/3", [1]), "only what all seeds have"
    assert summary.line("sgd").train.spread is None
    shown("report", study)


def test_without_adam_and_without_any_first_order_method(study: Path):
    for method in ("adam", "rmsprop", "sgd"):
        for file in study.glob(f"best/*/{method}.*"):
            file.unlink()
    (study / "trials.jsonl").write_text("")
    (study / "speed.json").unlink()
    study_read = load(study)
    summary = summarize(study_read)
    (line,) = summary.lines
    assert (line.to_adam, line.to_first_order, line.step_ratio) == (None, None, None)
    assert summary.best_first_order is None
    assert len(headline(study_read, summary)) == 1
    table = cells.markdown(summary)
    assert re.search(r"\| Adam \| – .* \| no trial finished \|", table), "the study's spaces name it"
    assert "to the best first-order method's loss" in table
    assert "no trial finished" in page_of(study)


def test_diverged_runs(study: Path):
    def diverge(rows):
        lost = {"train_loss": None, "test_loss": None, "diverged": True, "message": "the loss is <nan>"}
        return [*rows[:-1], {**rows[-1], **lost}]

    change_rows(study / "best" / "1" / "adam.jsonl", diverge)
    for seed in (1, 2):
        change_rows(study / "best" / str(seed) / "sgd.jsonl", diverge)
    summary = summarize(load(study))
    assert summary.line("adam").status == "1 of 2 seeds diverged"
    assert summary.line("adam").train.value == last_losses(study, "adam")[1], "of the other seed"
    assert summary.line("sgd").train is None
    assert "the loss is &lt;nan&gt;" in page_of(study)
    for method in ("locoprop-m", "rmsprop", "adam"):
        for seed in (1, 2):
            change_rows(study / "best" / str(seed) / f"{method}.jsonl", diverge)
    assert "all of them diverged" in headline(load(study), summarize(load(study)))[0]
    shown("report", study)


def test_a_method_that_is_not_in_the_table_any_more(study: Path):
    for seed in ("1", "2"):
        file = study / "best" / seed / "sgd.jsonl"
        change_rows(file, lambda rows: [{**row, "method": "old </script> one"} for row in rows])
    text = page_of(study)
    assert "old </script> one" not in text
    assert "old &lt;/script&gt; one" in text


def test_a_method_whose_library_is_missing(study: Path, monkeypatch: pytest.MonkeyPatch):
    info = json.loads((study / "study.json").read_text())
    info["spaces"]["soap"] = info["spaces"]["adam"]
    (study / "study.json").write_text(json.dumps(info))
    monkeypatch.setattr(Library, "missing", property(lambda self: self.module == "pytorch_optimizer"))
    assert summarize(load(study)).absent == {"SOAP": "not installed: pip install pytorch_optimizer"}


def test_arguments_that_make_no_sense(study: Path):
    assert "--check goes with --readme" in refused("report", study, "--check")
    assert "name a folder" in refused("report")


def test_the_table_names_its_columns(finished_study: Path):
    summary = summarize(load(finished_study))
    titles = [column.title for column in cells.columns(summary)]
    assert titles[:4] == ["method", "train", "test", "step ÷ Adam"]
    assert titles[-1] == "best settings"
    assert len(cells.row(summary.lines[0], summary)) == len(titles)
    assert write.title_of(load(finished_study)) == "CURVES: the standard tanh autoencoder, 3 epochs"
    with pytest.raises(BenchError, match="is not a folder"):
        load(finished_study / "nothing")


def test_commits_that_some_runs_did_not_note_are_not_claimed_for_them(tmp_path: Path):
    for name, commit in (("adam", "1130fb1"), ("sgd", None)):
        shutil.copy(RESULTS / "curves" / f"{name}.jsonl", tmp_path)
        change_rows(tmp_path / f"{name}.jsonl", lambda rows, commit=commit: [{**rows[0], "commit": commit}, *rows[1:]])
    assert facts.provenance(load(tmp_path))[1] == "1130fb1, others not noted"
