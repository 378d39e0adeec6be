"""The pytest plugin, in real runs of pytest: each rule with both lines, the mended code, and what must not alarm.

In the tests that are run, the first word of a name says what must become of it: `fine` passes, anything else is the
rule that fails it. The lines that the report must name are marked: held, asks, waits.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from workshop.database import Server

ROOT = Path(__file__).parents[1]
NAMED = {
    "second_connection": (r"holds  .*# held", r"asks   .*# asks"),
    "left_checked_out": (r"taken  .*# held",),
    "held_across_await": (r"holds  .*# held", r"waits  .*# waits"),
}
RULES = "|".join(NAMED)

HEAD = """
import asyncio, contextlib, os, threading, time, unittest
import anyio, pytest, pytest_asyncio
from sqlalchemy import create_engine, text
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool

URL, SYNC_URL = os.environ["TEST_URL"], os.environ["TEST_SYNC_URL"]
SELECT = text("select 1")
KEPT = []

async def ask(engine):
    async with engine.connect() as connection:  # asks
        await connection.execute(SELECT)

def until_seen(pool_rules):
    end = time.monotonic() + 30  # only a broken plugin takes so long
    while not pool_rules.violations and time.monotonic() < end:
        time.sleep(0.005)
"""

# What both plugins for async tests can run; each has its own fixture and mark.
ASYNC_CASES = """
@FIXTURE
async def engine():
    engine = create_async_engine(URL, pool_size=3, max_overflow=0)
    yield engine
    await engine.dispose()

@FIXTURE
async def session(engine):
    async with AsyncSession(engine) as session:
        yield session

@FIXTURE
async def held_by_fixture(engine):
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        yield connection

async def test_second_connection_in_one_task(engine):
    async with engine.connect():  # held
        await ask(engine)

async def test_second_connection_in_awaited_tasks(engine):
    async with engine.connect():  # held
        await asyncio.gather(ask(engine), ask(engine))

async def test_second_connection_two_tasks_below(engine):
    async def between():
        async with anyio.create_task_group() as group:
            group.start_soon(ask, engine)
    async with engine.connect():  # held
        await asyncio.create_task(between())

async def test_second_connection_in_the_sessions_child(engine):
    async def child(session):
        await session.execute(SELECT)
        await ask(engine)
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)  # held
        await asyncio.create_task(child(session))

async def test_fine_one_connection_handed_down(engine):
    async def child(connection):
        await connection.execute(SELECT)
    async with engine.connect() as connection:
        await asyncio.create_task(child(connection))
        await child(connection)

async def test_fine_one_after_the_other(engine):
    for _ in range(3):
        await ask(engine)

async def test_fine_many_tasks_with_one_each(engine):
    await asyncio.gather(*(ask(engine) for _ in range(30)))

async def test_fine_a_second_engine(engine):
    other = create_async_engine(URL)
    async with engine.connect():
        await ask(other)
    await other.dispose()

async def test_fine_a_child_that_is_not_awaited(engine):
    done, asked = asyncio.Event(), asyncio.Event()
    async def child():
        await ask(engine)
        asked.set()
    async with engine.connect() as connection:
        task = asyncio.create_task(child())
        while not asked.is_set():
            await connection.execute(SELECT)
    await task

async def test_fine_nested_transactions(session):
    async with session.begin():
        async with session.begin_nested():
            await session.execute(SELECT)
            async with session.begin_nested():
                await session.execute(SELECT)

async def test_fine_a_stream(engine):
    async with engine.connect() as connection:
        result = await connection.stream(text("select 1 union all select 2"))
        assert [row[0] async for row in result] == [1, 2]

async def test_fine_handed_on(engine):
    queue, used = asyncio.Queue(), asyncio.Event()
    async def takes_over():
        connection = await queue.get()
        await connection.execute(SELECT)
        await connection.close()
        used.set()
    async def hands_on():
        await queue.put(await engine.connect())
        await ask(engine)
        await used.wait()
        await ask(engine)
    task = asyncio.create_task(takes_over())
    await hands_on()
    await task

