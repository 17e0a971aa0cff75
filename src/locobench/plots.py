"""Train loss against epochs and against seconds, as PNG files."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from locobench import canvas
from locobench.methods import family, label
from locobench.runfile import RunFile, write_atomically
from locobench.styles import style

_LOG_FROM = 3.0  # a log scale from this ratio of the largest to the smallest loss


@dataclass(frozen=True)
class _Curve:
    label: str
    colour: str
    marker: str
    prominent: bool
    epochs: list[float]
    seconds: list[float]
    losses: list[float]


def draw(runs: list[RunFile], title: str, folder: Path) -> list[Path]:
    """Draw both plots into the folder; runs without a finished epoch are left out.

    Args:
        runs: In the order of the table.
        title: Of the plots.
        folder: Where `epochs.png` and `seconds.png` go.
    """
    curves = [_curve(run) for run in runs]
    curves = [curve for curve in curves if curve.losses]
    return [
        _plot(curves, title, "epochs", folder / "epochs.png"),
        _plot(curves, title, "seconds", folder / "seconds.png"),
    ]


def _curve(run: RunFile) -> _Curve:
    name: str = run.config["method"]
    rows = [row for row in run.rows if row["train_loss"] is not None]
    drawn = style(name)
    return _Curve(
        label(name) + ("  diverged" if run.diverged else f"  {rows[-1]['train_loss']:.4g}" if rows else ""),
        drawn.colour,
        drawn.marker,
        family(name) == "LocoProp",
        [row["epoch"] for row in rows],
        [row["seconds"] for row in rows],
        [row["train_loss"] for row in rows],
    )


def _plot(curves: list[_Curve], title: str, against: str, path: Path) -> Path:
    figure = canvas.blank(figsize=(8, 4.8), dpi=150)
    axes = figure.add_subplot()
    for curve in curves:
        axes.plot(
            curve.epochs if against == "epochs" else curve.seconds,
            curve.losses,
            color=curve.colour,
            marker=curve.marker,
            linewidth=3.0 if curve.prominent else 1.4,
            markersize=7 if curve.prominent else 5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            markevery=max(1, len(curve.losses) // 12),
            label=curve.label,
            zorder=3 if curve.prominent else 2,
        )
    _scale(axes, curves, against)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("epochs" if against == "epochs" else "seconds of training (evaluation not counted)")
    axes.set_ylabel("train loss (nats per image)")
    axes.grid(True, which="both", color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if curves:
        # Best first, each with its last loss, beside the plot: nothing is hidden behind a box.
        figure.legend(loc="outside right upper", frameon=False, title="method, final loss", fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def _scale(axes: Axes, curves: list[_Curve], against: str) -> None:
    losses = [loss for curve in curves for loss in curve.losses]
    if losses and min(losses) > 0 and max(losses) > _LOG_FROM * min(losses):
        axes.set_yscale("log")
        # Plain numbers: "50, 100, 200" says more than powers of ten over a decade or two.
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    if against == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        seconds = [second for curve in curves for second in curve.seconds]
        if seconds and min(seconds) > 0 and max(seconds) > 20 * min(seconds):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
