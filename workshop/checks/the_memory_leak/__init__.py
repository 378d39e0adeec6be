"""The checks of exercise 03: an alarm that names culprits, a job that lets go, and a page that keeps too much."""

from workshop.checks.the_memory_leak.forget_the_collection import forget_the_collection
from workshop.checks.the_memory_leak.let_go import let_go
from workshop.checks.the_memory_leak.name_the_culprit import name_the_culprit

__all__ = ["forget_the_collection", "let_go", "name_the_culprit"]