async def test_fine_handed_on_while_the_name_stays(engine):
    queue, used, ended = asyncio.Queue(), asyncio.Event(), asyncio.Event()
    async def takes_over():
        connection = await queue.get()
        await connection.execute(SELECT)
        used.set()
        await ended.wait()
        await connection.close()
    task = asyncio.create_task(takes_over())
    connection = await engine.connect()
    await queue.put(connection)
    await used.wait()
    await ask(engine)
    ended.set()
    await task

async def test_fine_fixtures_connection_and_ones_own(engine, held_by_fixture):
    await held_by_fixture.execute(SELECT)
    await ask(engine)

async def test_fine_a_session_that_its_fixture_closes(session):
    await session.execute(SELECT)

async def test_fine_a_task_that_the_loops_end_cancels(engine):
    until, holds = asyncio.Event(), asyncio.Event()
    async def background():
        async with engine.connect():
            holds.set()
            await until.wait()
    async with contextlib.AsyncExitStack() as stack:
        task = asyncio.create_task(background())
        await holds.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

async def test_left_checked_out_in_a_list(engine):
    KEPT.append(await engine.connect())  # held

async def test_left_checked_out_and_forgotten(engine):
    connection = await engine.connect()  # held
    await connection.execute(SELECT)

async def test_held_across_await_of_a_thread(engine, pool_rules):
    async with engine.connect() as connection:  # held
        await connection.execute(SELECT)
        await asyncio.to_thread(until_seen, pool_rules)  # waits

async def test_held_across_await_of_tasks(engine, pool_rules):
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)  # held
        await asyncio.gather(asyncio.to_thread(until_seen, pool_rules), asyncio.sleep(0))  # waits

async def test_fine_given_back_before_the_sleep(engine):
    async with AsyncSession(engine) as session:
        await session.execute(SELECT)
        await session.commit()
        await asyncio.sleep(0.25)

async def test_fine_many_short_awaits(engine):
    async with engine.connect() as connection:
        await connection.execute(SELECT)
        for _ in range(100):
            await asyncio.sleep(0.005)

async def test_fine_a_blocked_loop_is_no_await(engine):
    async def block():
        time.sleep(0.3)
    async with engine.connect():
        await asyncio.gather(block(), asyncio.sleep(0.001))

async def test_fine_awaits_a_task_that_uses_the_database(engine):
    other = create_async_engine(URL)
    async def works():
        end = asyncio.get_running_loop().time() + 0.3
        while asyncio.get_running_loop().time() < end:
            await ask(other)
    async with engine.connect():
        await asyncio.create_task(works())
    await other.dispose()

@pytest.mark.ormscope(held_across_await=60)
async def test_fine_with_a_longer_limit(engine):
    async with engine.connect():
        await asyncio.sleep(0.25)

@pytest.mark.ormscope(held_across_await=False)
async def test_left_checked_out_with_one_rule_off(engine):
    connection = await engine.connect()  # held
    await asyncio.sleep(0.25)

@pytest.mark.ormscope(second_connection=False, left_checked_out=False)
async def test_held_across_await_with_two_rules_off(engine, pool_rules):
    connection = await engine.connect()  # held
    await ask(engine)
    await asyncio.to_thread(until_seen, pool_rules)  # waits

async def test_second_connection_of_an_exhausted_pool_does_not_hang():
    engine = create_async_engine(URL, pool_size=1, max_overflow=0, pool_timeout=None)
    try:
        async with engine.connect():  # held
            await ask(engine)
    finally:
        await engine.dispose()

async def test_second_connection_without_a_pool():
    engine = create_async_engine(URL, poolclass=NullPool)
    async with engine.connect():  # held
        await ask(engine)

async def test_fine_one_connection_for_all():
    engine = create_async_engine(URL, poolclass=StaticPool)
    async with engine.connect():
        await ask(engine)
    await engine.dispose()

async def test_second_connection_of_an_engine_with_options(engine):
    async with engine.connect():  # held
        await ask(engine.execution_options(isolation_level="SERIALIZABLE"))
"""

PLAIN_CASES = """
engine = create_engine(SYNC_URL, pool_size=3, max_overflow=0)  # made before any test

def ask_sync(engine):
    with engine.connect() as connection:  # asks
        connection.execute(SELECT)

@pytest.fixture(scope="session", autouse=True)
def held_for_the_session():
    with engine.connect():
        yield

