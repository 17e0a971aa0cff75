"""The results in README.md: a block between two comments that is written by `locobench report --readme`."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from locobench.errors import BenchError
from locobench.report import cells, facts
from locobench.report.results import Results, load
from locobench.report.summary import summarize
from locobench.report.words import headline
from locobench.report.write import command_of, title_of
from locobench.runfile import write_atomically

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_COMMAND = re.compile(r"`locobench report ([^`]*) --readme`")
_PROVENANCE = "Runs of "


def recorded(readme: Path) -> tuple[list[Path], list[Path]]:
    """Folders and files of prices of the command that the block names.

    Raises:
        BenchError: There is no such block, or it names no command.
    """
    return _named(readme, _split(readme)[1])


def _named(readme: Path, text: str) -> tuple[list[Path], list[Path]]:
    found = _COMMAND.search(text)
    if found is None:
        raise BenchError(f"the block in {readme} names no folder yet; begin with `locobench report DIR --readme`")
    try:
        words = shlex.split(found[1])
    except ValueError as error:
        raise BenchError(f"the command in the block of {readme} cannot be read ({error}): {found[1]}") from None
    end = words.index("--speed") if "--speed" in words else len(words)
    folders, options, speed = words[:end], words[end::2], words[end + 1 :: 2]
    wrong = set(options) - {"--speed"} or len(options) != len(speed)
    if wrong or not folders or any(word.startswith("-") for word in [*folders, *speed]):
        raise BenchError(
            f"the command in the block of {readme} should name folders, and after them --speed before each file of "
            f"prices: {found[1]}"
        )
    return [Path(folder) for folder in folders], [Path(file) for file in speed]


def check(readme: Path, folders: Sequence[Path], speed: Sequence[Path] = ()) -> None:
    """Refuse what `rewrite` cannot do, before anything is written.

    Raises:
        BenchError: The file has not the two comments, or a name cannot stand in Markdown.
    """
    before, _, after = _split(readme)
    if "`" in command_of(folders, speed):
        raise BenchError("a name with a backtick in it cannot stand in Markdown; rename the folder or the file")
    text = block(readme, folders, speed)
    if _pieces(readme, before + text + after)[1] != text or _named(readme, text) != ([*folders], [*speed]):
        raise BenchError("the block would not be found again with these names in it; rename the folders or the file")


def rewrite(readme: Path, folders: Sequence[Path], speed: Sequence[Path] = ()) -> bool:
    """Put the block as the folders' files give it; returns whether anything changed."""
    before, old, after = _split(readme)
    new = block(readme, folders, speed)
    if "\r\n" in before + after:  # a file keeps its ends of lines
        new = new.replace("\n", "\r\n")
    if new == old:
        return False
    write_atomically(readme, lambda file: file.write_bytes((before + new + after).encode()))
    return True


def is_current(readme: Path, folders: Sequence[Path], speed: Sequence[Path] = ()) -> bool:
    """Whether the block says what the files give. Date and commit may lag: a commit cannot name itself."""
    old = _split(readme)[1]
    return _comparable(old) == _comparable(block(readme, folders, speed))


def block(readme: Path, folders: Sequence[Path], speed: Sequence[Path] = ()) -> str:
    """The block for these folders, without its two comments.

    Args:
        readme: It links the plots from where it lies.
        folders: One part each.
        speed: Files of `locobench speed`.
    """
    parts = [_part(readme, load(folder, speed)) for folder in folders]
    made = f"Written from the run files by `{command_of(folders, speed)} --readme`."
    text = "\n\n".join([*parts[:-1], f"{parts[-1]}\n{made}"])
    return "\n" + text.replace("<!--", "&lt;!--") + "\n"  # no name or message ends the block


def _part(readme: Path, results: Results) -> str:
    summary = summarize(results)
    heads = [column.title for column in cells.columns(summary)]
    unknown = {
        "trials": all(line.trials is None for line in summary.lines),
        "bytes ÷ Adam": all(line.bytes_ratio is None for line in summary.lines),
        "diverged": not any(line.diverged for line in summary.lines),
        "2nd trial": all(line.second_best is None for line in summary.lines),
    }
    only = tuple(title for title in heads if not unknown.get(title))
    picture = Path(os.path.relpath(results.folder / "report" / "train-epochs.png", readme.parent)).as_posix()
    dates, commit = facts.provenance(results)
    dated = f"{_PROVENANCE}{dates or 'an unknown date'}, commit {commit or 'unknown'}."
    notes = [f"{value[0].upper()}{value[1:]}." for _, value in facts.caveats(results, summary)]
    versions = results.config.get("versions", {})
    where = f"{facts.machine(results)}, torch {versions.get('torch', '?')}"
    return "\n".join(
        [
            f"**{title_of(results)}.** {' '.join(headline(results, summary))}",
            "",
            f"![Train loss against epochs, {title_of(results)}]({picture})",
            "",
            cells.markdown(summary, only),
            "Train, test: cross-entropy summed over the pixels, mean over all images. To a loss: time until it is "
            "passed, linearly interpolated within epochs, divided by the whole time of the method whose final loss it "
            "is.",
            f"{where}. {' '.join(notes)}",
            dated,
        ]
    )


def _comparable(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(_PROVENANCE)]


def _split(readme: Path) -> tuple[str, str, str]:
    """What comes before the block's text, the text, and what comes after it."""
    try:
        text = readme.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read {readme}: {error}; run this in the folder of README.md") from error
    return _pieces(readme, text)


def _pieces(readme: Path, text: str) -> tuple[str, str, str]:
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BenchError(f"{readme} should hold one {BEGIN} and after it one {END}, each on a line of its own")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start], text[start:end], text[end:]
