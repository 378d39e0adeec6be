"""How many objects the identity maps of this process hold, and which sessions those are."""

from __future__ import annotations

import weakref
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import Session

_sessions: dict[int, weakref.ref[Session]] = {}


def watch_sessions() -> None:
    """Note from now on each session that begins a transaction, by a weak reference."""
    if not event.contains(Session, "after_begin", _note):
        event.listen(Session, "after_begin", _note)


def _note(session: Session, *rest: Any) -> None:
    key = id(session)
    if key not in _sessions:
        _sessions[key] = weakref.ref(session, lambda _: _sessions.pop(key, None))


def objects_alive() -> int:
    """Objects in the identity maps of all sessions that were noted; callable from any thread."""
    sessions = [reference() for reference in list(_sessions.values())]
    return sum(len(session.identity_map) for session in sessions if session is not None)
