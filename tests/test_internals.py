"""The private names that ormscope reads: each is there, and where one is gone, its part is switched off and said."""

from __future__ import annotations

import ast
import asyncio
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.orm import base as orm_base

from ormscope import PoolScope, SessionCensus, internals, orm_internals
from ormscope.census import _BLIND
from workshop.shop import Order, OrderLine

NAMES = [(part, owner, name) for part, names in internals._NEEDED.items() for owner, name in names]


PACKAGE = Path(internals.__file__).parent
MODULES = ("internals.py", "orm_internals.py")
# Documented, in spite of the underscore: of sys, os and NamedTuple.
DOCUMENTED = {"_getframe", "_current_frames", "_exit", "_make"}
# Looked for where a notebook runs, and set but not read: see below.
OF_IPYTHON = {"_oh", "_render_traceback_"}


def private_names(path: Path) -> set[str]:
    """The attributes with an underscore that a module uses of anything but `self`, also by getattr."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            if not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if node.value.isidentifier() else set()
    return {
        name for name in found if name.startswith("_") and name[1:2] not in ("_", "")
    } - DOCUMENTED


def defined_here() -> set[str]:
    """What ormscope itself calls with an underscore."""
    own: set[str] = set()
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return own


def test_no_other_module_uses_a_private_name() -> None:
    foreign = {name for _, _, name in NAMES} | {*internals._OF_GROUPS} | OF_IPYTHON
    own = defined_here()
    for path in PACKAGE.glob("*.py"):
        if path.name not in MODULES:
            used = private_names(path)
            assert not used & foreign, path.name
            assert not used - own - {"_binary"}, path.name  # of psycopg_binary


def test_each_private_name_is_looked_for() -> None:
    looked_for = {name for _, _, name in NAMES} | {*internals._OF_GROUPS} | OF_IPYTHON
    looked_for.add(internals._OF_ASYNCPG)
    used = set().union(*(private_names(PACKAGE / name) for name in MODULES))
    if sys.version_info < (3, 13):
        used -= {
            "_AsCompletedIterator",
            "_todo",
            "_timeout_handle",
            "_handle_timeout",
        }  # from 3.13 on
    else:
        used.discard("_on_timeout")  # up to 3.12
    if sys.version_info >= (3, 12):
        used.discard("_current_tasks")  # up to 3.11
    assert not used - looked_for


def test_nothing_is_missing_here() -> None:
    assert internals.missing() == {}


@pytest.mark.parametrize(
    "part, owner, name", NAMES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_name_that_is_gone_is_noticed(
    part: str, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {part: [(owner, name), (owner, f"{name}_of_yesterday")]}
    monkeypatch.setattr(internals, "_NEEDED", needed)
    assert internals.missing()[part].endswith(f"{name}_of_yesterday")


def test_the_variables_of_wait_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals, "_NEEDED", {"proof": [(asyncio.sleep, "waiter")]})
    assert internals.missing()["proof"] == "asyncio.tasks.sleep's waiter"


def test_without_the_names_of_the_proof_nothing_is_proved(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "_NEEDED", {"proof": [(asyncio, "gone")]})

    async def main() -> None:
        engine = create_async_engine(url, pool_size=1, max_overflow=0, pool_timeout=4)
        scope = PoolScope(engine)

        async def twice() -> None:
            async with engine.connect(), engine.connect():
                pass

        waiting = asyncio.create_task(twice())
        await asyncio.sleep(3.4)
        verdict = scope.verdict()
        assert verdict.cause == "unknown" and scope.deadlocks == []
        assert "Without asyncio.gone no deadlock can be proved here" in str(verdict)
        waiting.cancel()
        await asyncio.wait({waiting})
        await engine.dispose()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_without_the_names_of_the_pool_nothing_is_watched(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "_NEEDED", {"watching": [(asyncio, "gone")]})

    async def main() -> None:
        engine = create_async_engine(url)
        scope = PoolScope(engine)
        async with engine.connect() as connection:
            await connection.execute(text("select 1"))
        verdict = scope.verdict()
        assert verdict.cause == "unknown" and "asyncio.gone is gone from SQLAlchemy" in str(verdict)
        scope.close()
        await engine.dispose()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_without_the_names_for_it_the_server_is_not_asked(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(internals, "_NEEDED", {"server": [(asyncio, "gone")]})

    async def main() -> None:
        engine = create_async_engine(url)
        scope = PoolScope(engine, "a")
        assert "PoolScope 'a' works without server: asyncio.gone is gone" in caplog.text
        if engine.dialect.name == "postgresql":
            assert "cannot tell, asyncio.gone is gone." in str(await scope.ask_server())
        scope.close()
        await engine.dispose()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_pool_does_not_speak_of_what_the_census_lacks(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(internals, "_NEEDED", {"unflushed": [(asyncio, "gone")]})
    PoolScope(create_async_engine(url)).close()
    assert not caplog.text


# anyio, which is looked at only where the program uses it.


def test_the_names_of_anyios_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyio._backends._asyncio as backend

    for name in internals._OF_GROUPS:
        assert internals._has(backend.TaskGroup.__init__, name)

    class Group:
        def __init__(self) -> None:
            self._tasks = ()

    monkeypatch.setattr(backend, "TaskGroup", Group)
    assert internals.missing()["anyio's groups"].endswith("__init__'s _on_completed_fut")


# The census.


def new_order() -> Session:
    session = Session()
    session.add(Order(lines=[OrderLine()]))
    return session


def test_a_census_that_lacks_nothing_says_nothing() -> None:
    session = new_order()
    census = SessionCensus(session)
    assert census.blind == () and "cannot see" not in str(census)
    assert {keeper.kind for keeper in census.keepers} == {"new"}
    session.expunge_all()
    assert str(SessionCensus(session)) == "0 objects alive"


@pytest.mark.parametrize("part", sorted(set(_BLIND) - {"census", "outputs", "context variables"}))
def test_a_census_says_what_it_cannot_see(
    part: orm_internals.Part, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(internals, "_NEEDED", {part: [(asyncio, "gone")]})
    session = new_order()
    census = SessionCensus(session)
    assert census.alive == {"Order": 1, "OrderLine": 1}
    assert f"cannot see {_BLIND[part]}: asyncio.gone is gone" in str(census)
    assert ("new" in {keeper.kind for keeper in census.keepers}) == (part != "unflushed")


def test_without_the_name_of_the_states_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_order()
    monkeypatch.delattr(orm_base, "DEFAULT_STATE_ATTR")
    census = SessionCensus(session)
    # Not "0 objects alive".
    assert str(census) == (
        "cannot see any mapped object: sqlalchemy.orm.base.DEFAULT_STATE_ATTR is gone"
    )
    assert not census.alive


def test_an_interpreter_that_has_context_variables_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(orm_internals, "_class_of_contexts", lambda: "trie")
    census = SessionCensus(session := new_order())
    assert "cannot see what context variables keep: the interpreter's hamt (now trie)" in str(
        census
    )
    session.close()


def test_the_names_of_ipython(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell that has them no more."""
    for gone, shell in (
        ("user_ns_hidden", SimpleNamespace(user_ns={"_oh": {}})),
        ("user_ns['_oh']", SimpleNamespace(user_ns={}, user_ns_hidden={})),
        ("user_ns", SimpleNamespace(user_ns_hidden={})),
    ):
        monkeypatch.setattr(orm_internals, "_running_shell", lambda shell=shell: shell)
        assert orm_internals.shell() is None
        census = SessionCensus(session := new_order())
        assert f"cannot see {_BLIND['outputs']}: InteractiveShell.{gone} is gone" in str(census)
        session.close()


