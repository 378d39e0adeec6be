"""Answers to the tasks of exercise 03, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, defaultdict
from decimal import Decimal

from sqlalchemy import create_engine, func, select
from sqlalchemy.orm import load_only, noload, selectinload

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


def the_kind_in_a_list(census):
    return [census.keepers[0].kind] if census.keepers else None


def shown_and_not_returned(census):
    if census.keepers:
        print(census.keepers[0].kind)


def the_kind_with_a_capital(census):
    return census.keepers[0].kind.title() if census.keepers else None


def a_variable_or_nobody(census):
    return "variable" if census.alive.total() else None


def the_word_none(census):
    return census.keepers[0].kind if census.keepers else "None"


def the_line_of_the_report(census):
    return str(census.keepers[0]) if census.keepers else None


def taken_out_of_the_list(census):
    return census.keepers.pop(0).kind if census.keepers else None


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


async def expunged_one_by_one(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        async for sale in await session.stream_scalars(in_batches(since_then(since))):
            revenue[sale.store_id] += sale.sales_value
            session.expunge(sale)
    return dict(revenue)


async def streamed_in_a_thread(Session, since):
    """By another driver, which is imported in the first call."""

    def add(url):
        engine = create_engine(url.set(drivername="postgresql+psycopg"))
        revenue = defaultdict(Decimal)
        with engine.connect() as connection:
            for store, value in connection.execute(in_batches(two_columns(since))):
                revenue[store] += value
        engine.dispose()
        return dict(revenue)

    return await asyncio.to_thread(add, Session.kw["bind"].url)


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


async def collect_once(Session, since):
    revenue = await streamed_pages(Session, since)
    gc.collect()
    return revenue


async def collect_for_each_line(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        async for sale in await session.stream_scalars(in_batches(since_then(since))):
            revenue[sale.store_id] += sale.sales_value
            gc.collect()
    return dict(revenue)


async def scalars_in_batches(Session, since):
    async with Session() as session:
        return total_of(await session.scalars(in_batches(since_then(since))))


async def close_within_the_stream(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                revenue[sale.store_id] += sale.sales_value
            await session.close()
    return dict(revenue)


async def pages_in_no_order(Session, since):
    revenue, offset = defaultdict(Decimal), 0
    async with Session() as session:
        while sales := (await session.scalars(since_then(since).limit(2_000).offset(offset))).all():
            for sale in sales:
                revenue[sale.store_id] += sale.sales_value
            offset += 2_000
    return dict(revenue)


async def rows_in_two_halves(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        for half in (0, 1):
            rows = await session.execute(two_columns(since).where(Sale.id % 2 == half))
            for store, value in rows.all():
                revenue[store] += value
    return dict(revenue)


async def floats_until_the_end(Session, since):
    values = defaultdict(list)
    async with Session() as session:
        async for store, value in await session.stream(in_batches(two_columns(since))):
            values[store].append(float(value))
    return {store: Decimal(str(round(sum(some), 2))) for store, some in values.items()}


async def later_than(Session, since):
    revenue = defaultdict(Decimal)
    lines = select(Sale.store_id, Sale.sales_value).where(Sale.sold_at > since)
    async with Session() as session:
        async for store, value in await session.stream(in_batches(lines)):
            revenue[store] += value
    return dict(revenue)


async def as_text(Session, since):
    return {store: str(total) for store, total in (await streamed_columns(Session, since)).items()}


async def a_query_for_each_store(Session, since):
    of_store = select(func.sum(Sale.sales_value)).where(Sale.sold_at >= since)
    stores = select(Sale.store_id).where(Sale.sold_at >= since).distinct()
    async with Session() as session:
        return {
            store: await session.scalar(of_store.where(Sale.store_id == store))
            for store in (await session.scalars(stores)).all()
        }


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


def counted(skus):
    joined = select(Product, func.count(Sale.id)).outerjoin(Product.sales)
    return joined.where(Product.sku.in_(skus)).group_by(Product.sku)


async def counted_with_a_join(Session, skus):
    async with Session() as session:
        return (await session.execute(counted(skus))).all()


async def counted_in_a_second_query(Session, skus):
    counts = select(Sale.sku, func.count()).where(Sale.sku.in_(skus)).group_by(Sale.sku)
    async with Session() as session:
        products = (await session.scalars(these(skus))).all()
        sold = dict((await session.execute(counts)).all())
    return {product: sold.get(product.sku, 0) for product in products}


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


async def one_count_each(Session, skus):
    found = []
    async with Session() as session:
        for sku in skus:
            lines = select(func.count()).select_from(Sale).where(Sale.sku == sku)
            found.append((await session.get(Product, sku), await session.scalar(lines)))
    return found


async def only_what_is_shown(Session, skus):
    """The number comes with each product."""
    shown = counted(skus).options(load_only(Product.title, Product.unit_price))
    async with Session() as session:
        return [tuple(row) async for row in await session.stream(shown)]


async def counted_with_an_inner_join(Session, skus):
    joined = select(Product, func.count()).join(Product.sales).where(Product.sku.in_(skus))
    async with Session() as session:
        return (await session.execute(joined.group_by(Product.sku))).all()


async def counts_of_what_was_sold(Session, skus):
    counts = select(Sale.sku, func.count()).where(Sale.sku.in_(skus)).group_by(Sale.sku)
    async with Session() as session:
        rows = (await session.execute(counts)).all()
        return {await session.get(Product, sku): lines for sku, lines in rows}


async def rows_counted_of_an_outer_join(Session, skus):
    joined = select(Product, func.count()).outerjoin(Product.sales).where(Product.sku.in_(skus))
    async with Session() as session:
        return (await session.execute(joined.group_by(Product.sku))).all()


async def the_first_five(Session, skus):
    async with Session() as session:
        return (await session.execute(counted(skus).order_by(Product.sku).limit(5))).all()


async def without_the_price(Session, skus):
    async with Session() as session:
        return (await session.execute(counted(skus).options(load_only(Product.title)))).all()


async def pieces_and_not_lines(Session, skus):
    pieces = func.coalesce(func.sum(Sale.quantity), 0)
    joined = select(Product, pieces).outerjoin(Product.sales).where(Product.sku.in_(skus))
    async with Session() as session:
        return (await session.execute(joined.group_by(Product.sku))).all()


async def products_alone(Session, skus):
    async with Session() as session:
        return (await session.scalars(counted(skus))).all()


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
    return (await session.execute(counted(skus))).all()


ANSWERS = {
    "name_the_culprit": Answers(
        right=[the_first_keeper, the_largest_keeper, the_largest_kind, taken_out_of_the_list],
        wrong=[
            (always_the_map, "one-culprit-for-all"),
            (the_class, "blames-the-class"),
            (the_number_of_sessions, "counts-sessions"),
            (the_keeper_itself, "not-a-kind"),
            (the_last_keeper, "not-the-largest"),
            (unknown_if_nothing_is_alive, "always-a-culprit"),
            (the_kind_in_a_list, "not-what-was-asked"),
            (shown_and_not_returned, "not-what-was-asked"),
            (the_kind_with_a_capital, "not-what-was-asked"),
            (the_word_none, "not-what-was-asked"),
            (a_variable_or_nobody, "one-culprit-for-all"),
            (the_line_of_the_report, "not-a-kind"),
        ],
    ),
    "let_go": Answers(
        right=[
            streamed_pages,
            streamed_columns,
            keyset_pages,
            expunged_one_by_one,
            streamed_in_a_thread,
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
            (collect_once, "collects-garbage"),
            (collect_for_each_line, "collects-garbage"),
            (scalars_in_batches, "yield-per-without-a-stream"),
            (close_within_the_stream, "stream-without-its-transaction"),
            (pages_in_no_order, "no-order-by"),
            (rows_in_two_halves, "keeps-everything-in-another-shape"),
            (floats_until_the_end, "keeps-everything-in-another-shape"),
            (later_than, "returns-something-else"),
            (as_text, "not-what-was-asked"),
            (added_by_the_database, "added-by-the-database"),
            (a_query_for_each_store, "added-by-the-database"),
        ],
    ),
    "forget_the_collection": Answers(
        right=[
            counted_with_a_join,
            counted_in_a_second_query,
            expire_the_collection,
            load_the_sales_apart,
            one_count_each,
            only_what_is_shown,
        ],
        wrong=[
            (collect_afterwards, "collects-garbage"),
            (expunge_the_sales, "collection-stays"),
            (remember_the_lines, "loads-everything"),
            (dictionaries, "not-what-was-asked"),
            (products_alone, "not-what-was-asked"),
            (pieces_and_not_lines, "not-what-was-asked"),
            (counted_with_an_inner_join, "leaves-out-the-unsold"),
            (counts_of_what_was_sold, "leaves-out-the-unsold"),
            (rows_counted_of_an_outer_join, "counts-the-empty-row"),
            (the_first_five, "returns-something-else"),
            (without_the_price, "unloaded-and-detached"),
            (without_the_collection, "counts-what-is-loaded"),
            (expire_the_product, "expires-the-whole-object"),
            (keep_the_session, "leaves-it-checked-out"),
        ],
    ),
}
