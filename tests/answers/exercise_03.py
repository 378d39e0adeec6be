"""Answers to the tasks of exercise 03, right and wrong, as people give them."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from decimal import Decimal

from sqlalchemy import func, select
from sqlalchemy.orm import noload, selectinload

from answers import Answers
from workshop.shop import Product, Sale

# The alarm


def the_first_keeper(census):
    return census.keepers[0].kind if census.keepers else None


def the_largest_keeper(census):
    largest = max(census.keepers, default=None)
    return largest and largest.kind


def the_largest_kind(census):
    kinds = Counter()
    for keeper in census.keepers:
        kinds[keeper.kind] += keeper.count
    return kinds.most_common(1)[0][0] if kinds else None


def always_the_map(census):
    return "the identity map"


def the_class(census):
    return census.alive.most_common(1)[0][0] if census.alive else None


def the_number_of_sessions(census):
    return census.sessions or None


def the_keeper_itself(census):
    return census.keepers[0] if census.keepers else None


def the_last_keeper(census):
    return census.keepers[-1].kind if census.keepers else None


def unknown_if_nothing_is_alive(census):
    return census.keepers[0].kind if census.keepers else "unknown"


# The nightly sums


def since_then(since):
    return select(Sale).where(Sale.sold_at >= since)


def in_batches(statement):
    return statement.execution_options(yield_per=1_000)


async def streamed_pages(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                revenue[sale.store_id] += sale.sales_value
    return revenue


def two_columns(since):
    return select(Sale.store_id, Sale.sales_value).where(Sale.sold_at >= since)


async def streamed_columns(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        async for store, value in await session.stream(in_batches(two_columns(since))):
            revenue[store] += value
    return dict(revenue)


async def added_by_the_database(Session, since):
    total = func.sum(Sale.sales_value)
    sums = select(Sale.store_id, total).where(Sale.sold_at >= since).group_by(Sale.store_id)
    async with Session() as session:
        return dict((await session.execute(sums)).all())


async def keyset_pages(Session, since):
    revenue, last = defaultdict(Decimal), 0
    page = since_then(since).order_by(Sale.id).limit(1_000)
    while True:
        async with Session() as session:
            sales = (await session.scalars(page.where(Sale.id > last))).all()
        if not sales:
            return dict(revenue)
        for sale in sales:
            revenue[sale.store_id] += sale.sales_value
        last = sales[-1].id


def total_of(sales):
    revenue = defaultdict(Decimal)
    for sale in sales:
        revenue[sale.store_id] += sale.sales_value
    return dict(revenue)


async def collect_in_the_loop(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                revenue[sale.store_id] += sale.sales_value
            gc.collect()
    return dict(revenue)


async def expunge_all_in_the_stream(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                revenue[sale.store_id] += sale.sales_value
            session.expunge_all()
    return dict(revenue)


async def all_then_del(Session, since):
    async with Session() as session:
        sales = (await session.scalars(since_then(since))).all()
        revenue = total_of(sales)
        del sales
    return revenue


async def streamed_in_one_piece(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        async for sale in await session.stream_scalars(since_then(since)):
            revenue[sale.store_id] += sale.sales_value
    return dict(revenue)


async def expunge_each(Session, since):
    kept = []
    async with Session() as session:
        async for sale in await session.stream_scalars(in_batches(since_then(since))):
            session.expunge(sale)
            kept.append(sale)
    return total_of(kept)


async def all_rows(Session, since):
    async with Session() as session:
        return total_of((await session.execute(two_columns(since))).all())


async def bare_numbers(Session, since):
    stores, values = [], []
    async with Session() as session:
        lines = await session.stream(in_batches(two_columns(since)))
        async for page in lines.partitions():
            stores += [sale.store_id for sale in page]
            values += [sale.sales_value for sale in page]
    sums = dict.fromkeys(stores, Decimal(0))
    for store, value in zip(stores, values, strict=True):
        sums[store] += value
    return sums


async def a_thousand_lines(Session, since):
    async with Session() as session:
        return total_of((await session.scalars(since_then(since).limit(1_000))).all())


async def with_floats(Session, since):
    revenue = defaultdict(float)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                revenue[sale.store_id] += float(sale.sales_value)
    return dict(revenue)


open_sessions = []


async def leave_the_session_open(Session, since):
    total = func.sum(Sale.sales_value)
    sums = select(Sale.store_id, total).where(Sale.sold_at >= since).group_by(Sale.store_id)
    session = Session()
    open_sessions.append(session)
    return dict((await session.execute(sums)).all())


# The page of top sellers


def with_sales(skus):
    return select(Product).where(Product.sku.in_(skus)).options(selectinload(Product.sales))


def these(skus):
    return select(Product).where(Product.sku.in_(skus))


async def counted_with_a_join(Session, skus):
    counted = select(Product, func.count()).join(Product.sales).where(Product.sku.in_(skus))
    async with Session() as session:
        return (await session.execute(counted.group_by(Product.sku))).all()


async def counted_in_a_second_query(Session, skus):
    counts = select(Sale.sku, func.count()).where(Sale.sku.in_(skus)).group_by(Sale.sku)
    async with Session() as session:
        products = (await session.scalars(these(skus))).all()
        sold = dict((await session.execute(counts)).all())
    return {product: sold[product.sku] for product in products}


async def expire_the_collection(Session, skus):
    found = {}
    async with Session() as session:
        for product in await session.scalars(with_sales(skus)):
            found[product] = len(product.sales)
            session.expire(product, ["sales"])
    return found


async def load_the_sales_apart(Session, skus):
    async with Session() as session:
        products = (await session.scalars(these(skus))).all()
        sales = (await session.scalars(select(Sale.sku).where(Sale.sku.in_(skus)))).all()
    sold = Counter(sales)
    return [(product, sold[product.sku]) for product in products]


async def pairs_of(Session, skus):
    async with Session() as session:
        products = (await session.scalars(with_sales(skus))).all()
        return [(product, len(product.sales)) for product in products]


async def collect_afterwards(Session, skus):
    found = await pairs_of(Session, skus)
    gc.collect()
    return found


async def expunge_the_sales(Session, skus):
    found = []
    async with Session() as session:
        for product in (await session.scalars(with_sales(skus))).all():
            found.append((product, len(product.sales)))
            for sale in product.sales:
                session.expunge(sale)
    return found


lines_seen = []


async def remember_the_lines(Session, skus):
    async with Session() as session:
        lines_seen.extend(await session.scalars(select(Sale).where(Sale.sku.in_(skus))))
    return await counted_with_a_join(Session, skus)


async def dictionaries(Session, skus):
    return [
        {"sku": product.sku, "title": product.title, "lines": count}
        for product, count in await counted_with_a_join(Session, skus)
    ]


async def without_the_collection(Session, skus):
    async with Session() as session:
        products = (await session.scalars(these(skus).options(noload(Product.sales)))).all()
        return [(product, len(product.sales)) for product in products]


async def expire_the_product(Session, skus):
    found = []
    async with Session() as session:
        for product in (await session.scalars(with_sales(skus))).all():
            found.append((product, len(product.sales)))
            session.expire(product)
    return found


async def keep_the_session(Session, skus):
    session = Session()
    open_sessions.append(session)
    counted = select(Product, func.count()).join(Product.sales).where(Product.sku.in_(skus))
    return (await session.execute(counted.group_by(Product.sku))).all()


ANSWERS = {
    "name_the_culprit": Answers(
        right=[the_first_keeper, the_largest_keeper, the_largest_kind],
        wrong=[
            (always_the_map, "one-culprit-for-all"),
            (the_class, "blames-the-class"),
            (the_number_of_sessions, "counts-sessions"),
            (the_keeper_itself, "not-a-kind"),
            (the_last_keeper, "not-the-largest"),
            (unknown_if_nothing_is_alive, "always-a-culprit"),
        ],
    ),
    "let_go": Answers(
        right=[
            streamed_pages,
            streamed_columns,
            added_by_the_database,
            keyset_pages,
        ],
        wrong=[
            (collect_in_the_loop, "collects-garbage"),
            (expunge_all_in_the_stream, "expunge-all-in-a-stream"),
            (all_then_del, "loads-everything"),
            (streamed_in_one_piece, "stream-without-yield-per"),
            (expunge_each, "detached-is-freed"),
            (all_rows, "keeps-everything-in-another-shape"),
            (bare_numbers, "keeps-everything-in-another-shape"),
            (a_thousand_lines, "returns-something-else"),
            (with_floats, "floats-lose-cents"),
            (leave_the_session_open, "leaves-it-checked-out"),
        ],
    ),
    "forget_the_collection": Answers(
        right=[
            counted_with_a_join,
            counted_in_a_second_query,
            expire_the_collection,
            load_the_sales_apart,
        ],
        wrong=[
            (collect_afterwards, "collects-garbage"),
            (expunge_the_sales, "collection-stays"),
            (remember_the_lines, "loads-everything"),
            (dictionaries, "returns-something-else"),
            (without_the_collection, "counts-what-is-loaded"),
            (expire_the_product, "expires-the-whole-object"),
            (keep_the_session, "leaves-it-checked-out"),
        ],
    ),
}
