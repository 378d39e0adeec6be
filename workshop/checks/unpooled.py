"""Connections to the server that the learner's code opens past every pool, as asyncpg.connect() does."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import sqlalchemy

from ormscope.lab import Recording
from ormscope.places import place
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence
from workshop.checks.unheard import is_learners

_SQLALCHEMY = os.path.join(os.path.dirname(sqlalchemy.__file__), "")


@dataclass(kw_only=True)
class Unpooled(Evidence):
    """The evidence of code that has pools: how many connections it made `past_the_pools`, and from which line."""

    past_the_pools: int
    past_the_pools_at: str


class Unpooling:
    """Watches each socket of this process that connects, until its end."""

    def __init__(self) -> None:
        self.past_the_pools = 0
        self.past_the_pools_at = ""
        watched = self

        class Socket(socket.socket):
            def connect(self, address: Any) -> None:
                watched._hear()
                super().connect(address)

        socket.socket = Socket  # type: ignore[misc]

    def _hear(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(_SQLALCHEMY):
            if _is_the_learners(frame):
                self.past_the_pools += 1
                self.past_the_pools_at = place((frame.f_code, frame.f_lineno)).short
                return
            frame = frame.f_back


def _is_the_learners(frame: FrameType) -> bool:
    """Whether it runs a function of theirs; at the bottom of each stack is the module that runs the check."""
    return is_learners(frame.f_code.co_filename) and frame.f_code.co_name != "<module>"


def connects_past_the_pools(run: Recording, seen: Unpooled) -> Iterator[Finding]:
    """Again and again, which nothing limits; one that is kept, or a few in a pool of another kind, have a limit."""
    if seen.past_the_pools > run.announced // 2:
        yield Finding(
            "engine-per-call",
            f"{seen.past_the_pools_at}, opened {seen.past_the_pools} connections past every pool.",
        )