@pytest.fixture
def session():
    with Session(engine) as session:
        yield session

def test_second_connection():
    with engine.connect():  # held
        ask_sync(engine)

def test_second_connection_of_two_sessions():
    with Session(engine) as first, Session(engine) as second:
        first.execute(SELECT)  # held
        second.execute(SELECT)  # asks

def test_fine_mended():
    with engine.connect() as connection:
        connection.execute(SELECT)
    ask_sync(engine)

def test_fine_two_threads_with_one_each():
    with engine.connect():
        thread = threading.Thread(target=ask_sync, args=(engine,))
        thread.start()
        thread.join()

def test_second_connection_in_a_thread():
    def work():
        with engine.connect():  # held
            ask_sync(engine)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

def test_left_checked_out_by_a_thread():
    thread = threading.Thread(target=lambda: KEPT.append(engine.connect()))  # held
    thread.start()
    thread.join()

def test_fine_what_another_test_left_is_not_this_ones():
    KEPT.pop().close()

def test_left_checked_out_and_collected():
    engine.connect().execute(SELECT)  # held

def test_fine_closed_by_the_fixture(session):
    session.execute(SELECT)

def test_fine_savepoints(session):
    with session.begin(), session.begin_nested():
        session.execute(SELECT)

def test_fine_detached():
    connection = engine.connect()
    connection.detach()
    connection.close()

def test_fine_invalidated():
    with engine.connect() as connection:
        connection.invalidate()

def test_second_connection_made_in_asyncio_run():
    async def main():
        engine = create_async_engine(URL)
        async with engine.connect():  # held
            await ask(engine)
        await engine.dispose()
    asyncio.run(main())

class Box:
    pass

def test_held_across_await_while_the_loops_caller_can_reach_it(pool_rules):
    box = Box()
    async def main():
        engine = create_async_engine(URL)
        async with engine.connect() as box.connection:  # held
            await asyncio.to_thread(until_seen, pool_rules)  # waits
        await engine.dispose()
    asyncio.run(main())

def test_fine_memory():
    memory = create_engine("sqlite://")
    with memory.connect():
        ask_sync(memory)

def test_fine_memory_async():
    async def main():
        engine = create_async_engine("sqlite+aiosqlite://")
        async with engine.connect():
            await ask(engine)
        await engine.dispose()
    asyncio.run(main())

