"""Where in the user's code something happened: function, line, text of the line."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType

import greenlet
import sqlalchemy

from ormscope.internals import LOOP_RUN, LOOP_STEP
from ormscope.owners import TaskOrThread
from ormscope.stacks import sleeping_frames, thread_frames

# A frame as it was at one moment. Resolving it to text costs file access, so that waits until somebody asks.
RawPlace = tuple[CodeType, int]


def _folder(path: str) -> str:
    return os.path.join(os.path.abspath(path), "")


_STANDARD_LIBRARY = _folder(sysconfig.get_path("stdlib"))
# Not only the environment's own: Debian, the user and `uv run --with` have a folder each beside it.
_SITE_PACKAGES = tuple(
    {_folder(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    | {_folder(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))}
)
_SQLALCHEMY = _folder(os.path.dirname(sqlalchemy.__file__))
_MACHINERY = (_folder(os.path.dirname(__file__)), _SQLALCHEMY)
# Between a notebook's cell and the event loop.
_KERNEL = tuple(
    os.path.join(folder, name, "") for folder in _SITE_PACKAGES for name in ("IPython", "ipykernel")
)


_is_user_code: dict[
    str, bool
] = {}  # what is_user_code has said; a dict is asked faster than a function


def is_user_code(filename: str) -> bool:
    """Whether a file is the user's: not ormscope, not SQLAlchemy, not the standard library."""
    if filename not in _is_user_code:
        in_library = filename.startswith(_STANDARD_LIBRARY)
        in_library = in_library and not filename.startswith(_SITE_PACKAGES)
        _is_user_code[filename] = not (
            in_library or filename.startswith((*_MACHINERY, *_KERNEL, "<frozen", "<sqlalchemy"))
        )
    return _is_user_code[filename]


def is_users(frame: FrameType) -> bool:
    """Whether a frame is of the user's code."""
    filename = frame.f_code.co_filename
    if filename == "<string>":  # of `python -c`, or of functions that SQLAlchemy makes from text
        return not str(frame.f_globals.get("__name__")).startswith("sqlalchemy.")
    return is_user_code(filename)


_MOST_FRAMES = 6


def own_place(subject: TaskOrThread) -> Place:
    """The innermost line of the program's own code, not of a library it uses, where a task or thread sleeps."""
    for frame in reversed(sleeping_frames(subject)):
        if is_users(frame) and not is_library(frame.f_code.co_filename):
            return place((frame.f_code, frame.f_lineno))
    return NOWHERE


def _users(frames: list[FrameType]) -> tuple[RawPlace, ...]:
    """Of frames, outermost first, those of the user's code, innermost first."""
    own = (frame for frame in reversed(frames) if is_users(frame))
    return tuple((frame.f_code, frame.f_lineno) for frame in islice(own, _MOST_FRAMES))


_MOST_KNOWN = 1_000
# What `calling_places` has returned, by the ids of the code objects, which are kept by it, and the instructions. It is
# the same tuple for the same places: thousands in line would else keep several each for the collector to look at.
_known: dict[tuple[int, ...], tuple[RawPlace, ...]] = {}


def calling_places() -> tuple[RawPlace, ...]:
    """The frames of the user's code that led here, innermost first, at most six.

    SQLAlchemy runs its internals in a greenlet of their own, whose stack ends at its first call; the coroutine that
    awaits it stands on the stack of the parent greenlet. Each frame that is looked at costs, and in the greenlet
    the user has code only by `run_sync`.
    """
    frames: list[FrameType] = []
    key: list[int] = []
    parent = greenlet.getcurrent().parent
    if parent is None:
        _add_users(sys._getframe(1), frames, key)
    else:
        spawning = parent.gr_frame  # `greenlet_spawn`
        caller = None if spawning is None else spawning.f_back
        if caller is not None and caller.f_code.co_name == "run_sync":  # of a connection or session
            _add_users(sys._getframe(1), frames, key)
        while parent is not None and len(frames) < _MOST_FRAMES:
            if _add_users(parent.gr_frame, frames, key):
                break
            parent = parent.parent
    found = _known.get(tuple(key))
    if found is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        found = tuple((frame.f_code, frame.f_lineno) for frame in frames)
        _known[tuple(key)] = found
    return found


def _add_users(frame: FrameType | None, frames: list[FrameType], key: list[int]) -> bool:
    """Add the user's frames of a stack; whether the loop was reached: below it is whoever started it."""
    known = _is_user_code
    while frame is not None:
        code = frame.f_code
        filename = code.co_filename
        # A line has to be worked out from the instruction, which takes the longer the longer the function is.
        if known[filename] if filename in known else is_user_code(filename):
            if filename != "<string>" or is_users(frame):
                frames.append(frame)
                key += (id(code), frame.f_lasti)
                if len(frames) == _MOST_FRAMES:
                    break
        elif code is LOOP_STEP or code is LOOP_RUN:
            return True
        frame = frame.f_back
    return False


def running_places(thread: int) -> tuple[RawPlace, ...]:
    """The frames of the user's code in which a thread, given by its identifier, is at this moment, innermost first."""
    return _users(thread_frames(thread))


@dataclass(frozen=True, order=True)
class Place:
    """One line of the user's code, or of a library between that and SQLAlchemy (`in_library`).

    In the cell of a notebook `line` counts within the cell, and `file` is empty, because the file that the kernel
    compiles a cell under is temporary.
    """

    function: str
    line: int
    text: str
    file: str = ""
    in_library: bool = False

    def __str__(self) -> str:
        if not self.line:
            return self.function
        where = (
            f"{self.file}:{self.line}, {self.function}"
            if self.file
            else f"{self.function}, line {self.line}"
        )
        return f"{where}: {self.text}" if self.text else where

    @property
    def short(self) -> str:
        """Function and line, without the text."""
        return f"{self.function}, line {self.line}" if self.line else self.function


NOWHERE = Place("outside the user's code", 0, "")


def is_cell(filename: str) -> bool:
    """Whether a code object's file name is one that IPython gives to a notebook cell."""
    # ipykernel compiles a cell as <temporary folder>/ipykernel_<pid>/<hash>.py, IPython as <ipython-input-…>
    return filename.startswith("<ipython-input-") or os.path.basename(
        os.path.dirname(filename)
    ).startswith("ipykernel_")


@functools.lru_cache(maxsize=1000)
def place(raw: RawPlace) -> Place:
    """The place of a raw frame; the same object for the same frame."""
    code, line = raw
    filename = code.co_filename
    return Place(
        function=code.co_qualname.rpartition("<locals>.")[2],
        line=line,
        text=linecache.getline(filename, line).strip(),
        file="" if is_cell(filename) else os.path.basename(filename),
        in_library=is_library(filename),
    )


@functools.lru_cache(maxsize=1000)
def places(frames: tuple[RawPlace, ...]) -> tuple[Place, ...]:
    """The places of raw frames; the same object for the same frames."""
    return tuple(map(place, frames))


def own_line(known: Iterable[Place]) -> Place:
    """Of places, innermost first, the innermost in the program's own code; that of a library where there is none."""
    known = list(known)
    own = [found for found in known if not found.in_library]
    return next(iter(own or known), NOWHERE)


def is_library(filename: str) -> bool:
    """Whether a file stands in an installed package: not the program's own, though it may be the user's choice."""
    return filename.startswith(_SITE_PACKAGES)
