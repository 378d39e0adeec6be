"""The checks of exercise 08: what a scrape of a pool's metrics tells, and when somebody is woken for it."""

from workshop.checks.watching_the_pool.measure_the_queue import measure_the_queue
from workshop.checks.watching_the_pool.wake_somebody import wake_somebody

__all__ = ["measure_the_queue", "wake_somebody"]
