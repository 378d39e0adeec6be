"""The checks of exercise 08: an engine whose settings hold when the server restarts and when somebody is slow."""

from workshop.checks.production_settings.give_it_limits import give_it_limits

__all__ = ["give_it_limits"]
