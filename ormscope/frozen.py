"""What `gc.freeze()` has taken out of the garbage collector's sight, as servers do before they fork their workers.

The collector does not name it as a holder of anything, so whoever asks who refers to an object has to look here, too.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

from ormscope.stacks import calling_frames, locals_of

_NEVER_FROZEN = 1000  # Python 3.12 has a few hundred objects there that nobody has frozen
_TOGETHER = 1_000  # objects that are looked at in one call, before others may run
# What was frozen refers to no connection that is younger, unless it can be changed.
_UNCHANGING = (
    ModuleType, tuple, frozenset, CodeType, FunctionType, BuiltinFunctionType, MethodType, property, classmethod,
    staticmethod, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType, WrapperDescriptorType, weakref.ref,
)  # fmt: skip

_lock = threading.Lock()
# What was frozen and can be changed. It is always this list, for whoever looks through the heap has to leave it out.
KNOWN: list[Any] = []
_known_of = 0  # how many were frozen when that was looked for


def is_frozen() -> bool:
    """Whether somebody has called `gc.freeze()` in this process, or in the one it was forked from.

    Where that is over, what was known is let go of.
    """
    global _known_of
    if gc.get_freeze_count() >= _NEVER_FROZEN:
        return True
    KNOWN.clear()
    _known_of = 0
    return False


def frozen_objects(
    heap: list[Any], weakly: Callable[[list[Any]], list[Any]] = lambda part: []
) -> list[Any]:
    """What is frozen, as far as it can be reached from the heap, as the collector knows it, modules and functions.

    `weakly` says to what some objects lead besides what they refer to. Takes two seconds or so for each million
    objects; empty where nothing is frozen.
    """
    if not is_frozen():
        return []
    known = set(map(id, heap))
    namespaces = [vars(module) for module in list(sys.modules.values()) if _is_module(module)]
    variables = [locals_of(frame) for frame in calling_frames()]
    frozen = [namespace for namespace in namespaces if id(namespace) not in known]
    known.update(map(id, frozen))
    # Python 3.12.1 dies of a look into _asyncio: modules are looked at by their namespaces.
    todo = [value for value in heap if not _is_module(value)] + namespaces + variables
    while todo:
        part = todo[-_TOGETHER:]
        del todo[-_TOGETHER:]
        for held in gc.get_referents(*part) + weakly(part):
            if id(held) not in known and gc.is_tracked(held):
                known.add(id(held))
                frozen.append(held)
                if not _is_module(held):
                    todo.append(held)
        time.sleep(0)  # lets others run
    return frozen


def frozen_holders(*objects: Any) -> list[Any]:
    """The frozen objects that refer to any of these.

    What is frozen is looked for once: it stays where it is, though what it refers to may change.
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
    global _known_of
    with _lock:
        if is_frozen() and (count := gc.get_freeze_count()) > _known_of:
            found = frozen_objects(gc.get_objects())
            KNOWN[:] = [
                value
                for value in found
                if not isinstance(value, _UNCHANGING) and value is not KNOWN
            ]
            _known_of = count
        return KNOWN


def _is_module(value: Any) -> bool:
    return isinstance(value, ModuleType)
