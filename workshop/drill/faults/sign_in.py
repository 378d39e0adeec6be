"""The sign-in, as it was when the incident began."""

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from workshop.drill.accounts import ApiToken, Household
from workshop.drill.service import open_session


class Accounts:
    """Who the customers are."""

    def __init__(self, sessions: async_sessionmaker[AsyncSession]) -> None:
        self.sessions = sessions

    async def get(self, number: int) -> Household | None:
        """The household with this number."""
        async with open_session(self.sessions) as session:
            return await session.get(Household, number)

    async def get_by_token(self, token: str) -> Household | None:
        """The household that this token belongs to; None where there is none, or it was revoked."""
        async with open_session(self.sessions) as session:
            found = await session.get(ApiToken, token)
            if found is None or found.revoked:
                return None
            return await self.get(found.household_id)
