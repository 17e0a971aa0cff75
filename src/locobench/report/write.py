"""Writing a report: page, pictures and table into DIR/report."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from locobench.errors import BenchError
from locobench.libraries import JINJA, PLOTLY
from locobench.report import cells, pictures
from locobench.report.facts import facts
from locobench.report.results import Results, load
from locobench.report.summary import Summary, summarize
from locobench.report.words import headline
from locobench.runfile import locked, prepare_folder, write_atomically

_PICTURES = {"train-epochs.png", "train-seconds.png", "test-epochs.png", "train-adam-steps.png", "sensitivity.png"}


@dataclass(frozen=True)
class Written:
    """A report.

    Attributes:
        results: What it is about.
        summary: Its numbers.
        title: Of page and plots.
        files: That were written, the page first.
    """

    results: Results
    summary: Summary
    title: str
    files: list[Path]


def check() -> None:
    """Refuse to begin where a library of the page is missing."""
    missing = [library.install for library in (PLOTLY, JINJA) if library.missing]
    if missing:
        raise BenchError(f"the page needs a library that is not installed: {'; '.join(missing)}")


def write_all(folders: Sequence[Path], *, speed: Sequence[Path] = (), second_order: Path | None = None) -> list[Path]:
    """Write a report about each folder, once all of them are known to be readable; returns the files.

    Args:
        folders: As for `write`, and so are the other two.
    """
    drafts = [_draft(folder, speed, second_order) for folder in folders]
    return [file for draft in drafts for file in _put(draft).files]


def write(folder: Path, *, speed: Sequence[Path] = (), second_order: Path | None = None) -> Written:
    """Read a folder and write its report; each file is put in its place as a whole.

    Args:
        folder: A study, or a folder of run files.
        speed: Files of `locobench speed`; see `load`.
        second_order: A file of `locobench figure second-order`.

    Raises:
        BenchError: A library is missing, what is read is not as it should be, or another process is writing the report.
    """
    return _put(_draft(folder, speed, second_order))


@dataclass(frozen=True)
class _Draft:
    results: Results
    summary: Summary
    title: str
    command: str
    page: str


def _draft(folder: Path, speed: Sequence[Path], second_order: Path | None) -> _Draft:
    """All that is read and can be refused."""
    check()
    from locobench.report import page
    from locobench.report import second_order as resemblance

    results = load(folder, speed)
    summary = summarize(results)
    content = None if second_order is None else resemblance.read(second_order)
    title = title_of(results)
    command = command_of([folder], speed, second_order)
    return _Draft(results, summary, title, command, page.render(results, summary, title, command, content))


def _put(draft: _Draft) -> Written:
    results, summary = draft.results, draft.summary
    out = results.folder / "report"
    prepare_folder(out)
    with locked(out):
        files = [_text(out / "report.html", draft.page)]
        files += [_text(out / "table.md", _markdown(results, summary, draft.command))]
        files += _pictures(results, summary, draft.title, out)
        for name in _PICTURES - {file.name for file in files}:
            (out / name).unlink(missing_ok=True)  # of an earlier report, which had prices or trials
        return Written(results, summary, draft.title, files)


def command_of(folders: Sequence[Path], speed: Sequence[Path] = (), second_order: Path | None = None) -> str:
    """What draws the report again."""
    options = [*[("--speed", file) for file in speed], ("--second-order", second_order)]
    parts = [part for name, path in options if path is not None for part in (name, _word(path))]
    return shlex.join(["locobench", "report", *map(_word, folders), *parts])


def _word(path: Path) -> str:
    """A path that is not taken for an option."""
    name = path.as_posix()
    return f"./{name}" if name.startswith("-") else name


def title_of(results: Results) -> str:
    """What was trained on what, for how long."""
    config = results.config
    name = {"curves": "CURVES", "mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "usps": "USPS"}
    epochs = "1 epoch" if config["epochs"] == 1 else f"{config['epochs']} epochs"
    model = f"{config['model']} {config.get('activation', '')}".strip()
    return f"{name.get(config['data'], config['data'])}: the {model} autoencoder, {epochs}"


def _pictures(results: Results, summary: Summary, title: str, out: Path) -> list[Path]:
    wanted = [("train", "epochs"), ("train", "seconds"), ("test", "epochs")]
    if summary.priced:
        wanted.append(("train", "adam_steps"))
    drawn = [
        pictures.losses(summary.lines, loss, against, title, out / f"{loss}-{against.replace('_', '-')}.png")
        for loss, against in wanted
    ]
    if results.trials:
        drawn.append(pictures.sensitivity(results.trials, title, out / "sensitivity.png"))
    return drawn


def _markdown(results: Results, summary: Summary, command: str) -> str:
    notes = "\n".join(f"- {name}: {value}" for name, value in facts(results, summary, command))
    return "\n".join([" ".join(headline(results, summary)), "", cells.markdown(summary), notes, ""])


def _text(path: Path, text: str) -> Path:
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8"))
    return path
