"""How LocoProp's update resembles second-order directions, from the file of `locobench figure second-order`."""

from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go

from locobench import plain_json
from locobench.errors import BenchError
from locobench.report.charts import layout
from locobench.runfile import is_count
from locobench.series import DIRECTIONS, SERIES, Series
from locobench.styles import Style


def read(path: Path) -> dict[str, Any]:
    """The numbers, checked as far as they are drawn.

    Raises:
        BenchError: The file cannot be read or is another one.
    """
    try:
        content: dict[str, Any] = plain_json.loads(path.read_text(encoding="utf-8"))
        if not all(is_count(step, 1) for step in content["steps"]):
            raise ValueError(f"steps are {content['steps']!r}")
        if not all(point["layers"][0]["dampings"] for point in content["points"]):
            raise ValueError("a point of training has nothing to show")
        for direction in DIRECTIONS:
            for trace in figure(content, direction).data:
                if not all(abs(cosine) <= 1.001 for cosine in trace.y) or not len(trace.x) == len(trace.y) > 0:
                    raise ValueError(f"{trace.name} are no cosines for the steps {content['steps']!r}")
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
        raise BenchError(f"{path} is no file of `locobench figure second-order`: {error!r}") from error
    return content


def views(content: dict[str, Any]) -> list[str]:
    """What can be looked at: each point of training with each damping."""
    return [
        f"{point['training_steps']} training steps, damping {result['damping']:g}"
        for point in content["points"]
        for result in point["layers"][0]["dampings"]
    ]


def figure(content: dict[str, Any], direction: str) -> go.Figure:
    """The cosine to a direction against the number of local steps, mean over the layers, for every view.

    Args:
        content: Of the file.
        direction: `foof`, `kfac` or `gauss-newton`.
    """
    drawn = go.Figure(layout=layout("local steps", f"cosine to {DIRECTIONS[direction]}"))
    drawn.update_xaxes(type="log", tickvals=[1, 3, 10, 50], ticktext=["1", "3", "10", "50"])
    drawn.update_yaxes(range=[-0.05, 1.05])
    names = iter(views(content))
    last = len(views(content)) - len(content["points"][-1]["layers"][0]["dampings"])
    for point in content["points"]:
        for number in range(len(point["layers"][0]["dampings"])):
            results = [layer["dampings"][number] for layer in point["layers"]]
            name = next(names)
            shown = name == views(content)[last]
            for key in results[0]["updates"]:
                means = [fmean(step) for step in zip(*(r["updates"][key][direction] for r in results), strict=True)]
                drawn.add_trace(_series(key, content["steps"], means, name, shown))
            gradient = fmean(result["gradient"][direction] for result in results)
            drawn.add_trace(_gradient(content["steps"], gradient, name, shown))
    return drawn


def _series(key: str, steps: list[int], means: list[float], view: str, shown: bool) -> go.Scatter:
    title, style = SERIES.get(key, Series(key, Style("#777777", "o")))
    return go.Scatter(
        x=steps,
        y=means,
        mode="lines+markers",
        name=title,
        line={"color": style.colour, "width": 2},
        marker={"symbol": style.symbol, "size": 6},
        hovertemplate=f"<b>{title}</b><br>%{{x}} local steps: %{{y:.3f}}<extra></extra>",
        meta={"view": view},
        visible=shown,
    )


def _gradient(steps: list[int], cosine: float, view: str, shown: bool) -> go.Scatter:
    return go.Scatter(
        x=[steps[0], steps[-1]],
        y=[cosine, cosine],
        mode="lines",
        name="the gradient",
        line={"color": "#999999", "width": 1.5, "dash": "dash"},
        hovertemplate=f"<b>the gradient</b>: {cosine:.3f}<extra></extra>",
        meta={"view": view},
        visible=shown,
    )
