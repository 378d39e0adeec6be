"""Instruments for SQLAlchemy under load: connection pools, the event loop, the objects that a session keeps.

They watch a running program; what runs experiments with them stands in `ormscope.lab`.
"""

import logging

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

# What a PoolScope has to say goes to the program's own log, and nowhere where there is none.
logging.getLogger("ormscope").addHandler(logging.NullHandler())
