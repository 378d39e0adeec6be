"""What of a notebook's output may differ from run to run, as nbval is told by tests/notebook.sanitize."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from nbval.plugin import get_sanitize_patterns

ROOT = Path(__file__).parents[1]


def masked(text: str) -> str:
    """A text as nbval compares it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (option,) = [
        option
        for option in settings["tool"]["pytest"]["ini_options"]["addopts"]
        if option.startswith("--nbval-sanitize-with=")
    ]
    rules = get_sanitize_patterns((ROOT / option.partition("=")[2]).read_text("utf-8"))
    for pattern, mask in rules:
        text = re.sub(pattern, mask, text)
    return text
