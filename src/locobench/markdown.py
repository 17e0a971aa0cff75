"""Tables as Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[str] = ("method",)) -> str:
    """The lines of a table; rows that are shorter than the headings end with empty cells.

    Args:
        headings: Of the columns.
        rows: Their cells, plain text.
        left: Headings of the columns that are set to the left.
    """
    rule = ["---" if heading in left else "--:" for heading in headings]
    full = [[*row, *[""] * (len(headings) - len(row))] for row in rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in [headings, rule, *full])


def _cell(text: str) -> str:
    """In one line, and no end of the cell before its end."""
    return " ".join(text.splitlines()).replace("|", "\\|")
