"""SessionCensus on the real server: each culprit is named, alone, and without it the objects go."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import gc
import os
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import greenlet
import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import (
    Session,
    joinedload,
    make_transient_to_detached,
    scoped_session,
    selectinload,
    sessionmaker,
)

from ormscope import SessionCensus
from ormscope.frozen import frozen_holders
from workshop.database import Server
from workshop.shop import AuditEntry, Product, Sale

ROWS = 500
BANANAS = 1082185
SALES = select(Sale).order_by(Sale.id).limit(ROWS)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Objects go when their last reference goes, and not by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def run(server: Server) -> Callable[[Callable[[AsyncSession], Coroutine[Any, Any, None]]], None]:
    """Run a test's coroutine with a session, and leave nothing."""

    def run(main: Callable[[AsyncSession], Coroutine[Any, Any, None]]) -> None:
        async def with_session() -> None:
            engine = create_async_engine(server.url)
            async with AsyncSession(engine) as session:
                await main(session)
            await engine.dispose()

        asyncio.run(with_session())

    return run


def culprits(session: Any = None) -> list[tuple[int, str, str]]:
    return [(keeper.count, keeper.name, keeper.kind) for keeper in SessionCensus(session).keepers]


def test_a_clean_stream_leaves_nothing(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        result = await session.stream_scalars(SALES.execution_options(yield_per=100))
        async for part in result.partitions():
            census = SessionCensus(session)
            assert census.alive == {"Sale": len(part)}
        del part
        assert str(SessionCensus(session)) == "0 objects alive"

    run(main)


def test_a_list(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        kept = (await session.scalars(SALES)).all()
        census = SessionCensus(session)
        assert census.alive == {"Sale": ROWS}
        assert culprits(session) == [(ROWS, "Sale", "variable")]
        assert "500 Sale: variable kept (a list) in main, line " in str(census)
        del kept
        assert not SessionCensus(session).alive

    run(main)


def test_a_list_within_an_object_that_a_function_further_up_holds(run: Any) -> None:
    class Report:
        def __init__(self) -> None:
            self.lines: dict[str, list[Any]] = {"sold": []}

    async def fill(session: AsyncSession, report: Report) -> None:
        report.lines["sold"] += (await session.scalars(SALES)).all()

    async def main(session: AsyncSession) -> None:
        mine = Report()
        await fill(session, mine)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "variable")
        assert keeper.where.startswith("mine in main, line ")
        del mine
        assert not SessionCensus(session).alive

    run(main)


def test_a_variable_of_a_task_that_sleeps(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        go_on = asyncio.Event()

        async def hold() -> None:
            mine = (await session.scalars(SALES)).all()
            await go_on.wait()
            del mine

        task = asyncio.create_task(hold())
        while not SessionCensus(session).alive:
            await asyncio.sleep(0.02)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "variable")
        assert keeper.where.startswith("mine (a list) in hold, line ")
        go_on.set()
        await task
        assert not SessionCensus(session).alive

    run(main)


def test_modified_objects(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        async for sale in await session.stream_scalars(SALES.execution_options(yield_per=100)):
            sale.quantity += 0
            sale.quantity = sale.quantity + 1
        del sale
        assert culprits(session) == [(ROWS, "Sale", "modified")]
        await session.flush()
        assert not SessionCensus(session).alive
        await session.rollback()

    run(main)


def test_new_objects(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        session.add_all(AuditEntry(action="looked") for _ in range(ROWS))
        assert culprits(session) == [(ROWS, "AuditEntry", "new")]
        await session.flush()
        assert not SessionCensus(session).alive

    run(main)


def test_deleted_objects(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        session.add_all(AuditEntry(action="looked") for _ in range(10))
        await session.flush()
        for entry in await session.scalars(select(AuditEntry).limit(10)):
            await session.delete(entry)
        del entry
        assert culprits(session) == [(10, "AuditEntry", "deleted")]
        await session.flush()
        assert not SessionCensus(session).alive
        await session.rollback()

    run(main)


def test_a_loaded_collection_on_a_living_parent(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        load = select(Product).where(Product.sku == BANANAS).options(selectinload(Product.sales))
        bananas = await session.scalar(load)
        assert bananas is not None
        sales = len(bananas.sales)
        census = SessionCensus(session)
        assert {(keeper.name, keeper.kind) for keeper in census.keepers} == {
            ("Product", "variable"),
            ("Sale", "collection"),
        }
        (held,) = (keeper for keeper in census.keepers if keeper.name == "Sale")
        assert held.count == sales
        assert held.where.startswith(
            "Product.sales, whose owner is kept by variable bananas in main, line "
        )
        del bananas
        assert not SessionCensus(session).alive

    run(main)


def test_a_cycle(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        load = (
            select(Product)
            .where(Product.sku == BANANAS)
            .options(selectinload(Product.sales).options(joinedload(Sale.product)))
        )
        assert (await session.scalar(load)) is not None
        census = SessionCensus(session)
        assert census.alive["Sale"] > ROWS
        assert {keeper.kind for keeper in census.keepers} == {"cycle"}
        gc.collect()
        assert not SessionCensus(session).alive

    run(main)


def test_a_result_that_was_not_read_to_its_end(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        unread = await session.scalars(SALES)
        next(iter(unread))
        assert {kind for _, _, kind in culprits(session)} == {"result"}
        assert SessionCensus(session).alive == {"Sale": ROWS}
        unread.close()
        del unread
        assert not SessionCensus(session).alive

    run(main)


def test_a_kept_traceback(run: Any) -> None:
    async def fail(session: AsyncSession) -> None:
        sales = (await session.scalars(SALES)).all()
        raise LookupError(f"{len(sales)} and not one more")

    async def main(session: AsyncSession) -> None:
        errors = []
        try:
            await fail(session)
        except LookupError as error:
            errors.append(error)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "traceback")
        assert "fail, line" in keeper.where
        errors.clear()
        assert not SessionCensus(session).alive

    run(main)


def test_a_scoped_session_that_nobody_removed(server: Server) -> None:
    async def main() -> None:
        engine = create_async_engine(server.url)
        scoped = async_scoped_session(async_sessionmaker(engine), scopefunc=asyncio.current_task)

        async def request() -> None:
            for entry in range(10):
                scoped.add(AuditEntry(action=f"looked {entry}"))

        tasks = [asyncio.create_task(request()) for _ in range(5)]
        await asyncio.gather(*tasks)
        census = SessionCensus()
        assert census.sessions == 5
        assert [(keeper.count, keeper.kind) for keeper in census.keepers] == [
            (50, "scoped registry")
        ]
        assert "5 scoped sessions kept for tasks that have ended" in str(census)
        for session in scoped.registry.registry.values():
            await session.close()
        scoped.registry.registry.clear()
        census = SessionCensus()
        assert (census.alive, census.sessions) == ({}, 0)
        await engine.dispose()

    asyncio.run(main())


async def sold(session: AsyncSession) -> AsyncIterator[list[Sale]]:
    page = list(await session.scalars(SALES))
    yield page


def test_a_generator_that_was_left_half_read(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        pages = sold(session)
        await anext(pages)
        (keeper,) = SessionCensus(session).keepers
        assert (keeper.count, keeper.kind) == (ROWS, "variable")
        assert keeper.where.startswith("page (a list) in sold, line ")
        await pages.aclose()
        assert not SessionCensus(session).alive

    run(main)


def test_a_census_keeps_nothing_alive(run: Any) -> None:
    async def main(session: AsyncSession) -> None:
        kept = (await session.scalars(SALES)).all()
        census = [SessionCensus(session) for _ in range(2)]
        del kept
        assert census[0].alive == {"Sale": ROWS}
        assert not SessionCensus(session).alive

    run(main)


CELLS = (
    "import gc; gc.disable(); from ormscope import SessionCensus; from workshop.shop import Product",
    "[Product(sku=n) for n in range(5)]",
    "print('CENSUS', [(k.count, k.kind) for k in SessionCensus().keepers])",
    "kept = [Product(sku=n) for n in range(7)]",
    "%xdel _2",
    "print('CENSUS', [(k.count, k.kind, k.where) for k in SessionCensus().keepers])",
)
NOTEBOOK = f"""
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
for cell in {CELLS!r}:
    shell.run_cell(cell, store_history=True)
"""


def test_jupyters_out() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "IPYTHONDIR": os.devnull, "PYTHONWARNINGS": "ignore"},
    )
    shown = [line for line in done.stdout.splitlines() if line.startswith("CENSUS")]
    assert shown == [
        "CENSUS [(5, 'output')]",
        "CENSUS [(7, 'variable', 'kept (a list) of the notebook')]",
    ], done.stdout + done.stderr


def products(count: int = 3) -> list[Product]:
    return [Product(sku=number) for number in range(count)]


def around_a_circle() -> Product:
    """A product whose sale refers to it again."""
    product = Product(sku=1)
    product.sales = [Sale(id=1)]
    return product


def said() -> list[tuple[str, str]]:
    """What the census names now, each once."""
    return sorted({(keeper.kind, keeper.where) for keeper in SessionCensus().keepers})


def test_a_session_of_a_thread_that_nobody_has_used() -> None:
    scoped = scoped_session(sessionmaker())
    assert not SessionCensus().alive
    assert str(SessionCensus(scoped)) == "0 objects alive"
    assert not scoped.registry.has()


def test_a_session_of_tasks_that_nobody_has_used() -> None:
    scoped = async_scoped_session(async_sessionmaker(), scopefunc=threading.get_ident)
    assert not SessionCensus(scoped).alive
    assert not scoped.registry.has()


def test_sessions_of_threads() -> None:
    scoped = scoped_session(sessionmaker())
    scoped().add_all(products(3))
    added, asked = threading.Event(), threading.Event()

    def work() -> None:
        scoped().add_all(products(4))
        added.set()
        asked.wait()
        scoped.remove()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        added.wait()
        try:
            assert culprits() == [(7, "Product", "new")]
            assert culprits(scoped) == [(3, "Product", "new")]
        finally:
            asked.set()
        future.result()
    scoped.remove()
    assert not SessionCensus().alive


def test_the_dict_of_locals_stays_as_it_is() -> None:
    order, price = 17, 3
    context = locals()
    price += 1
    before = dict(context)
    SessionCensus()
    assert context == before == {"order": order, "price": 3}


def names_of_the_caller() -> dict[str, Any]:
    return sys._getframe(1).f_locals


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="f_locals holds nothing of its own")
def test_the_dict_that_a_debugger_keeps_stays_as_it_is() -> None:
    order, price = 17, 3
    kept = names_of_the_caller()
    kept["price"] = order  # as a debugger does it, until the program goes on
    kept["__return__"] = price
    before = dict(kept)
    SessionCensus()
    assert kept == before


def test_variables_of_a_function_that_asks_for_its_locals() -> None:
    rows = products()
    assert locals()["rows"] is rows
    ((kind, where),) = said()
    assert kind == "variable"
    assert where.startswith(
        "rows (a list) in test_variables_of_a_function_that_asks_for_its_locals"
    )


def test_every_sort_of_variable_has_its_name() -> None:
    def handler(first: Any, /, *more: Any, last: Any, **named: Any) -> list[str]:
        own = products(1)
        shared = products(1)
        gone = products(1)
        del gone

        def around() -> Any:
            return shared, first

        assert own and around()
        return [where.partition(" in ")[0] for _, where in said()]

    def products_of(count: int) -> Any:
        return {"mine": products(count)}

    names = handler(products(1), products(1), last=products(1), **products_of(1))
    # What the callers of a function have on their stacks has no name, and its arguments are its own.
    assert names == [
        "first (a list)",
        "last (a list)",
        "more (a tuple)",
        "named (a dict)",
        "own (a list)",
        "shared (a list)",
    ]


def test_a_variable_that_a_sleeping_task_shares_with_a_function_in_it() -> None:
    async def main() -> None:
        async def hold() -> None:
            mine = products()
            assert (lambda: mine)()
            await asyncio.sleep(60)

        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        ((kind, where),) = said()
        assert (kind, where.partition(",")[0]) == ("variable", "mine (a list) in hold")
        task.cancel()

    asyncio.run(main())


def test_a_variable_on_the_stack_of_a_waiting_greenlet() -> None:
    def hold() -> None:
        mine = products()
        greenlet.getcurrent().parent.switch()
        del mine

    waiting = greenlet.greenlet(hold)
    waiting.switch()
    ((kind, where),) = said()
    assert (kind, where.partition(",")[0]) == ("variable", "mine (a list) in hold")
    waiting.switch()
    assert not SessionCensus().alive


class Repository:
    """Keeps what it found, in the ways in which classes do."""

    found: Any = None

    @functools.lru_cache  # noqa: B019
    def best(self, count: int) -> list[Product]:
        return products(count)

    @functools.cache  # noqa: B019
    def every(self) -> int:
        return 1


CONTEXT = contextvars.ContextVar[Any]("CONTEXT")


def in_a_context_variable() -> Iterator[None]:
    before = CONTEXT.set(products())
    yield
    CONTEXT.reset(before)


def in_one_of_many_context_variables() -> Iterator[None]:
    many = [contextvars.ContextVar[Any](f"number {number}") for number in range(100)]
    before = [(variable, variable.set(variable.name)) for variable in many]
    many[70].set(products())
    yield
    for variable, token in before:
        variable.reset(token)


def in_the_context_of_a_thread() -> Iterator[None]:
    kept, asked = threading.Event(), threading.Event()

    def work() -> None:
        CONTEXT.set(products())
        kept.set()
        asked.wait()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    kept.wait()
    yield
    asked.set()
    thread.join()


def in_the_cache_of_a_method() -> Iterator[None]:
    Repository().best(3)
    yield
    Repository.best.cache_clear()


def as_self_in_the_cache_of_a_method() -> Iterator[None]:
    repository = Repository()
    repository.found = products()
    repository.every()
    del repository
    yield
    Repository.every.cache_clear()


def in_the_cache_of_a_function() -> Iterator[None]:
    cached = functools.cache(products)
    cached()
    yield
    cached.cache_clear()


def in_a_class() -> Iterator[None]:
    Repository.found = products()
    yield
    Repository.found = None


def in_a_class_that_only_its_instance_keeps() -> Iterator[None]:
    class Local:
        found = products()

    instance = Local()
    del Local
    yield
    del instance
    gc.collect()


def as_a_default() -> Iterator[None]:
    def answer(rows: Any = products()) -> Any:  # noqa: B008
        return rows

    yield
    del answer


def as_a_default_by_name() -> Iterator[None]:
    def answer(*, rows: Any = products()) -> Any:  # noqa: B008
        return rows

    yield
    del answer


def in_a_module_that_is_not_in_sys_modules() -> Iterator[None]:
    plugin = types.ModuleType("plugin")
    exec("def work(): pass", plugin.__dict__)
    plugin.rows = products()  # type: ignore[attr-defined]
    work = plugin.work
    del plugin
    yield
    del work


def called_at_exit() -> Iterator[None]:
    atexit.register(len, products())
    yield
    atexit.unregister(len)


def a_circle_called_at_exit() -> Iterator[None]:
    atexit.register(len, [around_a_circle()])
    yield
    atexit.unregister(len)


def in_a_heap_that_is_frozen() -> Iterator[None]:
    session = Session()
    product = around_a_circle()
    for mapped in (product, *product.sales):
        make_transient_to_detached(mapped)
    session.add(product)
    gc.freeze()
    del product, mapped
    yield
    gc.unfreeze()


def by_what_is_frozen() -> Iterator[None]:
    kept: list[Any] = []
    kept.append([kept])
    gc.collect()
    gc.freeze()
    kept[0] += products()
    del kept
    yield
    gc.unfreeze()


@pytest.mark.parametrize(
    ("keep", "wanted"),
    [
        (in_a_context_variable, {("context variable", "CONTEXT (a list)")}),
        (in_one_of_many_context_variables, {("context variable", "number 70 (a list)")}),
        (in_the_context_of_a_thread, {("context variable", "CONTEXT (a list)")}),
        (in_the_cache_of_a_method, {("cache", "Repository.best")}),
        (as_self_in_the_cache_of_a_method, {("cache", "Repository.every")}),
        (in_the_cache_of_a_function, {("cache", "products")}),
        (in_a_class, {("class attribute", "Repository.found (a list)")}),
        (
            in_a_class_that_only_its_instance_keeps,
            {("class attribute", "Local.found (a list)")},
        ),
        (as_a_default, {("default argument", "answer")}),
        (as_a_default_by_name, {("default argument", "answer")}),
        (in_a_module_that_is_not_in_sys_modules, {("variable", "rows (a list) of module plugin")}),
        (called_at_exit, {("unknown", "")}),
        (
            a_circle_called_at_exit,
            {
                ("unknown", ""),
                (
                    "collection",
                    "Product.sales, whose owner is kept by something that the census does not know",
                ),
            },
        ),
        (in_a_heap_that_is_frozen, {("frozen", "")}),
        (by_what_is_frozen, {("unknown", "")}),
    ],
)
def test_no_garbage(keep: Callable[[], Iterator[None]], wanted: set[tuple[str, str]]) -> None:
    """What the collector does not free is never called a cycle, and has a name where there is one."""
    keeping = keep()
    next(keeping)
    gc.collect()
    assert set(said()) == wanted
    assert next(keeping, None) is None
    gc.collect()
    assert not SessionCensus().alive


def test_what_is_known_to_be_frozen_is_no_keeper() -> None:
    """That list is the instruments' own, and is let go of once nothing is frozen any more."""
    keeping, wanted = in_a_class(), {("class attribute", "Repository.found (a list)")}
    next(keeping)
    gc.collect()
    gc.freeze()
    try:
        assert frozen_holders(*Repository.found)
        assert set(said()) == wanted
    finally:
        gc.unfreeze()
    assert set(said()) == wanted
    assert next(keeping, None) is None
    gc.collect()
    assert not SessionCensus().alive


@pytest.mark.asyncios_loop("another loop does not tell what it will call later")
def test_a_callback_of_an_event_loop() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_later(60, functools.partial(products, 1), products())
        assert said() == [("callback", "products")]
        call.cancel()

    asyncio.run(main())


def garbage_in_a_context() -> None:
    context = contextvars.Context()
    context.run(CONTEXT.set, products())
    around: list[Any] = [context]
    around.append(around)


def garbage_of_a_class() -> None:
    class Local:
        found = products()

        @functools.lru_cache  # noqa: B019
        def best(self) -> list[Product]:
            return products()

    Local().best()


@pytest.mark.parametrize("make", [around_a_circle, garbage_in_a_context, garbage_of_a_class])
def test_garbage(make: Callable[[], object]) -> None:
    """What a name could be found for is garbage all the same, if nothing keeps the one that has the name."""
    make()
    assert said() == [("cycle", "")]
    assert said() == [("cycle", "")]  # the first look has kept nothing, and made nothing
    gc.collect()
    assert not SessionCensus().alive


class Liar:
    """Whoever asks it anything, or about its class, is told off."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def _refuse(self, *_: Any) -> Any:
        raise RuntimeError("this is mine")

    __class__ = __dict__ = property(_refuse)  # type: ignore[assignment]
    __eq__ = __hash__ = __bool__ = __len__ = __iter__ = _refuse  # type: ignore[assignment]


class LyingList(list[Any]):
    """A list that cannot be asked either."""

    _sa_adapter = __class__ = property(Liar._refuse)  # type: ignore[assignment]
    __eq__ = __bool__ = __len__ = __iter__ = Liar._refuse  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class LyingType(type):
    """A metaclass whose classes cannot be compared, nor asked."""

    __eq__ = __hash__ = Liar._refuse  # type: ignore[assignment]
    __subclasscheck__ = __instancecheck__ = Liar._refuse

    def __getattr__(cls, name: str) -> Any:
        raise RuntimeError(name)


def test_nothing_of_the_users_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kept(metaclass=LyingType):
        pass

    liar, kept = Liar(), Kept()
    object.__setattr__(liar, "rows", products(1))
    object.__setattr__(kept, "rows", LyingList(products(2)))
    monkeypatch.setitem(sys.modules, "a module that loads itself late", liar)  # type: ignore[arg-type]
    assert [(count, kind) for count, _, kind in culprits()] == [(2, "variable"), (1, "variable")]


def test_a_census_keeps_none_of_what_it_looked_at() -> None:
    kept = products()
    CONTEXT.set(around_a_circle())
    seen = [weakref.ref(mapped) for mapped in (*kept, CONTEXT.get())]
    census = SessionCensus()
    del kept
    CONTEXT.set(None)
    assert census.alive.total() == 5
    assert seen[0]() is None
    gc.collect()
    assert [reference() for reference in seen] == [None] * 4
