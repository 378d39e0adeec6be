"""The checks of exercise 07: what a scrape of a pool's metrics tells, and when somebody is woken for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from ormscope import PoolScope
from ormscope.lab import Recording, storm
from ormscope.metrics import PoolCollector
from workshop.checks.evidence import evidence
from workshop.checks.task import Finding, Task

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

_POLL_SECONDS = 0.001


async def _until(condition: Callable[[], object]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(_POLL_SECONDS)


async def _take_one(engine: AsyncEngine) -> None:
    async with engine.connect():
        pass


async def _hold_and_ask(engine: AsyncEngine, meet: asyncio.Barrier) -> None:
    async with engine.connect():
        await meet.wait()
        await _take_one(engine)


@asynccontextmanager
async def _deadlocked(engine: AsyncEngine, scope: PoolScope) -> AsyncIterator[float]:
    """A deadlock from the beginning of the block to its end; yields when it was made, on `time.perf_counter()`."""
    capacity = scope.capacity or 0
    meet, made = asyncio.Barrier(capacity), time.perf_counter()
    tasks = [asyncio.create_task(_hold_and_ask(engine, meet)) for _ in range(capacity)]
    try:
        await scope.deadlock()
        yield made
    finally:
        for one in tasks:
            one.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# measure_the_queue

_NUMBERS = ("checked_out", "waiting", "oldest_wait")
_APART_SECONDS = 0.15  # between the first and the others in line
_BLOCKED_SECONDS = 0.2
_SCRAPE_SECONDS = 1.0  # that a scrape may take; a right one takes a thousandth
_TOLERANCE = 0.05  # seconds

_MOMENTS = {
    "idle": "while nobody used the pool",
    "full": "while all connections were out and nobody waited",
    "queue": "while tasks waited in line",
    "loop blocked": "while the event loop stood still",
    "served": "when all of them had been served",
    "deadlock": "in a deadlock",
    "dispose()": "after dispose()",
    "NullPool": "of an engine with a NullPool",
}
_NO_AGE = 60.0  # seconds; nobody here waits for so long, or since before the beginning


class GaveUpError(Exception):
    """The learner's function is none that could be asked again."""


@dataclass
class Look:
    """One scrape: what the learner's function told, and what was true.

    `out` and `waiting` are numbers, `oldest` the least and the most seconds that whoever waits longest has waited,
    `youngest` and `held` the seconds that whoever came last has waited, and that a connection has been out. `took`
    says whether the scrape asked the pool for a connection, `hung` whether it did not end, `on_the_loop` whether
    what it returned is to be awaited, and `raised` is the class of what it raised.
    """

    moment: str
    out: int
    waiting: int
    oldest: tuple[float, float]
    youngest: float
    held: float
    told: dict[str, float] | None = None
    took: bool = False
    hung: bool = False
    on_the_loop: bool = False
    raised: str = ""

    @property
    def when(self) -> str:
        """The moment, in the words that the learner reads."""
        return _MOMENTS[self.moment]

    def true(self, number: str) -> float:
        """What one of the three numbers was."""
        truth = {"checked_out": self.out, "waiting": self.waiting, "oldest_wait": self.oldest[0]}
        return truth[number]

    def is_wrong(self, number: str) -> bool:
        """Whether the learner's function told another number than was true."""
        if self.told is None:
            return False
        found = self.told[number]
        if number == "oldest_wait":
            least, most = self.oldest
            return not least - _TOLERANCE <= found <= most + _TOLERANCE
        return found != self.true(number)


class Scraped:
    """An engine with the learner's metrics, scraped from a thread as `start_http_server` does."""

    def __init__(self, metrics: Callable[..., Any], engine: AsyncEngine) -> None:
        self.engine, self.scope = engine, PoolScope(engine)
        self.looks: list[Look] = []
        self._metrics = metrics
        self._measure: Any = None

    async def begin(self) -> None:
        """Ask for the function that each scrape calls."""

        async def ask(number: int) -> None:
            found = self._metrics(self.engine, self.scope)
            if not callable(found):
                raise TypeError(
                    f"metrics returned {_a(found)}; a function was asked for, that each scrape calls"
                )
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
            before = self._asked()
            if blocked:
                _stand_still(_BLOCKED_SECONDS)
            start = time.perf_counter()
            ended, thread = self._in_a_thread()
            if blocked:
                thread.join(_SCRAPE_SECONDS)
            late = start + _SCRAPE_SECONDS
            await _until(lambda: not thread.is_alive() or time.perf_counter() > late)
            end = time.perf_counter()
            one = Look(
                moment,
                out,
                len(since),
                (start - since[0][1], end - since[0][0]) if since else (0.0, 0.0),
                start - since[-1][1] if since else 0.0,
                start - held if held is not None else 0.0,
                took=self._asked() != before,
                hung=not ended,
            )
            self.looks.append(one)
            if ended:
                told, error = ended[0]
                if error is not None:
                    one.raised = type(error).__name__
                    raise error
                if inspect.iscoroutine(told):
                    told.close()
                    one.on_the_loop = True
                else:
                    one.told = _checked(told)

        await storm(ask, 1)
        if self.looks[-1].hung or self.looks[-1].on_the_loop:
            raise GaveUpError

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


