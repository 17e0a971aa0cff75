"""The page of a report: one HTML file with everything in it, which opens without a network."""

import base64
import json
from dataclasses import dataclass
from math import inf
from typing import Any

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from locobench.methods import FAMILIES, family
from locobench.reconstructions import COUNT, path_of, read
from locobench.report import cells, charts, local_losses, second_order
from locobench.report.facts import facts
from locobench.report.results import Results
from locobench.report.summary import Line, Summary
from locobench.report.ticks import log_ticks
from locobench.report.words import headline
from locobench.series import DIRECTIONS
from locobench.styles import style


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        name: Its id.
        title: Its heading.
        alt: What it shows, for who does not see it.
        figure: What plotly draws.
    """

    name: str
    title: str
    alt: str
    figure: go.Figure


def render(results: Results, summary: Summary, title: str, command: str, resemblance: dict[str, Any] | None) -> str:
    """The page.

    Args:
        results: What it is about.
        summary: Its numbers.
        title: Of the page.
        command: That draws it again.
        resemblance: The content of a second-order file, if that is to be shown.
    """
    losses = local_losses.table()
    loss_plots, trial_plots = _loss_plots(summary), _trial_plots(results)
    local = Plot("local", "Local loss", "The local loss against the prediction", local_losses.figure(losses))
    order_plots = [] if resemblance is None else _second_order(resemblance)
    plots = [*loss_plots, *trial_plots, local, *order_plots]
    heads = cells.columns(summary)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("locobench.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        headline=headline(results, summary),
        tiles=tiles(summary),
        families=_toggles(summary),
        loss_plots=loss_plots,
        trial_plots=trial_plots,
        second_order=order_plots,
        views=[] if resemblance is None else second_order.views(resemblance),
        view=_first_view(order_plots),
        columns=heads,
        rows=[(line.method, family(line.method) == "LocoProp", cells.row(line, summary)) for line in summary.lines],
        absent=[cells.absent(label, reason, len(heads)) for label, reason in summary.absent.items()],
        images=_images(results, summary),
        count=COUNT,
        transfers=local_losses.TRANSFERS,
        start=local_losses.START,
        lines=local_losses.LINES.values(),
        facts=facts(results, summary, command),
        has_bands=any(line.seeds > 1 for line in summary.lines),
        plotly=get_plotlyjs(),
        data=_embedded({"plots": {plot.name: _as_json(plot.figure) for plot in plots}, "local": losses}),
    )


def _embedded(content: dict[str, Any]) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _as_json(figure: go.Figure) -> dict[str, Any]:
    """What plotly draws, with the ticks of a log axis, which are plain numbers here: 50, 100, 200."""
    drawn: dict[str, Any] = json.loads(figure.to_json())
    values = [y for trace in drawn["data"] for y in trace.get("y", []) if isinstance(y, int | float)]
    if drawn["layout"]["yaxis"].get("type") == "log" and values:
        drawn["layout"]["meta"] = {"ticks": log_ticks(min(values), max(values))}
    return drawn


def _loss_plots(summary: Summary) -> list[Plot]:
    priced = any(line.curve.adam_steps for line in summary.lines)
    wanted = [("train", "epochs"), ("train", "seconds"), *([("train", "adam_steps")] if priced else [])]
    words = {"epochs": "epochs", "seconds": "seconds", "adam_steps": "steps of Adam"}
    return [
        Plot(
            f"{loss}-{against.replace('_', '-')}",
            f"{charts.LOSSES[loss].capitalize()} by {words[against]}",
            f"Lines of the mean {loss} loss of each method against {words[against]}; the table has the final values.",
            charts.losses(summary.lines, loss, against),
        )
        for loss, against in [*wanted, ("test", "epochs")]
    ]


def _trial_plots(results: Results) -> list[Plot]:
    if not results.trials:
        return []
    alt = "Points: the final train loss of every trial against its base learning rate, by method."
    return [Plot("sensitivity", "Sensitivity to the learning rate", alt, charts.sensitivity(results.trials))]


def _second_order(content: dict[str, Any]) -> list[Plot]:
    return [
        Plot(
            f"second-order-{direction}",
            name,
            f"Cosine between LocoProp's update and the direction of {name} against the number of local steps.",
            second_order.figure(content, direction),
        )
        for direction, name in DIRECTIONS.items()
    ]


def _first_view(plots: list[Plot]) -> str:
    """The view that the second-order plots open with."""
    return next((str(trace.meta["view"]) for plot in plots for trace in plot.figure.data if trace.visible), "")


def tiles(summary: Summary) -> list[tuple[str, str, str]]:
    """The few numbers that matter most: value, what it is, and a remark."""
    ours, rival, adam = summary.best("LocoProp"), summary.best_first_order, summary.line("adam")
    found = []
    if ours and ours.train:
        found.append((ours.train.text, f"{ours.label}: final train loss", "nats per image"))
    if rival and rival.train:
        found.append((rival.train.text, f"{rival.label}: the best first-order method", "nats per image"))
    if ours and adam and ours.to_adam is not None:
        never = ours.to_adam == inf
        text, remark = ("never", "within the run") if never else (f"{ours.to_adam:.2f} ×", "of Adam's time")
        found.append((text, f"{ours.label}'s time to Adam's final loss", remark))
    if ours and ours.step_ratio is not None:
        found.append((f"{ours.step_ratio:.2f} ×", f"a step of {ours.label}", "of Adam's step"))
    return found


def _toggles(summary: Summary) -> list[tuple[str, list[tuple[Line, Any]]]]:
    """The methods that are drawn, by family, with their styles."""
    drawn = [(line, style(line.method)) for line in summary.lines]
    groups = [(name, [pair for pair in drawn if family(pair[0].method) == name]) for name in FAMILIES]
    return [(name, members) for name, members in groups if members]


def _images(results: Results, summary: Summary) -> list[tuple[str, str]]:
    """Originals first, then each method's reconstructions, as data URLs; empty where no run has any."""
    found: list[tuple[str, str]] = []
    for line in summary.lines:
        runs = sorted(results.runs[line.method], key=lambda run: run.config.get("seed") or 0)
        pair = next((pair for run in runs if (pair := read(path_of(run.path))) is not None), None)
        if pair is None:
            continue
        if not found:
            found.append(("original", _url(pair[0])))
        found.append((line.label, _url(pair[1])))
    return found


def _url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
