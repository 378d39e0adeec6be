"""The checks of exercise 03: an alarm that names culprits, a job that lets go, and a page that keeps too much."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import random
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from sqlalchemy import event, func, inspect, select
from sqlalchemy.dialects.postgresql.asyncpg import AsyncAdapt_asyncpg_ss_cursor
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
)
from sqlalchemy.orm import Session, joinedload, selectinload

from ormscope import SessionCensus
from ormscope.census import Keeper, Kind
from ormscope.lab import Recording, storm
from workshop.checks.evidence import evidence
from workshop.checks.lent import engine_of
from workshop.checks.memory_rules import SAMPLED_SECONDS, wrong_use_of_memory
from workshop.checks.task import Finding, Task
from workshop.shop import AuditEntry, Base, Product, Sale

if TYPE_CHECKING:
    from ormscope.lab.picture import Picture

CONTAINER = 100  # MiB; the functions as given take 70


# name_the_culprit

BANANAS = 1082185
Sessions = async_sessionmaker[AsyncSession]


@asynccontextmanager
async def _variable(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        kept = (await session.scalars(select(Product).order_by(Product.sku).limit(count))).all()
        yield
        del kept


@asynccontextmanager
async def _modified(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        for sale in await session.scalars(select(Sale).order_by(Sale.id).limit(count)):
            sale.quantity += 1
        del sale
        yield


@asynccontextmanager
async def _new(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        session.add_all(AuditEntry(action=f"looked at {number}") for number in range(count))
        yield


@asynccontextmanager
async def _collection(sessions: Sessions, count: int) -> AsyncIterator[None]:
    first = select(Sale.id).where(Sale.sku == BANANAS).order_by(Sale.id).limit(count)
    some = selectinload(Product.sales.and_(Sale.id.in_(first)))
    async with sessions() as session:
        bananas = await session.scalar(select(Product).where(Product.sku == BANANAS).options(some))
        yield
        del bananas


@asynccontextmanager
async def _cycle(sessions: Sessions, count: int) -> AsyncIterator[None]:
    first = select(Sale.id).where(Sale.sku == BANANAS).order_by(Sale.id).limit(count)
    some = selectinload(Product.sales.and_(Sale.id.in_(first))).options(joinedload(Sale.product))
    async with sessions() as session:
        await session.scalar(select(Product).where(Product.sku == BANANAS).options(some))
        yield


@asynccontextmanager
async def _result(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        unread = await session.scalars(select(Sale).order_by(Sale.id).limit(count))
        next(iter(unread))
        yield
        unread.close()


async def _fail(session: AsyncSession, count: int) -> None:
    sales = (await session.scalars(select(Sale).order_by(Sale.id).limit(count))).all()
    raise LookupError(f"no line after number {len(sales)}")


@asynccontextmanager
async def _traceback(sessions: Sessions, count: int) -> AsyncIterator[None]:
    errors = []
    async with sessions() as session:
        try:
            await _fail(session, count)
        except LookupError as error:
            errors.append(error)
        yield
        errors.clear()


@asynccontextmanager
async def _scoped_registry(sessions: Sessions, count: int, each: int = 1) -> AsyncIterator[None]:
    scoped = async_scoped_session(sessions, scopefunc=asyncio.current_task)

    async def request() -> None:
        scoped().add_all(AuditEntry(action="looked") for _ in range(each))

    await asyncio.gather(*(asyncio.create_task(request()) for _ in range(count)))
    yield
    for session in scoped.registry.registry.values():
        await session.close()
    scoped.registry.registry.clear()


def _idle_sessions(sessions: Sessions, count: int) -> AbstractAsyncContextManager[None]:
    return _scoped_registry(sessions, count, each=0)


@asynccontextmanager
async def _nothing(sessions: Sessions, count: int) -> AsyncIterator[None]:
    async with sessions() as session:
        await session.scalars(select(Sale).order_by(Sale.id).limit(count))
    yield


KEEPERS: dict[str, Callable[[Sessions, int], AbstractAsyncContextManager[None]]] = {
    "variable": _variable,
    "modified": _modified,
    "new": _new,
    "collection": _collection,
    "cycle": _cycle,
    "result": _result,
    "traceback": _traceback,
    "scoped registry": _scoped_registry,
    "idle sessions": _idle_sessions,
    "nothing": _nothing,
}
NOTHING_ALIVE = ("idle sessions", "nothing")
# How many objects the culprit keeps, and each of the others: two of these together are more.
MOST, FEWER = range(70, 100), range(50, 65)


async def ask_about_situations(
    culprit: Callable[[SessionCensus], Any],
    url: str,
    *,
    situations: Sequence[Sequence[str]],
    seed: int,
) -> dict[str, Any]:
    """Make the situations, each of whose first keeper keeps most, and ask the alarm about a census of each."""
    engine, chance = engine_of(url, capacity=5), random.Random(seed)
    censuses: list[SessionCensus] = []
    answers: dict[int, Any] = {}
    gc.disable()  # it would undo the cycles
    for names in situations:
        async with AsyncExitStack() as kept:
            for number, name in enumerate(names):
                count = chance.choice(FEWER if number else MOST)
                keep = KEEPERS[name](async_sessionmaker(engine), count)
                await kept.enter_async_context(keep)
            censuses.append(SessionCensus())
        gc.collect()
    gc.enable()

    async def ask(number: int) -> None:
        answers[number] = culprit(censuses[number])

    async with evidence(engine) as noted:
        await storm(ask, len(censuses))
    await engine.dispose()
    asked = [
        {
            "kept_by": names,
            "wanted": None if names[0] in NOTHING_ALIVE else names[0],
            "said": _plain(answers[number]),
            "classes": sorted(census.alive),
            "sessions": census.sessions,
            "largest": [(one.count, one.name) for one in census.keepers[:1]],
        }
        for number, (names, census) in enumerate(zip(situations, censuses, strict=True))
        if number in answers
    ]
    return dataclasses.asdict(noted) | {"asked": asked}


def _plain(said: Any) -> Any:
    """An answer as it can be sent and shown: itself where it is a word, a number or None, else its class."""
    if isinstance(said, str):
        return str(said)
    return said if said is None or type(said) is int else type(said)


def _shown(said: Any) -> str:
    return f"an object of the class {said.__name__}" if isinstance(said, type) else repr(said)


def judge_alarm(run: Recording) -> Finding | None:
    """What is wrong with what the alarm said."""
    asked = run.result["asked"]
    wrong = [one for one in asked if one["said"] != one["wanted"]]
    if not wrong:
        return None
    first = next((one for one in wrong if one["wanted"] is not None), wrong[0])
    said = _shown(first["said"])
    if len(asked) == run.announced and len({one["said"] for one in asked}) == 1:
        return Finding(
            "one-culprit-for-all", f"Your function said {said} in all {len(asked)} situations."
        )
    seen = "No object was alive"
    if first["wanted"] is not None:
        ((count, name),) = first["largest"]
        seen = f"The most objects, {count} {name}, were kept by {first['wanted']!r}"
    evidence = f"{seen}, and your function said {said}."
    spoke = any(one["said"] is not None for one in wrong)
    if spoke and all(_counts_sessions(one) for one in wrong):
        return Finding("counts-sessions", f"{evidence} census.sessions was {first['sessions']}.")
    if first["wanted"] is None:
        return Finding("always-a-culprit", evidence)
    if all(one["said"] in one["classes"] for one in wrong if one["wanted"] is not None):
        return Finding("blames-the-class", evidence)
    if any(one["said"] is not None and one["said"] not in get_args(Kind) for one in wrong):
        return Finding("not-a-kind", evidence)
    return Finding("not-the-largest", evidence)


def _counts_sessions(one: dict[str, Any]) -> bool:
    if one["sessions"] and one["said"] == "scoped registry":
        return True
    return bool(one["said"] == one["sessions"] or not (one["said"] or one["sessions"]))


def prove_alarm(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    said = [one["said"] for run in runs for one in run.result["asked"]]
    return (
        f"{len(said)} censuses, {len({*said} - {None})} different culprits, each named;"
        f" {said.count(None)} times nothing was alive, and no alarm was raised."
    )


def plot_alarm(before: Recording, after: Recording) -> Picture:
    """Whom two alarms named in the same situations."""
    from workshop.pictures import answers

    def by_situation(run: Recording, key: str) -> dict[str, str]:
        return {", ".join(one["kept_by"]): str(one[key]) for one in run.result["asked"]}

    return answers(
        by_situation(after, "wanted"),
        {run.title: by_situation(run, "said") for run in (before, after)},
    )


name_the_culprit = Task(
    "03",
    "name_the_culprit",
    "culprit",
    load=ask_about_situations,
    trials=(
        {
            "seed": 3,
            "situations": (
                ("variable", "modified", "collection"),
                ("modified", "new"),
                ("collection", "variable"),
                ("cycle", "result"),
                ("idle sessions",),
                ("nothing",),
            ),
        },
        {
            "seed": 5,
            "situations": (
                ("variable", "modified", "traceback"),
                ("new", "scoped registry"),
                ("result", "collection"),
                ("scoped registry", "modified"),
                ("nothing",),
                ("traceback", "cycle"),
            ),
        },
    ),
    judge=judge_alarm,
    proof=prove_alarm,
    plot=plot_alarm,
    hints=(
        "print(census) is for people. What it prints comes from attributes: "
        "census.alive counts objects by class; which attribute tells who keeps them?",
        "census.keepers is a list of Keeper, each with count, name, kind and where. "
        "What does the list look like when nothing is alive?",
        "The largest keeper comes first: return census.keepers[0].kind, and None where the list is empty.",
    ),
)


# let_go

MOST_OBJECTS, MOST_MEBIBYTES = 5_000, 14
GROWTH = 3.5  # MiB more for the last call; right answers stay below 3, and two lists of bare decimals take 4.5


async def add_up(
    revenue_by_store: Callable[..., Any], url: str, *, days: Sequence[datetime]
) -> dict[str, Any]:
    """Let the job run since each of these days, the last of them with most lines; what it returned and kept."""
    engine = engine_of(url, capacity=5)
    returned: dict[datetime, Any] = {}
    most: Counter[str] = Counter()
    detached: weakref.WeakSet[Base] = weakref.WeakSet()
    fetch_all: Callable[[Any], Any] = AsyncAdapt_asyncpg_ss_cursor.fetchall

    def note_detached(session: Session, instance: Base) -> None:
        detached.add(instance)
        most["detached"] = max(most["detached"], len(detached))

    def note_fetched(cursor: Any) -> Any:
        rows = fetch_all(cursor)
        most["fetched"] = max(most["fetched"], len(rows))
        return rows

    async def work(since: datetime, number: int) -> None:
        returned[since] = await revenue_by_store(async_sessionmaker(engine), since)

    event.listen(Session, "persistent_to_detached", note_detached)
    # A server-side cursor that is read in one piece: SQLAlchemy has no event for it.
    AsyncAdapt_asyncpg_ss_cursor.fetchall = note_fetched  # type: ignore[method-assign]
    async with evidence(engine) as noted:
        for since in days:
            await storm(partial(work, since), 1)
            await asyncio.sleep(SAMPLED_SECONDS)
    event.remove(Session, "persistent_to_detached", note_detached)
    await engine.dispose()
    async with engine.connect() as connection:
        compared = [await compare(connection, since, returned.get(since)) for since in days]
    return dataclasses.asdict(noted) | {
        "detached": most["detached"],
        "fetched": most["fetched"],
        "sums": compared,
    }


async def compare(connection: AsyncConnection, since: datetime, sums: Any) -> dict[str, Any]:
    """Compare the sums that the job returned with those of the database."""
    total = select(Sale.store_id, func.sum(Sale.sales_value), func.count())
    found = await connection.execute(total.where(Sale.sold_at >= since).group_by(Sale.store_id))
    stores = found.all()
    facts = {
        "returned": type(sums).__name__,
        "lines": sum(lines for _, _, lines in stores),
        "stores": len(stores),
    }
    if not isinstance(sums, Mapping):
        return facts | {"is_mapping": False}
    exact = {store: one for store, one in sums.items() if isinstance(one, Decimal | int)}
    return facts | {
        "is_mapping": True,
        "floats": sum(isinstance(one, float) for one in sums.values()),
        "right": sum(exact.get(store) == total for store, total, _ in stores),
        "more": len(sums.keys() - {store for store, _, _ in stores}),
    }


def judge_sums(run: Recording) -> Finding | None:
    """What is wrong with how the job added up."""
    seen = run.result
    finding = wrong_use_of_memory(run, MOST_OBJECTS, MOST_MEBIBYTES, GROWTH)
    if finding is not None and seen is not None:
        too_many = finding.misconception in (
            "loads-everything",
            "keeps-everything-in-another-shape",
        )
        if too_many and seen["fetched"] > MOST_OBJECTS:
            return Finding(
                "stream-without-yield-per",
                f"A stream was read in one piece: more than {MOST_OBJECTS:,} rows at once.",
            )
        if finding.misconception == "keeps-everything-in-another-shape" and (
            seen["detached"] > MOST_OBJECTS
        ):
            return Finding(
                "detached-is-freed",
                f"More than {MOST_OBJECTS:,} objects belonged to no session any more, and were still alive.",
            )
    if finding is not None:
        return finding
    if run.completed < run.announced:
        return None
    if seen["left_out"]:
        return Finding(
            "leaves-it-checked-out", "The connection was still checked out when the job had ended."
        )
    for one in seen["sums"]:
        if not one["is_mapping"]:
            return Finding(
                "returns-something-else", f"Your function returned {one['returned']}, not a dict."
            )
        if one["floats"]:
            return Finding("floats-lose-cents", f"{one['floats']} of the sums are floats.")
        if one["right"] < one["stores"] or one["more"]:
            more = f", and there are {one['more']} keys more" if one["more"] else ""
            return Finding(
                "returns-something-else",
                f"{one['right']} of {one['stores']} stores have the right sum{more}.",
            )
    return None


def prove_sums(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{few['lines']:,} and {many['lines']:,} lines, all {few['stores']} and {many['stores']} sums right;"
        f" never more than {MOST_OBJECTS:,} objects alive, and no more memory for more lines."
        for few, many in (run.result["sums"] for run in runs)
    )


let_go = Task(
    "03",
    "let_go",
    "revenue_by_store",
    load=add_up,
    trials=(
        {"days": (datetime(2017, 2, 25), datetime(2017, 2, 17))},
        {"days": (datetime(2017, 2, 26), datetime(2017, 2, 19))},
    ),
    judge=judge_sums,
    proof=prove_sums,
    curves=("memory", "objects"),
    memory_limit=CONTAINER,
    hints=(
        "Two things keep every line: which are they? And what of a line is needed once its value has been added?",
        "stream_scalars() hands over batches, if somebody says how large: "
        "execution_options(yield_per=1000). A batch whose sums are taken may go; nothing has to be called for that.",
        "Go through `async for page in (await session.stream_scalars(statement)).partitions()`, add each line's value "
        "to a dictionary of sums that begin at Decimal(0), and keep no line. Or let the database add: "
        "select(Sale.store_id, func.sum(Sale.sales_value)) with group_by(Sale.store_id).",
    ),
)


# forget_the_collection

PAGES = 8
SHOWN = ("sku", "title", "unit_price")  # what the page reads of a product


async def show_pages(
    top_sellers: Callable[..., Any], url: str, *, first: int, each: int
) -> dict[str, Any]:
    """Let pages ask for well-sold products, keep what they get, and count what is alive then."""
    engine = engine_of(url, capacity=PAGES)
    lines = func.count(Sale.id).label("lines")
    counted = select(Product.sku, lines).join(Sale).group_by(Product.sku)
    async with engine.connect() as connection:
        best = counted.order_by(lines.desc(), Product.sku).offset(first).limit(PAGES * each)
        sold = {row.sku: row.lines for row in await connection.execute(best)}
    skus = [list(sold)[number::PAGES] for number in range(PAGES)]
    kept: dict[int, Any] = {}

    async def show(number: int) -> None:
        kept[number] = await top_sellers(async_sessionmaker(engine), list(skus[number]))

    async with evidence(engine) as noted:
        await storm(show, PAGES)
    await engine.dispose()
    await asyncio.sleep(0.3)  # for the curve: this is how much the pages keep
    pages = [(skus[number], _pairs(returned)) for number, returned in kept.items()]
    gc.collect()
    census = SessionCensus()
    left = Counter[tuple[str, str]]()
    for one in census.keepers:
        if one.name != "Product":
            left[one.name, _kept_by(one)] += one.count
    pairs = [pair for _, shown in pages for pair in shown]
    more = census.alive["Product"] - len({id(product) for product, _ in pairs})
    if more > 0 and len(pairs) == len(sold):
        left["Product", ""] += more
    numbers = [count for _, count in pairs]
    return dataclasses.asdict(noted) | {
        "left": left.most_common(1),
        "pages": sum(
            sorted(asked) == sorted(_sku(one) for one, _ in shown) for asked, shown in pages
        ),
        "unreadable": sum(any(name not in vars(one) for name in SHOWN) for one, _ in pairs),
        "right": sum(sold.get(_sku(product)) == count for product, count in pairs),
        "zeros": sum(count == 0 for count in numbers),
        "products": len(sold),
        "lines": sum(sold.values()),
    }


def _kept_by(keeper: Keeper) -> str:
    """The kind of a keeper, in the terms of the page."""
    if keeper.kind == "variable" and show_pages.__name__ in keeper.where:
        return "the products"
    return keeper.kind


def _pairs(returned: Any) -> list[tuple[Product, Any]]:
    """The pairs of a product and a number that a page was given, in whatever they came."""
    items = returned.items() if isinstance(returned, Mapping) else returned
    if not isinstance(items, Iterable):
        return []
    return [
        (pair[0], pair[1])
        for pair in items
        if isinstance(pair, Sequence) and len(pair) == 2 and isinstance(pair[0], Product)
    ]


def _sku(product: Product) -> int:
    """A product's number, also when it can no longer be read; 0 where it never had one."""
    identity = inspect(product).identity
    return int(identity[0]) if identity else vars(product).get("sku", 0)


