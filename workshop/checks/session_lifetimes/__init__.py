"""The checks of exercise 06: a payment, a page that stays open, a report in parallel, and workers beside customers."""

from workshop.checks.session_lifetimes.ask_in_parallel import ask_in_parallel
from workshop.checks.session_lifetimes.follow_an_order import follow_an_order
from workshop.checks.session_lifetimes.let_others_in import let_others_in
from workshop.checks.session_lifetimes.pay_without_a_connection import pay_without_a_connection

__all__ = ["ask_in_parallel", "follow_an_order", "let_others_in", "pay_without_a_connection"]