def _a(thing: object) -> str:
    return f"an object of class {type(thing).__name__}"


def _checked(told: Any) -> dict[str, float]:
    """The numbers that were asked for; raises TypeError where one is missing."""
    if not isinstance(told, dict):
        raise TypeError(f"the scrape returned {_a(told)}; a dictionary was asked for")
    for name in _NUMBERS:
        if not isinstance(told.get(name), int | float):
            raise TypeError(
                f"{name!r} is {_a(told[name])}; a number was asked for"
                if name in told
                else f"the scrape returned no {name!r}"
            )
    return {name: told[name] for name in _NUMBERS}


async def scrape_a_day(
    metrics: Callable[..., Any], url: str, *, pool_size: int, max_overflow: int, queue: int
) -> dict[str, Any]:
    """Scrape a pool in all that happens to it in a day, and then one without a limit; what each scrape told."""
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=max_overflow,
        pool_timeout=None,
        pool_logging_name="shop",
    )
    shop = Scraped(metrics, engine)
    nightly = Scraped(
        metrics, create_async_engine(url, poolclass=NullPool, pool_logging_name="nightly job")
    )
    async with evidence(engine) as noted:
        with contextlib.suppress(GaveUpError):
            await shop.begin()
            await _day(shop, queue)
    if noted.ended and not any(one.hung or one.on_the_loop for one in shop.looks):
        with contextlib.suppress(GaveUpError):
            await _evening(shop)
            await nightly.begin()
            await _night(nightly)
    return dataclasses.asdict(noted) | {"looks": shop.looks + nightly.looks}


async def _day(shop: Scraped, queue: int) -> None:
    """Idle, full, in line, in line while the loop stands still, idle again, deadlocked."""
    scope, capacity = shop.scope, shop.scope.capacity or 0
    await shop.look("idle")
    async with AsyncExitStack() as stack:
        for _ in range(capacity):
            await stack.enter_async_context(shop.engine.connect())
        held = scope.holders[0].since
        await asyncio.sleep(2 * _TOLERANCE)
        await shop.look("full", capacity, held=held)
        since, tasks = [], []
        for number in range(queue):
            came = time.perf_counter()
            tasks.append(asyncio.create_task(_take_one(shop.engine)))
            await _until(lambda: len(scope.waiters) == len(tasks))
            since.append((came, time.perf_counter()))
            if number == 0:
                await asyncio.sleep(_APART_SECONDS)
        try:
            await shop.look("queue", capacity, since, held)
            await shop.look("loop blocked", capacity, since, held, blocked=True)
        finally:
            await stack.aclose()
            await asyncio.gather(*tasks)
    await shop.look("served")
    async with _deadlocked(shop.engine, scope) as made:
        since = [(made, time.perf_counter())] * capacity
        await asyncio.sleep(_APART_SECONDS)
        await shop.look("deadlock", capacity, since, made)


async def _evening(shop: Scraped) -> None:
    """A new password: the engine is disposed of while a connection is out, and gets another pool."""
    async with shop.engine.connect():
        await shop.engine.dispose()
    async with shop.engine.connect(), shop.engine.connect():
        await shop.look("dispose()", 2)
    await shop.engine.dispose()


async def _night(nightly: Scraped) -> None:
    """A job whose engine has a NullPool."""
    async with nightly.engine.connect(), nightly.engine.connect(), nightly.engine.connect():
        await nightly.look("NullPool", 3)


