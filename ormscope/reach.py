"""Who can still use a connection, and so give it back: found in the heap, upwards from the connection.

Whoever took a connection is not always whoever gives it back: it is handed to another task, returned from a worker
thread, begun by a child task in the parent's session. So the search goes from SQLAlchemy's own handle of a
checked-out connection to all that refer to it, to what refers to that, and so on, until it comes to the stack of a
task or thread, to something global, or to nothing.

To ask the collector who refers to an object means a look at the whole heap, some 20 ms for 300,000 objects, in
which no other thread runs. So the neighbourhood of the tasks that are under suspicion is looked at first, and what
it finds is believed where it explains every single reference that an object has (`sys.getrefcount`).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from contextvars import Context
from dataclasses import dataclass, field
from types import (
    AsyncGeneratorType,
    BuiltinFunctionType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    ModuleType,
    TracebackType,
)
from typing import Any

import greenlet
from sqlalchemy.engine import Dialect, Engine, ExecutionContext
from sqlalchemy.pool import Pool
from sqlalchemy.util import ScopedRegistry

from ormscope.frozen import frozen_holders, is_frozen
from ormscope.internals import LOOP_RUN, LOOP_STEP, callback_of, is_fastapis_own
from ormscope.loops import known_loops
from ormscope.owners import Owner, TaskOrThread
from ormscope.stacks import (
    awaited_step,
    down_from,
    frame_of,
    frames_of_threads,
    greenlet_frames,
    locals_of,
    steps_of,
)

_STEPS = (CoroutineType, GeneratorType, AsyncGeneratorType)
# They have an entry for each thread or request. Whose one is cannot be told, but not everybody's who has the keeper.
_KEEPERS = (
    (threading.local, "a thread-local variable"),
    (ScopedRegistry, "the registry of a scoped session"),
)
_LISTS = (list, tuple, set, frozenset, deque)
_MOST_NODES = 3_000  # of one search; who is held by more is held by more than can be followed
# Looks at the whole heap in one search, each of which stops the program for as long as it takes: a dozen are usual, and
# some more where there are many handles.
_MOST_LOOKS = 20
_MOST_LOOKS_EACH = 1
_MOST_STEPS_DOWN = 9
_MOST_NEIGHBOURS = 600  # of one task
_OUR_THREADS = "ormscope "  # how their names begin
_ASKED_AT_ONCE = 16  # a longer list makes each look at the heap slower
_LONG = 200  # a container with more items is a user's data, not a place for a session
# SQLAlchemy's objects that lead from a session to its connection; behind all others are the mapping and the SQL.
_HANDLE_MODULES = (
    "sqlalchemy.engine.base",
    "sqlalchemy.engine.cursor",
    "sqlalchemy.engine.result",
    "sqlalchemy.ext.asyncio.",
    "sqlalchemy.orm.session",
    "sqlalchemy.orm.scoping",
    "sqlalchemy.pool.base",
    "sqlalchemy.util._collections",
)


@dataclass
class Users:
    """Who can use a connection: `subjects` have it in a variable, directly or through objects, and are alive.

    `elsewhere` names what else it can be reached from: a module, a callback of the loop, the error in a log record.
    `listed` are tasks and threads, and `is_listed` says whether anything, that have it only in a list. `unseen` is
    true where somebody refers to it whom the collector does not know: a function that runs at this moment. `exact` is
    whether every single reference was explained by the suspects' neighbourhood, so that nothing can have moved during
    the look.
    """

    subjects: set[TaskOrThread] = field(default_factory=set)
    listed: set[TaskOrThread] = field(default_factory=set)
    elsewhere: str = ""
    is_listed: bool = False
    unseen: bool = False
    complete: bool = True
    exact: bool = True

    @property
    def everybody(self) -> set[TaskOrThread]:
        """All tasks and threads that can reach it."""
        return self.subjects | self.listed


def users_of(
    handles: Iterable[Callable[[], Any]], suspects: Collection[asyncio.Task[Any]] = ()
) -> list[Users]:
    """Who can use each connection, given by what returns SQLAlchemy's handle, or None; `suspects` are looked at first.

    Called from any thread, by one at a time: else one search would find the other. Tasks that run meanwhile may
    change what it sees, so whoever wants to be sure looks whether anything has moved.
    """
    return _Search(suspects).users_of(handles)


class _Search:
    def __init__(self, suspects: Collection[asyncio.Task[Any]]) -> None:
        # By the id of an object, the ids of those that refer to it, once for each reference.
        self._above: dict[int, list[int]] = {}
        self._nodes: dict[int, Any] = {}
        # Tasks by the ids of the coroutines on their await chains.
        self._chains: dict[int, asyncio.Task[Any]] = {}
        self._stacks: dict[int, set[TaskOrThread]] | None = None
        self._namespaces: dict[int, str] | None = None
        self._asked = 0  # times the collector
        for task in suspects:
            self._look_around(task)
            _let_others_run()

    # Down from the suspects.

    def _look_around(self, task: asyncio.Task[Any]) -> None:
        steps = [step for step, _ in steps_of(task)]
        for step in steps:
            self._chains[id(step)] = task
        unseen = deque((step, 0) for step in steps)
        budget = _MOST_NEIGHBOURS
        while unseen and budget:
            node, depth = unseen.popleft()
            if id(node) in self._nodes:
                continue
            budget -= 1
            self._nodes[id(node)] = node
            for held in gc.get_referents(node):
                if gc.is_tracked(held):
                    self._above.setdefault(id(held), []).append(id(node))
                    if depth < _MOST_STEPS_DOWN and _leads_on(held):
                        unseen.append((held, depth + 1))

    # Up from the handle.

    def users_of(self, handles: Iterable[Callable[[], Any]]) -> list[Users]:
        """Go up from all handles at once, so that they share the looks at the heap."""
        # By their ids: what has been seen, so that it stays alive, and from which handles the way led there, with
        # whether it is through a list.
        alive: dict[int, Any] = {}
        ways: dict[int, dict[int, bool]] = {}
        found = []
        for number, handle in enumerate(handles):
            found.append(Users())
            _begin(number, handle, alive, ways)
        frontier = list(alive.values())
        most_looks = _MOST_LOOKS + _MOST_LOOKS_EACH * len(frontier)
        while frontier:
            _let_others_run()
            looks = self._asked and self._asked + len(frontier) / _ASKED_AT_ONCE
            if len(alive) > _MOST_NODES or looks > most_looks:
                for users in found:
                    users.complete = False
                break
            frontier = self._next_frontier(frontier, alive, ways, found)
        for users in found:
            users.exact = self._asked == 0
        return found

    def _next_frontier(
        self,
        frontier: list[Any],
        alive: dict[int, Any],
        ways: dict[int, dict[int, bool]],
        found: list[Users],
    ) -> list[Any]:
        # A function of its own: a variable that is left over would be one more reference to what it counts.
        above: dict[int, Any] = {}
        for key, parents, unseen in self._parents(frontier, alive):
            awaiting = [parent for parent in parents if _runs(parent, alive[key])]
            if type(alive[key]) is CoroutineType and alive[key].cr_running:
                # Who awaits it is on the same stack; the collector shows only who else has it.
                parents, unseen = awaiting, True
            elif awaiting:
                # Whoever else has a coroutine that a task runs or awaits can do nothing with it.
                parents, unseen = awaiting, False
            for number, listed in list(ways[key].items()):
                if unseen:
                    self._on_a_stack(alive[key], listed, found[number])
                for parent in parents:
                    way = self._step(alive[key], parent, listed, found[number])
                    known = ways.setdefault(id(parent), {}) if way is not None else {}
                    if way is not None and (number not in known or (known[number] and not way)):
                        known[number] = way
                        above[id(parent)] = parent
        alive.update(above)
        return list(above.values())

    def _step(self, node: Any, parent: Any, listed: bool, found: Users) -> bool | None:
        """Note what a parent is; return whether the way above it is through a list, None where it ends."""
        kind = type(parent)
        if id(parent) in self._chains:
            self._note(self._chains[id(parent)], listed, found)
            return None
        if issubclass(kind, asyncio.Task):
            if not parent.done():
                self._note(parent, listed, found)
                return None
            return True  # its result, or its exception: nobody's until somebody looks
        if type(node) is Context and _only_wakes(parent):
            return None  # it only wakes a task
        if issubclass(
            kind, (ModuleType, type, asyncio.AbstractEventLoop, asyncio.Handle, logging.LogRecord)
        ):
            found.elsewhere = found.elsewhere or _name_of(parent)
            return None
        for keeper, what in _KEEPERS:
            if issubclass(kind, keeper):
                found.elsewhere = found.elsewhere or what
                return None
        if kind is dict:
            if id(parent) in self._modules():
                if listed:
                    found.is_listed = True
                else:
                    found.elsewhere = found.elsewhere or self._modules()[id(parent)]
                return None
            owners = (
                [key for key, value in list(parent.items()) if value is node]
                if len(parent) < 100_000
                else []
            )
            if owners and all(
                isinstance(owner, (asyncio.Task, threading.Thread)) for owner in owners
            ):
                # A registry with a session for each task or thread: scoped_session.
                for owner in owners:
                    if Owner(owner).living is not None:
                        self._note(owner, listed, found)
                return None
            if owners and all(map(is_fastapis_own, owners)):
                return None  # who answers the request has it as well, and closes it
        if kind is FrameType:
            running = self._on_stacks().get(id(parent))
            if running:
                for subject in running:
                    self._note(subject, listed, found)
                return None
            return True  # of a function that has ended: a traceback keeps it
        if kind is TracebackType:
            return True
        if kind in _LISTS and _is_outermost(node):
            return True
        # A list in an object of some class, as a queue has it, is there for somebody to take from.
        return listed and not _is_object(kind)

    @staticmethod
    def _note(subject: TaskOrThread, listed: bool, found: Users) -> None:
        (found.listed if listed else found.subjects).add(subject)
        found.is_listed |= listed

    def _on_a_stack(self, node: Any, listed: bool, found: Users) -> None:
        """Somebody refers to a node whom the collector does not know."""
        if type(node) is CellType:  # a running function has the cell, and shows what is in it
            node = node.cell_contents
        elif isinstance(node, _STEPS):  # it runs, and so do those that await it
            node = frame_of(node)
        subjects = self._on_stacks().get(id(node), set())
        for subject in subjects:
            self._note(subject, listed, found)
        found.unseen |= not subjects

    def _parents(
        self, nodes: list[Any], alive: dict[int, Any]
    ) -> list[tuple[int, list[Any], bool]]:
        """For each node those that refer to it, and whether somebody else does, too."""
        # All are counted before anything is put into an answer: there it has one more reference.
        explained = set()
        for node in nodes:
            references = sys.getrefcount(node) - _OWN_REFERENCES - (id(node) in self._nodes)
            if references <= len(self._above.get(id(node), ())):
                explained.add(id(node))
        del node
        unexplained = [node for node in nodes if id(node) not in explained]
        answers = self._ask_the_collector(nodes, unexplained, alive) if unexplained else []
        for key in explained:
            parents = set(self._above.get(key, ()))
            answers.append((key, [self._nodes[above] for above in parents], False))
        return answers

    def _ask_the_collector(
        self, nodes: list[Any], unexplained: list[Any], alive: dict[int, Any]
    ) -> list[tuple[int, list[Any], bool]]:
        referrers: dict[int, dict[int, Any]] = {id(node): {} for node in unexplained}
        counts = dict.fromkeys(referrers, 0)
        ours = {id(thing) for thing in (nodes, unexplained, alive, self._nodes, self._above)}
        for start in range(0, len(unexplained), _ASKED_AT_ONCE):
            self._asked += 1
            _count_referrers(
                gc.get_referrers,
                unexplained[start : start + _ASKED_AT_ONCE],
                referrers,
                counts,
                ours,
            )
        unseen = self._unseen(unexplained, referrers, counts)
        if unseen and is_frozen():
            hidden = [node for node in unexplained if id(node) in unseen]
            _count_referrers(frozen_holders, hidden, referrers, counts, ours)
            del hidden  # it refers to what is counted
            unseen = self._unseen(unexplained, referrers, counts)
        return [(key, list(found.values()), key in unseen) for key, found in referrers.items()]

    def _unseen(
        self,
        unexplained: list[Any],
        referrers: dict[int, dict[int, Any]],
        counts: dict[int, int],
    ) -> set[int]:
        """To which of these somebody refers besides those who were found."""
        kept = Counter(key for found in referrers.values() for key in found)
        unseen = set()
        for node in unexplained:
            # One more for the list of the unexplained.
            own = _OWN_REFERENCES + 1 + (id(node) in self._nodes) + kept[id(node)]
            if sys.getrefcount(node) - own > counts[id(node)]:
                unseen.add(id(node))
        return unseen

    def _modules(self) -> dict[int, str]:
        if self._namespaces is None:
            self._namespaces = {
                id(module.__dict__): f"the module {name}"
                for name, module in list(sys.modules.items())
                if isinstance(module, ModuleType)
            }
        return self._namespaces

    def _on_stacks(self) -> dict[int, set[TaskOrThread]]:
        """Whose running functions have an object in a variable, or are that frame, by the object's id."""
        if self._stacks is None:
            self._stacks = {}
            running = {ident: asyncio.current_task(loop) for loop, ident in known_loops()}
            threads = {thread.ident: thread for thread in threading.enumerate()}
            for ident, frames in frames_of_threads().items():
                # Our own threads have in their variables what they search for.
                if ident in threads and not threads[ident].name.startswith(_OUR_THREADS):
                    self._note_stack(frames, threads[ident], running.get(ident))
            me = threading.current_thread()
            for frames in _parents_of_greenlet():
                self._note_stack(frames, me, running.get(me.ident or 0))
            for loop, _ in known_loops():
                for task in asyncio.all_tasks(loop):
                    for _, own in steps_of(task):
                        for frame in greenlet_frames(own):
                            self._note_variables(frame, task)
        return self._stacks

    def _note_stack(
        self, frames: list[FrameType], thread: threading.Thread, task: asyncio.Task[Any] | None
    ) -> None:
        for frame in reversed(frames):
            # Within the loop's step, the functions are those of the task that runs now.
            if frame.f_code is LOOP_STEP or frame.f_code is LOOP_RUN:
                task = None
            self._note_variables(frame, thread if task is None else task)

    def _note_variables(self, frame: FrameType, subject: TaskOrThread) -> None:
        assert self._stacks is not None
        self._stacks.setdefault(id(frame), set()).add(subject)
        # The variables of a module are global: nobody's more than anybody else's.
        if not _is_our_frame(frame) and frame.f_code.co_name != "<module>":
            for value in locals_of(frame).values():
                self._stacks.setdefault(id(value), set()).add(subject)


