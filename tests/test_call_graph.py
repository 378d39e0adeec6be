"""Why `asyncio.capture_call_graph` is not used, see ormscope/stacks.py: where one of these fails, look again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Generator, Iterable
from typing import Any

import pytest

from ormscope.stacks import sleeping_frames


async def asleep(*tasks: asyncio.Task[Any]) -> None:
    """Let tasks begin, and what they await."""
    for _ in range(5):
        await asyncio.sleep(0)


def names_of_graph(task: asyncio.Task[Any]) -> list[str]:
    graph = asyncio.capture_call_graph(task)
    assert graph is not None
    return [entry.frame.f_code.co_name for entry in reversed(graph.call_stack)]


def names_of_ours(task: asyncio.Task[Any]) -> list[str]:
    return [frame.f_code.co_name for frame in sleeping_frames(task)]


async def ends(task: asyncio.Future[Any]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def plain() -> None:
    await for_ever()


async def items() -> AsyncIterator[int]:
    await for_ever()
    yield 1


async def async_for() -> None:
    async for _ in items():
        pass


class Wrapped:
    def __await__(self) -> Generator[Any, Any, None]:
        yield from for_ever().__await__()


async def wrapped() -> None:
    await Wrapped()


@pytest.mark.parametrize(
    "way, theirs, ours",
    [
        (plain, ["plain", "for_ever"], ["plain", "for_ever"]),
        (async_for, ["async_for"], ["async_for", "items", "for_ever"]),
        (wrapped, ["wrapped"], ["wrapped", "__await__", "for_ever"]),
    ],
)
def test_what_each_sees_of_a_sleeping_task(way: Any, theirs: list[str], ours: list[str]) -> None:
    async def main() -> None:
        task = asyncio.create_task(way())
        await asleep(task)
        assert (names_of_graph(task), names_of_ours(task)) == (theirs, ours)
        await ends(task)

    asyncio.run(main())


def test_tasks_that_await_one_another_have_no_graph() -> None:
    async def main() -> None:
        tasks: dict[str, asyncio.Task[None]] = {}
        free = asyncio.Event()

        async def waiting_for(other: str) -> None:
            await asyncio.wait({tasks[other]}, return_when=asyncio.FIRST_COMPLETED)
            await free.wait()

        tasks |= {
            name: asyncio.create_task(waiting_for(other))
            for name, other in (("a", "b"), ("b", "a"))
        }
        await asleep()
        with pytest.raises(RecursionError):
            asyncio.capture_call_graph(tasks["a"])
        assert names_of_ours(tasks["a"]) == ["waiting_for", "wait", "_wait"]
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)

    asyncio.run(main())


def test_a_graph_costs_twice_as_much_for_each_layer_of_tasks() -> None:
    async def waiting_for(tasks: Iterable[asyncio.Task[None]]) -> None:
        await asyncio.wait(tasks)

    async def main() -> None:
        layer = [asyncio.create_task(for_ever())]
        lowest, everybody = layer[0], list(layer)
        seconds: list[float] = []
        for number in range(16):
            layer = [asyncio.create_task(waiting_for(layer)) for _ in "ab"]
            everybody += layer
            await asleep()
            if number in (11, 15):
                began = time.perf_counter()
                asyncio.capture_call_graph(lowest, limit=0)
                seconds.append(time.perf_counter() - began)
        assert seconds[1] > 6 * seconds[0]  # 16 times, about, for four layers more
        for task in everybody:
            task.cancel()
        await asyncio.gather(*everybody, return_exceptions=True)

    asyncio.run(main())
