"""What is seen of the service under load: its metrics, the server's list, its memory, a report by signal."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from urllib.error import URLError

import asyncpg
import psutil

from workshop.drill.run import Look, Run
from workshop.drill.running import Worker
from workshop.prometheus import ask, parsed

_LOOK_SECONDS = 0.5
# From its first line to the next of the log, which begins with a status, or with what uvicorn says of an error.
_REPORT = r"^ORMSCOPE, .*?(?=^\d{3} |^ERROR|^Traceback|\Z)"
_BAD_SECONDS = 0.7
_PATIENCE_SECONDS = 2.0  # for the metrics, while others are to be looked at as well
_ANSWER_SECONDS = 15.0  # for the metrics, when nothing else is left to do
# The warehouse has connections of its own, and so has whoever looks.
_CONNECTIONS = """
    SELECT count(*), count(*) FILTER (WHERE state LIKE 'idle in transaction%') FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND application_name NOT IN ('warehouse', 'on call')
"""
_ACTIVITY = """
    SELECT coalesce(wait_event_type || ': ' || wait_event, state) AS waits, state, left(query, 300) AS query, count(*)
    FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND application_name NOT IN ('warehouse', 'on call')
    GROUP BY 1, 2, 3 ORDER BY state = 'idle', 4 DESC, 3
"""


class Looks:
    """Looks at the workers and at the server twice a second, to the end of the block."""

    def __init__(self, workers: list[Worker], looking: asyncpg.Connection, run: Run) -> None:
        self._workers, self._looking, self._run = workers, looking, run
        self._processes = [psutil.Process(worker.pid) for worker in workers]
        self._written_before: dict[str, int] = {}
        self._most_open = -1  # transactions past their BEGIN, in the list that is kept
        self._one_at_a_time = asyncio.Lock()  # a connection of asyncpg is for one

    async def __aenter__(self) -> Looks:
        self._began = time.monotonic()
        self._task = asyncio.create_task(self._look_on())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._task.done():
            self._task.result()  # raises what the looking has raised
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._run.reports += self._reports()

    async def left_out(self, patience: float) -> int:
        """How many connections all pools have out when everybody has gone, and so many seconds later if need be."""
        deadline = time.monotonic() + patience
        while True:
            texts = [
                await asyncio.to_thread(ask, worker.metrics, _ANSWER_SECONDS)
                for worker in self._workers
            ]
            out = int(sum(parsed(text)["checked_out"] for text in texts))
            if not out or time.monotonic() > deadline:
                return out
            await asyncio.sleep(_LOOK_SECONDS)

    def _ask_for_a_report(self, worker: Worker) -> None:
        self._written_before[worker.name] = len(_written(worker))
        if hasattr(signal, "SIGUSR1"):
            os.kill(worker.pid, signal.SIGUSR1)

    async def _take_the_list(self) -> None:
        """What the server lists, if more transactions are past their BEGIN than in the list before.

        On a busy machine the first bad moment may come before the transactions, or before their statements.
        """
        async with self._one_at_a_time:
            rows = await self._looking.fetch(_ACTIVITY)
        # A connection that is just being made has no state.
        idle = (row for row in rows if (row["state"] or "").startswith("idle in transaction"))
        past_begin = sum(row["count"] for row in idle if row["query"] != "BEGIN;")
        if past_begin > self._most_open:
            self._most_open = past_begin
            self._run.activity = [(row["waits"], row["query"], row["count"]) for row in rows]

    def _reports(self) -> Iterator[str]:
        """What the workers have written on a signal, without what they log besides."""
        for worker in self._workers:
            text = _written(worker)[self._written_before.get(worker.name, 0) :]
            yield from re.findall(_REPORT, text, re.DOTALL | re.MULTILINE)[:1]

    async def _look_on(self) -> None:
        """Twice a second; closely at each worker's first moment that is bad, or else towards the end.

        The server's list is that of the bad moment at which most transactions were open and past their BEGIN.
        """
        while True:
            async with self._one_at_a_time:
                connections, idle = await self._looking.fetchrow(_CONNECTIONS)
            for worker, process in zip(self._workers, self._processes, strict=True):
                try:
                    scrape = parsed(await asyncio.to_thread(ask, worker.metrics, _PATIENCE_SECONDS))
                except (URLError, TimeoutError):  # it is too busy to tell its numbers
                    continue
                self._run.looks.append(
                    Look(
                        time.monotonic() - self._began,
                        worker.name,
                        scrape.cause,
                        scrape["checked_out"],
                        scrape["waiting"],
                        scrape["oldest_wait_seconds"],
                        scrape["oldest_hold_seconds"],
                        scrape["timeouts_total"],
                        scrape["deadlocks_total"],
                        scrape.lag,
                        process.memory_info().rss / 2**20,
                        scrape["wait_seconds_count"],
                        scrape["waits_within_a_second"],
                        connections,
                        idle,
                    )
                )
                look = self._run.looks[-1]
                is_bad = max(look.oldest_wait, look.oldest_hold, look.lag) > _BAD_SECONDS
                is_late = look.time > 0.75 * self._run.seconds
                if (is_bad or is_late) and worker.name not in self._written_before:
                    self._ask_for_a_report(worker)
                if is_bad or is_late:
                    await self._take_the_list()
            await asyncio.sleep(_LOOK_SECONDS)


def _written(worker: Worker) -> str:
    return Path(worker.log).read_text("utf-8", errors="replace")
