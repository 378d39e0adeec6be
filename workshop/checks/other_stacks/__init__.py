"""The checks of exercise 11: an order in Tortoise ORM, customers who leave, and a line before a psycopg_pool."""

from workshop.checks.other_stacks.draw_a_line import draw_a_line
from workshop.checks.other_stacks.leave_at_any_moment import leave_at_any_moment
from workshop.checks.other_stacks.stay_in_the_context import stay_in_the_context

__all__ = ["draw_a_line", "leave_at_any_moment", "stay_in_the_context"]
