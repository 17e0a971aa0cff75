"""The table of a folder of runs, in the terminal and as Markdown. Reads run files, runs nothing."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from locobench import plots
from locobench.markdown import markdown_table
from locobench.methods import METHODS, Method, family
from locobench.methods import label as label_of
from locobench.methods.method import written
from locobench.prices import read_prices
from locobench.report.means import clock, median_step
from locobench.runfile import Row, RunFile, read_folder, write_atomically
from locobench.settings import counted_threads

_SHARED = ("data", "model", "activation", "epochs", "schedule_epochs", "batch_size", "train_size", "seed")
_ELSEWHERE = ("device", "threads", "machine", "versions", "protocol")
_HEADINGS = ("method", "lr", "train", "test", "seconds", "ms/step", "÷ Adam", "epochs")
_PRICED = ("method", "lr", "train", "test", "÷ Adam", "price", "epochs")


@dataclass(frozen=True)
class Drawn:
    """What was written and what to print.

    Attributes:
        table: For a rich console.
        notes: What is needed to read the table.
        files: The Markdown table and the plots.
    """

    table: Table
    notes: list[str]
    files: list[Path]


def draw(folder: Path, *, best: bool = False, speed: Path | None = None, absent: Sequence[Method] = ()) -> Drawn:
    """Read the runs in a folder and the folders in it, draw `table.md`, `epochs.png` and `seconds.png` into it.

    Args:
        folder: Of the runs.
        best: Whether to leave out all but the best run of each method, as after a search.
        speed: A file of `locobench speed`, for prices that are not blurred by what else ran at the time.
        absent: Methods that were asked for and whose library is missing; they get a line without numbers.
    """
    runs = sorted(read_folder(folder), key=_rank)
    tried = Counter(run.config["method"] for run in runs)
    if best:
        runs = [run for i, run in enumerate(runs) if run.config["method"] not in {r.config["method"] for r in runs[:i]}]
    prices = None if speed is None else read_prices(speed)
    notes = _notes(runs, prices, tried if best else None)
    lines = _lines(runs, prices)
    headings = _HEADINGS if prices is None else _PRICED
    dashes = ("–",) * (len(headings) - 2)
    lines += [(method.label, *dashes, f"not installed: {method.missing}") for method in absent]
    markdown = folder / "table.md"
    write_atomically(markdown, lambda file: file.write_text(_markdown(headings, lines, notes), encoding="utf-8"))
    return Drawn(_table(headings, lines, _title(runs)), notes, [markdown, *plots.draw(runs, _title(runs), folder)])


def label(run: RunFile) -> str:
    """The method's name for readers; files of methods that are not in the table any more keep theirs."""
    return label_of(run.config["method"])


def final(run: RunFile) -> Row | None:
    """The last epoch that has a loss."""
    rows = [row for row in run.rows if row["train_loss"] is not None]
    return rows[-1] if rows else None


def _rank(run: RunFile) -> tuple[bool, bool, float]:
    """Best final train loss first; unfinished runs after the finished ones, diverged ones last."""
    row = final(run)
    return run.diverged, not run.finished, row["train_loss"] if row else float("inf")


def _lines(runs: list[RunFile], prices: dict[str, float] | None) -> list[tuple[str, ...]]:
    if prices is not None:
        return [_priced_line(run, prices.get(run.config["method"])) for run in runs]
    adam = next((run for run in runs if run.config["method"] == "adam" and final(run)), None)
    lines: list[tuple[str, ...]] = []
    for run in runs:
        # A diverged run has no final loss: numbers from before would only look like a result.
        row = None if run.diverged else final(run)
        step = median_step([run])
        lines.append(
            (
                label(run),
                f"{run.config['lr']:.3g}",
                _loss(row, "train_loss"),
                _loss(row, "test_loss"),
                f"{run.rows[-1]['seconds']:.1f}" if run.rows else "–",
                f"{1000 * step:.1f}" if step else "–",
                _price(run, adam),
                _status(run),
            )
        )
    return lines


