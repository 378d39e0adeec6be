"""Answers to the tasks of exercise 03, right and wrong, as people give them."""

from __future__ import annotations

import gc
from collections import Counter, defaultdict
from decimal import Decimal

from sqlalchemy import func, select
from sqlalchemy.orm import lazyload, noload, selectinload

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


def always_the_session(census):
    return "modified"


def the_class(census):
    return census.alive.most_common(1)[0][0] if census.alive else None


def the_keepers_class(census):
    return census.keepers[0].name if census.keepers else None


def the_number_of_sessions(census):
    return census.sessions or None


def how_many_sessions(census):
    return census.sessions


def the_keeper_itself(census):
    return census.keepers[0] if census.keepers else None


def where_it_is(census):
    return census.keepers[0].where if census.keepers else None


def the_last_keeper(census):
    return census.keepers[-1].kind if census.keepers else None


def the_first_by_name(census):
    return min((one.kind for one in census.keepers), default=None)


def unknown_if_nothing_is_alive(census):
    return census.keepers[0].kind if census.keepers else "unknown"


def empty_if_nothing_is_alive(census):
    return census.keepers[0].kind if census.keepers else ""


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


async def streamed_one_by_one(Session, since):
    revenue = {}
    async with Session() as session:
        async for sale in await session.stream_scalars(in_batches(since_then(since))):
            revenue[sale.store_id] = revenue.get(sale.store_id, 0) + sale.sales_value
    return revenue


async def streamed_with_a_number(Session, since):
    revenue = Counter()
    async with Session() as session:
        lines = await session.stream_scalars(since_then(since))
        async for page in lines.partitions(1_500):
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


async def collect_and_keep(Session, since):
    by_store = defaultdict(list)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                by_store[sale.store_id].append(sale)
            gc.collect()
    return {store: sum(one.sales_value for one in lines) for store, lines in by_store.items()}


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


async def all_then_collect(Session, since):
    revenue = await all_then_del(Session, since)
    gc.collect()
    return revenue


