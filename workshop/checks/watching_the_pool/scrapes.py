"""Scrapes of a pool's metrics, as Prometheus makes them, for exercise 08, task 1: what was told, and what was true."""

from __future__ import annotations

import inspect
import numbers
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from ormscope import PoolScope
from ormscope.lab import storm
from workshop.checks.catalogue import Finding
from workshop.checks.returned import another_answer
from workshop.checks.unpooled import Backends
from workshop.checks.watching_the_pool.moments import MOMENTS, until

NUMBERS = ("checked_out", "waiting", "oldest_wait")
TOLERANCE = 0.05  # seconds
_BLOCKED_SECONDS = 0.2
_SCRAPE_SECONDS = 1.0  # that a scrape may take; a right one takes a thousandth


class GaveUpError(Exception):
    """The learner's function is none that could be asked again."""


@dataclass
class Look:
    """One scrape: what the learner's function told, and what was true.

    `out` and `waiting` are numbers, `oldest` the least and the most seconds that whoever waits longest has waited,
    `youngest` and `held` the seconds that whoever came last has waited, and that a connection has been out. `took`
    says whether the scrape asked the pool for a connection, `hung` whether it did not end, `on_the_loop` whether what
    it returned is to be awaited, and `raised` is the class of what it raised. `odd` tells what it returned that is no
    such numbers, and what it did to the pool or to the scope. `longest_so_far` and `checkouts` are what the scope has
    counted.
    """

    moment: str
    out: int
    waiting: int
    oldest: tuple[float, float]
    youngest: float
    held: float
    told: dict[str, float] | None = None
    longest_so_far: float = 0.0
    checkouts: int = 0
    took: bool = False
    hung: bool = False
    on_the_loop: bool = False
    raised: str = ""
    odd: Finding | None = None

    @property
    def when(self) -> str:
        """The moment, in the words that the learner reads."""
        return MOMENTS[self.moment]

    def true(self, number: str) -> float:
        """What one of the three numbers was."""
        truth = {"checked_out": self.out, "waiting": self.waiting, "oldest_wait": self.oldest[0]}
        return truth[number]

    def is_wrong(self, number: str) -> bool:
        """Whether the learner's function told another number than was true."""
        if self.told is None:
            return False
        if number == "oldest_wait":
            return not self.is_true_wait(self.said(number))
        return self.said(number) != self.true(number)

    def is_true_wait(self, seconds: float) -> bool:
        """Whether whoever waits longest has waited for so long."""
        least, most = self.oldest
        return least - TOLERANCE <= seconds <= most + TOLERANCE

    def said(self, number: str) -> float:
        """What the learner's function told of one of the three."""
        assert self.told is not None
        return self.told[number]


class Scraped:
    """An engine with the learner's metrics, scraped from a thread as `start_http_server` does."""

    def __init__(self, metrics: Callable[..., Any], engine: AsyncEngine, server: Backends) -> None:
        self.engine, self.scope = engine, PoolScope(engine)
        self.looks: list[Look] = []
        self.odd: Finding | None = None
        self._metrics = metrics
        self._server = server
        self._measure: Any = None

    async def begin(self) -> None:
        """Ask for the function that each scrape calls."""

        async def ask(number: int) -> None:
            found = self._metrics(self.engine, self.scope)
            if not callable(found):
                self.odd = Finding(
                    "not-what-was-asked",
                    f"metrics(engine, scope) returned {type(found).__name__}: a function was asked for, which each"
                    " scrape calls.",
                )
                return
            self._measure = found

        await storm(ask, 1)
        if self._measure is None:
            raise GaveUpError

    async def look(
        self,
        moment: str,
        out: int = 0,
        since: Sequence[tuple[float, float]] = (),
        held: float | None = None,
        blocked: bool = False,
    ) -> None:
        """One scrape, while `out` connections are out.

        Those who wait came and were seen to wait at the times of `since`, and the first connection was taken at
        `held`. `blocked` lets the event loop stand still meanwhile.
        """

        async def ask(number: int) -> None:
            before, pool = self._asked(), self.engine.pool
            if blocked:
                _stand_still(_BLOCKED_SECONDS)
            start = time.perf_counter()
            ended, thread = self._in_a_thread()
            if blocked:
                thread.join(_SCRAPE_SECONDS)
            late = start + _SCRAPE_SECONDS
            await until(lambda: not thread.is_alive() or time.perf_counter() > late)
            end = time.perf_counter()
            scraped = Look(
                moment,
                out,
                len(since),
                (start - since[0][1], end - since[0][0]) if since else (0.0, 0.0),
                start - since[-1][1] if since else 0.0,
                start - held if held is not None else 0.0,
                longest_so_far=self.scope.longest_wait,
                checkouts=self.scope.checkouts,
                took=self._asked() != before or thread.ident in self._server.threads,
                hung=not ended,
            )
            self.looks.append(scraped)
            if ended:
                told, error = ended[0]
                if error is not None:
                    scraped.raised = type(error).__name__
                    raise error
                if inspect.iscoroutine(told):
                    told.close()
                    scraped.on_the_loop = True
                else:
                    scraped.told, scraped.odd = _checked(told, scraped)
            if self.scope.is_closed:
                scraped.odd = Finding(
                    "not-what-was-asked", f"The scrape {scraped.when} closed the scope."
                )
            elif self.engine.pool is not pool:
                scraped.odd = Finding(
                    "not-what-was-asked",
                    f"After the scrape {scraped.when} the engine had another pool, as dispose() gives it one.",
                )

        await storm(ask, 1)
        if self.gave_up:
            raise GaveUpError

    @property
    def gave_up(self) -> bool:
        """Whether the last scrape was such that another would tell nothing."""
        last = self.looks[-1] if self.looks else None
        return last is None or last.hung or last.on_the_loop or last.odd is not None

    def _asked(self) -> tuple[int, ...]:
        """What changes when somebody asks the pool for a connection."""
        scope = self.scope
        return scope.checkouts, scope.opened, scope.waits.count, len(scope.waiters)

    def _in_a_thread(self) -> tuple[list[tuple[Any, BaseException | None]], threading.Thread]:
        """Let a scrape begin; what it returns or raises comes into the list."""
        ended: list[tuple[Any, BaseException | None]] = []

        def scrape() -> None:
            try:
                ended.append((self._measure(), None))
            except BaseException as error:  # raised again where it is noted
                ended.append((None, error))

        # No executor: one would wait for a scrape that never ends.
        thread = threading.Thread(target=scrape, name="scrape", daemon=True)
        thread.start()
        return ended, thread


def _stand_still(seconds: float) -> None:
    """Block the event loop, as a synchronous driver does."""
    time.sleep(seconds)


def _checked(told: Any, scraped: Look) -> tuple[dict[str, float] | None, Finding | None]:
    """The numbers that were asked for, or that something else came back."""
    expected = {name: scraped.true(name) for name in NUMBERS}
    is_whole = isinstance(told, dict) and all(
        isinstance(told.get(name), numbers.Real) for name in NUMBERS
    )
    if not is_whole:
        return None, another_answer(f"The scrape {scraped.when}", told, expected)
    return {name: told[name] for name in NUMBERS}, None
