"""The checks of exercise 06: a payment, and a page that stays open."""

from workshop.checks.session_lifetimes.follow_an_order import follow_an_order
from workshop.checks.session_lifetimes.pay_without_a_connection import pay_without_a_connection

__all__ = ["follow_an_order", "pay_without_a_connection"]
