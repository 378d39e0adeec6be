"""Experiments: a workload runs in a fresh process with all instruments attached, and what they saw comes back.

Needs the extra `lab` (`pip install "ormscope[lab]"`).
"""

from ormscope.lab.memory import MemoryScope
from ormscope.lab.observe import observe
from ormscope.lab.recording import Recording
from ormscope.lab.storm import storm

__all__ = ["MemoryScope", "Recording", "observe", "storm"]
