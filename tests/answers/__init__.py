"""Answers to the tasks of the exercises, as people give them; one module for each exercise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Answers(NamedTuple):
    """Answers to one task: those that are right, and those that are wrong, each with its misconception's name."""

    right: Sequence[Callable[..., Any]]
    wrong: Sequence[tuple[Callable[..., Any], str]]