def in_a_process(program: str, folder: Path) -> str:
    """What a program prints that changes too much for this process."""
    environment = {**os.environ, "IPYTHONDIR": str(folder)}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_real_ipython_has_the_names(tmp_path: Path) -> None:
    program = """
from IPython.core.interactiveshell import InteractiveShell
from ormscope import internals, orm_internals
shell = InteractiveShell.instance()
assert internals.missing() == {}, internals.missing()
assert orm_internals.shell() == (shell.user_ns, shell.user_ns_hidden, shell.user_ns["Out"])
try:
    raise ValueError
except ValueError as error:
    orm_internals.show_as(error, ["instead of the frames"])
    shell.showtraceback()
"""
    shown = in_a_process(program, tmp_path)
    assert "instead of the frames" in shown and "Traceback" not in shown


def test_a_name_that_is_gone_lets_the_import_be(tmp_path: Path) -> None:
    """Else it would take the program with it."""
    program = """
import asyncio
from sqlalchemy.pool import QueuePool
del asyncio.tasks._GatheringFuture, asyncio.tasks._wait, asyncio.futures._chain_future
del asyncio.Handle._run, QueuePool._do_get, asyncio.Queue._init
from ormscope import internals
print(internals.missing()["proof"], internals.LOOP_STEP)
"""
    assert in_a_process(program, tmp_path) == "asyncio.tasks._GatheringFuture None\n"
