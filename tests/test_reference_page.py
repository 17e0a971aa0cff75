"""The reference shows all that is public, each name once; CONTRIBUTING has a place for every module."""

import re
from pathlib import Path

import torchloco

ROOT = Path(__file__).parent.parent


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs/api.md").read_text()
    named = re.findall(r"^\.\. auto(?:class|function|module):: (?:torchloco\.)?(\S+)$", text, re.MULTILINE)
    assert sorted(named) == sorted(torchloco.__all__)


def test_every_module_has_a_line_for_contributors():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    modules = {path.name for path in (ROOT / "src/torchloco").glob("*.py")} - {"__init__.py"}
    assert not {name for name in modules if f"`{name}`" not in text}