def _begin(
    number: int,
    handle_now: Callable[[], Any],
    alive: dict[int, Any],
    ways: dict[int, dict[int, bool]],
) -> None:
    """Begin the way up from a handle, if it is still there."""
    handle = handle_now()
    if handle is not None:
        alive[id(handle)] = handle
        ways.setdefault(id(handle), {})[number] = False


def _count_referrers(
    ask: Callable[..., list[Any]],
    part: list[Any],
    referrers: dict[int, dict[int, Any]],
    counts: dict[int, int],
    ours: set[int],
) -> None:
    """Note who refers to each object of `part`, and by how many references, without whatever is ours."""
    found = ask(*part)
    for referrer in found:
        if id(referrer) in ours or referrer is part or _is_ours(referrer):
            continue
        for held in gc.get_referents(referrer):
            if id(held) in counts and any(held is wanted for wanted in part):
                counts[id(held)] += 1
                referrers[id(held)][id(referrer)] = referrer


def _own_references() -> int:
    """How many references to an object the search itself has while it counts them."""
    nodes = [object()]
    alive = {id(node): node for node in nodes}
    for node in nodes:
        references = sys.getrefcount(node)
    return references if alive else 0


_OWN_REFERENCES = _own_references()


def _let_others_run() -> None:
    """Hand the interpreter over: a loop in another thread would have to ask for it, and wait for 5 ms each time."""
    time.sleep(0)


