"""The website: lessons, exercises and the pages of the instruments, from their stored outputs; nothing is executed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

project = "SQLAlchemy under load"
html_title = project
extensions = ["myst_nb", "sphinx_design", "sphinx-mathjax-offline"]
root_doc = "website/index"
include_patterns = [
    "website/*.md",
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "notebooks/*",
    "exercises/*.ipynb",
    "ormscope/*.md",
    "instructor/*.md",
    "hub/README.md",
    "data/README.md",
]
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_fullscreen_button": False,
    "use_download_button": False,  # a notebook needs the kit around it
    "navbar_persistent": [],  # the search is in the sidebar
}
html_static_path = ["static"]
html_css_files = ["website.css"]
html_extra_path = ["pages"]  # sends whoever asks for no page to the first one
html_context = {"default_mode": "auto"}
html_copy_source = False
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
VERDICTS = README.partition("## An article on trial\n")[2].partition("\n## ")[0]
suppress_warnings = ["myst.header"]  # the glossary's terms stand right below its title


def _translate(_app: Any, document: str, source: list[str]) -> None:
    """Say in Sphinx's way what only Jupyter knows: links to a cell, and pictures that a cell has attached.

    The page of the article's verdicts is what the README says of them.
    """
    text = source[0]
    if document == "website/verdicts":
        text += VERDICTS
    if document.startswith(("notebooks/", "exercises/")) and text.lstrip().startswith("{"):
        notebook = json.loads(text)
        cells = []
        for cell in notebook["cells"]:
            if cell.get("id", "").startswith("claim-"):
                target = {"cell_type": "markdown", "metadata": {}, "source": f"({cell['id']})="}
                cells.append(target | {"id": f"before-{cell['id']}"})
            for name, versions in cell.pop("attachments", {}).items():
                ((kind, content),) = versions.items()
                picture = f"data:{kind};base64,{content}"
                cell["source"] = "".join(cell["source"]).replace(f"attachment:{name}", picture)
            cells.append(cell)
        notebook["cells"] = cells
        text = json.dumps(notebook)
    source[0] = re.sub(r"\([\w./]+\.ipynb#cell-id=([\w-]+)\)", r"(#\1)", text)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _translate)