async def streamed_in_one_piece(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        async for sale in await session.stream_scalars(since_then(since)):
            revenue[sale.store_id] += sale.sales_value
    return dict(revenue)


async def columns_in_one_piece(Session, since):
    revenue = defaultdict(Decimal)
    async with Session() as session:
        async for store, value in await session.stream(two_columns(since)):
            revenue[store] += value
    return dict(revenue)


async def expunge_each(Session, since):
    kept = []
    async with Session() as session:
        async for sale in await session.stream_scalars(in_batches(since_then(since))):
            session.expunge(sale)
            kept.append(sale)
    return total_of(kept)


async def a_session_for_each_page(Session, since):
    kept, last = [], 0
    page = since_then(since).order_by(Sale.id).limit(1_000)
    while True:
        async with Session() as session:
            sales = (await session.scalars(page.where(Sale.id > last))).all()
        if not sales:
            return total_of(kept)
        kept += sales
        last = sales[-1].id


async def all_rows(Session, since):
    async with Session() as session:
        return total_of((await session.execute(two_columns(since))).all())


async def all_dictionaries(Session, since):
    kept = []
    async with Session() as session:
        lines = await session.stream(in_batches(two_columns(since)))
        async for page in lines.mappings().partitions():
            kept += [dict(row) for row in page]
    revenue = defaultdict(Decimal)
    for row in kept:
        revenue[row["store_id"]] += row["sales_value"]
    return dict(revenue)


async def a_thousand_lines(Session, since):
    async with Session() as session:
        return total_of((await session.scalars(since_then(since).limit(1_000))).all())


async def one_line_in_a_hundred(Session, since):
    some = since_then(since).where(Sale.id % 100 == 0)
    async with Session() as session:
        revenue = total_of((await session.scalars(some)).all())
    return {store: 100 * total for store, total in revenue.items()}


async def with_floats(Session, since):
    revenue = defaultdict(float)
    async with Session() as session:
        lines = await session.stream_scalars(in_batches(since_then(since)))
        async for page in lines.partitions():
            for sale in page:
                revenue[sale.store_id] += float(sale.sales_value)
    return dict(revenue)


async def with_rounded_floats(Session, since):
    return {store: round(one, 2) for store, one in (await with_floats(Session, since)).items()}


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


async def counted_one_by_one(Session, skus):
    found = []
    async with Session() as session:
        for sku in skus:
            product = await session.get(Product, sku)
            count = await session.scalar(select(func.count()).where(Sale.sku == sku))
            found.append([product, count])
    return found


async def counted_in_a_column(Session, skus):
    count = select(func.count()).where(Sale.sku == Product.sku).scalar_subquery()
    async with Session() as session:
        return (await session.execute(these(skus).add_columns(count))).all()


async def expire_the_collection(Session, skus):
    found = {}
    async with Session() as session:
        for product in await session.scalars(with_sales(skus)):
            found[product] = len(product.sales)
            session.expire(product, ["sales"])
    return found


async def expire_and_collect(Session, skus):
    found = await expire_the_collection(Session, skus)
    gc.collect()
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


async def expunge_everything(Session, skus):
    async with Session() as session:
        products = (await session.scalars(with_sales(skus))).all()
        found = [(product, len(product.sales)) for product in products]
        session.expunge_all()
    return found


lines_seen = []


async def remember_the_lines(Session, skus):
    async with Session() as session:
        lines_seen.extend(await session.scalars(select(Sale).where(Sale.sku.in_(skus))))
    return await counted_with_a_join(Session, skus)


all_products = []


async def remember_products(Session, skus):
    async with Session() as session:
        all_products.extend(await session.scalars(select(Product).limit(50)))
    return await counted_with_a_join(Session, skus)


async def dictionaries(Session, skus):
    return [
        {"sku": product.sku, "title": product.title, "lines": count}
        for product, count in await counted_with_a_join(Session, skus)
    ]


async def rows_of_columns(Session, skus):
    counted = select(Product.sku, func.count()).join(Product.sales).where(Product.sku.in_(skus))
    async with Session() as session:
        return (await session.execute(counted.group_by(Product.sku))).all()


async def without_the_collection(Session, skus):
    async with Session() as session:
        products = (await session.scalars(these(skus).options(noload(Product.sales)))).all()
        return [(product, len(product.sales)) for product in products]


async def what_is_loaded(Session, skus):
    async with Session() as session:
        products = (await session.scalars(these(skus).options(lazyload(Product.sales)))).all()
        return [(product, len(vars(product).get("sales", []))) for product in products]


async def expire_the_product(Session, skus):
    found = []
    async with Session() as session:
        for product in (await session.scalars(with_sales(skus))).all():
            found.append((product, len(product.sales)))
            session.expire(product)
    return found


async def commit_at_the_end(Session, skus):
    async with Session() as session:
        products = (await session.scalars(with_sales(skus))).all()
        found = [(product, len(product.sales)) for product in products]
        await session.commit()
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
            (always_the_session, "one-culprit-for-all"),
            (the_class, "blames-the-class"),
            (the_keepers_class, "blames-the-class"),
            (the_number_of_sessions, "counts-sessions"),
            (how_many_sessions, "counts-sessions"),
            (the_keeper_itself, "not-a-kind"),
            (where_it_is, "not-a-kind"),
            (the_last_keeper, "not-the-largest"),
            (the_first_by_name, "not-the-largest"),
            (unknown_if_nothing_is_alive, "always-a-culprit"),
            (empty_if_nothing_is_alive, "always-a-culprit"),
        ],
    ),
    "let_go": Answers(
        right=[
            streamed_pages,
            streamed_one_by_one,
            streamed_with_a_number,
            streamed_columns,
            added_by_the_database,
            keyset_pages,
        ],
        wrong=[
            (collect_in_the_loop, "collects-garbage"),
            (collect_and_keep, "collects-garbage"),
            (expunge_all_in_the_stream, "expunge-all-in-a-stream"),
            (all_then_del, "loads-everything"),
            (all_then_collect, "loads-everything"),
            (streamed_in_one_piece, "stream-without-yield-per"),
            (columns_in_one_piece, "stream-without-yield-per"),
            (expunge_each, "detached-is-freed"),
            (a_session_for_each_page, "detached-is-freed"),
            (all_rows, "keeps-everything-in-another-shape"),
            (all_dictionaries, "keeps-everything-in-another-shape"),
            (a_thousand_lines, "returns-something-else"),
            (one_line_in_a_hundred, "returns-something-else"),
            (with_floats, "floats-lose-cents"),
            (with_rounded_floats, "floats-lose-cents"),
            (leave_the_session_open, "leaves-it-checked-out"),
        ],
    ),
    "forget_the_collection": Answers(
        right=[
            counted_with_a_join,
            counted_in_a_second_query,
            counted_one_by_one,
            counted_in_a_column,
            expire_the_collection,
            expire_and_collect,
            load_the_sales_apart,
        ],
        wrong=[
            (collect_afterwards, "collects-garbage"),
            (expunge_the_sales, "collection-stays"),
            (expunge_everything, "collection-stays"),
            (remember_the_lines, "loads-everything"),
            (remember_products, "loads-everything"),
            (dictionaries, "returns-something-else"),
            (rows_of_columns, "returns-something-else"),
            (without_the_collection, "counts-what-is-loaded"),
            (what_is_loaded, "counts-what-is-loaded"),
            (expire_the_product, "expires-the-whole-object"),
            (commit_at_the_end, "expires-the-whole-object"),
            (keep_the_session, "leaves-it-checked-out"),
        ],
    ),
}
