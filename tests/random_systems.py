"""Random systems of tasks, pools, timers and threads, each run to its end: was every proof true, and was any missed?

`python tests/random_systems.py --systems 2000 --seed 1` prints the figures and the numbers of those that fail;
`--only N` runs the system with that number alone and prints its program, what happened, and what was proved.

What really happened is told by pools of our own, not by the instrument: a system was *stuck* where nothing at all
moved in it until a pool timeout broke that, although the pool was full.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import logging
import multiprocessing
import random
import sqlite3
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ormscope import PoolScope
from ormscope.proof import Proof

POOL_TIMEOUT = 1.3  # seconds; long against everything else in a system
STILL = 0.7  # so long nothing has moved where a proof is called for
LATE = 0.25  # seconds by which a loop is late that cannot be expected to prove anything
PATIENCE = 4.0  # then whoever still waits, for what nobody will give, is cancelled
PROCESSES, AT_ONCE = (
    4,
    4,
)  # all systems in one process would make each search through its heap a long one
SELECT = text("select 1")


# A driver of nothing.


class NoCursor:
    description = (("nothing", None, None, None, None, None, None),)
    rowcount, lastrowid, arraysize = -1, None, 1

    async def __aenter__(self) -> NoCursor:
        return self

    def __await__(self) -> Generator[Any, None, NoCursor]:
        return self.__aenter__().__await__()  # SQLAlchemy 2.0 has it so

    async def execute(self, *_: Any) -> NoCursor:
        await asyncio.sleep(0)
        return self

    async def fetchall(self) -> list[tuple[int]]:
        return [(0,)]

    async def close(self) -> None:
        pass


class NoConnection:
    _connection = True

    def cursor(self) -> NoCursor:
        return NoCursor()

    async def nothing(self, *_: Any, **__: Any) -> None:
        await asyncio.sleep(0)

    create_function = rollback = commit = close = nothing

    def stop(self) -> None:
        pass


async def connect_to_nothing() -> NoConnection:
    await asyncio.sleep(0)
    return NoConnection()


# What really happens.


@dataclass
class Log:
    """What happened to a system: (seconds, number of the pool or -1, what)."""

    events: list[tuple[float, int, str]] = field(default_factory=list)
    limits: list[tuple[float, float]] = field(default_factory=list)  # when it was due, when left

    def note(self, what: str, pool: int = -1) -> None:
        self.events.append((time.perf_counter(), pool, what))


class Telling:
    """Makes a pool tell what becomes of its connections."""

    log, number = Log(), -1

    def _do_get(self) -> Any:
        try:
            record = super()._do_get()  # type: ignore[misc]
        except PoolTimeoutError:
            # A waiter that was not woken though there was room is SQLAlchemy's own mistake.
            full = self.checkedout() >= self.size()  # type: ignore[attr-defined]
            self.log.note("timeout" if full else "timeout with room", self.number)
            raise
        self.log.note("served", self.number)
        return record

    def _do_return_conn(self, record: Any) -> None:
        self.log.note("returned", self.number)
        super()._do_return_conn(record)  # type: ignore[misc]


class TellingPool(Telling, AsyncAdaptedQueuePool):
    pass


class TellingThreadPool(Telling, QueuePool):
    pass


@dataclass(frozen=True)
class Told:
    """A proof as one scope was told of it: when, the numbers of the pools, whether a time limit ends it."""

    at: float
    pools: frozenset[int]
    timed: bool


class TellingScope(PoolScope):
    told: list[Told]
    numbers: dict[int, int]  # of the system's pools, by their ids

    def proved(self, found: Proof) -> None:
        pools = frozenset(self.numbers[key] for key in found.pools if key in self.numbers)
        self.told.append(Told(found.at, pools, bool(found.timers)))
        super().proved(found)


# A random program.


@dataclass(frozen=True)
class Step:
    kind: str
    way: str = ""
    pool: int = 0
    seconds: float = 0.0
    inner: tuple[Program, ...] = ()

    def lines(self, indent: str = "") -> Iterable[str]:
        parts = [self.kind, self.way, f"{self.seconds:g} s" if self.seconds else ""]
        if self.kind in USES_POOL:
            parts.append(f"pool {self.pool}")
        yield indent + " ".join(filter(None, parts))
        for program in self.inner:
            mark = "- " if len(self.inner) > 1 else "  "
            inside = [line for step in program for line in step.lines()] or ["nothing"]
            for position, line in enumerate(inside):
                yield indent + (mark if position == 0 else "  ") + line


Program = tuple[Step, ...]

USES_POOL = ("take", "hand", "begun by a child", "put")
TAKES = ("connect", "session", "begin", "await", "generator", "stack")
HANDS = ("argument", "attribute", "dict", "list", "queue")
# Kinds by how many programs are inside; those in LASTING may wait for what nobody is known to give.
LEAVES = ("sleep", "thread", "timer")
SINGLE = ("child", "wait_for", "timeout", "move_on", "shield", "background")
SEVERAL = ("gather", "wait", "group", "anyio", "as_completed")
LASTING = ("lock", "event", "set", "put", "get")
LIMITED = ("wait_for", "timeout", "move_on")


@dataclass(frozen=True)
class System:
    """One random system; `promised` where it is only of the kinds of waiting that the proof follows."""

    number: int
    family: str
    sizes: tuple[int, ...]
    programs: tuple[Program, ...]
    promised: bool
    cancels: tuple[tuple[float, int, str], ...] = ()  # when, which task, by a task or a timer
    asks: tuple[tuple[float, str], ...] = ()  # when a verdict is asked for, in the loop or a thread
    eager: bool = False

    @property
    def untimed(self) -> bool:
        """Whether nobody has set himself a time limit; where the machine has the connections, it has."""
        unseen, limits = [step for program in self.programs for step in program], not self.promised
        while unseen:
            step = unseen.pop()
            limits |= step.kind in LIMITED or "limit" in step.way
            unseen.extend(inner for program in step.inner for inner in program)
        return not limits and not any(way == "timer" for _, _, way in self.cancels)

    def __str__(self) -> str:
        head = f"system {self.number}: {self.family}, pools of {self.sizes}, "
        head += "promised kinds only" if self.promised else "kinds that are not promised, too"
        if self.eager:
            head += ", eager tasks"
        lines = [head]
        for number, program in enumerate(self.programs):
            lines.append(f"task {number}")
            lines += [line for step in program for line in step.lines("    ")]
        lines += [
            f"at {at:.3f} s: task {task} cancelled by a {way}" for at, task, way in self.cancels
        ]
        lines += [f"at {at:.3f} s: a verdict asked for in a {way}" for at, way in self.asks]
        return "\n".join(lines)


class Maker:
    def __init__(self, number: int) -> None:
        self.number = number
        self.dice = random.Random(number)

    def system(self) -> System:
        dice = self.dice
        self.family = "threads" if dice.random() < 0.12 else "tasks"
        self.pools = dice.choice((1, 1, 1, 2, 2, 3))
        self.limits = dice.random() < 0.5
        self.lasting = dice.random() < 0.25
        tasks = dice.randint(1, 5)
        sizes = tuple(dice.choice((1, 2, 2, 3, 4)) for _ in range(self.pools))
        make = self.program
        if self.family == "tasks" and dice.random() < 0.2:
            sizes, make = (dice.choice((1, 2)), *sizes[1:]), self.bait
            tasks = sizes[0] + dice.choice((0, 1))
        programs = tuple(make(0) for _ in range(tasks))
        is_async = self.family == "tasks"
        cancels = tuple(
            (dice.uniform(0.01, 0.6), dice.randrange(tasks), dice.choice(("task", "timer")))
            for _ in range(dice.choice((0, 0, 0, 0, 1, 2)) if is_async else 0)
        )
        asks = tuple(
            (dice.uniform(0.05, 1.0), dice.choice(("loop", "thread")))
            for _ in range(dice.choice((0, 0, 0, 1, 2)))
        )
        eager = is_async and dice.random() < 0.1
        return System(
            self.number, self.family, sizes, programs, not self.lasting, cancels, asks, eager
        )

    def program(self, depth: int) -> Program:
        dice, steps = self.dice, []
        if depth == 0 and self.family == "tasks" and self.limits and dice.random() < 0.3:
            steps.append(self.step(dice.choice(LIMITED), depth))
        elif depth == 0 and dice.random() < 0.8:
            # Most begin with a connection: systems in which nobody holds one show nothing.
            steps.append(self.step("take", depth))
        for _ in range(dice.choice((0, 1, 1, 2))):
            steps.append(self.step(self.kind(depth), depth))
            if "left" in steps[-1].way and dice.random() < 0.6:
                # Whoever took it waits for the pool, and whoever has it need not.
                steps.append(replace(self.step("take", depth), pool=steps[-1].pool))
        return tuple(steps)

    def bait(self, depth: int) -> Program:
        """What looks like a deadlock of the first pool, and mostly ends by itself."""
        again = Step("take", self.dice.choice(TAKES), inner=(self.program(4),))
        moment = Step(self.dice.choice(LEAVES), seconds=0.3)
        hand = f"{self.dice.choice(HANDS)} {self.dice.choice(('kept', 'left', 'left'))}"
        inside: Program = self.dice.choice(
            (
                (Step("wait", "future", inner=((again,),)),),
                (Step("as_completed", "future", inner=((again,),)),),
                (Step("wait", "first", inner=((again,), (moment,))),),
                (Step("group", inner=((moment,),)), Step("background", inner=((again,),))),
                (again,),
            )
        )
        programs = (
            (Step("take", self.dice.choice(TAKES), inner=(inside,)),),
            (Step("begun by a child", inner=(inside,)),),
            (Step("hand", hand, inner=((moment,),)), again),
        )
        return self.dice.choice(programs)

    def kind(self, depth: int) -> str:
        dice = self.dice
        if self.family == "threads":
            kinds = ["sleep"] if depth > 3 else ["sleep", "take", "take"]
            return dice.choice(kinds + ["join"] * (self.lasting and depth < 3))
        if self.lasting and dice.random() < 0.2:
            return dice.choice(LASTING)
        if depth > 4 or dice.random() < 0.2:
            return dice.choice(LEAVES)
        group: tuple[str, ...] = dice.choice((SINGLE, SEVERAL, USES_POOL[:1], USES_POOL[:3]))
        kind = dice.choice(group)
        if kind == "take" and depth and dice.random() < 0.3:
            return dice.choice(LEAVES)
        return "child" if kind in LIMITED and not self.limits else kind

    def step(self, kind: str, depth: int) -> Step:
        dice = self.dice
        several = kind in SEVERAL
        way, seconds = "", 0.0
        if kind in LEAVES:
            seconds = dice.choice((0.001, 0.005, 0.02, 0.1, 0.3))
        elif kind == "take":
            way = dice.choice(TAKES)
        elif kind == "hand":
            way = dice.choice(HANDS) + dice.choice((" kept", " dropped", " left"))
        elif kind == "gather":
            way = dice.choice(("plain", "nested", "future", "exceptions"))
        elif kind == "wait":
            way = dice.choice(
                ("all", "first", "future", *(("all limit", "first limit") * self.limits))
            )
        elif kind == "as_completed":
            way = dice.choice(("", "limit" if self.limits else ""))
        if kind in LIMITED or "limit" in way:
            # Two shorter than the pool's timeout, two that are never reached.
            seconds = dice.choice((0.1, 0.5, 5.0, 60.0))
        if kind in LEAVES or kind in ("set", "event"):
            count = 0
        elif several:
            count = dice.randint(1, 3)
        else:
            count = 1
        inner = [self.program(depth + 1) for _ in range(count)]
        if kind == "hand" and dice.random() < 0.5:
            inner[0] = (Step("sleep", seconds=0.3), *inner[0])
        if kind == "take" and dice.random() < 0.45:
            # Whoever holds one waits a moment, so that others take theirs, and then needs another.
            follow = self.step(self.kind(depth + 1), depth + 1)
            inner[0] = (Step("sleep", seconds=0.01), follow, *inner[0])
        return Step(kind, way, dice.randrange(self.pools), seconds, tuple(inner))


# Running it.


class Box:
    connection: AsyncConnection | None = None


class Machine:
    """Runs the programs of a system. No connection may be reached from it, or every task could use it."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.log = Log()
        self.told: list[Told] = []
        self.outcomes: Counter[str] = Counter()
        self.causes: Counter[str] = Counter()
        self.failures: list[str] = []
        self.engines: list[Any] = []
        self.scopes: list[TellingScope] = []
        self.tasks: set[asyncio.Task[None]] = set()
        for number, size in enumerate(system.sizes):
            options: dict[str, Any] = {
                "pool_size": size,
                "max_overflow": 0,
                "pool_timeout": POOL_TIMEOUT,
            }
            engine: Any
            if system.family == "threads":
                connect = functools.partial(sqlite3.connect, ":memory:", check_same_thread=False)
                engine = create_engine(
                    "sqlite://", creator=connect, poolclass=TellingThreadPool, **options
                )
                pool = engine.pool
            else:
                engine = create_async_engine(
                    "sqlite+aiosqlite:///nothing",
                    async_creator=connect_to_nothing,
                    poolclass=TellingPool,
                    **options,
                )
                pool = engine.sync_engine.pool
            pool.log, pool.number = self.log, number
            self.engines.append(engine)
            self.scopes.append(TellingScope(engine, f"system {system.number} pool {number}"))
        numbers = {id(scope.pool): number for number, scope in enumerate(self.scopes)}
        for scope in self.scopes:
            scope.told, scope.numbers = self.told, numbers

    async def main(self) -> None:
        """Run all programs to their ends."""
        self.lock, self.event = asyncio.Lock(), asyncio.Event()
        self.queue: asyncio.Queue[AsyncConnection] = asyncio.Queue()
        self.log.note("begin")
        begun = [self.spawn(program) for program in self.system.programs]
        loop = asyncio.get_running_loop()
        helpers = [asyncio.create_task(self.ask(at, way)) for at, way in self.system.asks]
        for at, number, way in self.system.cancels:
            if way == "timer":
                loop.call_later(at, cancel, begun[number], self.log)
            else:
                helpers.append(asyncio.create_task(cancel_later(at, begun[number], self.log)))
        del begun
        until = time.perf_counter() + PATIENCE
        while pending := {task for task in self.tasks if not task.done()}:
            left = until - time.perf_counter()
            if left < 0:
                self.log.note("cancel")
                for task in pending:
                    task.cancel()
                left = 1.0
            await asyncio.wait(pending, timeout=left)
        await asyncio.gather(*helpers)
        while not self.queue.empty():
            await self.queue.get_nowait().close()
        for task in self.tasks:
            self.outcome(None if task.cancelled() else task.exception(), task.cancelled())
        self.tasks.clear()
        del task  # whose exception has the frames that it passed, and what they hold
        # A shielded close outlives a task that is cancelled twice; then its connection may be garbage.
        while self.is_out() and time.perf_counter() < until + 2 * PATIENCE:
            gc.collect()
            await asyncio.sleep(0.1)
        self.end()
        for engine in self.engines:
            await engine.dispose()

    def run_threads(self) -> None:
        """Run all programs to their ends, each in a thread of its own."""
        self.log.note("begin")
        threads = [
            threading.Thread(target=self.thread, args=(program,), name=f"worker {number}")
            for number, program in enumerate(self.system.programs)
        ]
        for thread in threads:
            thread.start()
        begun = time.perf_counter()
        for at, _ in sorted(self.system.asks):
            time.sleep(max(0.0, begun + at - time.perf_counter()))
            self.causes.update(scope.verdict().cause for scope in self.scopes)
        for thread in threads:
            thread.join()
        self.end()
        for engine in self.engines:
            engine.dispose()

    def is_out(self) -> bool:
        """Whether a connection is not back in its pool."""
        return any(scope.pool.checkedout() for scope in self.scopes)  # type: ignore[attr-defined]

    def end(self) -> None:
        """Whether all is as it was, and the scopes saw it to the end."""
        for scope in self.scopes:
            if scope.failure:
                self.failures.append(f"{scope.name} has stepped aside: {scope.failure}")
            elif scope.pool.checkedout() or scope.holders or scope.waiters:  # type: ignore[attr-defined]
                out = scope.pool.checkedout()  # type: ignore[attr-defined]
                self.failures.append(f"{scope.name}: {out} not back:\n{scope.report()}")
            elif scope.deadlock_count and not self.told:
                self.failures.append(f"{scope.name}: proved, and told nobody")
            scope.close()

    def outcome(self, error: BaseException | None, cancelled: bool = False) -> None:
        if isinstance(error, BaseExceptionGroup):
            for part in error.exceptions:
                self.outcome(part)
            return
        kind = "CancelledError" if cancelled else "ok" if error is None else type(error).__name__
        self.outcomes[kind] += 1
        if kind not in ("ok", "CancelledError", "TimeoutError"):
            self.failures.append(f"raised {error!r}")

    async def ask(self, at: float, way: str) -> None:
        await asyncio.sleep(at)
        for scope in self.scopes:
            verdict = scope.verdict() if way == "loop" else await asyncio.to_thread(scope.verdict)
            self.causes[verdict.cause] += 1
            # Whoever is cancelled before it has begun loses the connection that it was given.
            if verdict.cause == "leaked" and self.system.untimed and not self.system.cancels:
                self.failures.append(f"{scope.name} said to be leaked")

    # Threads.

    def thread(self, program: Program) -> None:
        try:
            self.run_here(program)
            self.outcome(None)
        except Exception as error:
            self.outcome(error)

    def run_here(self, program: Program) -> None:
        for step in program:
            match step.kind:
                case "take":
                    with self.engines[step.pool].connect() as connection:
                        connection.execute(SELECT)
                        self.run_here(step.inner[0])
                case "join":
                    thread = threading.Thread(target=self.thread, args=step.inner)
                    thread.start()
                    thread.join()
                case _:
                    time.sleep(step.seconds)
            self.log.note("step")

    # Tasks.

    def spawn(self, program: Program, place: Any = None) -> asyncio.Task[None]:
        run = self.run(program) if place is None else self.receive(place, program)
        if self.system.eager and sys.version_info >= (3, 12):
            task = asyncio.eager_task_factory(asyncio.get_running_loop(), run)
        else:
            task = asyncio.create_task(run)
        self.tasks.add(task)
        return task

    async def run(self, program: Program) -> None:
        for step in program:
            due = time.perf_counter() + step.seconds
            try:
                await getattr(self, "do_" + step.kind.replace(" ", "_"))(step, *step.inner)
            except asyncio.CancelledError:
                self.log.note("cancelled")
                raise
            finally:
                if step.kind in LIMITED or "limit" in step.way:
                    self.log.limits.append((due, time.perf_counter()))
                self.log.note("step")

    async def do_take(self, step: Step, inner: Program) -> None:
        engine: AsyncEngine = self.engines[step.pool]
        match step.way:
            case "connect":
                async with engine.connect() as connection:
                    await connection.execute(SELECT)
                    await self.run(inner)
            case "session":
                async with AsyncSession(engine) as session:
                    await session.execute(SELECT)
                    await self.run(inner)
            case "begin":
                async with AsyncSession(engine) as session, session.begin():
                    await session.connection()
                    await self.run(inner)
            case "await":
                connection = await engine.connect()
                try:
                    await self.run(inner)
                finally:
                    await connection.close()
            case "generator":
                async with aclosing(connections(engine)) as found:
                    async for _ in found:
                        await self.run(inner)
            case "stack":
                async with AsyncExitStack() as stack:
                    await stack.enter_async_context(engine.connect())
                    await self.run(inner)

    async def do_hand(self, step: Step, inner: Program) -> None:
        way, after = step.way.split()
        connection = await self.engines[step.pool].connect()
        place: Any = connection
        if way == "attribute":
            place = Box()
            place.connection = connection
        elif way == "dict":
            place = {"connection": connection}
        elif way == "list":
            place = [connection]
        elif way == "queue":
            place = asyncio.Queue()
            place.put_nowait(connection)
        task = self.spawn(inner, place)
        if after != "kept":
            del place, connection
        if after != "left":
            await task

    async def receive(self, place: Any, program: Program) -> None:
        """Use a connection that somebody else has taken, and give it back."""
        if isinstance(place, asyncio.Queue):
            connection = await place.get()
        elif isinstance(place, Box):
            connection = place.connection
        elif isinstance(place, dict):
            connection = place["connection"]
        else:
            connection = place[0] if isinstance(place, list) else place
        try:
            if place is connection:  # else only the heap tells who has it, not who used it last
                await connection.execute(SELECT)
            await self.run(program)
        finally:
            await connection.close()

    async def do_begun_by_a_child(self, step: Step, inner: Program) -> None:
        session = AsyncSession(self.engines[step.pool])
        try:
            task = asyncio.create_task(begin(session))
            self.tasks.add(task)
            try:
                await task
            finally:
                task.cancel()
                await asyncio.wait({task})
            await self.run(inner)
        finally:
            await session.close()

    async def do_sleep(self, step: Step) -> None:
        await asyncio.sleep(step.seconds)

    async def do_thread(self, step: Step) -> None:
        await asyncio.to_thread(time.sleep, step.seconds / 5)

    async def do_timer(self, step: Step) -> None:
        await later(step.seconds)

    async def do_child(self, step: Step, inner: Program) -> None:
        await self.spawn(inner)

    async def do_background(self, step: Step, inner: Program) -> None:
        self.spawn(inner)

    async def do_shield(self, step: Step, inner: Program) -> None:
        await asyncio.shield(self.spawn(inner))

    async def do_wait_for(self, step: Step, inner: Program) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self.run(inner), step.seconds)

    async def do_timeout(self, step: Step, inner: Program) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(step.seconds):
                await self.run(inner)

    async def do_move_on(self, step: Step, inner: Program) -> None:
        with anyio.move_on_after(step.seconds):
            await self.run(inner)

    async def do_gather(self, step: Step, *inner: Program) -> None:
        children: list[Any] = list(map(self.spawn, inner))
        if step.way == "nested":
            children = [asyncio.gather(*children), self.spawn(())]
        elif step.way == "future":
            children.append(later(0.02))
        await asyncio.gather(*children, return_exceptions=step.way == "exceptions")

    async def do_wait(self, step: Step, *inner: Program) -> None:
        until = "ALL_COMPLETED" if "all" in step.way else "FIRST_COMPLETED"
        limit = step.seconds if "limit" in step.way else None
        awaited: list[asyncio.Future[None]] = list(map(self.spawn, inner))
        if step.way == "future":
            awaited.append(later(0.3))
        await asyncio.wait(awaited, timeout=limit, return_when=until)

    async def do_as_completed(self, step: Step, *inner: Program) -> None:
        limit = step.seconds if "limit" in step.way else None
        awaited: list[asyncio.Future[None]] = list(map(self.spawn, inner))
        if step.way == "future":
            awaited.append(later(0.3))
        with suppress(TimeoutError):
            for done in asyncio.as_completed(awaited, timeout=limit):
                await done
                if step.way == "future":
                    break

    async def do_group(self, step: Step, *inner: Program) -> None:
        async with asyncio.TaskGroup() as group:
            for program in inner:
                group.create_task(self.run(program))

    async def do_anyio(self, step: Step, *inner: Program) -> None:
        async with anyio.create_task_group() as group:
            for program in inner:
                group.start_soon(self.run, program)

    async def do_lock(self, step: Step, inner: Program) -> None:
        async with self.lock:
            await self.run(inner)

    async def do_event(self, step: Step) -> None:
        await self.event.wait()

    async def do_set(self, step: Step) -> None:
        self.event.set()

    async def do_put(self, step: Step, inner: Program) -> None:
        self.queue.put_nowait(await self.engines[step.pool].connect())
        await self.run(inner)

    async def do_get(self, step: Step, inner: Program) -> None:
        connection = await self.queue.get()
        try:
            await self.run(inner)
        finally:
            await connection.close()


