"""The checks of exercise 09: an engine with limits, and a service of five faults that only load shows."""

from workshop.checks.production_settings.give_it_limits import give_it_limits
from workshop.checks.production_settings.serve_a_crowd import serve_a_crowd

__all__ = ["give_it_limits", "serve_a_crowd"]
