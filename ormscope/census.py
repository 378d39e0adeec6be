"""SessionCensus: which mapped objects are alive, and what keeps them."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import (
    BuiltinFunctionType,
    CellType,
    FrameType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any, Literal, NamedTuple

import greenlet
from sqlalchemy.engine import Result
from sqlalchemy.ext.asyncio import (
    AsyncResult,
    AsyncScalarResult,
    AsyncSession,
    async_scoped_session,
)
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.orm.state import InstanceState
from sqlalchemy.util import ScopedRegistry

from ormscope import internals, orm_internals
from ormscope.frozen import KNOWN, frozen_objects
from ormscope.orm_internals import state_of
from ormscope.places import is_user_code, place
from ormscope.stacks import STEPS, calling_frames, down_from, frame_of, locals_of

Kind = Literal[
    "new", "modified", "deleted", "scoped registry", "variable", "collection", "result",
    "traceback", "output", "class attribute", "default argument", "cache", "context variable",
    "callback", "value", "frozen", "cycle", "unknown",
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
    "class attribute": "class attribute {where}",
    "default argument": "a default argument of {where}",
    "cache": "the cache of {where} (lru_cache)",
    "context variable": "context variable {where}",
    "callback": "an event loop, which is to call {where} with them",
    "value": "a value without a name in {where}",
    "frozen": "one another, in a heap that gc.freeze() froze: the garbage collector does not look there",
    "cycle": "only one another, in a reference cycle that waits for the garbage collector",
    "unknown": "something that the census does not know",
}
# What a census leaves out where a private name is gone: see `internals.missing`.
_BLIND: dict[orm_internals.Part, str] = {
    "census": "any mapped object",
    "unflushed": "which objects a session keeps until it flushes",
    "collections": "which collections were loaded by a mapped object",
    "scoped sessions": "which sessions a scoped session has for tasks that have ended",
    "context variables": "what context variables keep",
    "callbacks": "what an event loop is to call",
    "outputs": "which results the notebook keeps because a cell has shown them (Out)",
}
_MOST_LEVELS = 15  # of holders above an object; each costs one look at the whole heap
_TOGETHER = 64  # objects that are looked at in one call


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
    sessions that scoped registries hold for tasks that have ended. `str()` is the report. `blind` says what cannot be
    seen here, because a private name is gone from SQLAlchemy or IPython; objects that it would be named for are then
    put down to what keeps it, further up.

    It looks through the whole heap several times: some tenths of a second for each million objects. Call it from
    the thread that uses the session. A census holds no reference to anything that it counted. It changes nothing in
    the program, and calls nothing of it: no property, no `__getattr__`, no comparison of the objects that it meets.
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
        lacking = internals.missing()
        self.blind = tuple(
            f"{what}: {lacking[part]} is gone" for part, what in _BLIND.items() if part in lacking
        )
        search = _Search(heap, _passed(session), lacking, of_all=session is None)
        self.alive: Counter[str] = Counter(search.names())
        found = Counter(zip(search.names(), search.keepers(), strict=True))
        self.keepers = sorted(
            (Keeper(count, name, *root) for (name, root), count in found.items()), reverse=True
        )
        self.sessions = len(search.abandoned)

    def __str__(self) -> str:
        blind = [f"cannot see {what}" for what in self.blind]
        if not self.alive and not self.sessions:
            return "\n".join(blind or ["0 objects alive"])
        lines = [f"{self.alive.total():,} objects alive, kept by"] if self.alive else []
        lines += [f"  {keeper}" for keeper in self.keepers]
        if self.sessions:
            lines.append(f"{self.sessions:,} scoped sessions kept for tasks that have ended")
        return "\n".join([*lines, *blind])


def _passed(session: Any) -> Any:
    """The synchronous session that somebody passed, in whatever it came; None where no session is made yet."""
    if isinstance(session, (scoped_session, async_scoped_session)):
        # To call an unused one would make a session.
        session = session.registry() if session.registry.has() else None
    return _plain(session)


def _plain(session: Any) -> Any:
    return session.sync_session if _is_subclass(AsyncSession, type(session)) else session


class _Root(NamedTuple):
    """What keeps other things: the program itself keeps it, or it is what one wants to know of a longer way."""

    kind: Kind
    where: str


# What the search has to tell apart.
_Role = Literal[
    "mapped", "state", "module", "class", "function", "frame", "step", "result", "registry",
    "collection", "context", "context's node", "cache", "callback", "greenlet", "anything",
]  # fmt: skip
_ROLES: tuple[tuple[_Role, type], ...] = (
    ("state", InstanceState),
    ("module", ModuleType),
    ("class", type),
    ("function", FunctionType),
    ("frame", FrameType),
    *(("step", kind) for kind in STEPS),
    *(("result", kind) for kind in (Result, AsyncResult, AsyncScalarResult)),
    ("registry", ScopedRegistry),
    ("context", contextvars.Context),
    ("cache", type(functools.lru_cache(len))),
    ("callback", asyncio.Handle),
    ("greenlet", greenlet.greenlet),
)
_OF_INTEREST: tuple[_Role, ...] = ("mapped", "module", "registry", "context", "greenlet")
# Of type itself: a metaclass may define each of these anew.
_bases = type.__dict__["__mro__"].__get__
_attributes = type.__dict__["__dict__"].__get__
_name = type.__dict__["__name__"].__get__
_qualified_name = type.__dict__["__qualname__"].__get__
_is_subclass = type.__subclasscheck__


class _Types:
    """What an object is, and its attributes, told without a call of the user's code.

    `isinstance` asks an object for its `__class__`, which may be a property, `hasattr` runs `__getattr__`, and a
    metaclass can define how its classes compare. So this goes by the id of the type that the interpreter goes by.
    """

    def __init__(self, lacking: Collection[str]) -> None:
        self._lacking = lacking
        self._roles: dict[int, _Role] = {}
        self.getters: dict[int, Any] = {}

    def role(self, value: Any) -> _Role:
        """What an object is to the search."""
        role = self._roles.get(id(type(value)))
        if role is None:
            role = self._roles[id(type(value))] = self._learn(type(value))
        return role

    def attributes(self, value: Any) -> dict[str, Any]:
        """The `__dict__` of an object, as the interpreter has it; empty if it has none."""
        if id(type(value)) not in self.getters:
            # A class may define a property of this name, too.
            found = (_attributes(base).get("__dict__") for base in _bases(type(value)))
            own = (GetSetDescriptorType, MemberDescriptorType)
            self.getters[id(type(value))] = next(
                (value for value in found if type(value) in own), None
            )
        getter = self.getters[id(type(value))]
        attributes = None if getter is None else getter.__get__(value)
        return attributes if type(attributes) is dict else {}

    def _learn(self, kind: type) -> _Role:
        for base in _bases(kind):
            defined = _attributes(base)
            if "census" not in self._lacking and orm_internals.is_mapped(defined):
                return "mapped"
            if "collections" not in self._lacking and orm_internals.is_collection(defined):
                return "collection"  # SQLAlchemy has made it one
        for role, wanted in _ROLES:
            if _is_subclass(wanted, kind):
                blind = role == "callback" and "callbacks" in self._lacking
                return "anything" if blind else role
        return "context's node" if orm_internals.is_of_a_context(_name(kind)) else "anything"


_UNKNOWN = _Root("unknown", "")


class _Search:
    """One search for the keepers: upwards from the objects to the roots, then down to whom each root keeps.

    All is noted by id. The few containers that hold the objects themselves are listed in `_own`: where the references
    to an object are counted, these are ours.
    """

    def __init__(
        self, heap: list[Any], session: Session | None, lacking: Collection[str], *, of_all: bool
    ) -> None:
        self._lacking = lacking
        self._types = _Types(lacking)
        self._namespaces, self._outputs = _namespaces(self._types)
        self._frozen = self._add_frozen(heap)
        self._heap = heap
        self._sort(session, of_all)
        self._counted_ids = dict.fromkeys(map(id, self.counted))
        self._nodes: dict[int, Any] = {}
        self._own = (
            self._heap,
            self.counted,
            self._modules,
            self._nodes,
            self._types.getters,
        )
        # Of each node those that it holds, and those that hold it.
        self._keeps: dict[int, list[int]] = {}
        self._kept_by: dict[int, list[int]] = {}
        # What to say of whatever one node holds by another; and of the values of a dict, whose it is.
        self._labels: dict[tuple[int, int], _Root] = {}
        self._owned: dict[int, _Root] = {}
        self._roots: dict[int, _Root] = {}
        self._equal_roots: dict[_Root, _Root] = {}
        self._found: dict[int, _Root] = {}
        # Classes above whose instances nobody has looked yet.
        self._classes: set[int] = set()
        self._through_instances = False
        self._note_sessions()
        self._judge(self._search())

    def names(self) -> Iterator[str]:
        """The name of the class of each object that is counted."""
        return (_name(type(mapped)) for mapped in self.counted)

    def keepers(self) -> Iterator[_Root]:
        """What keeps each object that is counted."""
        # Whatever is not garbage has been found: see _judge.
        return (self._found.get(key, _Root("cycle", "")) for key in self._counted_ids)

    def _add_frozen(self, heap: list[Any]) -> set[int]:
        """Add what gc.freeze() has taken out of the collector's sight, as far as it can be reached; the ids of that."""

        def mapped(part: list[Any]) -> list[Any]:
            return [value.obj() for value in part if self._types.role(value) == "state"]

        found = frozen_objects(heap, mapped)
        heap += found
        return set(map(id, found))

    def _sort(self, session: Session | None, of_all: bool) -> None:
        """Go through the heap once, for what is of interest in itself."""
        types = self._types
        members: dict[_Role, list[Any]] = {role: [] for role in _OF_INTEREST}
        for value in self._heap:
            if (role := types.role(value)) in _OF_INTEREST:
                members[role].append(value)
        # What unpickling, or a class that is made without its __init__, has not finished has no state.
        states = [(mapped, state_of(mapped)) for mapped in members["mapped"]]
        self.counted = [
            mapped
            for mapped, state in states
            if state is not None and (of_all or (session is not None and state.session is session))
        ]
        known = () if "scoped sessions" in self._lacking else members["registry"]
        self.abandoned = set(_abandoned_sessions(known))
        # By the ids of their dicts. They are looked at apart, see _held_by.
        self._modules = {id(types.attributes(module)): module for module in members["module"]}
        self._heap[:] = [
            value for value in self._heap if types.role(value) != "module" and value is not KNOWN
        ]
        self._context_values = {
            id(value): f"{variable.name}{_container(value)}"
            for context in members["context"]
            for variable, value in context.items()
        }
        frames = _frames(members["greenlet"])
        self._live = {id(frame) for frame in frames}
        self._variables, self._library_variables = _variables(frames)

    def _held_by(self, holder: Any) -> list[Any]:
        """All that an object refers to, as often as it does."""
        if self._types.role(holder) == "module":
            # Python 3.12.1 dies of a look into _asyncio.
            return [self._types.attributes(holder)]
        return gc.get_referents(holder)

    def _note_sessions(self) -> None:
        for mapped in self.counted:
            if (root := self._root_in_session(mapped)) is not None:
                self._roots[id(mapped)] = root
                self._found[id(mapped)] = root

    def _root_in_session(self, mapped: Any) -> _Root | None:
        """What to say of an object that its session itself keeps; None for one that it only knows."""
        state = state_of(mapped)
        session = None if state is None else state.session
        if state is None or session is None or "unflushed" in self._lacking:
            return None
        kind = orm_internals.unflushed(session, state)
        if kind is None:
            return None
        return _Root("scoped registry" if id(session) in self.abandoned else kind, "")

    def _search(self) -> set[int]:
        """Find the roots, level by level, until each object has one; the nodes above which it has not looked."""
        self._nodes.update(
            (id(counted), counted) for counted in self.counted if id(counted) not in self._found
        )
        frontier = set(self._nodes)
        seen = set(frontier)
        for _ in range(_MOST_LEVELS):
            if not frontier:
                # A class may have more instances than there is of all else, so they come last.
                frontier, self._classes, self._through_instances = self._classes, set(), True
            if not frontier:
                break
            above: set[int] = set()
            for held, holder in self._holders(frontier):
                for node in self._steps_up(held, holder):
                    self._keeps.setdefault(id(node), []).append(id(held))
                    self._kept_by.setdefault(id(held), []).append(id(node))
                    if id(node) not in seen and id(node) not in self._roots:
                        seen.add(id(node))
                        above.add(id(node))
                        self._nodes[id(node)] = node
            self._look_down(self._roots.items())
            # What is above none but objects whose root is known is of no interest any more.
            wanted = self._above_unfound()
            seen -= above - wanted
            frontier = above & wanted
            self._classes &= wanted
        return frontier | self._classes

    def _above_unfound(self) -> set[int]:
        """The objects without a root, and all that was found to hold them."""
        todo = [key for key in self._counted_ids if key not in self._found]
        above = set(todo)
        while todo:
            for holder in self._kept_by.get(todo.pop(), ()):
                if holder not in above:
                    above.add(holder)
                    todo.append(holder)
        return above

    def _holders(self, frontier: set[int]) -> Iterator[tuple[Any, Any]]:
        """Each pair of an object in the frontier and somebody who refers to it."""
        for key, (frame, name) in self._variables.items():
            if key in frontier:
                held = self._nodes[key]
                yield held, _Root("variable", _variable(frame, name, held))
        for key, module in self._modules.items():
            if key in frontier:
                yield self._nodes[key], module
        for start in range(0, len(self._heap), _TOGETHER):
            some = self._heap[start : start + _TOGETHER]
            if frontier.isdisjoint(map(id, gc.get_referents(*some))):
                continue
            for holder in some:
                for held in gc.get_referents(holder):
                    if id(held) in frontier:
                        yield held, holder

    def _steps_up(self, held: Any, holder: Any) -> Iterator[Any]:
        """What to look at next above `held`, and a note of what there is to say of it; roots are noted instead."""
        role = self._types.role(holder)
        root = holder if type(holder) is _Root else self._root(role, held, holder)
        if root is not None:
            root = self._equal_roots.setdefault(root, root)
            self._roots[id(root)] = root
            yield root
        elif role == "frame":
            return  # it is running: its variables are known
        elif type(holder) is held and not self._through_instances:
            self._classes.add(id(held))
        else:
            if role == "collection":
                yield from self._owner(held, holder)
            elif label := self._label(role, held, holder):
                self._labels[id(holder), id(held)] = label
            # It may be that the collection is kept and its owner is not.
            yield holder

    def _root(self, role: _Role, held: Any, holder: Any) -> _Root | None:
        """The root that a holder is; None where one has to look further up."""
        if role == "result":
            return _Root("result", _name(type(holder)))
        if role == "frame" and id(holder) not in self._live:
            # The collector knows a frame only once it has ended: what keeps it then is a traceback.
            return _Root("traceback", _traceback(holder))
        if role == "step":
            return _in_step(held, holder)
        if type(holder) is dict and id(holder) in self._namespaces:
            if holder is self._outputs:
                return _Root("output", "a result that a cell has shown")
            name = _key(held, holder)
            if name is None:
                return None
            if self._outputs is not None and name.startswith("_"):
                return _Root("output", f"a result that a cell has shown, also called {name}")
            kind = _container(held)
            return _Root("variable", f"{name}{kind} of {self._namespaces[id(holder)]}")
        return None

    def _owner(self, held: Any, collection: Any) -> Iterator[Any]:
        """The mapped object that has loaded this collection."""
        owner, key = orm_internals.owner_of(collection)
        if owner is not None and self._types.attributes(owner).get(key) is collection:
            through = f"{_name(type(owner))}.{key}"
            self._labels[id(owner), id(held)] = _Root("collection", through)
            yield owner

    def _label(self, role: _Role, held: Any, holder: Any) -> _Root | None:
        """What to say of all that is kept by this reference, whatever keeps the holder; None for most."""
        if role == "class" and type(held) is dict:
            self._owned[id(held)] = _Root("class attribute", f"{_short(_qualified_name(holder))}.")
        elif role == "module":
            self._owned[id(held)] = _Root("variable", f" of module {held.get('__name__')}")
        elif role == "function":
            if held is holder.__globals__ and "__name__" in held:
                self._owned[id(held)] = _Root("variable", f" of module {held['__name__']}")
            if held is holder.__defaults__ or held is holder.__kwdefaults__:
                return _Root("default argument", _short(holder.__qualname__))
        elif role == "context's node" and id(held) in self._context_values:
            return _Root("context variable", self._context_values[id(held)])
        elif role == "cache":
            wrapped = self._types.attributes(holder).get("__wrapped__")
            if held is not wrapped and held is not self._types.attributes(holder):
                return _Root("cache", _callables_name(wrapped))
        elif role == "callback" and (callback := _users_callback(held, holder)) is not None:
            return _Root("callback", callback)
        return None

    def _look_down(self, starts: Iterable[tuple[int, _Root]]) -> None:
        """Give each object that can be reached from the starts the nearest of them, if it has none."""
        seen: set[int] = set()
        queue: deque[tuple[int, _Root]] = deque()
        for key, root in starts:
            if key not in seen:
                seen.add(key)
                queue.append((key, root))
        while queue:
            key, root = queue.popleft()
            if key in self._counted_ids:
                self._found.setdefault(key, root)
            for held in self._keeps.get(key, ()):
                if held not in seen:
                    seen.add(held)
                    queue.append((held, self._kept_through(key, held, root)))

    def _kept_through(self, holder: int, held: int, root: _Root) -> _Root:
        """What to say of that which a root keeps by way of a holder."""
        label = self._labels.get((holder, held))
        if label is None and holder in self._owned:
            label = self._labels[holder, held] = self._value_of(holder, held)
        if label is None:
            return root
        if label.kind != "collection":
            return label
        keeper = _REPORTS[root.kind].format(where=root.where)
        return _Root("collection", f"{label.where}, whose owner is kept by {keeper}")

    def _value_of(self, namespace: int, held: int) -> _Root:
        """What to say of a class attribute, or a variable of a module that is not in sys.modules."""
        kind, where = self._owned[namespace]
        value = self._nodes[held]
        name = f"{_key(value, self._nodes[namespace])}{_container(value)}"
        return _Root(kind, f"{where}{name}" if kind == "class attribute" else f"{name}{where}")

    def _judge(self, not_looked_above: set[int]) -> None:
        """Find something to say of each object that has no root and is not garbage.

        By the collector's own rule: what has more references than were met on the way up is kept from outside, and
        keeps what it holds. Of the rest one may say that the collector frees it.
        """
        suspects = self._above_unfound()
        if not suspects:
            return
        kept = self._referred_to_from_outside(suspects) | (not_looked_above & suspects)
        frozen = self._frozen & suspects
        alive = set(kept | frozen)
        todo = list(alive)
        while todo:
            for held in self._keeps.get(todo.pop(), ()):
                if held not in alive:
                    alive.add(held)
                    todo.append(held)
        labels = (
            (held, self._kept_through(holder, held, _UNKNOWN))
            for holder in alive
            for held in self._keeps.get(holder, ())
        )
        # The best that can be said comes first.
        self._look_down(
            [label for label in labels if label[1].kind not in ("unknown", "collection")]
        )
        self._look_down(
            (key, _Root("variable", _variable(frame, name, self._nodes[key])))
            for key, (frame, name) in self._library_variables.items()
            if key in suspects
        )
        self._look_down((key, _UNKNOWN) for key in kept)
        self._look_down((key, _Root("frozen", "")) for key in frozen)

    def _referred_to_from_outside(self, keys: set[int]) -> set[int]:
        """Those nodes to which somebody refers who is not among them."""
        nodes = [self._nodes[key] for key in keys]
        counts = list(map(sys.getrefcount, nodes))
        # What the list and the call contribute. It depends on the version of Python.
        (added,) = map(sys.getrefcount, [object()])
        explained = Counter(
            key
            for holder in (*self._own, *nodes)
            for key in map(id, self._held_by(holder))
            if key in keys
        )
        return {
            key for key, count in zip(keys, counts, strict=True) if count - added > explained[key]
        }


