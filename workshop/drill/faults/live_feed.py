"""The live feed, as it was when the incident began."""

import asyncio
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from workshop.drill.service import FEED_SECONDS, InSession, SignedIn, app, new_orders


@app.get("/feed")
async def feed(household: SignedIn, session: InSession) -> StreamingResponse:
    """The numbers of new orders as they come, for the screen in the warehouse."""

    async def events() -> AsyncIterator[str]:
        last = None
        while True:
            last, lines = await new_orders(session, last)
            yield lines
            await asyncio.sleep(FEED_SECONDS)

    return StreamingResponse(events(), media_type="text/event-stream")
