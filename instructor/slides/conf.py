"""How Sphinx makes slides of what `workshop/slides.py` has written."""

from __future__ import annotations

project = "SQLAlchemy under load"
extensions = ["myst_parser", "sphinx_revealjs"]
myst_enable_extensions = ["colon_fence"]
root_doc = "index"
suppress_warnings = ["myst.header", "myst.xref_missing", "toc.not_included"]
pygments_style = "friendly"

revealjs_style_theme = "white"
revealjs_static_path = ["static"]
revealjs_css_files = ["slides.css"]
revealjs_script_plugins = [{"name": "RevealNotes", "src": "revealjs/plugin/notes/notes.js"}]
revealjs_script_conf = {
    "width": 1280,
    "height": 720,
    "margin": 0.05,
    "center": False,
    "hash": True,
    "slideNumber": "c/t",
    "transition": "none",
    "navigationMode": "linear",
}
