"""Which way the arrows point: the mathematics knows nothing of modules and hooks, and files stay readable."""

import ast
import sys
from pathlib import Path

import pytest

import torchloco

ROOT = Path(torchloco.__file__).parent
MATHEMATICS = [
    *(
        "grouped",
        "inputs",
        "windows",
        "transfers",
        "losses",
        "targets",
        "regularizers",
        "problem",
        "sampling",
        "conjugate",
    ),
    *("solvers", "steps", "exact", "moments", "spectral", "anderson", "newton", "safety", "rmsprop"),
]
ATTACHING = {
    "capture",
    "discovery",
    "nodes",
    "registry",
    "attached",
    "optimizer",
    "layers",
    "groups",
    "display",
    "recipes",
}


def imports(path):
    """Everything a file imports, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", MATHEMATICS)
def test_the_mathematics_imports_no_module_and_no_hook(name):
    for imported in imports(ROOT / f"{name}.py"):
        assert imported not in ("torch.nn", "torch.nn.Module")
        assert "hooks" not in imported
        top, *inside = imported.split(".")
        assert top != "torchloco" or inside[0] not in ATTACHING


def test_the_library_depends_on_torch_alone():
    for path in ROOT.rglob("*.py"):
        for imported in imports(path):
            top = imported.split(".")[0]
            assert top in {"torch", "torchloco", "__future__", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_readable_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 480