def _abandoned_sessions(registries: Iterable[Any]) -> Iterator[int]:
    """The ids of the sessions that scoped registries hold for tasks that have ended."""
    for registry in registries:
        for scope, session in list(orm_internals.registered(registry).items()):
            if _is_subclass(asyncio.Task, type(scope)) and asyncio.Task.done(scope):
                yield id(_plain(session))


_Variables = dict[int, tuple[FrameType, str]]


def _frames(greenlets: Iterable[Any]) -> list[FrameType]:
    """The frames that run now or wait in a greenlet, innermost first."""
    frames = calling_frames()
    for waiting in greenlets:
        frames += reversed(down_from(greenlet.greenlet.gr_frame.__get__(waiting)))
    return frames


def _variables(frames: Iterable[FrameType]) -> tuple[_Variables, _Variables]:
    """The local variables of the user's functions, and those of all others, by the ids of their values."""
    users: _Variables = {}
    others: _Variables = {}
    for frame in frames:
        code = frame.f_code
        if code.co_flags & inspect.CO_OPTIMIZED:
            found = users if is_user_code(code.co_filename) else others
            for name, value in locals_of(frame).items():
                found.setdefault(id(value), (frame, name))
    return users, others


def _namespaces(types: _Types) -> tuple[dict[int, str], Any]:
    """The global variables of modules, by the id of their dict, and Jupyter's Out."""
    found = {
        id(variables): f"module {name}"
        for name, module in list(sys.modules.items())
        if (variables := types.attributes(module))
    }
    shell = orm_internals.shell()
    if shell is None:
        return found, None
    found[id(shell.variables)] = "the notebook"
    found[id(shell.outputs)] = found[id(shell.hidden)] = "Out"
    return found, shell.outputs


