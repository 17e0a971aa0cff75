"""The plot of `locobench speed`: a step's time ÷ Adam's against the size of what is trained, from the file alone."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from locobench import canvas
from locobench.errors import BenchError
from locobench.methods import family, label
from locobench.runfile import write_atomically
from locobench.settings import counted_threads
from locobench.styles import style

AXES = {"width": "hidden widths ×", "depth": "number of 500 layers ×", "batch_size": "images per step"}


def varying(content: dict[str, Any]) -> list[str]:
    """Which of width, depth and batch size has several values in a file of `locobench speed`."""
    return [key for key in AXES if len({row.get(key) for row in content["prices"]}) > 1]


def save(content: dict[str, Any], path: Path) -> Path:
    """Draw a panel for each of width, depth and batch size that varies, the others at their first value.

    Args:
        content: Of a file of `locobench speed`.
        path: The PNG.

    Raises:
        BenchError: Nothing varies.
    """
    keys = varying(content)
    if not keys:
        raise BenchError("nothing to draw: the file has one size only; give `locobench speed` --width 1,2,4")
    missing = {"model", "activation", "device", "threads"} - content.keys()
    if missing or not any("trouble" not in row for row in content["prices"]):
        raise BenchError(f"nothing to draw: the file has no {', '.join(sorted(missing)) or 'prices'}")
    figure = canvas.blank(figsize=(4.6 * len(keys) + 3.2, 5.2), dpi=150)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        _panel(axes, content["prices"], key)
    panels[0].set_ylabel("time of a step ÷ Adam's")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    machine = f"{content['device']}, {counted_threads(content['threads'])}"
    title = f"{content['model']} {content['activation']} autoencoder, {machine}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def series(rows: list[dict[str, Any]], key: str) -> dict[str, dict[int, float]]:
    """Time ÷ Adam's by method and by the value of `key`, at the first value of the other two. Dearest method first."""
    fixed = {other: rows[0].get(other) for other in AXES if other != key}
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if "trouble" not in row and all(row.get(other) == value for other, value in fixed.items()):
            found.setdefault(row["method"], {})[row[key]] = row["time_ratio"]
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    found = series(rows, key)
    for name, points in found.items():
        sizes = sorted(points)
        drawn, prominent = style(name), family(name) == "LocoProp"
        axes.plot(
            sizes,
            [points[size] for size in sizes],
            color=drawn.colour,
            linestyle=drawn.linestyle,
            marker=drawn.marker,
            linewidth=2.6 if prominent else 1.3,
            markersize=6 if prominent else 5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=label(name),
            zorder=3 if prominent else 2,
        )
    sizes = sorted({size for points in found.values() for size in points})
    others = [f"{AXES[other]} {rows[0][other]}".replace("× ", "×") for other in AXES if other != key]
    axes.set_title(", ".join(others), fontsize=9)
    axes.set_xlabel(AXES[key])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
