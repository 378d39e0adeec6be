"""What the service of the drill has beside the shop's own tables: who may sign in, and the numbered receipts."""

from __future__ import annotations

from sqlalchemy import ForeignKey, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from workshop.shop import Base, Order

# Not the shop's own, for that one's tables are made wherever the shop is loaded.
metadata = MetaData(naming_convention=Base.metadata.naming_convention)


class _Base(DeclarativeBase):
    metadata = metadata


class Household(_Base):
    """A customer."""

    __tablename__ = "households"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str]


class ApiToken(_Base):
    """What a customer's app signs in with, until it is revoked."""

    __tablename__ = "api_tokens"

    token: Mapped[str] = mapped_column(primary_key=True)
    household_id: Mapped[int] = mapped_column(ForeignKey(Household.id))
    revoked: Mapped[bool] = mapped_column(default=False)


class Receipt(_Base):
    """The tax office wants receipts numbered 1, 2, 3 … in the order of the sales, none missing, none twice."""

    __tablename__ = "receipts"

    order_id: Mapped[int] = mapped_column(ForeignKey(Order.id), primary_key=True)
    number: Mapped[int] = mapped_column(index=True)
