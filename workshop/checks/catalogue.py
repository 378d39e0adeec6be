"""The wrong ideas that the checks recognise; the data is in misconceptions.toml beside this file."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class Misconception:
    """One wrong idea.

    `idea` is what an answer of this kind rests on, in a line; `says` the sentence that helps; `lesson` and `section`
    name what to read again, by a lesson's number and one of its headings.
    """

    name: str
    idea: str
    says: str
    lesson: str
    section: str


class Finding(NamedTuple):
    """A wrong idea, by its name in the catalogue, and what was seen of it in this run."""

    misconception: str
    evidence: str

    def __str__(self) -> str:
        about = misconceptions()[self.misconception]
        read_again = f'Read again: lesson {about.lesson}, "{about.section}".'
        return "\n".join((about.idea, self.evidence, about.says, read_again))


@functools.cache
def misconceptions() -> dict[str, Misconception]:
    """All of them, by name."""
    text = Path(__file__).with_name("misconceptions.toml").read_text(encoding="utf-8")
    return {name: Misconception(name, **fields) for name, fields in tomllib.loads(text).items()}
