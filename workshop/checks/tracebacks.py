"""Tracebacks as a learner should read them: their own lines, and as many as anybody reads."""

from __future__ import annotations

import os
import re

MOST_LINES = 12
_WORKSHOP = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_NOT_OWN = re.compile(rf"{re.escape(_WORKSHOP)}|[/\\](site|dist)-packages[/\\]|lib/sqlalchemy/")
_CHAINED = ("The above exception was the direct cause", "During handling of the above exception")


def told(error: BaseException) -> str:
    """The learner's own traceback of an exception that `observe` raised."""
    render = getattr(error, "_render_traceback_", None)
    return own_part("\n".join(render()) if render else f"{type(error).__name__}: {error}")


def own_part(report: str) -> str:
    """The last exception of a traceback, without frames of the workshop or of libraries, shortened where it is long."""
    lines: list[str] = []
    skipping = False
    for line in report.splitlines():
        if line.startswith(_CHAINED):
            lines.clear()
            continue
        is_frame = line.lstrip().startswith("File ")
        skipping = bool(_NOT_OWN.search(line)) if is_frame else skipping and line.startswith("    ")
        if not skipping:
            lines.append(line)
    lines = "\n".join(lines).strip().splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES // 2], "  ...", *lines[-MOST_LINES // 2 :]]
    return "\n".join(lines)
