"""The checks of exercise 02: how many may come in, and an audit log that outlives a rollback."""

from workshop.checks.feeding_the_pool.choose_the_permits import choose_the_permits
from workshop.checks.feeding_the_pool.keep_the_audit import keep_the_audit

__all__ = ["choose_the_permits", "keep_the_audit"]
