"""The table of a report, as cells: what is written, what it is sorted by, and what a cell needs to be understood."""

from dataclasses import dataclass
from math import inf

from locobench.markdown import markdown_table
from locobench.report.means import Mean, number
from locobench.report.summary import Line, Summary

DASH = "–"
_BETWEEN = "linearly interpolated within epochs"


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: Its heading.
        help: What it means.
        numeric: Whether it is set to the right.
    """

    title: str
    help: str
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: What is written.
        key: By which rows are sorted, None for a cell without a value: always last.
    """

    text: str
    key: float | str | None


_NONE = Cell(DASH, None)


def columns(summary: Summary) -> list[Column]:
    """The columns of `row`."""
    rival = summary.best_first_order.label if summary.best_first_order else "the best first-order method"
    goals = [Column("to Adam's loss", f"time to Adam's final train loss, {_BETWEEN}, divided by Adam's whole time")]
    if not _adam_leads(summary):
        about = f"time to {rival}'s final train loss, {_BETWEEN}, divided by {rival}'s whole time"
        goals.append(Column(f"to {rival}'s loss", about))
    price = "by `locobench speed`" if summary.priced else "by the runs' own seconds, which other work may have blurred"
    elsewhere = [Column(f"step ÷ Adam on {where}", "the same on another machine") for where in summary.elsewhere]
    return [
        Column("method", "", numeric=False),
        Column("train", "train loss after the last epoch, mean ± standard deviation over the seeds"),
        Column("test", "the same over the test images"),
        Column("step ÷ Adam", f"time of a step divided by that of Adam's, {price}; ± over the rounds"),
        *elsewhere,
        Column("bytes ÷ Adam", "what the optimizer holds between steps, divided by Adam's"),
        *goals,
        Column("trials", "settings that were tried"),
        Column("2nd trial", "train loss of the search's second best trial: far above where the best was luck"),
        Column("diverged", "trials whose loss was not finite any more"),
        Column("epochs", "that the runs of the best settings lasted, and over how many seeds", numeric=False),
        Column("best settings", "of the search; other settings are the method's own", numeric=False),
    ]


def _adam_leads(summary: Summary) -> bool:
    """Whether Adam is the best first-order method, so that both goals are the same."""
    return summary.best_first_order is not None and summary.best_first_order.method == "adam"


def row(line: Line, summary: Summary) -> list[Cell]:
    """A method's cells."""
    seeds = f"{line.seeds} seeds" if line.seeds > 1 else "1 seed"
    return [
        Cell(line.label, line.label.lower()),
        _mean(line.train),
        _mean(line.test),
        _step(line, summary),
        *[_priced(*line.elsewhere[where]) if where in line.elsewhere else _NONE for where in summary.elsewhere],
        _ratio(line.bytes_ratio),
        _reached(line.to_adam),
        *([] if _adam_leads(summary) else [_reached(line.to_first_order)]),
        _trials(line),
        _NONE if line.second_best is None else Cell(number(line.second_best), line.second_best),
        _count(line.diverged),
        Cell(f"{line.status}, {seeds}", float(len(line.curve.epochs))),
        Cell(line.settings, line.settings),
    ]


def absent(label: str, reason: str, width: int) -> list[Cell]:
    """The cells of a method that did not run."""
    return [Cell(label, label.lower()), *[_NONE] * (width - 2), Cell(reason, reason)]


def markdown(summary: Summary, only: tuple[str, ...] = ()) -> str:
    """The table as Markdown.

    Args:
        summary: Of the study.
        only: Titles of the columns to write, all where none is named.
    """
    heads = columns(summary)
    rows = [row(line, summary) for line in summary.lines]
    rows += [absent(label, reason, len(heads)) for label, reason in summary.absent.items()]
    kept = [i for i, column in enumerate(heads) if not only or column.title in only]
    left = [head.title for head in heads if not head.numeric]
    written = [[cells[i].text for i in kept] for cells in rows]
    return markdown_table([heads[i].title for i in kept], written, left) + "\n"


def _mean(mean: Mean | None) -> Cell:
    return _NONE if mean is None else Cell(mean.text, mean.value)


def _ratio(ratio: float | None) -> Cell:
    return _NONE if ratio is None else Cell(f"{ratio:.2f}", ratio)


def _step(line: Line, summary: Summary) -> Cell:
    """A star marks a ratio that is less certain than the others."""
    if line.step_ratio is None:
        return _NONE
    star = "*" if summary.priced and not line.measured else ""
    return _priced(line.step_ratio, line.step_spread, star)


def _priced(ratio: float, spread: float | None, star: str = "") -> Cell:
    return Cell(f"{ratio:.2f}{'' if spread is None else f' ± {spread:.2f}'}{star}", ratio)


def _reached(ratio: float | None) -> Cell:
    """A time to a loss, or that it is never reached."""
    return Cell("never", None) if ratio == inf else _ratio(ratio)


def _trials(line: Line) -> Cell:
    """How many there were, and how many there are to be where that is more."""
    if line.trials is None or line.planned is None or line.trials >= line.planned:
        return _count(line.trials)
    return Cell(f"{line.trials}/{line.planned}", float(line.trials))


def _count(count: int | None) -> Cell:
    return _NONE if count is None else Cell(f"{count}", float(count))
