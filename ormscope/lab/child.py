"""The process that `observe` starts: runs the workload with the instruments attached, and tells what they see.

Standard input carries the workload and stays open: a line there asks the run to stop, and its end means that
the parent is gone. Standard output carries pickled messages; what the workload prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import importlib
import inspect
import linecache
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, BinaryIO

_SEND_SECONDS = 0.05
_MOST_OF_A_CORE = 0.05  # what looking may take of it: with thousands in line each look takes longer


@dataclass
class _Watched:
    """A scope, and what of it has been sent."""

    scope: Any
    deadlocks_sent: int = 0
    verdict_sent: bool = False
    troubles_sent: set[str] = field(default_factory=set)


class Reporter:
    """Sends what the instruments saw to the parent, at most 20 times a second, from a thread of its own."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._start = time.perf_counter()
        self._watched: list[_Watched] = []
        self.loop_scope: Any = None

    def watch_every_engine(self) -> None:
        """Give each engine that this process creates a PoolScope at its birth.

        SQLAlchemy tells a dialect when an engine has been made; there is no event for that. (To replace the engine's
        constructor would hide its arguments from `create_engine`, which looks for their names.)
        """
        from sqlalchemy.engine import Engine
        from sqlalchemy.engine.default import DefaultDialect

        from ormscope.pool import PoolScope

        original = DefaultDialect.engine_created.__func__  # type: ignore[attr-defined]

        def watched(dialect: type[DefaultDialect], engine: Engine) -> None:
            original(dialect, engine)
            name = engine.pool.logging_name
            if name is None:
                name = "pool" if not self._watched else f"pool {len(self._watched) + 1}"
            scope = PoolScope(engine, name, loop=self.loop_scope, samples=True)
            self._watched.append(_Watched(scope))

        DefaultDialect.engine_created = classmethod(watched)  # type: ignore[method-assign,assignment]

    def start(self) -> None:
        """Begin to send; times are counted, and memory is compared, from here."""
        import psutil

        # The parent's own first look may come too late.
        memory = psutil.Process().memory_info().rss / 2**20
        self._start = time.perf_counter()
        self._send("started", (self._start, memory))
        threading.Thread(target=self._send_for_ever, name="ormscope reporter", daemon=True).start()

    def finish(self, kind: str, content: Any) -> None:
        """Send the last samples, the final verdicts and how the run ended."""
        with self._lock:
            try:
                self._send("seen", self._collect(final=True))
            except Exception:
                self._send("failed", traceback.format_exc())
            self._send(kind, (time.perf_counter() - self._start, content))

    def _send_for_ever(self) -> None:
        spent = 0.0
        while True:
            time.sleep(max(_SEND_SECONDS, spent / _MOST_OF_A_CORE))
            started = time.thread_time()
            with self._lock:
                try:
                    seen = self._collect(final=False)
                except Exception:
                    self._send("failed", traceback.format_exc())
                    return
                self._send("seen", seen)
            spent = time.thread_time() - started

    def _send(self, kind: str, content: Any) -> None:
        pickle.dump((kind, content), self._stream)
        self._stream.flush()

    def _collect(self, final: bool) -> dict[str, Any]:
        from ormscope.lab.storm import log

        pools = []
        for watched in list(self._watched):  # the workload may create another one meanwhile
            scope = watched.scope
            proved = scope.deadlocks[watched.deadlocks_sent :]
            watched.deadlocks_sent += len(proved)
            samples = _drained(scope.samples)
            # Where nothing moves, say why at once: the process may be killed before its last words.
            stands_still = not samples and bool(scope.holders) and not watched.verdict_sent
            last = scope.verdict() if final else scope.verdict_now() if stands_still else None
            watched.verdict_sent = stands_still or (watched.verdict_sent and not samples)
            trouble = scope.trouble(known=watched.troubles_sent)
            if trouble is not None:
                watched.troubles_sent.add(trouble.cause)
            pools.append(
                {
                    "name": scope.name,
                    "capacity": scope.capacity,
                    "samples": [(at - self._start, *counts) for at, *counts in samples],
                    "deadlocks": [
                        replace(verdict, at=verdict.at - self._start) for verdict in proved
                    ],
                    "trouble": trouble and replace(trouble, at=trouble.at - self._start),
                    "last": last and replace(last, at=last.at - self._start),
                    "timeouts": scope.timeouts,
                    "served_after_wait": scope.served_after_wait,
                    "longest_wait": scope.longest_wait,
                    "mean_hold": scope.holds.total / max(scope.holds.count, 1),
                    "most_held_by_one": scope.most_held_by_one,
                }
            )
        requests = [
            (number, start - self._start, end - self._start, *how)
            for number, start, end, *how in _drained(log.ended)
        ]
        from ormscope.lab.sessions import objects_alive

        lag = self.loop_scope.longest_lag() if self.loop_scope is not None else None
        now = time.perf_counter() - self._start
        return {
            "pools": pools,
            "requests": requests,
            "announced": log.announced,
            "loop_lag": [] if lag is None else [(now, lag)],
            "objects": (now, objects_alive()),
        }


