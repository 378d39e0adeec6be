"""The checks of exercise 01: two handlers that hold a connection while they ask for another."""

from workshop.checks.pool_starvation.enrich_in_parallel import enrich_in_parallel
from workshop.checks.pool_starvation.reuse_the_session import reuse_the_session

__all__ = ["enrich_in_parallel", "reuse_the_session"]
