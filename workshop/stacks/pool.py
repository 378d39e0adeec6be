"""What every stack of lesson 11 has: a name, the server that it needs, and a pool with four doors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, NamedTuple

Server = Literal["PostgreSQL", "MySQL", "SQLite"]
BATCH = 1000  # rows
ROWS = 18_000
"""How many products a stream has on each server; see `shops` for why not all."""
SELECT = f"SELECT * FROM products ORDER BY sku LIMIT {ROWS}"


class Pool(NamedTuple):
    """An open pool.

    `transaction()` is what people write around their work: it takes a connection and begins. `ask` sends a statement
    within it. `statistics()` are the numbers that the library publishes of its pool, by name. `products()` reads the
    table of products in the way that the library offers for many rows; close it when you have enough.
    """

    transaction: Callable[[], AbstractAsyncContextManager[Any]]
    ask: Callable[[Any], Awaitable[Any]]
    statistics: Callable[[], Mapping[str, float]]
    products: Callable[[], AsyncGenerator[Any, None]]


class Stack(NamedTuple):
    """What people use: its name, the server that it needs, and how a pool of some size is opened."""

    name: str
    server: Server
    opened: Callable[[str, int], AbstractAsyncContextManager[Pool]]