def judge_metrics(run: Recording) -> Finding | None:
    """What is wrong with what the scrapes told."""
    looks: list[Look] = run.result["looks"]
    if run.result["tampered"]:
        return Finding("changes-the-pool", "The pool came back with other settings than it had.")
    if len(run.pools) > 2:
        return Finding("needs-a-connection", "Your code made an engine of its own.")
    took = next((one for one in looks if one.took), None)
    if took is not None or any("MissingGreenlet" in one.outcome for one in run.requests):
        when = f" {took.when}" if took is not None else ""
        return Finding(
            "needs-a-connection", f"The scrape{when} asked for a connection of the pool."
        )
    if (finding := _waits_for_the_loop(run, looks)) is not None:
        return finding
    hung = next((one for one in looks if one.hung), None)
    if hung is not None:
        return Finding("never-ends", f"The scrape {hung.when} had not ended after a second.")
    no_counter = [
        one for one in looks if one.raised == "AttributeError" and one.moment == "NullPool"
    ]
    if run.announced - run.completed > len(no_counter):
        return None
    told = [one.told for one in looks if one.told is not None and one.moment != "NullPool"]
    if len(told) > 1 and all(one == told[0] for one in told):
        return Finding("history-is-not-now", "Each scrape told the same as the first.")
    for judge in (_wrong_waiting, _wrong_wait, _wrong_out):
        if (finding := judge(looks)) is not None:
            return finding
    if no_counter:
        return Finding(
            "every-pool-counts", "The scrape of an engine with a NullPool raised AttributeError."
        )
    return None


def _waits_for_the_loop(run: Recording, looks: list[Look]) -> Finding | None:
    wrong = [one for one in looks if any(map(one.is_wrong, _NUMBERS))]
    if any(one.on_the_loop for one in looks):
        return Finding(
            "asks-the-loop",
            "What your function returned is to be awaited, and a thread cannot do that.",
        )
    stood_still = [one for one in looks if one.moment == "loop blocked"]
    raised = [one for one in looks if one.raised]
    if any(one.hung for one in stood_still) or (raised and raised == stood_still):
        return Finding(
            "asks-the-loop", "The scrape while the event loop stood still had no answer."
        )
    if wrong and (wrong == stood_still or run.result["left_running"]):
        return Finding(
            "asks-the-loop",
            "While the event loop stood still, the scrape told how it had been before.",
        )
    return None


def _wrong_waiting(looks: list[Look]) -> Finding | None:
    wrong = [one for one in looks if one.is_wrong("waiting")]
    if not wrong:
        return None
    wrong_when = {one.moment for one in wrong}
    if "full" not in wrong_when and "served" in wrong_when:
        return _past(wrong[0], "waiting")
    return Finding("connections-are-no-queue", f"The number waiting was wrong {wrong[0].when}.")


def _wrong_wait(looks: list[Look]) -> Finding | None:
    wrong = [one for one in looks if one.is_wrong("oldest_wait")]
    if not wrong:
        return None
    told = {one.moment: one.told["oldest_wait"] for one in wrong if one.told is not None}
    if any(not -_TOLERANCE <= seconds < _NO_AGE for seconds in told.values()):
        return Finding(
            "another-clock", f"The oldest wait {wrong[0].when} was no age of anybody here."
        )
    first = wrong[0]
    if not first.waiting and first.held and abs(told[first.moment] - first.held) < _TOLERANCE:
        return Finding(
            "hold-is-not-wait",
            f"The oldest wait {wrong[0].when} was the age of a connection that is out.",
        )
    if all(one.youngest - _TOLERANCE <= told[one.moment] < one.oldest[0] for one in wrong):
        return Finding(
            "not-the-oldest",
            f"The oldest wait {wrong[0].when} was shorter than the first in line had waited.",
        )
    return _past(wrong[0], "oldest_wait")


def _wrong_out(looks: list[Look]) -> Finding | None:
    wrong = [one for one in looks if one.is_wrong("checked_out")]
    if not wrong:
        return None
    first = wrong[0]
    if first.moment == "dispose()":
        return Finding(
            "keeps-the-first-pool",
            f"Two connections were out after dispose(), and you told {_told(first)}.",
        )
    if first.moment == "NullPool":
        return Finding(
            "every-pool-counts",
            f"Three connections of an engine with a NullPool were out, and you told {_told(first)}.",
        )
    return _past(first, "checked_out")


def _told(look: Look) -> str:
    assert look.told is not None
    return f"{look.told['checked_out']:g}"


def _past(look: Look, number: str) -> Finding:
    return Finding("history-is-not-now", f"The number {number} was wrong {look.when}.")


def prove_metrics(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{len(run.result['looks'])} scrapes of a pool of {run.pools[0].capacity}, idle, full, blocked, deadlocked and"
        " disposed of, and of one without a limit: each told what was true, and none took a connection."
        for run in runs
    )


