"""What `gc.freeze()` has taken out of the garbage collector's sight, as servers do before they fork their workers.

The collector does not name it as a holder of anything, so whoever asks who refers to an object has to look here, too.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from types import (
    BuiltinFunctionType,
    CodeType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from ormscope.stacks import frames_of_threads, locals_of

_NEVER_FROZEN = 1000  # Python 3.12 has a few hundred objects there that nobody has frozen
_TOGETHER = 1_000  # objects that are looked at in one call, before others may run
_CODE = (FrameType, ModuleType)
# What was frozen refers to no connection that is younger, unless it can be changed.
_UNCHANGING = (
    tuple, frozenset, CodeType, FunctionType, BuiltinFunctionType, MethodType, property, classmethod, staticmethod,
    GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType, weakref.ref,
)  # fmt: skip

_lock = threading.Lock()
_known: list[Any] = []
_known_of = 0  # how many were frozen when these were looked for


def is_frozen() -> bool:
    """Whether somebody has called `gc.freeze()` in this process, or in the one it was forked from."""
    return gc.get_freeze_count() >= _NEVER_FROZEN


def frozen_holders(*objects: Any) -> list[Any]:
    """The frozen objects that refer to any of these, as far as modules and running functions lead to them.

    What is frozen is looked for once, which takes as long as some looks of the collector at the whole heap; it stays
    where it is, and what it refers to may change. Empty where nothing is frozen.
    """
    wanted = set(map(id, objects))
    found = []
    containers = _containers()
    for start in range(0, len(containers), _TOGETHER):
        part = containers[start : start + _TOGETHER]
        if not wanted.isdisjoint(map(id, gc.get_referents(*part))):
            found += [
                container
                for container in part
                if not wanted.isdisjoint(map(id, gc.get_referents(container)))
            ]
    return found


def _containers() -> list[Any]:
    global _known, _known_of
    count = gc.get_freeze_count()
    with _lock:
        if count < _NEVER_FROZEN:
            _known, _known_of = [], 0
        elif count > _known_of:
            _known, _known_of = _found(), count
        return _known


def _found() -> list[Any]:
    seen_by_the_collector = set(map(id, gc.get_objects()))
    todo: list[Any] = [vars(module) for module in list(sys.modules.values()) if module is not None]
    for frames in frames_of_threads().values():
        todo += [value for frame in frames for value in locals_of(frame).values()]
    known = set(map(id, todo))
    frozen = [value for value in todo if id(value) not in seen_by_the_collector]
    while todo:
        part = todo[-_TOGETHER:]
        del todo[-_TOGETHER:]
        for held in gc.get_referents(*part):
            if id(held) not in known and gc.is_tracked(held) and not isinstance(held, _CODE):
                known.add(id(held))
                todo.append(held)
                if id(held) not in seen_by_the_collector and not isinstance(held, _UNCHANGING):
                    frozen.append(held)
        time.sleep(0)  # lets others run
    return frozen