def _in_step(held: Any, step: Any) -> _Root | None:
    """The root that a coroutine or generator of the user is, where it waits; None for one of a library."""
    frame = frame_of(step)
    if frame is None or not is_user_code(frame.f_code.co_filename):
        return None
    if type(held) is FunctionType and held.__code__ is frame.f_code:
        return None  # its own function, which holds the variables of the functions around it
    value = _content(held) if type(held) is CellType else held
    for name, own in locals_of(frame).items():
        if own is value:
            return _Root("variable", _variable(frame, name, value))
    return _Root("value", place((frame.f_code, frame.f_lineno)).short)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _key(value: Any, namespace: dict[str, Any]) -> str | None:
    """The name of a value in a namespace, rather one that is not private; None if it is no longer there."""
    names = [name for name, own in list(namespace.items()) if own is value and type(name) is str]
    return next((name for name in names if not name.startswith("_")), names[0] if names else None)


def _container(held: Any) -> str:
    containers = (list, tuple, set, dict, deque)
    kind = type(held)
    return (
        f" (a {_name(kind)})"
        if any(_is_subclass(container, kind) for container in containers)
        else ""
    )


def _variable(frame: FrameType, name: str, held: Any) -> str:
    where = place((frame.f_code, frame.f_lineno))
    return f"{name}{_container(held)} in {where.short}"


