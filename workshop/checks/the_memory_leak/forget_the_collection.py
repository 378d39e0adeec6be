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
from workshop.checks.evidence import evidence
from workshop.checks.lent import Conditions
from workshop.checks.memory import MemoryBudget, Read, reading
from workshop.checks.returned import another_answer
from workshop.checks.rules import leaves_it_checked_out
from workshop.checks.task import Task
from workshop.shop import Product, Sale

PAGES = 8
MORE_ON_ONE_PAGE = 4  # new products, so that the pages are not all of one size
SHOWN = ("sku", "title", "unit_price")  # what the page reads of a product
BUDGET = MemoryBudget(container=100, objects=5_000, mebibytes=100)  # the function as given takes 70


@dataclass(kw_only=True)
class Pages(Read):
    """What pages were given of so many `products`, which were sold in so many `lines`, or never (`unsold`).

    `left` is what is alive beside the products, in words, and `left_by` the kind of its keeper; both are empty where
    nothing is. `other` says of one page what it was given in place of pairs. `pages` have a pair for each product;
    of the others `missing` products have none, and `missing_unsold` of these were never sold. Of the products that
    were given `expired` and `unloaded` cannot be shown, `zeros` are said to be sold in 0 lines and were, and
    `unsold_in_a_line` the other way round; `wrong` tells the first number that is not right.
    """

    left: str
    left_by: str
    other: str
    pages: int
    products: int
    unsold: int
    lines: int
    missing: int = 0
    missing_unsold: int = 0
    expired: int = 0
    unloaded: int = 0
    zeros: int = 0
    unsold_in_a_line: int = 0
    wrong: str = ""


async def show_pages(
    top_sellers: Callable[..., Any], conditions: Conditions, *, first: int, each: int
) -> Pages:
    """Let pages ask for well-sold products and new ones, keep what they get, and count what is alive then."""
    engine = conditions.engine(capacity=PAGES)
    lines = func.count(Sale.id).label("lines")
    counted = select(Product.sku, lines).join(Sale).group_by(Product.sku)
    never = select(Product.sku).where(~Product.sales.any()).order_by(Product.sku)
    async with engine.connect() as connection:
        best = counted.order_by(lines.desc(), Product.sku).offset(first).limit(PAGES * each)
        sold = {row.sku: row.lines for row in await connection.execute(best)}
        new = list(await connection.scalars(never.offset(first).limit(PAGES + MORE_ON_ONE_PAGE)))
    skus = [[*list(sold)[number::PAGES], new[number]] for number in range(PAGES)]
    skus[0] += new[PAGES:]
    sold |= dict.fromkeys(new, 0)
    kept: dict[int, Any] = {}

    async def show(number: int) -> None:
        kept[number] = await top_sellers(async_sessionmaker(engine), list(skus[number]))

    with reading(top_sellers, engine) as noted_of_reading:
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
    found = Pages(
        **vars(noted),
        **vars(noted_of_reading),
        left=f"{count:,} {name}" if count else "",
        left_by=left_by,
        other=next(
            (
                _difference(skus[number], sold, returned)
                for number, returned in kept.items()
                if not _pairs(returned)
            ),
            "",
        ),
        pages=sum(
            sorted(asked) == sorted(_sku(product) for product, _ in shown) for asked, shown in pages
        ),
        products=len(sold),
        unsold=len(new),
        lines=sum(sold.values()),
    )
    for asked, shown in pages:
        missing = {*asked} - {_sku(product) for product, _ in shown}
        found.missing += len(missing)
        found.missing_unsold += len(missing & {*new})
    for product, count in pairs:
        _look_at(found, product, count, sold.get(_sku(product)))
    return found


def _look_at(found: Pages, product: Product, count: Any, lines: int | None) -> None:
    """Note whether a product can be shown, and whether its number is right."""
    if any(name not in vars(product) for name in SHOWN):
        expired = bool(inspect(product).expired_attributes & {*SHOWN})
        found.expired += expired
        found.unloaded += not expired
    if count == lines:
        return
    found.zeros += count == 0
    found.unsold_in_a_line += (count, lines) == (1, 0)
    if not found.wrong:
        said = f"{count!r} ({type(count).__name__})"
        found.wrong = f"Product {_sku(product)} was sold in {lines} lines, and the page got {said}."


def _difference(skus: list[int], sold: dict[int, int], returned: Any) -> str:
    """What a page was given in place of pairs."""
    wanted = [(Product(sku=sku), sold[sku]) for sku in skus]
    return another_answer(f"top_sellers(Session, {skus})", returned, wanted).evidence


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
    if seen.collected_at:
        yield Finding("collects-garbage", f"{seen.collected_at}, called gc.collect(), and {alive}.")
    if seen.left_by in ("collection", "the products"):
        yield Finding("collection-stays", f"{alive}, kept by their products.")
    yield Finding("loads-everything", f"{alive}{seen.left_by and f', kept by: {seen.left_by}'}.")


def demands(run: Recording, seen: Pages) -> Iterator[Finding]:
    """A page has a pair for each product, which can be read, and how many lines the database has of it."""
    if seen.other:
        yield Finding("not-what-was-asked", seen.other)
    if seen.missing and seen.missing == seen.missing_unsold == seen.unsold:
        yield Finding(
            "leaves-out-the-unsold",
            f"{seen.missing} of {seen.products} products are missing, and all of these were never sold.",
        )
    if seen.pages < run.announced:
        yield Finding(
            "returns-something-else",
            f"{seen.pages} of {run.announced} pages were given a pair for each product that they asked for.",
        )
    if seen.expired:
        yield Finding(
            "expires-the-whole-object",
            f"{seen.expired} of {seen.products} products have expired: no title or price that the page could show.",
        )
    if seen.unloaded:
        yield Finding(
            "unloaded-and-detached",
            f"{seen.unloaded} of {seen.products} products were never given the title or the price that the page shows.",
        )
    if seen.unsold_in_a_line:
        yield Finding(
            "counts-the-empty-row",
            f"{seen.unsold_in_a_line} of {seen.unsold} products that were never sold are said to be in 1 line.",
        )
    if seen.zeros:
        yield Finding(
            "counts-what-is-loaded",
            f"{seen.zeros} of {seen.products} products are said to be sold in 0 lines, and were sold.",
        )
    if seen.wrong:
        yield Finding("not-what-was-asked", seen.wrong)


def prove(run: Recording, seen: Pages) -> str:
    """What a run of a right answer has shown."""
    return (
        f"{run.announced} pages, {seen.products} products with {seen.lines:,} lines counted right, {seen.unsold} of"
        " them never sold;"
        f" {seen.products} products and 0 sales alive afterwards."
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
        "select(Product, func.count(Sale.id)).outerjoin(Product.sales).group_by(Product.sku) brings both at once, "
        "also for a product without a sale. "
        'Where a collection must be loaded, session.expire(product, ["sales"]) lets go of it.',
    ),
)
