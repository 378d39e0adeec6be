"""The checks of exercise 07: a report in parallel, and workers beside customers."""

from workshop.checks.shared_lost_unfair.ask_in_parallel import ask_in_parallel
from workshop.checks.shared_lost_unfair.let_others_in import let_others_in

__all__ = ["ask_in_parallel", "let_others_in"]