def _parents_of_greenlet() -> list[list[FrameType]]:
    """The stacks that wait for the greenlet which runs now, the frames of each outermost first."""
    stacks, parent = [], greenlet.getcurrent().parent
    while parent is not None:
        stacks.append(down_from(parent.gr_frame))
        parent = parent.parent
    return stacks


def _is_our_frame(frame: FrameType) -> bool:
    return frame.f_globals.get("__package__") == __package__


def _leads_on(held: Any) -> bool:
    """Whether a session may be found behind an object, near enough to look."""
    kind = type(held)
    if issubclass(
        kind, (ModuleType, type, Engine, Pool, Dialect, asyncio.AbstractEventLoop, asyncio.Task)
    ):
        return False
    if kind is FunctionType:
        return held.__closure__ is not None
    if kind is BuiltinFunctionType or kind is FrameType:
        return False
    if kind in _LISTS or kind is dict:
        return len(held) <= _LONG
    module = kind.__module__
    if isinstance(module, str) and module.startswith("sqlalchemy."):
        return module.startswith(_HANDLE_MODULES) or issubclass(kind, ExecutionContext)
    return not (isinstance(module, str) and module.startswith("ormscope"))


def _is_outermost(node: Any) -> bool:
    """Whether an object is one of SQLAlchemy's that a program has in a list: a connection or a session."""
    module = type(node).__module__
    return isinstance(module, str) and module.startswith(
        (
            "sqlalchemy.engine.base",
            "sqlalchemy.ext.asyncio.",
            "sqlalchemy.orm.session",
            "sqlalchemy.pool.base",
        )
    )


