"""A service whose sessions come from dependencies of FastAPI: the server keeps them too, and closes none of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from helpers import PATIENCE, run
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from ormscope import PoolScope
from workshop.database import Server
from workshop.service import serving

SELECT = text("SELECT 1")
WAYS: list[dict[str, Any]] = [{}, {"scope": "function"}, {"max_concurrency": 50}]


@pytest.mark.parametrize("way", WAYS, ids=["request", "function", "max_concurrency"])
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "foreign"])
def test_a_session_from_a_dependency(way: dict[str, Any], is_nested: bool, server: Server) -> None:
    """Where each request asks for a second connection it is proved; where they wait for something else it is not."""

    async def main() -> tuple[bool, str]:
        engine = create_async_engine(server.url, pool_size=3, max_overflow=0, pool_timeout=60)
        app, answers = FastAPI(), asyncio.Event()

        async def get_session() -> AsyncIterator[AsyncSession]:
            async with AsyncSession(engine) as session:
                yield session

        @app.get("/")
        async def index(session: AsyncSession = Depends(get_session, **way)) -> None:  # noqa: B008
            await session.execute(SELECT)
            if is_nested:
                async with AsyncSession(engine) as second:
                    await second.execute(SELECT)
            await answers.wait()

        scope = PoolScope(engine)
        async with serving(app) as client:
            requests = [asyncio.create_task(client.get("/")) for _ in range(5)]
            proof = asyncio.create_task(scope.deadlock())
            await asyncio.wait([proof], timeout=PATIENCE if is_nested else 1.0)
            found = proof.done(), scope.cause()
            for task in (proof, *requests):
                task.cancel()
            await asyncio.gather(proof, *requests, return_exceptions=True)
            answers.set()
        await engine.dispose()
        return found

    is_proved, cause = run(main())
    assert is_proved == is_nested
    assert cause == ("deadlock" if is_nested else "held across a foreign await")
