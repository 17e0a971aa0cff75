"""The documentation as a site: `make docs`. Its pages are those that are read in the repository; README comes first."""

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(?<!!)\[([^\[\]]+)\]\(([^)\s:#]+)\)")
_PAGES = """
```{{toctree}}
:hidden:
:caption: {caption}

{pages}
```
"""
_CONTENTS = {
    "Guide": ["docs/algorithms", "docs/solvers", "docs/models", "docs/extending", "docs/api"],
    "Measured": ["docs/results", "docs/performance", "docs/second-order", "results/README"],
    "Benchmark": ["docs/benchmark", "docs/report"],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
}

project = "torchloco"
author = copyright = "The torchloco authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "results/**.md"]
html_theme = "furo"
html_title = project
maximum_signature_line_length = 88
default_role = "code"
suppress_warnings = ["toc.not_included"]  # tables among the raw results, which pages link to
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_use_ivar = True


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _prepare)
    app.connect("build-finished", _begin_at_readme)


def _prepare(app: Sphinx, page: str, source: list[str]) -> None:
    """Give the first page the contents, and let links to folders, which a site does not have, be plain text."""
    folder = (ROOT / page).parent

    def rewrite(match: re.Match[str]) -> str:
        return match[1] if (folder / match[2]).is_dir() else match[0]

    source[0] = _LINK.sub(rewrite, source[0])
    if page == root_doc:
        source[0] += "".join(
            _PAGES.format(caption=caption, pages="\n".join(f"/{page}" for page in pages))
            for caption, pages in _CONTENTS.items()
        )


def _begin_at_readme(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        (Path(app.outdir) / "index.html").write_text('<meta http-equiv="refresh" content="0; url=README.html">\n')
