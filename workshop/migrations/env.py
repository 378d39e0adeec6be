"""Alembic's way to the database of a service: a migration that gets no lock gives up and lets the line move.

Copy this file into your service's folder of migrations. MIGRATION_URL is for a role and a driver of its own
(postgresql+psycopg://...); LOCK_TIMEOUT is in PostgreSQL's units.
"""

import os

from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool


def migrate() -> None:
    """Carry out what is wanted, each migration in a transaction of its own.

    Raises OperationalError (LockNotAvailable) where a lock does not come in time. What that migration had done is
    undone then, those before it stay; start it again, at a better moment.
    """
    settings = {
        "lock_timeout": os.environ.get("LOCK_TIMEOUT", "2s"),
        "statement_timeout": "0",  # to build an index may take hours
        "application_name": "migration",
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    engine = create_engine(
        os.environ["MIGRATION_URL"], poolclass=NullPool, connect_args={"options": options}
    )
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=None,  # your Base.metadata, for `alembic revision --autogenerate`
            transaction_per_migration=True,
        )
        with context.begin_transaction():
            context.run_migrations()


migrate()
