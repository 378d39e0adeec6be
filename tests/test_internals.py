"""The private names that ormscope reads: each is there, and where one is gone, its part is switched off and said."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from ormscope import PoolScope, internals

NAMES = [(part, owner, name) for part, names in internals._NEEDED.items() for owner, name in names]


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    internals.missing.cache_clear()
    yield
    internals.missing.cache_clear()


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
    monkeypatch.setattr(internals, "_WAIT", asyncio.sleep)
    assert internals.missing()["proof"] == "the variables of asyncio.tasks._wait"


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
