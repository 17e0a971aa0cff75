"""When and from which commit results come."""

import subprocess
from datetime import datetime, timezone
from functools import cache
from pathlib import Path


def today() -> str:
    """The date in UTC, as 2026-01-31."""
    return datetime.now(timezone.utc).date().isoformat()


@cache
def commit() -> str | None:
    """The commit that this code was checked out at, "-dirty" after it where files differ; None outside a checkout."""
    source = Path(__file__)
    # An installed copy may lie in somebody else's repository, which says nothing about this code.
    if _git(source.parent, "ls-files", "--error-unmatch", source.name) is None:
        return None
    return _git(source.parent, "describe", "--always", "--dirty", "--exclude=*")


def also(commits: str | None, another: str | None) -> str | None:
    """What has been worked on under several commits names them all, as "1130fb1, ca1c0bb"."""
    known = commits.split(", ") if commits else []
    return ", ".join(dict.fromkeys([*known, *([another] if another else [])])) or None


def last_change(folder: Path) -> tuple[str, str] | None:
    """Date and commit of the last change to a folder's run files, None where they are in no repository."""
    found = _git(folder, "log", "-1", "--format=%cs %h", "--", ":(glob)**/*.jsonl")
    if not found:
        return None
    date, _, short = found.partition(" ")
    return date, short


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers, None where it fails or is not installed."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
