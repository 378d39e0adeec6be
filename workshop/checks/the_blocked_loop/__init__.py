"""The checks of exercise 05: a report of the old service, and sums that keep everybody waiting."""

from workshop.checks.the_blocked_loop.free_the_loop import free_the_loop
from workshop.checks.the_blocked_loop.sum_without_a_stall import sum_without_a_stall

__all__ = ["free_the_loop", "sum_without_a_stall"]
