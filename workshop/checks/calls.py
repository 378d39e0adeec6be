"""Which call of the learner's function is at work, and which connections it has (exercises 06 and 07)."""

from __future__ import annotations

import asyncio
import builtins
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from itertools import count
from typing import Any, NoReturn

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, close_all_sessions
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.util import await_only

from ormscope.lab import Recording
from ormscope.tracebacks import outcome_of
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence
from workshop.checks.rules import Noted, Rule

current_call: ContextVar[int | None] = ContextVar("call", default=None)
"""The number of the call that is at work; the tasks that a call starts inherit it."""
_IN_USE = "exercises 06 and 07: in use"
_SLOW_SECONDS = 0.03
_LIBRARIES = {"asyncio", "asyncpg", "fastapi", "greenlet", "sqlalchemy", "starlette", "workshop"}


def _is_own(outcome: str) -> bool:
    """Whether an exception, by its class's name, is the learner's own: not of the database, the pool or the check."""
    is_from_outside = issubclass(getattr(builtins, outcome, Exception), OSError)  # or a timeout
    return outcome.partition(".")[0] not in _LIBRARIES and not is_from_outside


def raise_own(error: BaseException) -> NoReturn:
    """Raise what the learner is to read of an exception: of a group one of their own, or else the first."""
    told = [*within(error)]
    own = next((each for each in told if _is_own(outcome_of(each))), told[0])
    raise own from own.__cause__


def within(error: BaseException) -> Iterator[BaseException]:
    """The exceptions of a group, or a single one."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from within(each)
    else:
        yield error


def unless_raised(*rules: Rule[Noted]) -> tuple[Rule[Noted], ...]:
    """Rules that say nothing where the learner is to read an exception of their own, which explains what was seen."""

    def restrained(rule: Rule[Noted]) -> Rule[Noted]:
        @wraps(rule)
        def ask(run: Recording, seen: Noted) -> Iterator[Finding]:
            if not any(request.error and _is_own(request.outcome) for request in run.requests):
                yield from rule(run, seen)

        return ask

    return tuple(map(restrained, rules))


async def pause(seconds: float) -> None:
    """Wait; neither with a sleep nor with an event, for those are looked for in the learner's code."""
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    timer = loop.call_later(seconds, _end, over)
    try:
        await over
    finally:
        timer.cancel()


def _end(wait: asyncio.Future[None]) -> None:
    if not wait.done():  # a wait that was cancelled in this step of the loop
        wait.set_result(None)


class Holds:
    """Which call has which connections of an engine.

    `most` is the most that one call had at once, `statements` counts those that each call sent, `updates` are those
    that began so, `failed` are the calls with a statement that failed, and `shared` says whether a connection was
    used by two tasks at the same time. Of the calls in `ended`, those in `at_work` have gone on: with a task that had
    a connection, or by taking or using one.

    Statements for which `is_slow` says so, asked with their call and their text, take as long as on a busy server.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self.ended: set[int] = set()
        self.most = 0
        self.shared = False
        self.statements: Counter[int | None] = Counter()
        self.updates: list[str] = []
        self.failed: set[int | None] = set()
        self.at_work: set[int | None] = set()
        self.is_slow: Callable[[int | None, str], bool] = lambda call, statement: False
        self._by: dict[ConnectionPoolEntry, int | None] = {}
        self._numbers: dict[ConnectionPoolEntry, int] = {}
        self._checkouts = count()
        self._tasks: dict[ConnectionPoolEntry, asyncio.Task[Any] | None] = {}
        event.listen(engine.sync_engine, "checkout", self._checked_out)
        event.listen(engine.sync_engine, "checkin", self._checked_in)
        event.listen(engine.sync_engine, "before_cursor_execute", self._begins)
        event.listen(engine.sync_engine, "after_cursor_execute", self._ends)
        event.listen(engine.sync_engine, "handle_error", self._fails)

    def count(self, call: int | None) -> int:
        """How many connections a call has now."""
        return sum(holder == call for holder in self._by.values())

    def checkouts(self, call: int | None) -> set[int]:
        """The numbers of the checkouts that a call has now; a connection that is taken anew has another."""
        return {self._numbers[entry] for entry, holder in self._by.items() if holder == call}

    def end(self, call: int) -> None:
        """Note that a call has ended."""
        self.ended.add(call)
        for entry, holder in self._by.items():
            task = self._tasks[entry]
            if holder == call and task not in (None, asyncio.current_task()) and not task.done():
                self.at_work.add(call)

    def _checked_out(self, connection: Any, entry: ConnectionPoolEntry, proxy: Any) -> None:
        call = self._by[entry] = current_call.get()
        self._tasks[entry] = asyncio.current_task()
        self._numbers[entry] = next(self._checkouts)
        self._note_work(call)
        if call is not None:
            self.most = max(self.most, self.count(call))

    def _checked_in(self, connection: Any, entry: ConnectionPoolEntry) -> None:
        self._by.pop(entry, None)
        self._tasks.pop(entry, None)
        self._numbers.pop(entry, None)
        entry.info.pop(_IN_USE, None)

    def _begins(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any
    ) -> None:
        call = current_call.get()
        self.statements[call] += 1
        self._note_work(call)
        self.shared = self.shared or connection.info.get(_IN_USE, False)
        connection.info[_IN_USE] = True
        text = f"{statement} {parameters}"
        if statement.lstrip().upper().startswith("UPDATE"):
            self.updates.append(text)
        if self.is_slow(call, text):
            await_only(pause(_SLOW_SECONDS))

    def _ends(self, connection: Any, *rest: Any) -> None:
        connection.info[_IN_USE] = False

    def _fails(self, context: Any) -> None:
        self.failed.add(current_call.get())
        if context.connection is not None and not context.connection.closed:
            context.connection.info[_IN_USE] = False

    def _note_work(self, call: int | None) -> None:
        if call in self.ended:
            self.at_work.add(call)


async def close_sessions(noted: Evidence) -> None:
    """One that was left open would lock its rows against what follows; one that is still in use closes itself."""
    if noted.ended and not noted.left_running:
        await close_all_sessions()