def judge_pages(run: Recording) -> Finding | None:
    """What is wrong with what the pages were given, and with what they keep by it."""
    seen = run.result
    if seen is None:
        return wrong_use_of_memory(run, MOST_OBJECTS, CONTAINER)
    if run.completed < run.announced:
        return None
    if seen["left"]:
        ((name, kind), count) = seen["left"][0]
        evidence = f"{count:,} {name} are alive beside what the pages have asked for"
        if seen["collections"] >= run.announced:
            return Finding(
                "collects-garbage", f"{evidence}, although your code ran the garbage collector."
            )
        if kind in ("collection", "the products"):
            return Finding("collection-stays", f"{evidence}, kept by their products.")
        return Finding("loads-everything", f"{evidence}{kind and f', kept by: {kind}'}.")
    if seen["left_out"]:
        return Finding(
            "leaves-it-checked-out",
            "Connections were still checked out when all calls had ended.",
        )
    if seen["pages"] < run.announced:
        return Finding(
            "returns-something-else",
            f"{seen['pages']} of {run.announced} pages were given a pair for each product that they asked for.",
        )
    if seen["unreadable"]:
        return Finding(
            "expires-the-whole-object",
            f"{seen['unreadable']} of {seen['products']} products have no title or price that the page could show.",
        )
    if seen["zeros"]:
        return Finding(
            "counts-what-is-loaded",
            f"{seen['zeros']} of {seen['products']} products are said to be sold in 0 lines.",
        )
    if seen["right"] < seen["products"]:
        return Finding(
            "returns-something-else",
            f"{seen['right']} of {seen['products']} numbers of lines are right.",
        )
    return None


def prove_pages(runs: list[Recording]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.announced} pages, {run.result['products']} products with {run.result['lines']:,} lines counted right;"
        f" {run.result['products']} products and 0 sales alive afterwards."
        for run in runs
    )


forget_the_collection = Task(
    "03",
    "forget_the_collection",
    "top_sellers",
    load=show_pages,
    trials=({"first": 4, "each": 3}, {"first": 30, "each": 2}),
    judge=judge_pages,
    proof=prove_pages,
    curves=("memory",),  # of the objects it would show those in sessions, and these are detached
    memory_limit=CONTAINER,
    hints=(
        "Only products are returned, and the session is closed. By which attribute does each product hold its sales?",
        "The page wants a number. Who else could count, so that no Sale is ever made? "
        "Or what could make a product forget its collection, and nothing else?",
        "select(Product, func.count(Sale.id)).join(Product.sales).group_by(Product.sku) brings both at once. "
        'Where a collection must be loaded, session.expire(product, ["sales"]) lets go of it.',
    ),
)
