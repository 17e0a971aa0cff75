"""The plots of a report as PNG files, for places that show pictures only."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

from locobench import canvas
from locobench.methods import family, label
from locobench.report.results import ceiling
from locobench.report.summary import Line
from locobench.report.ticks import log_ticks
from locobench.runfile import write_atomically
from locobench.styles import style
from locobench.trials import Trial

AXES = {
    "epochs": "epochs",
    "seconds": "seconds of training (evaluation not counted)",
    "adam_steps": "time, in steps of Adam",
}


def losses(lines: Sequence[Line], loss: str, against: str, title: str, path: Path) -> Path:
    """Draw mean losses with a band of one standard deviation over the seeds.

    Args:
        lines: Of the table, in its order.
        loss: `train` or `test`.
        against: `epochs`, `seconds` or `adam_steps`.
        title: Of the plot.
        path: The PNG.
    """
    figure, axes = _start(title)
    for line in lines:
        x, means = getattr(line.curve, against), getattr(line.curve, loss)
        if x and means:
            _line(axes, line, x, [m.value for m in means], [m.spread or 0.0 for m in means], means[-1].text)
    _log(axes)
    if against == "epochs":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(AXES[against])
    axes.set_ylabel(f"{loss} loss (nats per image)")
    return _finish(figure, axes, "method, final loss", path)


def _line(axes: Axes, line: Line, x: list[float], y: list[float], spread: list[float], final: str) -> None:
    drawn, prominent = style(line.method), family(line.method) == "LocoProp"
    axes.plot(
        x,
        y,
        color=drawn.colour,
        linestyle=drawn.linestyle,
        marker=drawn.marker,
        linewidth=3.0 if prominent else 1.4,
        markersize=7 if prominent else 5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        markevery=max(1, len(y) // 12),
        label=f"{line.label}  {final}",
        zorder=3 if prominent else 2,
    )
    if any(spread):
        lower = [max(value - s, value / 10) for value, s in zip(y, spread, strict=True)]
        upper = [value + s for value, s in zip(y, spread, strict=True)]
        axes.fill_between(x, lower, upper, color=drawn.colour, alpha=0.18, linewidth=0)


def sensitivity(trials: Sequence[Trial], title: str, path: Path) -> Path:
    """Draw every trial's last train loss against its learning rate.

    Open marks ended early; what is higher is an arrow on the upper edge, what diverged a cross there.

    Args:
        trials: Of the search.
        title: Of the plot.
        path: The PNG.
    """
    figure, axes = _start(title)
    top = ceiling(trials)
    for method in dict.fromkeys(trial.method for trial in trials):
        own = [trial for trial in trials if trial.method == method]
        known = [(t, t.train_loss) for t in own if t.state != "diverged" and t.train_loss is not None]
        drawn = style(method)
        axes.scatter([], [], color=drawn.colour, marker=drawn.marker, s=36, label=label(method))
        for trial, loss in known:
            axes.scatter(
                [trial.lr],
                [min(loss, top)],
                edgecolors=drawn.colour,
                facecolors=drawn.colour if trial.state == "finished" else "none",
                marker="^" if loss > top else drawn.marker,
                s=36,
                alpha=0.85,
            )
        lost = [trial.lr for trial in own if trial.state == "diverged"]
        axes.scatter(lost, [top] * len(lost), color=drawn.colour, marker="x", s=30)
    _log(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("base learning rate (open: ended early; arrow: higher; cross: diverged)")
    axes.set_ylabel("last train loss (nats per image)")
    return _finish(figure, axes, "method", path)


def _start(title: str) -> tuple[Figure, Axes]:
    figure = canvas.blank(figsize=(8, 4.8), dpi=150)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    return figure, axes


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(log_ticks(*axes.get_ylim())))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def _finish(figure: Figure, axes: Axes, legend: str, path: Path) -> Path:
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, title=legend, fontsize=9)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path
