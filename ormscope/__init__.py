"""Instruments for SQLAlchemy under load: connection pools, event loop, memory."""

import logging

from ormscope.census import SessionCensus
from ormscope.loop import LoopScope
from ormscope.memory import MemoryScope
from ormscope.observe import observe
from ormscope.pool import PoolScope
from ormscope.recording import Recording
from ormscope.storm import storm
from ormscope.verdict import Verdict

__all__ = [
    "LoopScope",
    "MemoryScope",
    "PoolScope",
    "Recording",
    "SessionCensus",
    "Verdict",
    "observe",
    "storm",
]

# What a PoolScope has to say goes to the program's own log, and nowhere where there is none.
logging.getLogger("ormscope").addHandler(logging.NullHandler())