def plot_metrics(before: Recording, after: Recording) -> Picture:
    """What the scrapes of two functions told, on what was true."""
    from workshop.pictures import Told, scrapes_told

    def told(number: str, look: Look) -> Told:
        found = look.told[number] if look.told is not None else None
        return look.moment, look.true(number), found, found is None or look.is_wrong(number)

    return scrapes_told(
        {
            run.title: {
                number: [told(number, one) for one in run.result["looks"]] for number in _NUMBERS
            }
            for run in (before, after)
        }
    )


measure_the_queue = Task(
    "07",
    "measure_the_queue",
    "metrics",
    load=scrape_a_day,
    trials=(
        {"pool_size": 3, "max_overflow": 2, "queue": 7},
        {"pool_size": 1, "max_overflow": 1, "queue": 4},
    ),
    judge=judge_metrics,
    proof=prove_metrics,
    plot=plot_metrics,
    hints=(
        "SQLAlchemy counts connections, and nobody in line has one. What does the scope know of those who wait, and "
        "since when do they?",
        "Which of the three numbers are of this moment, and which are of something that has ended? And whose pool is "
        "it that the engine had when metrics was called?",
        "len(scope.waiters); time.perf_counter() - scope.waiters[0].since, or 0 where nobody waits; and "
        "scope.checked_out, which asks the engine's present pool, of whatever class it is.",
    ),
)


# wake_somebody

_SCRAPES = 6  # in each of the situations
_IMPATIENT = 0.05  # seconds; the pool_timeout that breaks deadlocks between two scrapes

_SITUATIONS = {
    "idle": _MOMENTS["idle"],
    "full": _MOMENTS["full"],
    "long report": "while a report had all connections and others waited, for less than they bear",
    "busy": "while all connections were out and each customer was served before the next scrape",
    "hiccup": "when customers had waited for too long in all scrapes but the first",
    "hiccup, over": "when customers had waited for too long, and were served long before the last scrape",
    "overloaded": "while the first in line had waited for too long in every scrape",
    "new deadlock": "when a deadlock had just been proved",
    "deadlock": "in a deadlock that was proved a moment before the first scrape",
    "old deadlock": "in a deadlock that was there long before the first scrape",
    "timeouts": "when a few customers had timed out behind a report, which was over",
    "timed-out deadlocks": "while pool_timeout broke one deadlock after another, each between two scrapes",
    "yesterday's deadlocks": "when nothing happened, after the deadlocks of yesterday",
    "restart": "when the process had been started anew, and nothing else happened",
    "restart, deadlock": "when the process had been started anew, and had another deadlock",
}

Scrapes = list[dict[str, Any]]


class Watched:
    """A pool and what its PoolCollector tells; customers keep their connection until they are let go."""

    def __init__(self, url: str, name: str, capacity: int, timeout: float | None) -> None:
        self.engine = create_async_engine(
            url,
            pool_size=capacity,
            max_overflow=0,
            pool_timeout=timeout,
            pool_logging_name=name,
        )
        self.scope = PoolScope(self.engine, "shop")
        self._collector = PoolCollector(self.scope)
        self._go = asyncio.Semaphore(0)
        self._present = self._inside = 0
        self._tasks: list[asyncio.Task[None]] = []

    def scrape(self) -> dict[str, Any]:
        """What a Prometheus would read at this moment, without the histograms' buckets."""
        numbers: dict[str, Any] = {}
        for metric in self._collector.collect():
            for sample in metric.samples:
                if "cause" not in sample.labels and "le" not in sample.labels:
                    numbers[sample.name.removeprefix("sqlalchemy_pool_")] = sample.value
                elif "cause" in sample.labels and sample.value:
                    numbers["verdict"] = sample.labels["cause"]
        return numbers

    def scrapes(self, count: int) -> Scrapes:
        """Several in a row."""
        return [self.scrape() for _ in range(count)]

    async def come(self, customers: int) -> None:
        """So many customers more; those for whom there is no connection are in line now."""
        self._present += customers
        self._tasks += [asyncio.create_task(self._stay()) for _ in range(customers)]
        await self._settled()

    async def leave(self, customers: int) -> None:
        """Let so many of them go, the first first; those in line take their places."""
        for _ in range(customers):
            self._go.release()
        wanted = self._present - customers
        await _until(lambda: self._present == wanted)
        await self._settled()

    async def waited(self, seconds: float) -> None:
        """Until the first in line has waited for longer than that."""
        await _until(lambda: self.scrape()["oldest_wait_seconds"] > seconds)

    async def close(self) -> None:
        """Let everybody go."""
        await self.leave(self._present)
        await asyncio.gather(*self._tasks)
        await self.engine.dispose()

    async def _stay(self) -> None:
        async with self.engine.connect():
            self._inside += 1
            await self._go.acquire()
            self._inside -= 1
        self._present -= 1

    async def _settled(self) -> None:
        await _until(lambda: self._inside + len(self.scope.waiters) == self._present)


