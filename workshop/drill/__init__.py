"""The incident drill: a small service that breaks as real ones did, the load that shows it, and a judge."""

from workshop.drill.drill import Drill

__all__ = ["Drill"]
