"""How long a lesson takes, counted from its notebook."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from nbformat import NotebookNode

WORDS_PER_MINUTE = 200
MINUTES_OF_RUNS = 1.5  # of one lesson, at most; on two cores they take 10 to 90 seconds
A_PREDICTION = re.compile(r"\*\*Predict\b|^## Predict$", re.MULTILINE)  # a minute each
MINUTES_ON_CALL = 35  # where learners find something by themselves: the tag on-call


def _text(cells: Sequence[NotebookNode]) -> str:
    return " ".join(re.sub(r"\]\([^)]*\)", "]", cell.source) for cell in cells)


def reading(cells: Sequence[NotebookNode]) -> float:
    """Minutes to read text and code."""
    return len(_text(cells).split()) / WORDS_PER_MINUTE


def predicting(cells: Sequence[NotebookNode]) -> int:
    """Minutes to predict: one for each prediction."""
    return sum(len(A_PREDICTION.findall(cell.source)) for cell in cells)


def on_call(cells: Sequence[NotebookNode]) -> int:
    """Minutes in which learners find something by themselves."""
    return MINUTES_ON_CALL * any("on-call" in cell.metadata.get("tags", []) for cell in cells)


def up_to_five(minutes: float) -> int:
    """Rounded up to five minutes."""
    return 5 * math.ceil(minutes / 5)


def minutes(cells: Sequence[NotebookNode]) -> int:
    """Minutes to read, predict and run, rounded up to five; what learners find by themselves comes on top."""
    return on_call(cells) + up_to_five(reading(cells) + predicting(cells) + MINUTES_OF_RUNS)
