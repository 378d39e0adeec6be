"""Instruments for SQLAlchemy under load: connection pools, the event loop, the objects that a session keeps.

They watch a running program; what runs experiments with them stands in `ormscope.lab`.

Each is imported when it is first asked for: pytest loads the plugin of every package that is installed, and those who
do not use it shall not pay for SQLAlchemy.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ormscope.census import SessionCensus
    from ormscope.console import Console, serve_console
    from ormscope.loop import LoopScope
    from ormscope.on_signal import SignalReport, report_on_signal
    from ormscope.pool import PoolScope
    from ormscope.verdict import Verdict

__all__ = [
    "Console",
    "LoopScope",
    "PoolScope",
    "SessionCensus",
    "SignalReport",
    "Verdict",
    "report_on_signal",
    "serve_console",
]
__version__ = "1.0.0"

_HOMES = {
    "Console": "ormscope.console",
    "LoopScope": "ormscope.loop",
    "PoolScope": "ormscope.pool",
    "SessionCensus": "ormscope.census",
    "SignalReport": "ormscope.on_signal",
    "Verdict": "ormscope.verdict",
    "report_on_signal": "ormscope.on_signal",
    "serve_console": "ormscope.console",
}

# What a PoolScope has to say goes to the program's own log, and nowhere where there is none.
logging.getLogger("ormscope").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
