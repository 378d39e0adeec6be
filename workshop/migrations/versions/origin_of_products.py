"""Products get an origin: the harmless migration of a lesson."""

import sqlalchemy as sa
from alembic import op

revision = "origin_of_products"
down_revision = None


def upgrade() -> None:
    """Takes a millisecond, once the lock is there."""
    op.add_column("products", sa.Column("origin", sa.Text))


def downgrade() -> None:
    """The same."""
    op.drop_column("products", "origin")
