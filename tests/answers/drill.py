"""What people do to the service of the incident drill: what mends it, and the wrong turns, each with its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Turn(NamedTuple):
    """A change of the service: definitions put in the place of their namesakes, and the operator's settings.

    `draws` is the misconception that the judge has to name; None is a service that is mended.
    """

    incident: str
    draws: str | None
    definitions: str = ""
    settings: Mapping[str, str] = {}


ACCOUNTS = """
class Accounts:
    def __init__(self, sessions):
        self.sessions = sessions

    async def get(self, number):
        async with open_session(self.sessions) as session:
            return await session.get(Household, number)

    async def get_by_token(self, token):
        async with open_session(self.sessions) as session:
            found = await session.get(ApiToken, token)
            {}
"""
NESTED = """if found is None or found.revoked:
                return None
            return await self.get(found.household_id)"""
FEED = """
@app.get("/feed")
async def feed(household: SignedIn, session: InSession) -> StreamingResponse:
    async def events():
        last = None
        while True:
            {}

    return StreamingResponse(events(), media_type="text/event-stream")
"""
EXPORT = """
@app.post("/export")
async def export(last: int, household: SignedIn, sessions: SessionFactory, rehearsal: bool = False) -> Exported:
    async with open_session(sessions) as session:
        {}
    done = Exported(lines=len(sales), total=sum((sale.sales_value for sale in sales), Decimal()))
    if not rehearsal:
        {}
    return done
"""
ALL = "sales = (await session.scalars(select(Sale).where(Sale.id <= last))).all()"
COLUMNS = "sales = (await session.execute(select(Sale.sales_value).where(Sale.id <= last){})).all()"
IN_A_THREAD = "await asyncio.to_thread(book, done)"
ORDER = """
async def audit(sessions, action, order):
    {}


@app.post("/orders")
async def place_order(new: NewOrder, household: SignedIn, sessions: SessionFactory) -> int:
    async with open_session(sessions) as session:
        price = await session.scalar(select(Product.unit_price).where(Product.sku == new.sku))
        line = OrderLine(sku=new.sku, quantity=new.quantity, unit_price=price)
        session.add(order := Order(household_id=household.id, lines=[line]))
        await session.flush()
        number = await give_receipt(session, order.id)
        {}
    return number
"""
OWN_SESSION = """async with open_session(sessions) as session:
        session.add(AuditEntry(action=action, order_id=order))
        await session.commit()"""

SAME = """if found is None or found.revoked:
                return None
            return await session.get(Household, found.household_id)"""
AFTER = """number = None if found is None or found.revoked else found.household_id
        return None if number is None else await self.get(number)"""
COMMIT = """last, lines = await new_orders(session, last)
            await session.commit()
            yield lines
            await asyncio.sleep(FEED_SECONDS)"""
DARK = """yield ": welcome\\n\\n"
            await asyncio.sleep(3600)"""
AUDIT_AFTER = """await session.commit()
        await audit(sessions, f"receipt {number}", order.id)"""
AUDIT_WITHIN = """session.add(AuditEntry(action="receipt", order_id=order.id))
        await session.commit()"""

MENDED = {
    "the same session": Turn(
        "sign_in",
        None,
        ACCOUNTS.format(SAME),
    ),
    "one after the other": Turn(
        "sign_in",
        None,
        ACCOUNTS.format(AFTER),
    ),
    "a commit after each look": Turn(
        "live_feed",
        None,
        FEED.format(COMMIT),
    ),
    "columns, and a thread": Turn(
        "nightly_export", None, EXPORT.format(COLUMNS.format(""), IN_A_THREAD)
    ),
    "the audit after the commit": Turn(
        "order_lock",
        None,
        ORDER.format(
            OWN_SESSION,
            AUDIT_AFTER,
        ),
    ),
}

WRONG = {
    "restart": Turn("sign_in", "restarts-it"),
    "a larger pool": Turn("sign_in", "takes-a-larger-share", settings={"POOL_SIZE": "30"}),
    "a larger pool for the screens": Turn(
        "live_feed", "takes-a-larger-share", settings={"POOL_SIZE": "30"}
    ),
    "a shorter timeout": Turn("sign_in", "fails-sooner", settings={"POOL_TIMEOUT": "0.3"}),
    "a longer timeout": Turn("sign_in", "waits-longer", settings={"POOL_TIMEOUT": "20"}),
    "a close that nothing can cancel": Turn(
        "sign_in",
        "blames-cancellation",
        """
@asynccontextmanager
async def open_session(sessions):
    session = sessions()
    try:
        yield session
    except asyncio.CancelledError:
        await asyncio.shield(session.invalidate())
        raise
    finally:
        await asyncio.shield(session.close())
""",
    ),
    "retries": Turn(
        "sign_in",
        "covers-it-with-retries",
        """
class Deadline:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] == "/feed":
            await self.app(scope, receive, send)
            return
        body = await receive()

        async def replay():
            if given:
                return given.pop()
            return await asyncio.Event().wait()

        async def keep(message):
            sent.append(message)

        for attempt in range(8):
            sent, given = [], [body]
            await self.app(scope, replay, keep)
            if sent[0]["status"] not in (401, 503):
                break
            await asyncio.sleep(hash((scope["client"], attempt)) % 1000 / 1000)
        for message in sent:
            await send(message)
""",
    ),
    "an engine of its own": Turn(
        "sign_in",
        "a-pool-beside-the-pool",
        "another = async_sessionmaker(db.make_engine(db.Settings.from_environment()))"
        + ACCOUNTS.format(NESTED).replace(
            "(self.sessions) as session:\n            return",
            "(another) as session:\n            return",
        ),
    ),
    "no sign-in": Turn(
        "sign_in",
        "skips-the-sign-in",
        """
async def signed_in(request: Request) -> Household:
    return Household(id=1, name="household 1")
""",
    ),
    "a cache of tokens": Turn(
        "sign_in",
        "remembers-the-token",
        "known: dict[str, Household] = {}\n"
        + ACCOUNTS.format(NESTED).replace("get_by_token", "ask")
        + """
    async def get_by_token(self, token):
        if token not in known and (household := await self.ask(token)):
            known[token] = household
        return known.get(token)
""",
    ),
    "dark screens": Turn(
        "live_feed",
        "turns-the-screens-off",
        FEED.format(DARK).replace("session: InSession", "sessions: SessionFactory"),
    ),
    "a short export": Turn(
        "nightly_export",
        "exports-less",
        EXPORT.format(COLUMNS.format(".limit(1000)"), IN_A_THREAD),
    ),
    "a thread, and the list": Turn(
        "nightly_export",
        "ends-the-stops-only",
        EXPORT.format(ALL + "\n        booked.append(sales)", IN_A_THREAD),
    ),
    "no list, and no thread": Turn(
        "nightly_export", "ends-the-growth-only", EXPORT.format(COLUMNS.format(""), "book(done)")
    ),
    "no lock": Turn(
        "order_lock",
        "the-lock-is-in-the-way",
        ORDER.format(
            "raise NotImplementedError",
            AUDIT_WITHIN,
        )
        + """
async def give_receipt(session, order):
    last = await session.scalar(select(func.max(Receipt.number)))
    session.add(Receipt(order_id=order, number=(last or 0) + 1))
    await session.flush()
    return (last or 0) + 1
""",
    ),
}
DRAWN = {turn.draws for turn in WRONG.values()}