async def connections(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection, None]:
    async with engine.connect() as connection:
        yield connection


async def begin(session: AsyncSession) -> None:
    await session.connection()


def later(seconds: float) -> asyncio.Future[None]:
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    loop.call_later(seconds, end, future)
    return future


def end(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def cancel(task: asyncio.Task[None], log: Log) -> None:
    if task.cancel():
        log.note("cancel")


async def cancel_later(seconds: float, task: asyncio.Task[None], log: Log) -> None:
    await asyncio.sleep(seconds)
    cancel(task, log)


# Holding the proofs against what happened.

MOVES = ("served", "returned")
late_at: list[float] = []  # when the loop of this process was late
WRONG = ("false", "missed", "limit overlooked", "timer invented", "broken")


@dataclass
class Report:
    """What became of a system, and what was wrong about the proofs."""

    system: System
    machine: Machine
    stuck: int = 0
    wrong: dict[str, str] = field(default_factory=dict)

    def __init__(self, machine: Machine) -> None:
        self.system, self.machine = machine.system, machine
        self.wrong = dict.fromkeys(
            ("broken",) * bool(machine.failures), "; ".join(machine.failures)
        )
        self.events = sorted(machine.log.events)
        self.stuck = sum(self._judge_stop(*found) for found in self._stops())
        for told in machine.told:
            self._judge_proof(told)

    def _stops(self) -> Iterable[tuple[float, int]]:
        """The pool timeouts before which nothing has moved for long."""
        for before, (at, pool, what) in zip(self.events, self.events[1:], strict=False):
            if what == "timeout" and at - before[0] > STILL:
                yield at, pool

    def _judge_stop(self, at: float, pool: int) -> bool:
        said = [
            told for told in self.machine.told if pool in told.pools and not self._moves(told, at)
        ]
        was_late = any(at - POOL_TIMEOUT < late <= at for late in late_at)
        if not said and self.system.promised and not was_late:
            self.wrong["missed"] = f"pool {pool} until {at - self.events[0][0]:.3f} s"
        return True

    def _judge_proof(self, told: Told) -> None:
        seconds = f"proved{' until a timer' * told.timed} at {told.at - self.events[0][0]:.3f} s, "
        if told.timed and self.system.untimed:
            self.wrong["timer invented"] = seconds + "and there is none"
        broken = min(
            (
                at
                for at, pool, what in self.events
                if at > told.at and pool in told.pools and what.startswith("timeout")
            ),
            default=float("inf"),
        )
        moved = min(self._moves(told, broken), default=None)
        if moved is None:
            return
        seconds += f"moved at {moved - self.events[0][0]:.3f} s"
        # A loop that is late may leave a limit running that was due before the proof.
        expired = any(
            told.at < left and due <= min(left + 0.002, moved)
            for due, left in self.machine.log.limits
        )
        cancelled = any(
            told.at < at <= moved and what in ("cancel", "cancelled") for at, _, what in self.events
        )
        if not expired and not cancelled:
            self.wrong["false"] = seconds
        elif expired and not cancelled and not told.timed:  # else it may have been another's limit
            self.wrong["limit overlooked"] = seconds

    def _moves(self, told: Told, until: float) -> list[float]:
        return [
            at
            for at, pool, what in self.events
            if told.at < at < until and pool in told.pools and what in MOVES
        ]

    def __str__(self) -> str:
        begun = self.events[0][0]
        lines = [str(self.system), "", "what happened:"]
        happened = [
            (at, f"{what} {'' if pool < 0 else f'pool {pool}'}") for at, pool, what in self.events
        ]
        happened += [
            (told.at, f"PROVED for pools {sorted(told.pools)}{' until a timer' * told.timed}")
            for told in self.machine.told
        ]
        lines += [f"  {at - begun:.3f} {what}" for at, what in sorted(happened) if what != "step "]
        lines += [f"outcomes: {dict(self.machine.outcomes)}, asked: {dict(self.machine.causes)}"]
        lines += [f"{kind.upper()}: {what}" for kind, what in self.wrong.items()]
        return "\n".join(lines)


@dataclass
class Figures:
    """How many systems were what; `failing` has by kind what was wrong, by the system's number."""

    counts: Counter[str] = field(default_factory=Counter)
    failing: dict[str, dict[int, str]] = field(default_factory=lambda: {kind: {} for kind in WRONG})
    among_others: list[str] = field(default_factory=list)  # missed, but not when alone
    lag: float = 0.0

    def add(self, report: Report) -> None:
        told, events = report.machine.told, report.events
        self.counts.update(
            {
                "systems": 1,
                f"of {report.system.family}": 1,
                "with a pool timeout": any(what == "timeout" for _, _, what in events),
                "stuck": bool(report.stuck),
                "stuck, of promised kinds": bool(report.stuck and report.system.promised),
                "proved": any(not proof.timed for proof in told),
                "until a timer": any(proof.timed for proof in told),
            }
        )
        self.counts.update({f"asked: {cause}": n for cause, n in report.machine.causes.items()})
        for kind, what in report.wrong.items():
            # One that is missed is run again; what else is wrong may never be so again.
            shown = what if kind == "missed" else f"{what}\n{report}"
            self.failing[kind][report.system.number] = shown

    def __iadd__(self, other: Figures) -> Figures:
        self.counts.update(other.counts)
        for kind, found in other.failing.items():
            self.failing[kind] |= found
        self.lag = max(self.lag, other.lag)
        return self

    def __str__(self) -> str:
        lines = [f"{name}: {count}" for name, count in sorted(self.counts.items())]
        for kind, found in self.failing.items():
            lines.append(f"{kind}: {len(found)}")
            lines += [f"    {number}: {what}" for number, what in sorted(found.items())]
        lines += [f"missed among others only: {what}" for what in self.among_others]
        return "\n".join([*lines, f"longest lag of a loop: {self.lag:.3f} s"])


async def beat(figures: Figures) -> None:
    while True:
        due = time.perf_counter() + 0.01
        await asyncio.sleep(0.01)
        now = time.perf_counter()
        figures.lag = max(figures.lag, now - due)
        if now - due > LATE:
            late_at.append(now)
            figures.counts["times that a loop was late"] += 1


async def run_here(numbers: Iterable[int], at_once: int, verbose: bool) -> Figures:
    figures, free = Figures(), asyncio.Semaphore(at_once)

    async def run(number: int) -> None:
        async with free:
            machine = Machine(Maker(number).system())
            if machine.system.family == "threads":
                await asyncio.to_thread(machine.run_threads)
            else:
                await machine.main()
            report = Report(machine)
            figures.add(report)
            if verbose:
                print(report)

    heart = asyncio.create_task(beat(figures))
    async with asyncio.TaskGroup() as group:
        for number in numbers:
            group.create_task(run(number))
    heart.cancel()
    return figures


def run_part(numbers: Iterable[int], at_once: int = AT_ONCE, verbose: bool = False) -> Figures:
    """Run the systems with these numbers in this process, several at once."""
    warnings.simplefilter("ignore")  # SQLAlchemy's, about those who were cancelled
    logging.getLogger(__name__).setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    return asyncio.run(run_here(numbers, at_once, verbose))


def run_all(numbers: Iterable[int], processes: int = PROCESSES, at_once: int = AT_ONCE) -> Figures:
    """Run the systems with these numbers in several processes."""
    numbers, figures = list(numbers), Figures()
    parts = [numbers[first::processes] for first in range(processes)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        for part in pool.map(run_part, parts, [at_once] * processes):
            figures += part
    # On a busy machine a search may take longer than the pool's timeout: is it missed without the others, too? Each in
    # a process of its own, for in that of all the tests a search has a heap to go through that no system has made.
    for number, what in list(figures.failing["missed"].items()):
        with ProcessPoolExecutor(1, context) as pool:
            alone = pool.submit(run_part, [number]).result()
        if not alone.failing["missed"]:
            figures.failing["missed"].pop(number)
            figures.counts["missed among others only"] += 1
            figures.among_others.append(f"{number}: {what}")
    return figures


def numbers_of(seed: int, count: int) -> range:
    """The numbers of the systems of one run: those of two seeds have none in common."""
    return range(seed * 1_000_000, seed * 1_000_000 + count)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--systems", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="in each process")
    parser.add_argument("--only", type=int, help="the number of one system, to be shown")
    options = parser.parse_args()
    begun = time.perf_counter()
    if options.only is not None:
        figures = run_part([options.only], verbose=True)
    else:
        numbers = numbers_of(options.seed, options.systems)
        figures = run_all(numbers, options.processes, options.at_once)
        print(figures, f"{time.perf_counter() - begun:.0f} s", sep="\n")
    sys.exit(any(figures.failing.values()))


if __name__ == "__main__":
    main()