def _traceback(frame: FrameType) -> str:
    return f"the frame of {place((frame.f_code, frame.f_lineno)).short} is in it"


def _short(qualified_name: str) -> str:
    """A name without the functions in which it was defined."""
    return qualified_name.rpartition("<locals>.")[2]


def _function(called: Any) -> Any:
    """What is called in the end by a bound method or a partial."""
    while True:
        if type(called) is MethodType:
            called = called.__func__
        elif _is_subclass(functools.partial, type(called)):
            called = functools.partial.func.__get__(called)
        else:
            return called


def _callables_name(called: Any) -> str:
    function = _function(called)
    if type(function) in (FunctionType, BuiltinFunctionType):
        return _short(function.__qualname__)
    return str(_name(type(function)))


def _users_callback(held: Any, handle: Any) -> str | None:
    """What an event loop is to call, if it is the user's and `held` is the call's; None if not.

    To wake up whoever waits is a call as well, but then it is not the event loop that keeps what he has.
    """
    callback, arguments = internals.callback_of(handle)
    function = _function(callback)
    if type(function) is FunctionType:
        if not is_user_code(function.__code__.co_filename):
            return None
    elif type(function) is not BuiltinFunctionType or held is callback:
        return None
    return _callables_name(function) if held is callback or held is arguments else None
