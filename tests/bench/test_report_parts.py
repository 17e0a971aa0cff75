"""The parts of a report: pictures, figures of the theory, axes, and what its sentences claim."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from reports import change_rows, page_of

from locobench import canvas, plots, reconstructions
from locobench.methods.method import written
from locobench.report import charts, local_losses, pictures, second_order
from locobench.report.means import Mean
from locobench.report.results import ceiling, load
from locobench.report.summary import Line, summarize
from locobench.report.ticks import log_ticks
from locobench.report.words import headline

RESULTS = Path(__file__).parent.parent.parent / "results"


def test_old_runs_without_reconstructions(study: Path):
    for file in study.rglob("*.reconstructions.png"):
        assert file.stat().st_size < 8000
        file.unlink()
    assert 'id="images"' not in page_of(study)


def test_reconstructions_are_what_the_model_makes(tmp_path: Path):
    images = torch.rand(12, 6)
    path = tmp_path / "a.png"
    reconstructions.save(torch.nn.Identity(), images, (2, 3), path)
    with Image.open(path) as image:
        assert image.size == (30, 4)
        pixels = list(image.tobytes())
    second = [pixels[row * 30 + 3 + column] for row in range(4) for column in range(3)]
    assert second[:6] == [round(255 * v) for v in images[1].tolist()]
    assert second[6:] == [round(255 * v) for v in images[1].sigmoid().tolist()]
    assert reconstructions.read(tmp_path / "none.png") is None


def test_the_local_losses_are_the_librarys():
    table = local_losses.table()
    at, target = table["predictions"].index(-1.0), table["targets"].index(1.5)
    # For relu F(a) = max(a, 0)²/2: D = F(-1) - F(1.5) - 1.5 · (-1 - 1.5).
    assert table["transfers"]["relu"]["matching"][target][at] == pytest.approx(-(1.5**2) / 2 + 1.5 * 2.5)
    zero = table["predictions"].index(1.5)
    for name in local_losses.TRANSFERS:
        matching = table["transfers"][name]["matching"][target]
        assert matching[zero] == pytest.approx(0, abs=1e-9)
        assert min(matching) >= -1e-9
    assert table["squared"][target][at] == pytest.approx(2.5**2 / 2)


def test_the_second_order_figure():
    content = second_order.read(RESULTS / "second-order.json")
    assert second_order.views(content)[-1] == "120 training steps, damping 0.1"
    figure = second_order.figure(content, "foof")
    layers = content["points"][1]["layers"]
    mean = sum(layer["dampings"][0]["updates"]["squared plain"]["foof"][-1] for layer in layers) / len(layers)
    shown = [trace for trace in figure.data if trace.visible]
    assert shown[0].y[-1] == pytest.approx(mean)
    assert {trace.meta["view"] for trace in shown} == {"120 training steps, damping 1"}


@pytest.mark.parametrize(("low", "high", "least"), [(50, 300, 6), (55, 500, 6), (95, 110, 2), (0.5, 9000, 4)])
def test_ticks_of_log_axes(low: float, high: float, least: int):
    ticks = log_ticks(low, high)
    assert least <= len(ticks) <= 14
    assert all(0.8 * low <= tick <= 1.25 * high for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(5e-324, 1e100), (1e-200, 1e200), (0.0, 1.0)])
def test_ticks_of_axes_beyond_measure(low: float, high: float):
    assert len(log_ticks(low, high)) <= 16


def test_trials_that_end_high_do_not_flatten_the_plot():
    study = load(RESULTS / "curves-search")
    worse = [*study.trials, replace(study.trials[0], train_loss=1e6, lr=9.0)]
    assert ceiling(worse) == ceiling(study.trials)
    traces = charts.sensitivity(worse).data
    assert max(max(trace.y) for trace in traces) == ceiling(worse)
    high = next(trace for trace in traces if 9.0 in trace.x)
    at = high.x.index(9.0)
    assert high.marker.symbol[at] == "arrow-up"
    assert high.customdata[at][1] == "1000000.00", "pointing at it tells the true loss"


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (Mean(50.0, 0.3), Mean(53.0, 0.5), "below"),
        (Mean(53.0, 0.5), Mean(50.0, 0.3), "above"),
        (Mean(50.0, 0.3), Mean(50.4, 0.5), "within the spread of seeds of"),
        (Mean(50.0, None), Mean(50.4, 0.5), "within the spread of seeds of"),
        (Mean(50.0, None), Mean(50.6, 0.5), "below"),
        (Mean(50.0, None), Mean(50.1, None), "below"),
    ],
)
def test_a_difference_within_the_spread_is_no_win(study: Path, own: Mean, other: Mean, said: str):
    loaded = load(study)
    whole = summarize(loaded)

    def put(line: Line, mean: Mean) -> Line:
        return replace(line, curve=replace(line.curve, train=[mean]))

    ours, rival = put(whole.line("locoprop-m"), own), put(whole.line("adam"), other)
    text = headline(loaded, replace(whole, lines=[ours, rival], best_first_order=rival))[0]
    rest = f"{said} the only first-order method that ran, Adam, at {other.text}"
    assert f"LocoProp-M is at a train loss of {own.text}, {rest}" in text


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([], "the only first-order method that ran"),
        (["sgd"], "the better of two first-order methods"),
        (["sgd", "rmsprop"], "the best of 3 first-order methods"),
    ],
)
def test_among_how_many_the_best_is(study: Path, others: list[str], said: str):
    loaded = load(study)
    whole = summarize(loaded)
    ours, rival = whole.line("locoprop-m"), whole.line("adam")
    lines = [ours, rival, *(replace(rival, method=method) for method in others)]
    assert f" {said}, Adam, at " in headline(loaded, replace(whole, lines=lines, best_first_order=rival))[0]


def test_who_is_there_earlier_is_named(tmp_path: Path):
    """A time to a loss alone would flatter: others may take less."""
    ratios = {"adam": 1.0, "rmsprop": 1.0, "locoprop-m-fast": 2.0, "muon": 1.5}
    prices = [{"method": method, "time_ratio": ratio} for method, ratio in ratios.items()]
    (tmp_path / "speed.json").write_text(json.dumps({"prices": prices}))
    study = load(RESULTS / "curves", [tmp_path / "speed.json"])
    summary = summarize(study)
    muon, ours = summary.line("muon"), summary.best("LocoProp")
    assert muon.to_first_order < ours.to_first_order
    assert f"× RMSProp's time (Muon in {muon.to_first_order:.2f})" in " ".join(headline(study, summary))


def test_no_label_of_a_picture_is_a_formula(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Which would be shown as it is written."""
    drawn: list[Figure] = []
    original = canvas.blank
    monkeypatch.setattr(canvas, "blank", lambda **settings: drawn.append(original(**settings)) or drawn[-1])
    study = load(RESULTS / "curves-search")
    summary = summarize(study)
    pictures.sensitivity(study.trials, "$a$", tmp_path / "a.png")
    pictures.losses(summary.lines, "train", "epochs", "title", tmp_path / "b.png")
    plots.draw([run for runs in study.runs.values() for run in runs], "title", tmp_path)
    labels = [
        text.get_text()
        for figure in drawn
        for axes in figure.axes
        for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.get_offset_text())
    ]
    assert len(drawn) == 4
    assert len(labels) > 20
    assert not [label for label in labels if "$" in label]


def test_the_second_best_of_plain_runs_is_of_another_setting(tmp_path: Path):
    for name, lr, seed, loss in [("a", 1e-3, 0, 100.0), ("b", 1e-3, 1, 101.0), ("c", 1e-2, 0, 150.0)]:
        (tmp_path / name).mkdir()
        shutil.copy(RESULTS / "curves" / "adam.jsonl", tmp_path / name)
        change_rows(
            tmp_path / name / "adam.jsonl",
            lambda rows, lr=lr, seed=seed, loss=loss: [
                {**rows[0], "lr": lr, "seed": seed},
                *rows[1:-1],
                {**rows[-1], "train_loss": loss},
            ],
        )
    (line,) = summarize(load(tmp_path)).lines
    assert line.train is not None
    assert (line.train.value, line.second_best) == (100.5, 150.0)


def test_settings_are_as_they_were_tried():
    settings = {"lr": 3.12e-4, "beta1": 0.95, "momentum": 0.99872, "damping": 1.87e-3, "steps": 5, "eps": 1e-8}
    found = written({**settings, "activation_lr": 1590.0})
    assert found == ("lr 3.12e-4, beta1 0.95, momentum 0.99872, damping 1.87e-3, steps 5, eps 1e-8, activation_lr 1590")
