"""The private names of SQLAlchemy's ORM, of IPython and of the interpreter that SessionCensus reads.

As with those of the pool, in `internals`: where a name is gone, that part of the census is left out, and it says so.
A mapped object may have code of the user's for every question that is asked of it, so none is asked here.
"""

from __future__ import annotations

import contextvars
import gc
import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from sqlalchemy.orm import Session
from sqlalchemy.orm import base as orm_base
from sqlalchemy.orm.collections import CollectionAdapter, InstrumentedList
from sqlalchemy.orm.instrumentation import ClassManager
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.util import ScopedRegistry

# The ORM.

_MANAGER = getattr(orm_base, "DEFAULT_MANAGER_ATTR", "")  # "_sa_class_manager"
_STATE = getattr(orm_base, "DEFAULT_STATE_ATTR", "")  # "_sa_instance_state"


def is_mapped(defined: Mapping[str, Any]) -> bool:
    """Whether a class, given by what it defines, is mapped."""
    return type.__subclasscheck__(ClassManager, type(defined.get(_MANAGER)))


def is_collection(defined: Mapping[str, Any]) -> bool:
    """Whether SQLAlchemy has made a class, given by what it defines, a collection of mapped objects."""
    return defined.get("_sa_adapter", ...) is None


def state_of(mapped: Any) -> InstanceState[Any] | None:
    """SQLAlchemy's record of a mapped object; None for one that is not finished.

    To ask for `__dict__` would make a dict, where the interpreter has none yet.
    """
    try:
        state: InstanceState[Any] = object.__getattribute__(mapped, _STATE)
    except AttributeError:
        return None
    return state


def unflushed(
    session: Session, state: InstanceState[Any]
) -> Literal["new", "deleted", "modified"] | None:
    """Why a session itself keeps an object until it flushes; None for one that it only knows."""
    if state in session._new:
        return "new"
    if state in session._deleted:
        return "deleted"
    return None if state._strong_obj is None else "modified"


def owner_of(collection: Any) -> tuple[Any, str]:
    """The mapped object that has loaded a collection, and by which attribute; None if there is none any more."""
    adapter = object.__getattribute__(collection, "_sa_adapter")
    if type(adapter) is not CollectionAdapter:
        return None, ""
    return adapter.owner_state.obj(), adapter._key


def registered(registry: Any) -> dict[Any, Any]:
    """The sessions that a scoped session has, by scope; none where each thread has its own."""
    try:
        sessions = ScopedRegistry.__dict__["registry"].__get__(registry)
    except AttributeError:
        return {}  # somebody is just making it
    # By thread it is a threading.local, from which sessions go together with their threads.
    return sessions if type(sessions) is dict else {}


# IPython.


class Shell(NamedTuple):
    """The variables of a notebook, those of them that IPython made, and what its cells have shown."""

    variables: dict[str, Any]
    hidden: dict[str, Any]
    outputs: dict[int, Any]


def shell() -> Shell | None:
    """The notebook in which this runs; None where there is none, or it does not tell."""
    running = _running_shell()
    if running is None or _missing_in(running):
        return None
    return Shell(running.user_ns, running.user_ns_hidden, running.user_ns["_oh"])


def show_as(error: BaseException, lines: list[str]) -> None:
    """Let a notebook show these lines for an error, instead of its traceback."""
    error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]


def _running_shell() -> Any:
    if "IPython" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    return get_ipython()


def _missing_in(running: Any) -> str:
    """The name that a running IPython lacks; nothing if it lacks none."""
    for name in ("user_ns", "user_ns_hidden"):
        if not hasattr(running, name):
            return f"InteractiveShell.{name}"
    return "" if "_oh" in running.user_ns else "InteractiveShell.user_ns['_oh']"


# The interpreter.

_VARIABLE = contextvars.ContextVar[object]("ormscope")


def is_of_a_context(kind: str) -> bool:
    """Whether a class of this name is one in which the interpreter has the values of context variables."""
    return kind.startswith("hamt")


def _class_of_contexts() -> str:
    context = contextvars.Context()
    context.run(_VARIABLE.set, object())
    return next((type(held).__name__ for held in gc.get_referents(context)), "nothing")


# For the self-test, see `internals.missing`.

Part = Literal[
    "census", "unflushed", "collections", "scoped sessions", "context variables", "callbacks", "outputs"
]  # fmt: skip
NEEDED: dict[Any, list[tuple[object, str]]] = {
    "census": [(orm_base, "DEFAULT_MANAGER_ATTR"), (orm_base, "DEFAULT_STATE_ATTR")],
    "unflushed": [(Session, "_new"), (Session, "_deleted"), (InstanceState, "_strong_obj")],
    "collections": [
        (InstrumentedList, "_sa_adapter"),
        (CollectionAdapter, "_key"),
        (CollectionAdapter, "owner_state"),
    ],
    "scoped sessions": [(ScopedRegistry, "registry")],
}


def missing() -> dict[Part, str]:
    """What only an example, or a running IPython, can tell: the parts that lack a name, and that name."""
    found: dict[Part, str] = {}
    if not is_of_a_context(_class_of_contexts()):
        found["context variables"] = f"the interpreter's hamt (now {_class_of_contexts()})"
    running = _running_shell()
    if running is not None and (name := _missing_in(running)):
        found["outputs"] = name
    return found
