"""SessionCensus: which mapped objects are alive, and what keeps them."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType, ModuleType
from typing import Any, Literal, NamedTuple

from sqlalchemy.engine import Result
from sqlalchemy.ext.asyncio import (
    AsyncResult,
    AsyncScalarResult,
    AsyncSession,
    async_scoped_session,
)
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.base import instance_state
from sqlalchemy.orm.instrumentation import ClassManager
from sqlalchemy.util import ScopedRegistry

from ormscope.places import is_user_code, place
from ormscope.stacks import calling_frames, locals_of

Kind = Literal[
    "new", "modified", "deleted", "scoped registry", "variable", "collection", "result",
    "traceback", "output", "cycle", "unknown",
]  # fmt: skip

_REPORTS: dict[Kind, str] = {
    "new": "added and not flushed: the session keeps them until it flushes",
    "modified": "changed and not flushed: the session keeps them until it flushes",
    "deleted": "deleted and not flushed: the session keeps them until it flushes",
    "scoped registry": "not flushed, in a scoped session whose task has ended: call remove() in the task",
    "variable": "variable {where}",
    "collection": "loaded collection {where}",
    "result": "a result that was not read to its end: {where}",
    "traceback": "a kept traceback: {where}",
    "output": "Jupyter's Out: {where}",
    "cycle": "only one another, in a reference cycle that waits for the garbage collector",
    "unknown": "something that the census does not know",
}
_RESULTS = (Result, AsyncResult, AsyncScalarResult)
_STEPS = (CoroutineType, GeneratorType, AsyncGeneratorType)
_STEP_FRAME = {CoroutineType: "cr_frame", GeneratorType: "gi_frame", AsyncGeneratorType: "ag_frame"}
_MOST_LEVELS = 9  # of holders above an object; each costs one look at the whole heap


@dataclass(frozen=True, order=True)
class Keeper:
    """What keeps `count` objects of the class `name` alive; `where` names it, where it has a name."""

    count: int
    name: str
    kind: Kind
    where: str = ""

    def __str__(self) -> str:
        return f"{self.count:,} {self.name}: {_REPORTS[self.kind].format(where=self.where)}"


class SessionCensus:
    """The mapped objects that are alive at this moment, and what keeps each of them.

    With a session, those that belong to it; without, all of this process, detached ones included. The garbage
    collector is not run, so objects in a reference cycle count as long as they are there. `alive` counts them by
    class, `keepers` names for each object one culprit, the nearest: the largest group first. `sessions` counts the
    sessions that scoped registries hold for tasks that have ended. `str()` is the report.

    It looks through the whole heap several times: some tenths of a second for each million objects. Call it from
    the thread that uses the session. A census holds no reference to anything that it counted.
    """

    def __init__(
        self,
        session: Session
        | AsyncSession
        | scoped_session[Any]
        | async_scoped_session[Any]
        | None = None,
    ) -> None:
        # First of all, so that nothing that is made here is among them.
        heap = gc.get_objects()
        search = _Search(heap, None if session is None else _plain(session))
        self.alive: Counter[str] = Counter(type(one).__name__ for one in search.counted)
        found = Counter((type(one).__name__, *search.keeper(one)) for one in search.counted)
        self.keepers = sorted((Keeper(count, *rest) for rest, count in found.items()), reverse=True)
        self.sessions = len(search.abandoned)

    def __str__(self) -> str:
        if not self.alive and not self.sessions:
            return "0 objects alive"
        lines = [f"{self.alive.total():,} objects alive, kept by"] if self.alive else []
        lines += [f"  {one}" for one in self.keepers]
        if self.sessions:
            lines.append(f"{self.sessions:,} scoped sessions kept for tasks that have ended")
        return "\n".join(lines)


def _plain(session: Any) -> Session:
    if isinstance(session, (scoped_session, async_scoped_session)):
        session = session()
    return session.sync_session if isinstance(session, AsyncSession) else session


class _Root(NamedTuple):
    """What keeps other things and is kept by the program itself."""

    kind: Kind
    where: str


class _Search:
    """One search for the keepers: upwards from the objects to the roots, then down to whom each root keeps."""

    def __init__(self, heap: list[Any], session: Session | None) -> None:
        mapped = list(_mapped(heap))
        self.abandoned = set(_abandoned_sessions(heap))
        self.counted = [
            one for one in mapped if session is None or instance_state(one).session is session
        ]
        self._mapped_dicts = {id(one.__dict__): one for one in mapped}
        self._mapped_ids = {id(one) for one in mapped}
        self._variables = _variables()
        self._namespaces, self._outputs = _namespaces()
        self._live = {id(frame) for frame in calling_frames()}
        # By the id of a holder: what it holds, and through which attribute.
        self._keeps: dict[int, list[tuple[Any, str]]] = {}
        self._roots: dict[int, tuple[Any, _Root]] = {}
        self._found: dict[int, _Root] = {}
        for one in self.counted:
            if (root := self._kept_by_session(one)) is not None:
                self._roots[id(one)] = (one, root)
                self._found[id(one)] = root
        self._exhausted = self._search(heap)

    def keeper(self, one: Any) -> _Root:
        """The kind of an object's keeper, and where it is."""
        return self._found.get(id(one)) or _Root("cycle" if self._exhausted else "unknown", "")

    def _kept_by_session(self, one: Any) -> _Root | None:
        state = instance_state(one)
        session = state.session
        if session is None:
            return None
        kind: Kind
        if state in session._new:
            kind = "new"
        elif state in session._deleted:
            kind = "deleted"
        elif state._strong_obj is not None:
            kind = "modified"
        else:
            return None
        return _Root("scoped registry" if id(session) in self.abandoned else kind, "")

    def _search(self, heap: list[Any]) -> bool:
        """Find the roots, level by level, until each object has one; whether every path was followed to its end."""
        frontier = {id(one): one for one in self.counted if id(one) not in self._found}
        seen = set(frontier)
        for _ in range(_MOST_LEVELS):
            if not frontier:
                return True
            above: dict[int, Any] = {}
            for held, holder in self._holders(heap, frontier):
                for node, through in self._steps_up(held, holder):
                    self._keeps.setdefault(id(node), []).append((held, through))
                    if id(node) not in seen and id(node) not in self._roots:
                        seen.add(id(node))
                        above[id(node)] = node
            frontier = above
            self._look_down()
            if all(id(one) in self._found for one in self.counted):
                return True
        return not frontier

    def _holders(self, heap: list[Any], frontier: dict[int, Any]) -> Iterator[tuple[Any, Any]]:
        """Each pair of an object in the frontier and somebody who refers to it."""
        for key, (frame, name) in self._variables.items():
            if key in frontier:
                yield frontier[key], _Root("variable", _variable(frame, name, frontier[key]))
        for holder in heap:
            if isinstance(holder, ModuleType):
                continue  # its dict is in the heap too; Python 3.12.1 dies of a look into _asyncio
            for held in gc.get_referents(holder):
                if id(held) in frontier:
                    yield frontier[id(held)], holder

    def _steps_up(self, held: Any, holder: Any) -> Iterator[tuple[Any, str]]:
        """What to look at next above `held`, and by which attribute it holds that; roots are noted instead."""
        root = holder if isinstance(holder, _Root) else self._root(held, holder)
        if root is not None:
            if root.kind != "unknown":
                self._roots.setdefault(id(root), (root, root))
                yield root, ""
            return
        adapter = (
            getattr(holder, "_sa_adapter", None) if isinstance(holder, (list, set, dict)) else None
        )
        if adapter is not None and (owner := adapter.owner_state.obj()) is not None:
            yield owner, f"{type(owner).__name__}.{adapter._key}"
        elif id(holder) in self._mapped_dicts:
            yield self._mapped_dicts[id(holder)], ""
        else:
            yield holder, ""

    def _root(self, held: Any, holder: Any) -> _Root | None:
        """The root that a holder is; None where one has to look further up, unknown for what keeps nothing."""
        if isinstance(holder, _RESULTS):
            return _Root("result", type(holder).__name__)
        if isinstance(holder, FrameType):
            # The collector knows a frame only once it has ended: what keeps it then is a traceback.
            return (
                _Root("unknown", "")
                if id(holder) in self._live
                else _Root("traceback", _traceback(holder))
            )
        if isinstance(holder, _STEPS):
            frame = getattr(holder, _STEP_FRAME[type(holder)])
            if frame is not None and is_user_code(frame.f_code.co_filename):
                names = [name for name, value in locals_of(frame).items() if value is held]
                return _Root("variable", _variable(frame, names[0], held)) if names else None
        if isinstance(holder, dict) and id(holder) in self._namespaces:
            if holder is self._outputs:
                return _Root("output", "a result that a cell has shown")
            names = [name for name, value in list(holder.items()) if value is held]
            names = [name for name in names if not name.startswith("_")] or names[:1]
            if not names:
                return None
            if self._outputs is not None and names[0].startswith("_"):
                return _Root("output", f"a result that a cell has shown, also called {names[0]}")
            kind = _container(held)
            return _Root("variable", f"{names[0]}{kind} of {self._namespaces[id(holder)]}")
        return None

    def _look_down(self) -> None:
        """Give each object that can be reached from a root the nearest of them."""
        queue = deque((node, root) for node, root in self._roots.values())
        seen = {id(node) for node, _ in queue}
        while queue:
            node, root = queue.popleft()
            if id(node) in self._mapped_ids:
                self._found.setdefault(id(node), root)
            for held, through in self._keeps.get(id(node), ()):
                if id(held) not in seen:
                    seen.add(id(held))
                    below = root
                    if through:
                        keeper = _REPORTS[root.kind].format(where=root.where)
                        below = _Root("collection", f"{through}, whose owner is kept by {keeper}")
                    queue.append((held, below))