async def _patient(url: str, capacity: int, queue: int, bearable: float) -> dict[str, Scrapes]:
    """What happens to a pool without a timeout."""
    found: dict[str, Scrapes] = {}
    shop = Watched(url, "shop", capacity, None)
    found["idle"] = shop.scrapes(_SCRAPES)
    await shop.come(capacity)
    found["full"] = shop.scrapes(_SCRAPES)
    await shop.come(queue)
    found["long report"] = shop.scrapes(_SCRAPES)
    await shop.leave(capacity + queue)
    found["busy"] = []
    for _ in range(_SCRAPES):
        await shop.come(capacity + queue)
        found["busy"].append(shop.scrape())
        await shop.leave(capacity + queue)
    found["hiccup"] = [shop.scrape()]
    await shop.come(capacity + queue)
    await shop.waited(1.5 * bearable)  # the mean of all six is too long as well
    found["hiccup"] += shop.scrapes(_SCRAPES - 1)
    found["hiccup, over"] = found["hiccup"][-2:]
    found["overloaded"] = [shop.scrape()]
    for _ in range(_SCRAPES - 1):
        await shop.come(1)
        await shop.leave(1)
        found["overloaded"].append(shop.scrape())
    await shop.leave(capacity + queue)
    found["hiccup, over"] += shop.scrapes(_SCRAPES - 2)
    found["new deadlock"] = [shop.scrape()]
    async with _deadlocked(shop.engine, shop.scope):
        found["deadlock"] = shop.scrapes(_SCRAPES)
        found["new deadlock"] += found["deadlock"][1:]
        await shop.waited(bearable)
        found["old deadlock"] = shop.scrapes(_SCRAPES)
    await shop.close()
    return found


