"""The figure of the resemblance to second-order directions, and its numbers as a file."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from locobench import canvas, plain_json
from locobench.runfile import write_atomically
from locobench.series import DIRECTIONS, SERIES

_LINES = {"solid": "-", "dashed": "--", "dotted": ":"}  # by damping


def save(content: dict[str, Any], path: Path) -> list[Path]:
    """Write the numbers as JSON and draw them, next to each other.

    Args:
        content: What `experiment` returned.
        path: The PNG; the JSON has its name with another suffix.
    """
    numbers = path.with_suffix(".json")
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(numbers, lambda file: file.write_text(text, encoding="utf-8"))
    figure = draw(content)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=90))
    return [path, numbers]


def may_replace(path: Path) -> bool:
    """Whether there is no such file, or one of these numbers."""
    if not path.exists():
        return True
    try:
        content = plain_json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"points", "dampings", "steps"} <= content.keys()


def draw(content: dict[str, Any]) -> Figure:
    """A row of panels per point and direction, a column per layer, a line per series and damping."""
    points = content["points"]
    count = len(points[0]["layers"])
    figure = canvas.blank(figsize=(2.0 * count + 0.6, 6.4 * len(points) + 0.9))
    parts = figure.subfigures(len(points), 1, squeeze=False)[:, 0]
    for part, point in zip(parts, points, strict=True):
        when = f"after {point['training_steps']} steps" if point["training_steps"] else "at the initial weights"
        part.suptitle(f"{when}, loss of the batch {point['loss']:.1f}", fontweight="bold")
        grid = part.subplots(len(DIRECTIONS), count, sharex=True, sharey=True, squeeze=False)
        for axes_row, (kind, label) in zip(grid, DIRECTIONS.items(), strict=True):
            axes_row[0].set_ylabel(f"cosine to {label}")
            for axes, layer in zip(axes_row, point["layers"], strict=True):
                _panel(axes, layer, kind, content["steps"])
        for axes, layer in zip(grid[0], point["layers"], strict=True):
            d_out, columns = layer["shape"]
            axes.set_title(f"{layer['layer']}\n{columns - 1} → {d_out}", fontsize=9)
        for axes in grid[-1]:
            axes.set_xlabel("local steps T")
    handles, labels = parts[-1].axes[0].get_legend_handles_labels()
    named = dict(zip(labels[::-1], handles[::-1], strict=True))  # of each label the first line, which is solid
    dampings = ", ".join(
        f"{style} λ = {damping:g}" for damping, style in zip(content["dampings"], _LINES, strict=False)
    )
    figure.legend(
        [*named.values()][::-1], [*named][::-1], loc="outside lower center", ncols=6, frameon=False, title=dampings
    )
    return figure


def _panel(axes: Axes, layer: dict[str, Any], kind: str, steps: list[int]) -> None:
    for result, line in zip(layer["dampings"], _LINES.values(), strict=False):
        axes.axhline(result["gradient"][kind], color="#999999", linestyle=line, linewidth=1.2, label="gradient")
        for series, by_kind in result["updates"].items():
            label, style = SERIES[series]
            axes.plot(
                steps,
                by_kind[kind],
                color=style.colour,
                linestyle=line,
                marker=style.marker,
                markersize=3,
                linewidth=1.2,
                label=label,
            )
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 50], ["1", "3", "10", "50"])
    axes.minorticks_off()
    axes.set_ylim(-0.05, 1.05)
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