def _mapped(heap: Iterable[Any]) -> Iterator[Any]:
    known: dict[type, bool] = {}
    for one in heap:
        kind = type(one)
        if kind not in known:
            known[kind] = isinstance(getattr(kind, "_sa_class_manager", None), ClassManager)
        if known[kind] and "_sa_instance_state" in one.__dict__:
            yield one


def _abandoned_sessions(heap: Iterable[Any]) -> Iterator[int]:
    """The ids of the sessions that a scoped registry holds for a task that has ended."""
    for one in heap:
        if isinstance(one, ScopedRegistry):
            for scope, session in list(getattr(one, "registry", {}).items()):
                if isinstance(scope, asyncio.Task) and scope.done():
                    yield id(_plain(session))


def _variables() -> dict[int, tuple[FrameType, str]]:
    """The local variables of the user's functions that run now, by the id of their value; innermost first."""
    found: dict[int, tuple[FrameType, str]] = {}
    for frame in calling_frames():
        code = frame.f_code
        if is_user_code(code.co_filename) and code.co_flags & inspect.CO_OPTIMIZED:
            for name, value in locals_of(frame).items():
                found.setdefault(id(value), (frame, name))
    return found


def _namespaces() -> tuple[dict[int, str], Any]:
    """The global variables of modules, by the id of their dict, and Jupyter's Out."""
    found = {
        id(module.__dict__): f"module {name}"
        for name, module in list(sys.modules.items())
        if hasattr(module, "__dict__")
    }
    outputs = None
    if "IPython" in sys.modules:
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is not None:
            outputs = shell.user_ns["_oh"]
            found[id(shell.user_ns)] = "the notebook"
            found[id(outputs)] = found[id(shell.user_ns_hidden)] = "Out"
    return found, outputs


def _container(held: Any) -> str:
    return (
        f" (a {type(held).__name__})" if isinstance(held, (list, tuple, set, dict, deque)) else ""
    )


def _variable(frame: FrameType, name: str, held: Any) -> str:
    where = place((frame.f_code, frame.f_lineno))
    return f"{name}{_container(held)} in {where.short}"


def _traceback(frame: FrameType) -> str:
    return f"the frame of {place((frame.f_code, frame.f_lineno)).short} is in it"