async def _impatient(url: str, capacity: int) -> dict[str, Scrapes]:
    """What happens to a pool whose timeout is short, and to its process when that is started anew."""
    found: dict[str, Scrapes] = {}
    shop = Watched(url, "hasty", capacity, _IMPATIENT)
    found["timeouts"] = shop.scrapes(2)
    await shop.come(capacity)
    for one in await asyncio.gather(
        *(_take_one(shop.engine) for _ in range(3)), return_exceptions=True
    ):
        assert isinstance(one, PoolTimeoutError), one
    await shop.leave(capacity)
    found["timeouts"] += shop.scrapes(_SCRAPES - 2)
    found["timed-out deadlocks"] = [shop.scrape()]
    for _ in range(_SCRAPES - 1):
        await _broken_deadlock(shop)
        found["timed-out deadlocks"].append(shop.scrape())
    found["yesterday's deadlocks"] = shop.scrapes(_SCRAPES)
    await shop.close()
    anew = Watched(url, "anew", capacity, _IMPATIENT)
    calm = anew.scrapes(_SCRAPES // 2)
    found["restart"] = found["yesterday's deadlocks"][: _SCRAPES // 2] + calm
    await _broken_deadlock(anew)
    found["restart, deadlock"] = [*found["yesterday's deadlocks"][:2], *calm[:2], *anew.scrapes(2)]
    await anew.close()
    return found


async def _broken_deadlock(shop: Watched) -> None:
    """A deadlock that the timeout breaks."""
    capacity = shop.scope.capacity or 0
    meet, before = asyncio.Barrier(capacity), shop.scope.deadlock_count
    ended = await asyncio.gather(
        *(_hold_and_ask(shop.engine, meet) for _ in range(capacity)), return_exceptions=True
    )
    assert any(isinstance(one, PoolTimeoutError) for one in ended), ended
    assert shop.scope.deadlock_count == before + 1


def needs_somebody(scrapes: Scrapes, bearable: float) -> bool:
    """What the exercise asks for: a deadlock since the first scrape or now, or too long a wait in all of them."""
    proved = any(
        after["deadlocks_total"] > before["deadlocks_total"] for before, after in pairwise(scrapes)
    )
    late = all(one["oldest_wait_seconds"] > bearable for one in scrapes)
    return proved or late or scrapes[-1]["verdict"] == "deadlock"


async def ask_whether_to_page(
    should_page: Callable[..., Any], url: str, *, capacity: int, queue: int, bearable: float
) -> dict[str, Any]:
    """Show the learner's function the scrapes of pools to which all kinds of things happen; what it said."""
    patient = await _patient(url, capacity, queue, bearable)
    scrapes, paged = patient | await _impatient(url, capacity), dict[str, bool]()

    async def ask(name: str, number: int) -> None:
        paged[name] = bool(should_page([dict(one) for one in scrapes[name]], bearable))

    async with evidence() as noted:
        for name in _SITUATIONS:
            await storm(partial(ask, name), 1)
    wanted = {name: needs_somebody(scrapes[name], bearable) for name in _SITUATIONS}
    return dataclasses.asdict(noted) | {"paged": paged, "wanted": wanted}


_FALSE_ALARMS = {
    "idle": "always-the-same",
    "full": "full-is-no-fault",
    "busy": "queue-is-no-outage",
    "long report": "still-is-not-stuck",
    "timeouts": "timeout-is-no-deadlock",
    "hiccup": "one-scrape-is-no-outage",
    "hiccup, over": "one-scrape-is-no-outage",
    "yesterday's deadlocks": "counter-is-no-gauge",
    "restart": "counter-starts-anew",
}


def judge_pages(run: Recording) -> Finding | None:
    """What is wrong with when somebody was woken."""
    paged, wanted = run.result["paged"], run.result["wanted"]
    if run.completed < run.announced or paged == wanted:
        return None
    if len(set(paged.values())) == 1:
        always = "each time" if paged["idle"] else "not once"
        return Finding("always-the-same", f"Of {len(paged)} situations you paged for {always}.")
    for name, misconception in _FALSE_ALARMS.items():
        if paged[name] and not wanted[name]:
            return Finding(misconception, f"You paged {_SITUATIONS[name]}.")
    missed = {name for name in paged if wanted[name] and not paged[name]}
    misconception, name = _missed(missed)
    return Finding(misconception, f"You did not page {_SITUATIONS[name]}.")


def _missed(missed: set[str]) -> tuple[str, str]:
    """The wrong idea of somebody who did not page in these situations, and the one that shows it best."""
    if {"new deadlock", "old deadlock"} <= missed and "timed-out deadlocks" not in missed:
        return "timeout-is-no-deadlock", "old deadlock"
    if "overloaded" in missed:
        return "only-the-cause", "overloaded"
    if "old deadlock" in missed:
        return "history-is-not-now", "old deadlock"
    if "new deadlock" in missed:
        return "deadlock-needs-no-slack", "new deadlock"
    if "deadlock" in missed:
        return "counter-is-no-gauge", "deadlock"
    if "timed-out deadlocks" in missed:
        return "between-two-scrapes", "timed-out deadlocks"
    return "counter-starts-anew", "restart, deadlock"


def prove_pages(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"A pool of {run.pools[0].capacity} in {len(run.result['wanted'])} situations: paged for the"
        f" {sum(run.result['wanted'].values())} that need somebody, silent in the others."
        for run in runs
    )


def plot_pages(before: Recording, after: Recording) -> Picture:
    """In which situations two functions woke somebody."""
    from workshop.pictures import answers

    def as_words(paged: dict[str, bool]) -> dict[str, str]:
        return {name: "paged" if paged[name] else "silent" for name in _SITUATIONS}

    return answers(
        as_words(after.result["wanted"]),
        {run.title: as_words(run.result["paged"]) for run in (before, after)},
    )


wake_somebody = Task(
    "07",
    "wake_somebody",
    "should_page",
    load=ask_whether_to_page,
    trials=(
        {"capacity": 5, "queue": 12, "bearable": 0.3},
        {"capacity": 2, "queue": 7, "bearable": 0.1},
    ),
    judge=judge_pages,
    proof=prove_pages,
    plot=plot_pages,
    hints=(
        "Two reasons are worth waking somebody for, and each has a line of its own: a deadlock, and customers who "
        "wait. Which of them needs slack, and which does not?",
        "What is there at a scrape, a gauge tells (look at the last one); what came and went between two scrapes, only "
        "a counter tells, by its rise from one scrape to the next. How does it look when the process starts anew?",
        'any(after > before for before, after in pairwise(…)) over deadlocks_total; or the last verdict is "deadlock"; '
        "or all(…) of the oldest waits are longer than bearable.",
    ),
)
