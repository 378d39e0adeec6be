"""A text with measured numbers all over it, as a notebook shows it."""

from __future__ import annotations

import html

# JupyterLab breaks a long line in the middle of a word otherwise.
_STYLE = "word-break: normal; overflow-wrap: anywhere"


class Document:
    """A text that differs from run to run; `title` is its plain-text form, the same in every run."""

    def __init__(self, title: str, text: str) -> None:
        self.title, self.text = title, text

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Document: {self.title}>"

    def _repr_html_(self) -> str:
        return f'<pre data-kind="measured" style="{_STYLE}">{html.escape(self.text)}</pre>'
