"""Which call of the learner's function is at work, and which connections it has; for the tasks of exercise 06."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, close_all_sessions
from sqlalchemy.pool import ConnectionPoolEntry

from workshop.checks.evidence import Evidence

current_call: ContextVar[int | None] = ContextVar("call", default=None)
"""The number of the call that is at work; the tasks that a call starts inherit it."""
_IN_USE = "exercise 06: in use"


class Holds:
    """Which call has which connections of an engine.

    `most` is the most that one call had at once, `shared` says whether a connection was used by two tasks at the
    same time, and `late` whether a call in `ended` had one, or took one, after its end.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.ended: set[int] = set()
        self.most = 0
        self.shared = False
        self.late = False
        self._by: dict[ConnectionPoolEntry, int | None] = {}
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "checkin", self._checked_in)
        event.listen(engine.sync_engine, "before_cursor_execute", self._begins)
        event.listen(engine.sync_engine, "after_cursor_execute", self._ends)
        event.listen(engine.sync_engine, "handle_error", self._fails)

    def count(self, call: int | None) -> int:
        """How many connections a call has now."""
        return sum(holder == call for holder in self._by.values())

    def end(self, call: int) -> None:
        """Note that a call has ended."""
        self.ended.add(call)
        self.late = self.late or self.count(call) > 0

    def _checked_out(self, connection: Any, entry: ConnectionPoolEntry, proxy: Any) -> None:
        call = self._by[entry] = current_call.get()
        self.late = self.late or call in self.ended
        if call is not None:
            self.most = max(self.most, self.count(call))

    def _checked_in(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        self._by.pop(entry, None)
        entry.info.pop(_IN_USE, None)

    def _begins(self, connection: Any, *rest: Any) -> None:
        self.shared = self.shared or connection.info.get(_IN_USE, False)
        connection.info[_IN_USE] = True

    def _ends(self, connection: Any, *rest: Any) -> None:
        connection.info[_IN_USE] = False

    def _fails(self, context: Any) -> None:
        if context.connection is not None and not context.connection.closed:
            context.connection.info[_IN_USE] = False


async def close_sessions(noted: Evidence) -> None:
    """One that was left open would lock its rows against what follows; one that is still in use closes itself."""
    if noted.ended and not noted.left_running:
        await close_all_sessions()


def dsn(engine: AsyncEngine) -> str:
    """For connections that no instrument sees: those of other processes."""
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
