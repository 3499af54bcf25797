"""The site: `make docs` turns these pages into build/docs/index.html. It needs no network, nor do its pages.

A link that leads nowhere, also to a heading of a page, is an error (`sphinx-build --fail-on-warning`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import keys  # noqa: E402

from megdet_hpc import __version__  # noqa: E402

project = "megdet_hpc"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# GitHub's names for headings, so that one link holds on the site and where the files are looked at.
myst_heading_anchors = 4
# Indented commands and console output are shown as they are.
highlight_language = "none"
# --resume is no dash.
smartquotes = False

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"megdet_hpc {__version__}"
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["static"]
html_css_files = ["site.css"]

# Pages whose text is a file outside this folder. The file of the page itself only points there.
TEXT_OF = {
    "preparing_data": "data_prep/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "security": "SECURITY.md",
}
PAGE_OF = {ROOT / file: name for name, file in TEXT_OF.items()}
LINKED_FILE = re.compile(r"(?<=\]\()[^)#:\s]+\.md(?=[)#])")


def take_text(app: Any, name: str, source: list[str]) -> None:
    """Give a page of TEXT_OF its text, configuration its tables, the index pages that it leaves out.

    Links to files of TEXT_OF lead to their pages.

    Args:
        app: Sphinx.
        name: the page.
        source: its text, the only item, which is replaced.
    """
    folder = HERE
    if name in TEXT_OF:
        file = ROOT / TEXT_OF[name]
        app.env.note_dependency(str(file))
        source[0], folder = file.read_text(encoding="utf-8"), file.parent
    if name == "index":
        others = sorted({page.stem for page in HERE.glob("*.md")} - {"index"} - set(source[0].split()))
        source[0] += (
            "\n".join(["", "```{toctree}", ":caption: More", ":hidden:", "", *others, "```", ""]) if others else ""
        )
    if name == "configuration":
        source[0] += keys.tables()

    def page(link: re.Match[str]) -> str:
        target = (folder / link[0]).resolve()
        return f"{PAGE_OF[target]}.md" if target in PAGE_OF else os.path.relpath(target, HERE)

    source[0] = LINKED_FILE.sub(page, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", take_text)
