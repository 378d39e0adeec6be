"""Exercise 03, task 3: a page that keeps products, and by them all their sales."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, inspect, select
from sqlalchemy.ext.asyncio import async_sessionmaker

from ormscope import SessionCensus
from ormscope.census import Keeper
from ormscope.lab import Recording, storm
from workshop.checks.catalogue import Finding
from workshop.checks.evidence import Evidence, evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import MemoryBudget
from workshop.checks.rules import leaves_it_checked_out
from workshop.checks.task import Task, Trials
from workshop.shop import Product, Sale

PAGES = 8
SHOWN = ("sku", "title", "unit_price")  # what the page reads of a product
BUDGET = MemoryBudget(container=100, objects=5_000, mebibytes=100)  # the function as given takes 70


@dataclass(kw_only=True)
class Pages(Evidence):
    """What pages were given of so many `products`, which were sold in so many `lines`.

    `left` is what is alive beside the products, in words, and `left_by` the kind of its keeper; both are empty where
    nothing is. `pages` have a pair for each product; `unreadable` is how many products cannot be shown, `right` how
    many numbers are right, and `zeros` how many are 0.
    """

    left: str
    left_by: str
    pages: int
    unreadable: int
    right: int
    zeros: int
    products: int
    lines: int


async def show_pages(
    top_sellers: Callable[..., Any], conditions: Conditions, *, first: int, each: int
) -> Pages:
    """Let pages ask for well-sold products, keep what they get, and count what is alive then."""
    engine = conditions.engine(capacity=PAGES)
    lines = func.count(Sale.id).label("lines")
    counted = select(Product.sku, lines).join(Sale).group_by(Product.sku)
    async with engine.connect() as connection:
        best = counted.order_by(lines.desc(), Product.sku).offset(first).limit(PAGES * each)
        sold = {row.sku: row.lines for row in await connection.execute(best)}
    skus = [list(sold)[number::PAGES] for number in range(PAGES)]
    kept: dict[int, Any] = {}

    async def show(number: int) -> None:
        kept[number] = await top_sellers(async_sessionmaker(engine), list(skus[number]))

    async with evidence(conditions, engine) as noted:
        await storm(show, PAGES)
    await engine.dispose()
    await asyncio.sleep(0.3)  # for the curve: this is how much the pages keep
    pages = [(skus[number], _pairs(returned)) for number, returned in kept.items()]
    gc.collect()
    census = SessionCensus()
    left = Counter[tuple[str, str]]()
    for keeper in census.keepers:
        if keeper.name != "Product":
            left[keeper.name, _kept_by(keeper)] += keeper.count
    pairs = [pair for _, shown in pages for pair in shown]
    more = census.alive["Product"] - len({id(product) for product, _ in pairs})
    if more > 0 and len(pairs) == len(sold):
        left["Product", ""] += more
    [((name, left_by), count)] = left.most_common(1) or [(("", ""), 0)]
    return Pages(
        **vars(noted),
        left=f"{count:,} {name}" if count else "",
        left_by=left_by,
        pages=sum(
            sorted(asked) == sorted(_sku(product) for product, _ in shown) for asked, shown in pages
        ),
        unreadable=sum(any(name not in vars(product) for name in SHOWN) for product, _ in pairs),
        right=sum(sold.get(_sku(product)) == count for product, count in pairs),
        zeros=sum(count == 0 for _, count in pairs),
        products=len(sold),
        lines=sum(sold.values()),
    )


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


def keeps_more(run: Recording, seen: Pages) -> Iterator[Finding]:
    """Objects that are alive beside the products that were asked for."""
    if not seen.left:
        return
    alive = f"{seen.left} are alive beside what the pages have asked for"
    if seen.collections >= run.announced:
        yield Finding("collects-garbage", f"{alive}, although your code ran the garbage collector.")
    if seen.left_by in ("collection", "the products"):
        yield Finding("collection-stays", f"{alive}, kept by their products.")
    yield Finding("loads-everything", f"{alive}{seen.left_by and f', kept by: {seen.left_by}'}.")


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A page has a pair for each product, which can be read, and how many lines the database has of it."""
    if seen.pages < run.announced:
        yield Finding(
            "returns-something-else",
            f"{seen.pages} of {run.announced} pages were given a pair for each product that they asked for.",
        )
    if seen.unreadable:
        yield Finding(
            "expires-the-whole-object",
            f"{seen.unreadable} of {seen.products} products have no title or price that the page could show.",
        )
    if seen.zeros:
        yield Finding(
            "counts-what-is-loaded",
            f"{seen.zeros} of {seen.products} products are said to be sold in 0 lines.",
        )
    if seen.right < seen.products:
        yield Finding(
            "returns-something-else",
            f"{seen.right} of {seen.products} numbers of lines are right.",
        )


def prove(trials: Trials[Pages]) -> str:
    """What the runs of a right answer have shown."""
    return "\n".join(
        f"{run.announced} pages, {seen.products} products with {seen.lines:,} lines counted right;"
        f" {seen.products} products and 0 sales alive afterwards."
        for run, seen in trials
    )


forget_the_collection = Task(
    "03",
    "forget_the_collection",
    "top_sellers",
    load=show_pages,
    trials=({"first": 4, "each": 3}, {"first": 30, "each": 2}),
    rules=(),
    demands=(keeps_more, leaves_it_checked_out, demands),
    proof=prove,
    curves=("memory",),  # of the objects it would show those in sessions, and these are detached
    memory=BUDGET,
    hints=(
        "Only products are returned, and the session is closed. By which attribute does each product hold its sales?",
        "The page wants a number. Who else could count, so that no Sale is ever made? "
        "Or what could make a product forget its collection, and nothing else?",
        "select(Product, func.count(Sale.id)).join(Product.sales).group_by(Product.sku) brings both at once. "
        'Where a collection must be loaded, session.expire(product, ["sales"]) lets go of it.',
    ),
)