def _drained(queue: Any) -> list[Any]:
    """Everything in a deque, taken out; safe while another thread appends."""
    return [queue.popleft() for _ in range(len(queue))]


def _take_standard_output() -> BinaryIO:
    """Keep the pipe to the parent for messages; let whatever prints go to standard error."""
    messages = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return messages


def _obey_parent(stream: BinaryIO, reporter: Reporter) -> None:
    """End this process when the parent asks for it, or is gone; a thread, so that a blocked loop cannot stop it."""
    if stream.readline():
        reporter.finish("stopped", None)
    os._exit(0)


async def _run_on_loop(workload: Callable[[], Any], reporter: Reporter) -> Any:
    from ormscope.loop import LoopScope

    reporter.loop_scope = LoopScope()
    reporter.start()
    return await workload()


def _refuse_keyboard(*arguments: Any, **options: Any) -> Any:
    """What `input()` and `breakpoint()` do here, where standard input is the parent's."""
    raise EOFError(
        "there is no keyboard in the process of a run: hand it values as arguments, and print what you want to see"
    )


def _result(workload: Any, result: Any) -> bytes:
    """What the workload returned, pickled; raises UnsendableError where that cannot be."""
    import cloudpickle

    from ormscope.lab.sending import UnsendableError, name_of

    try:
        data: bytes = cloudpickle.dumps(result)
    except Exception as error:
        raise UnsendableError(
            f"{name_of(workload)} returned what cannot be sent back, {type(result).__name__} ({error}): "
            "return plain values."
        ) from None
    return data


def _portable(error: BaseException) -> bytes | None:
    """The exception, pickled; None where it cannot be (the parent then raises a WorkloadError in its place)."""
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None
    return data


def serve() -> None:
    """Import what each run needs, then be the process of every run that is asked for."""
    import cloudpickle  # noqa: F401
    import psutil  # noqa: F401
    import sqlalchemy.ext.asyncio
    import sqlalchemy.orm  # noqa: F401

    import ormscope.lab.sessions
    import ormscope.lab.storm
    import ormscope.loop
    import ormscope.pool  # noqa: F401
    from ormscope.lab.forks import serve_forks

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_drivers([])
    serve_forks()
    main()


def _import_drivers(others: list[str]) -> None:
    """Else their import would count as the run's memory, and as a stall of its loop."""
    for driver in ("asyncpg", "aiosqlite", *others):
        with contextlib.suppress(ImportError):
            importlib.import_module(driver)


def main() -> None:
    """Run one workload, then end the process at once."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole terminal; the parent decides
    messages = _take_standard_output()
    setting, workload_bytes = pickle.load(sys.stdin.buffer)
    sys.path[:] = setting["path"]
    os.environ.clear()
    os.environ.update(setting["environment"])
    os.chdir(setting["folder"])
    for filename, lines in setting["cells"].items():
        linecache.cache[filename] = (sum(map(len, lines)), None, lines, filename)
    import cloudpickle

    from ormscope.lab.sessions import watch_sessions

    reporter = Reporter(messages)
    reporter.watch_every_engine()
    watch_sessions()
    _import_drivers(setting["drivers"])
    threading.Thread(target=_obey_parent, args=(sys.stdin.buffer, reporter), daemon=True).start()
    sys.breakpointhook = builtins.input = _refuse_keyboard
    try:
        workload, arguments, options = cloudpickle.loads(workload_bytes)
        if inspect.iscoroutinefunction(workload):
            result = asyncio.run(_run_on_loop(partial(workload, *arguments, **options), reporter))
        else:
            reporter.start()
            result = workload(*arguments, **options)
        reporter.finish("returned", _result(workload, result))
    except BaseException as error:
        from ormscope.tracebacks import outcome_of, users_traceback

        reporter.finish(
            "raised", (_portable(error), outcome_of(error), str(error), users_traceback(error))
        )
    sys.stdout.flush()
    sys.stderr.flush()
    # No farewell: a leaked connection would otherwise be collected, and reported, by a half-dead interpreter.
    os._exit(0)


if __name__ == "__main__":
    main()