def _price(run: RunFile, adam: RunFile | None) -> str:
    """A step's time ÷ Adam's, where the two ran on the same clock."""
    step, its = median_step([run]), None if adam is None else median_step([adam])
    return f"{step / its:.2f}" if adam and step and its and clock([run]) == clock([adam]) else "–"


def _priced_line(run: RunFile, price: float | None) -> tuple[str, ...]:
    row = None if run.diverged else final(run)
    return (
        label(run),
        f"{run.config['lr']:.3g}",
        _loss(row, "train_loss"),
        _loss(row, "test_loss"),
        f"{price:.2f}" if price else "–",
        f"{price * len(run.rows):.1f}" if price else "–",
        _status(run),
    )


def _loss(row: Row | None, key: str) -> str:
    if row is None:
        return "–"
    return f"{row[key]:.2f}" if row[key] < 1e5 else f"{row[key]:.3g}"


def _status(run: RunFile) -> str:
    if run.diverged:
        return "diverged"
    if run.finished:
        return f"{run.config['epochs']}"
    return f"{len(run.rows)}/{run.config['epochs']}"


def _title(runs: list[RunFile]) -> str:
    config = runs[0].config
    return f"{config['data'].upper()}, {config['model']} {config.get('activation', '')} autoencoder"


def _notes(runs: list[RunFile], prices: dict[str, float] | None, tried: Counter[str] | None) -> list[str]:
    """The settings that the runs share, and a warning of those that they do not."""
    notes = []
    shared, differing = [], []
    for key in (*_SHARED, *_ELSEWHERE):
        values = [run.config.get(key) for run in runs]
        if any(value != values[0] for value in values):
            each = ", ".join(f"{label(run)}: {value}" for run, value in zip(runs, values, strict=True))
            differing.append(f"{key.replace('_', ' ')} ({each})")
        elif key in _SHARED and values[0] is not None:
            shared.append(f"{key.replace('_', ' ')} {values[0]}")
    notes.append("; ".join(shared) + ".")
    if differing:
        notes.append(f"Not comparable without care, the runs differ in {'; '.join(differing)}.")
    machine = runs[0].config.get("machine", {})
    versions = runs[0].config.get("versions", {})
    if tried is not None:
        notes.append(
            "The best of several learning rates: "
            + ", ".join(f"{label(run)} {tried[run.config['method']]}" for run in runs)
            + "."
        )
    notes.append(
        "Train, test: loss after the last epoch (cross-entropy, summed over pixels, mean over all images). "
        + (
            "Seconds: training steps only; ÷ Adam: time per step divided by Adam's. "
            if prices is None
            else "÷ Adam: time per step divided by Adam's, by `locobench speed`; price: that times the epochs, in "
            "epochs of Adam. "
        )
        + f"{machine.get('gpu', machine.get('cpu', 'unknown machine'))}, "
        f"{counted_threads(runs[0].config.get('threads', '?'))}, torch {versions.get('torch', '?')}. "
        "For prices per step that a busy machine does not blur, use `locobench speed`."
    )
    known = [METHODS[run.config["method"]] for run in runs if run.config["method"] in METHODS]
    notes.append("; ".join(f"{method.label}: {method.note}" for method in known) + ".")
    for run in runs:
        if run.config["params"]:
            notes.append(f"{label(run)} with {written(run.config['params'])}.")
        if run.diverged:
            last = run.rows[-1]
            reason = last.get("message", "no reason recorded")
            notes.append(f"{label(run)} diverged in epoch {last['epoch']}: {reason}")
    return notes


def _table(headings: tuple[str, ...], lines: list[tuple[str, ...]], title: str) -> Table:
    table = Table(title=escape(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in headings:
        left = heading in ("method", "epochs")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    ours = {method.label for method in METHODS.values() if family(method.name) == "LocoProp"}
    for line in lines:
        table.add_row(*map(escape, line), style="bold" if line[0] in ours else None)
    return table


def _markdown(headings: tuple[str, ...], lines: list[tuple[str, ...]], notes: list[str]) -> str:
    rows = markdown_table(headings, lines, left=("method", "epochs"))
    return "\n".join([rows, "", *(f"{note}\n" for note in notes)])
