"""Where in the user's code something happened: function, line, text of the line."""

from __future__ import annotations

import asyncio
import functools
import linecache
import os
import sys
import sysconfig
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType

import greenlet
import sqlalchemy

from ormscope.owners import TaskOrThread
from ormscope.stacks import awaited_future, sleeping_frames, thread_frames
from ormscope.waitgraph import awaited_tasks

# A frame as it was at one moment. Resolving it to text costs file access, so that waits until somebody asks.
RawPlace = tuple[CodeType, int]


def _folder(path: str) -> str:
    return os.path.join(os.path.abspath(path), "")


_STANDARD_LIBRARY = _folder(sysconfig.get_path("stdlib"))
_SITE_PACKAGES = tuple(_folder(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
_SQLALCHEMY = _folder(os.path.dirname(sqlalchemy.__file__))
_MACHINERY = (_folder(os.path.dirname(__file__)), _SQLALCHEMY)
# Between a notebook's cell and the event loop.
_KERNEL = tuple(
    os.path.join(one, name, "") for one in _SITE_PACKAGES for name in ("IPython", "ipykernel")
)
_LOOP_STEP = asyncio.Handle._run.__code__


@functools.cache
def is_user_code(filename: str) -> bool:
    """Whether a file is the user's: not ormscope, not SQLAlchemy, not the standard library."""
    in_library = filename.startswith(_STANDARD_LIBRARY) and not filename.startswith(_SITE_PACKAGES)
    return not (
        in_library or filename.startswith((*_MACHINERY, *_KERNEL, "<frozen", "<sqlalchemy"))
    )


_MOST_FRAMES = 6


def sleeping_places(subject: TaskOrThread) -> tuple[RawPlace, ...]:
    """The frames of the user's code in which a task or thread sleeps, innermost first, at most six."""
    return _users(sleeping_frames(subject))


def _users(frames: list[FrameType]) -> tuple[RawPlace, ...]:
    """Of frames, outermost first, those of the user's code, innermost first."""
    own = (one for one in reversed(frames) if is_user_code(one.f_code.co_filename))
    return tuple((one.f_code, one.f_lineno) for one in islice(own, _MOST_FRAMES))


def calling_places(skipped: int) -> tuple[RawPlace, ...]:
    """The frames of the user's code that led here, innermost first, at most six.

    `skipped` is how many of the innermost frames cannot be the user's: to look at a frame has its price.

    SQLAlchemy runs its internals in a greenlet of their own, whose stack ends at its first call;
    the coroutine that awaits it stands on the stack of the parent greenlet.
    """
    frames: list[RawPlace] = []
    frame: FrameType | None = sys._getframe(skipped)
    parent = greenlet.getcurrent().parent
    while len(frames) < _MOST_FRAMES:
        if frame is None:
            if parent is None:
                break
            frame, parent = parent.gr_frame, parent.parent
            continue
        code = frame.f_code
        if code is _LOOP_STEP:
            break  # below it is whoever started the loop, not what this task is doing
        if is_user_code(code.co_filename):
            frames.append((code, frame.f_lineno))
        frame = frame.f_back
    return tuple(frames)


def running_places(thread: int) -> tuple[RawPlace, ...]:
    """The frames of the user's code in which a thread, given by its identifier, is at this moment, innermost first."""
    return _users(thread_frames(thread))


def foreign_place(subject: TaskOrThread) -> Place | None:
    """The line of the user's code in which a task or thread sleeps for something that SQLAlchemy does not know of.

    A framework may run the user's code in a task of its own, for which this one waits; then the line is there.
    """
    if isinstance(subject, asyncio.Task) and awaited_future(subject) is None:
        return None  # it is about to run, or runs
    frames = sleeping_frames(subject)
    files = [one.f_code.co_filename for one in frames]
    if any(file.startswith(_SQLALCHEMY) for file in files):
        return None  # it waits for the database, or for the pool
    users = [
        (frame.f_code, frame.f_lineno) for frame in frames if is_user_code(frame.f_code.co_filename)
    ]
    own = [one for one in users if not one[0].co_filename.startswith(_SITE_PACKAGES)]
    if own:
        return place(own[-1])
    children = awaited_tasks(subject) if isinstance(subject, asyncio.Task) else ()
    found = [foreign_place(one) for one in children]
    # Else the framework itself waits: for the browser to hang up, say.
    known = [one for one in found if one not in (None, NOWHERE)]
    return min(known, default=place(users[-1]) if users else NOWHERE)


@dataclass(frozen=True, order=True)
class Place:
    """One line of the user's code.

    `cell` is true for code from a notebook cell; then `line` counts within the cell and `file` is
    empty, because the file that the kernel compiles a cell under is temporary.
    """

    function: str
    line: int
    text: str
    file: str = ""

    def __str__(self) -> str:
        where = (
            f"{self.file}:{self.line}, {self.function}"
            if self.file
            else f"{self.function}, line {self.line}"
        )
        return f"{where}: {self.text}" if self.text else where

    @property
    def short(self) -> str:
        """Function and line, without the text."""
        return f"{self.function}, line {self.line}"


NOWHERE = Place("outside the user's code", 0, "")


def is_cell(filename: str) -> bool:
    """Whether a code object's file name is one that IPython gives to a notebook cell."""
    # ipykernel compiles a cell as <temporary folder>/ipykernel_<pid>/<hash>.py, IPython as <ipython-input-…>
    return filename.startswith("<ipython-input-") or os.path.basename(
        os.path.dirname(filename)
    ).startswith("ipykernel_")


def place(raw: RawPlace) -> Place:
    """The place of a raw frame."""
    code, line = raw
    filename = code.co_filename
    return Place(
        function=code.co_qualname.rpartition("<locals>.")[2],
        line=line,
        text=linecache.getline(filename, line).strip(),
        file="" if is_cell(filename) else os.path.basename(filename),
    )