def _runs(parent: Any, step: Any) -> bool:
    """Whether `step` is a coroutine or generator that `parent`, a task or another one, is in the middle of."""
    if not isinstance(step, _STEPS):
        return False
    if isinstance(parent, asyncio.Task):
        return parent.get_coro() is step
    return isinstance(parent, _STEPS) and awaited_step(parent) is step


def _only_wakes(handle: Any) -> bool:
    """Whether a callback of the loop is asyncio's own: it carries the context of the task that it wakes."""
    if not isinstance(handle, asyncio.Handle):
        return False
    callback, _ = callback_of(handle)
    owner = getattr(callback, "__self__", None)
    module = getattr(callback, "__module__", None) or type(owner).__module__
    return isinstance(module, str) and module.split(".")[0].lstrip("_") == "asyncio"


def _is_object(kind: type) -> bool:
    """Whether a class is one of a library or of the user, and not a container, a function or a future."""
    return kind.__module__ != "builtins" and not issubclass(kind, (asyncio.Future, deque))


def _is_ours(referrer: Any) -> bool:
    module = type(referrer).__module__
    return (isinstance(module, str) and module.startswith("ormscope")) or (
        type(referrer) is FrameType and _is_our_frame(referrer)
    )


def _name_of(parent: Any) -> str:
    if isinstance(parent, (asyncio.AbstractEventLoop, asyncio.Handle)):
        return "a callback of the event loop"
    if isinstance(parent, logging.LogRecord):
        return "a log record"
    return f"the {'class' if isinstance(parent, type) else 'module'} {parent.__name__}"
