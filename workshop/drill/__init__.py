"""The incident drill: a small service that breaks as real ones did, the load that shows it, and a judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workshop.drill.drill import Drill

__all__ = ["Drill"]


def __getattr__(name: str) -> Any:
    """`Drill`, imported when it is asked for: the service's processes have no use for what it draws with."""
    if name == "Drill":
        from workshop.drill.drill import Drill

        return Drill
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
