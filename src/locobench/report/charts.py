"""The plots of a report's page, as plotly figures. Each trace tells its method in `meta`, so that it can be toggled."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from locobench.methods import family, label
from locobench.methods.method import written
from locobench.report.means import Mean
from locobench.report.results import ceiling
from locobench.report.summary import Line
from locobench.styles import style
from locobench.trials import Trial

AXES = {
    "epochs": "epochs",
    "seconds": "seconds of training",
    "adam_steps": "time, in steps of Adam",
}
LOSSES = {"train": "train loss", "test": "test loss"}
_GRID, _INK, _AXIS = "#e7e5e0", "#33312c", "#b9b5ab"
_TRIAL_SYMBOLS = {"finished": "", "pruned": "-open", "unfinished": "-open", "diverged": "x-thin-open"}


def layout(x: str, y: str, **more: Any) -> go.Layout:
    """What all plots share: thin lines, no legend (the page has toggles), room for axis titles only."""
    axis = {"gridcolor": _GRID, "linecolor": _AXIS, "zeroline": False, "ticks": "outside", "tickcolor": _AXIS}
    return go.Layout(
        template="none",
        font={"family": "inherit", "size": 13, "color": _INK},
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        showlegend=False,
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "bordercolor": _AXIS, "font": {"color": _INK}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        dragmode=False,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": _AXIS, "activecolor": _INK},
        xaxis={**axis, "title": {"text": x, "standoff": 8}, "showgrid": False},
        yaxis={**axis, "title": {"text": y, "standoff": 6}, "automargin": True},
        **more,
    )


def losses(lines: Sequence[Line], loss: str, against: str) -> go.Figure:
    """Mean loss of each method with a band of one standard deviation over the seeds.

    Args:
        lines: Of the table.
        loss: `train` or `test`.
        against: `epochs`, `seconds` or `adam_steps`.
    """
    figure = go.Figure(layout=layout(AXES[against], f"{LOSSES[loss]}, nats per image"))
    figure.update_yaxes(type="log")
    # What stands out is drawn last, on top.
    for line in sorted(lines, key=lambda line: family(line.method) == "LocoProp"):
        x: list[float] | None = getattr(line.curve, against)
        means: list[Mean] = getattr(line.curve, loss)
        if x and means:
            if means[0].spread is not None:
                figure.add_trace(_band(line.method, x, means))
            figure.add_trace(_curve(line, x, means, against))
    return figure


def _curve(line: Line, x: list[float], means: list[Mean], against: str) -> go.Scatter:
    drawn, prominent = style(line.method), family(line.method) == "LocoProp"
    unit = {"epochs": "", "seconds": "%{x:.1f} s, ", "adam_steps": "%{x:.0f} steps of Adam, "}[against]
    return go.Scatter(
        x=x,
        y=[mean.value for mean in means],
        customdata=[[epoch, mean.text] for epoch, mean in zip(line.curve.epochs, means, strict=True)],
        hovertemplate=f"<b>{line.label}</b><br>{unit}epoch %{{customdata[0]}}: %{{customdata[1]}}<extra></extra>",
        mode="lines+markers",
        name=line.label,
        line={"color": drawn.colour, "width": 3.5 if prominent else 1.6, "dash": drawn.line},
        marker={"symbol": drawn.symbol, "size": 8 if prominent else 6, "line": {"color": "white", "width": 0.8}},
        meta={"method": line.method, "kind": "curve"},
    )


def _band(method: str, x: list[float], means: list[Mean]) -> go.Scatter:
    upper = [mean.value + (mean.spread or 0) for mean in means]
    # A log axis has no place for what a wide spread puts below zero.
    lower = [max(mean.value - (mean.spread or 0), mean.value / 10) for mean in means]
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*upper, *reversed(lower)],
        fill="toself",
        fillcolor=_translucent(style(method).colour),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        meta={"method": method, "kind": "band"},
    )


def _translucent(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def sensitivity(trials: Sequence[Trial]) -> go.Figure:
    """Every trial's final train loss against its learning rate; what diverged or ended high is on the upper edge."""
    figure = go.Figure(layout=layout("base learning rate", "final train loss, nats per image"))
    figure.update_xaxes(type="log", exponentformat="power", dtick=1, showgrid=True)
    figure.update_yaxes(type="log")
    top = ceiling(trials)
    for method in dict.fromkeys(trial.method for trial in trials):
        own = [t for t in trials if t.method == method and (t.train_loss is not None or t.state == "diverged")]
        if own:
            figure.add_trace(_trials(method, sorted(own, key=lambda trial: trial.lr), top))
    return figure


def _trials(method: str, trials: list[Trial], top: float) -> go.Scatter:
    drawn = style(method)
    gone = [trial.state == "diverged" for trial in trials]
    return go.Scatter(
        x=[trial.lr for trial in trials],
        y=[top if lost or (t.train_loss or 0) > top else t.train_loss for t, lost in zip(trials, gone, strict=True)],
        customdata=[
            [written({"lr": t.lr, **t.params}), _outcome(t), "diverged" if lost else t.state]
            for t, lost in zip(trials, gone, strict=True)
        ],
        hovertemplate=f"<b>{label(method)}</b><br>%{{customdata[0]}}<br>%{{customdata[1]}}<extra></extra>",
        # Where nothing else was tuned, the trials are points of one curve.
        mode="markers" if any(trial.params for trial in trials) else "lines+markers",
        line={"color": drawn.colour, "width": 1, "dash": drawn.line},
        name=label(method),
        marker={
            "color": drawn.colour,
            "size": 9,
            "opacity": 0.85,
            "symbol": [
                _TRIAL_SYMBOLS["diverged"] if lost else _symbol(trial, drawn.symbol, top)
                for trial, lost in zip(trials, gone, strict=True)
            ],
            "line": {"color": drawn.colour, "width": 1.5},
        },
        meta={"method": method, "kind": "trials"},
    )


def _symbol(trial: Trial, symbol: str, top: float) -> str:
    return "arrow-up" if (trial.train_loss or 0) > top else symbol + _TRIAL_SYMBOLS[trial.state]


def _outcome(trial: Trial) -> str:
    if trial.state == "diverged" or trial.train_loss is None:
        return trial.state
    return f"{trial.train_loss:.2f}" + (
        "" if trial.state == "finished" else f", {trial.state} after {trial.epochs} epochs"
    )
