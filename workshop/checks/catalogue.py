"""The wrong ideas that the checks recognise; the data is in misconceptions.toml beside this file."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Misconception:
    """One wrong idea.

    `idea` is what the learner believes, in a line; `says` the sentence that helps; `lesson` and `section` name
    what to read again, by a lesson's number and one of its headings.
    """

    name: str
    idea: str
    says: str
    lesson: str
    section: str


@functools.cache
def misconceptions() -> dict[str, Misconception]:
    """All of them, by name."""
    text = Path(__file__).with_name("misconceptions.toml").read_text(encoding="utf-8")
    return {name: Misconception(name, **fields) for name, fields in tomllib.loads(text).items()}
