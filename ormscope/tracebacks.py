"""An exception in words: its name, and the traceback as far as it is the user's."""

from __future__ import annotations

import traceback

from ormscope.places import is_cell, is_user_code


def outcome_of(error: BaseException) -> str:
    """The name of an exception's class, with its module unless that is builtins."""
    kind = type(error)
    return (
        kind.__qualname__
        if kind.__module__ == "builtins"
        else f"{kind.__module__}.{kind.__qualname__}"
    )


def users_traceback(error: BaseException) -> list[str]:
    """The traceback without the frames of the machinery; a notebook cell is called Cell, not by its temporary file."""
    report = traceback.TracebackException.from_exception(error)
    _trim(report)
    return "".join(report.format()).splitlines()


def _trim(report: traceback.TracebackException) -> None:
    frames = [frame for frame in report.stack if is_user_code(frame.filename)]
    for frame in frames:
        if is_cell(frame.filename):
            frame.filename = "Cell"
    report.stack[:] = frames
    for other in (report.__cause__, report.__context__, *(report.exceptions or ())):
        if other is not None:
            _trim(other)