class TestCases(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.engine = create_async_engine(URL, pool_size=3, max_overflow=0)
        self.connection = None

    async def asyncTearDown(self):
        if self.connection is not None:
            await self.connection.close()
        await self.engine.dispose()

    async def test_second_connection_here(self):
        async with self.engine.connect():  # held
            await ask(self.engine)

    async def test_left_checked_out_here(self):
        KEPT.append(await self.engine.connect())  # held

    @pytest.fixture(autouse=True)
    def rules(self, pool_rules):
        self.pool_rules = pool_rules

    async def test_held_across_await_here(self):
        async with self.engine.connect():  # held
            await asyncio.to_thread(until_seen, self.pool_rules)  # waits

    async def test_fine_closed_in_tear_down(self):
        self.connection = await self.engine.connect()
        await self.connection.execute(SELECT)

class TestSync(unittest.TestCase):
    def test_second_connection_here_too(self):
        with engine.connect():  # held
            ask_sync(engine)
"""


@pytest.fixture
def environment(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[str, str]]:
    """The addresses of each database for async and for plain engines."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Else the plugin would come twice where this distribution is installed; with it go all the others.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    file = f"/{tmp_path / 'shop.db'}"
    return {
        "postgresql": (server.url, server.url.replace("asyncpg", "psycopg")),
        "sqlite": (f"sqlite+aiosqlite://{file}", f"sqlite://{file}"),
    }


class Run:
    """A run of pytest with the plugin: what became of each test, and its report."""

    def __init__(
        self,
        pytester: pytest.Pytester,
        monkeypatch: pytest.MonkeyPatch,
        urls: tuple[str, str],
        source: str,
        *options: str,
        in_process: bool = False,
    ) -> None:
        for name, url in zip(("TEST_URL", "TEST_SYNC_URL"), urls, strict=True):
            monkeypatch.setenv(name, url)
        pytester.makepyfile(test_inner=HEAD + textwrap.dedent(source))
        options = ("-pormscope.pytest_plugin", "-pno:cacheprovider", "--junitxml=x.xml", *options)
        self.result = (
            pytester.runpytest_inprocess(*options)
            if in_process
            else pytester.runpytest_subprocess(*options, timeout=60)
        )
        text = self.result.stdout.str() + self.result.stderr.str()
        assert "INTERNALERROR" not in text, text
        self.outcomes: dict[str, set[str]] = {}
        self.reports: dict[str, str] = {}
        for case in ElementTree.parse(pytester.path / "x.xml").iter("testcase"):
            name = re.sub(r"\[.*", "", case.get("name", "")).removeprefix("test_")
            outcomes = self.outcomes.setdefault(name, set())
            for kind in case:
                if kind.tag in ("failure", "error", "skipped"):
                    outcomes.add(kind.tag)
                    self.reports[name] = self.reports.get(name, "") + (kind.text or "")

    def wrong(self) -> list[str]:
        """Which tests did not end as their names say, and why."""
        found = []
        for name, outcomes in self.outcomes.items():
            report = self.reports.get(name, "")
            broken = set(re.findall(rf"\(rule ({RULES})", report))
            match = re.match(RULES, name)
            wanted = {match[0]} if match else set()
            lines = NAMED[match[0]] if match else ()
            missing = [line for line in lines if not re.search(line, report)]
            if broken != wanted or bool(outcomes) != bool(wanted) or missing:
                found.append(f"{name}: {outcomes}, broken {broken}, not named {missing}\n{report}")
        return found


PLUGINS = {
    "asyncio": ("-p", "pytest_asyncio.plugin", "--asyncio-mode=auto"),
    "anyio": ("-p", "anyio.pytest_plugin"),
}
PREAMBLE = {
    "asyncio": "",
    "anyio": """
pytestmark = pytest.mark.anyio

@pytest.fixture
def anyio_backend():
    return "asyncio"
""",
}


@pytest.mark.parametrize(
    ("database", "plugin"),
    [("postgresql", "asyncio"), ("postgresql", "anyio"), ("sqlite", "asyncio")],
)
def test_async_tests(
    database: str,
    plugin: str,
    environment: dict[str, tuple[str, str]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixture = {"asyncio": "pytest_asyncio.fixture", "anyio": "pytest.fixture"}[plugin]
    source = PREAMBLE[plugin] + ASYNC_CASES.replace("FIXTURE", fixture)
    run = Run(pytester, monkeypatch, environment[database], source, "--ormscope", *PLUGINS[plugin])
    assert len(run.outcomes) == source.count("async def test_")
    assert not run.wrong(), "\n".join(run.wrong())


@pytest.mark.parametrize("database", ["postgresql", "sqlite"])
def test_plain_tests_threads_and_unittest(
    database: str,
    environment: dict[str, tuple[str, str]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(pytester, monkeypatch, environment[database], PLAIN_CASES, "--ormscope")
    assert len(run.outcomes) == PLAIN_CASES.count("def test_")
    assert not run.wrong(), "\n".join(run.wrong())


TWO_TESTS = """
def test_broken():
    engine = create_engine(SYNC_URL)
    with engine.connect():  # held
        with engine.connect():  # asks
            pass

@pytest.mark.ormscope
def test_marked():
    test_broken()

def test_with_fixture(pool_rules):
    test_broken()
    if pool_rules is not None:
        with pytest.raises(AssertionError, match="second_connection"):
            pool_rules.check()

def test_with_fixture_later(request):
    rules = request.getfixturevalue("pool_rules")
    test_broken()
    assert rules is None or len(rules.violations) == 1
"""


@pytest.mark.parametrize(
    ("options", "setting", "failing"),
    [
        ((), "", {"marked", "with_fixture", "with_fixture_later"}),
        (("--ormscope",), "", {"broken", "marked", "with_fixture", "with_fixture_later"}),
        ((), "ormscope = true", {"broken", "marked", "with_fixture", "with_fixture_later"}),
        (("--no-ormscope",), "ormscope = true", set()),
        (("--ormscope",), "ormscope_second_connection = false", set()),
    ],
)
def test_who_is_watched(
    options: tuple[str, ...],
    setting: str,
    failing: set[str],
    environment: dict[str, tuple[str, str]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytester.makeini(f"[pytest]\n{setting}\n")
    source = TWO_TESTS
    if "second_connection" in setting:
        source = (
            source.replace("pytest.raises", "contextlib.suppress")
            .replace(', match="second_connection"', "")
            .replace("== 1", "== 0")
        )
    run = Run(
        pytester,
        monkeypatch,
        environment["sqlite"],
        source,
        *options,
        "--strict-markers",
        in_process=True,
    )
    assert {name for name, outcomes in run.outcomes.items() if outcomes} == failing
    assert all(outcomes <= {"failure"} for outcomes in run.outcomes.values())


SETTINGS = """
@pytest.mark.ormscope(held_accross_await=1)
def test_misspelt(): pass

@pytest.mark.ormscope(1)
def test_without_a_name(): pass

@pytest.mark.ormscope(held_across_await=0)
def test_no_seconds(): pass

@pytest.mark.ormscope(second_connection=2)
def test_no_bool(): pass

@pytest.mark.ormscope(held_across_await=True)
def test_default(): pass

@pytest.mark.ormscope(second_connection=False)
class TestClass:
    def test_inherits(self):
        with engine.connect(), engine.connect():
            pass

    @pytest.mark.ormscope(second_connection=True)
    def test_own(self):
        with engine.connect(), engine.connect():
            pass

engine = create_engine(SYNC_URL)

@pytest.fixture
def fails_at_the_end():
    yield
    raise RuntimeError("the fixture's own")

@pytest.mark.ormscope
def test_own_error():
    with engine.connect(), engine.connect():
        raise KeyError("the test's own")

@pytest.mark.ormscope
def test_own_error_and_left(request):
    KEPT.append(engine.connect())
    raise KeyError("the test's own")

@pytest.mark.ormscope
def test_fixtures_error(fails_at_the_end):
    KEPT.append(engine.connect())

@pytest.mark.ormscope
def test_caught_and_refused():
    engine = create_engine(SYNC_URL, pool_size=1, max_overflow=0)
    with engine.connect():
        with contextlib.suppress(AssertionError):
            engine.connect()
    assert engine.pool.checkedout() == 0

@pytest.mark.ormscope
@pytest.mark.xfail(strict=True)
def test_expected():
    with engine.connect(), engine.connect():
        pass

@pytest.mark.ormscope
def test_skipped():
    with engine.connect(), engine.connect():
        pytest.skip("not here")

@pytest.mark.ormscope
class TestUnit(unittest.TestCase):
    def test_unit_error(self):
        with engine.connect(), engine.connect():
            raise KeyError("the test's own")
"""


def test_marks_and_errors(
    environment: dict[str, tuple[str, str]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(pytester, monkeypatch, environment["sqlite"], SETTINGS, in_process=True)
    assert run.outcomes == {
        "misspelt": {"error"},
        "without_a_name": {"error"},
        "no_seconds": {"error"},
        "no_bool": {"error"},
        "default": set(),
        "inherits": set(),
        "own": {"failure"},
        "own_error": {"failure"},
        "own_error_and_left": {"failure"},
        "fixtures_error": {"error"},
        "caught_and_refused": {"failure"},
        "expected": {"skipped"},
        "skipped": {"skipped"},
        "unit_error": {"failure"},
    }
    for name, words in {
        "misspelt": ["by name, not held_accross_await"],
        "without_a_name": ["by name, not 1"],
        "no_seconds": ["held_across_await=0", "a number of seconds above 0, or False"],
        "no_bool": ["second_connection=2", "takes a bool"],
        "own_error": ['KeyError: "the test\'s own"', "rule second_connection"],
        "own_error_and_left": ['KeyError: "the test\'s own"', "rule left_checked_out"],
        "fixtures_error": ["RuntimeError: the fixture's own", "rule left_checked_out"],
        "caught_and_refused": ["rule second_connection"],
        "unit_error": ['KeyError: "the test\'s own"', "rule second_connection"],
    }.items():
        for word in words:
            assert word in run.reports[name], run.reports[name]


def test_a_setting_that_is_no_number_is_an_error_of_use(
    environment: dict[str, tuple[str, str]], pytester: pytest.Pytester
) -> None:
    pytester.makeini("[pytest]\normscope_held_across_await = soon\n")
    result = pytester.runpytest_inprocess("-p", "ormscope.pytest_plugin")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*ormscope_held_across_await = soon: this is neither*"])


INSTALLED = """
import sys

def test_nothing_is_imported_and_nothing_changed(pytestconfig):
    assert pytestconfig.pluginmanager.hasplugin("ormscope")
    assert "sqlalchemy" not in sys.modules
    assert "ormscope.pool" not in sys.modules
"""


def test_whoever_merely_has_it_installed_pays_nothing(
    environment: dict[str, tuple[str, str]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As pip would note it: the entry point of ormscope's own pyproject.toml."""
    project = tomllib.loads((ROOT / "ormscope" / "pyproject.toml").read_text())["project"]
    noted = pytester.mkdir("installed") / "ormscope-1.0.0.dist-info"
    noted.mkdir()
    (noted / "METADATA").write_text("Metadata-Version: 2.1\nName: ormscope\nVersion: 1.0.0\n")
    (entry,) = project["entry-points"]["pytest11"].items()
    (noted / "entry_points.txt").write_text(f"[pytest11]\n{' = '.join(entry)}\n")
    monkeypatch.setenv("PYTHONPATH", f"{noted.parent}{os.pathsep}{ROOT}")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    pytester.makepyfile(INSTALLED)
    result = pytester.runpytest_subprocess(
        *["-p", "no:nbval", "-p", "no:hypothesispytest", "-p", "no:cacheprovider"], timeout=60
    )
    result.assert_outcomes(passed=1)


BROKEN = """
import ormscope.pool_rules

engine = create_engine(SYNC_URL)

@pytest.mark.parametrize("name", ["_scope_of", "_second", "_keep", "_note_lost", "_note_left"])
def test_fails_inside(name, pool_rules):
    def fails(*about):
        raise ZeroDivisionError("the plugin's own")
    setattr(pool_rules, name, fails)
    for _ in range(2):
        with engine.connect() as connection:
            assert connection.execute(SELECT).scalar() == 1
    assert engine.pool.checkedout() == 0

@pytest.mark.parametrize("name", ["_foreign_await"])
def test_fails_beside(name, monkeypatch, pool_rules):
    def fails(*about):
        raise ZeroDivisionError("the plugin's own")
    monkeypatch.setattr(ormscope.pool_rules, name, fails)
    async def main():
        engine = create_async_engine(URL)
        async with engine.connect() as connection:
            while pool_rules.failure is None:
                await connection.execute(SELECT)
        assert engine.pool.checkedout() == 0
        await engine.dispose()
    asyncio.run(main())

def test_leaves_no_trace():
    from sqlalchemy.engine import Engine
    assert Engine.raw_connection.__module__ == "sqlalchemy.engine.base"
    assert not {"_do_get", "recreate"} & set(vars(engine.pool))
    assert "do_execute" not in vars(engine.dialect)
    assert not [thread for thread in threading.enumerate() if thread.name == "ormscope rules"]
test_leaves_no_trace.pytestmark = [pytest.mark.ormscope(**dict.fromkeys(
    ["second_connection", "left_checked_out", "held_across_await"], False))]
"""


def test_what_fails_in_the_plugin_costs_the_test_nothing(
    environment: dict[str, tuple[str, str]],
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(pytester, monkeypatch, environment["sqlite"], BROKEN, "--ormscope", in_process=True)
    run.result.assert_outcomes(passed=7, warnings=6)
    run.result.stdout.fnmatch_lines(
        ["*ormscope could not watch this test: ZeroDivisionError: the plugin's own*"]
    )


def test_the_packages_names_are_there_before_they_are_imported() -> None:
    code = """
import sys, ormscope
assert "sqlalchemy" not in sys.modules
assert set(ormscope.__all__) <= set(dir(ormscope))
from ormscope import *
assert PoolScope.__module__ == "ormscope.pool" and ormscope.PoolScope is PoolScope
assert not hasattr(ormscope, "Pool")
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
