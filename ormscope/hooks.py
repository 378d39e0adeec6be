"""What stands between an engine and its users, so that PoolScopes hear of it: it can fail without harm.

SQLAlchemy has no event for *waiting*, and to add or remove a listener while a connection is being opened makes
that attempt fail ("deque mutated during iteration"). So methods are replaced on the pool and the dialect
themselves, not on their classes, and given back when the last scope is closed.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import Engine
from sqlalchemy.pool import Pool

from ormscope.internals import (
    CLOSE,
    CONNECT_ANEW,
    GIVE_BACK,
    OPEN,
    POOL_HOOKS,
    STATEMENT_HOOKS,
    TAKE,
    is_asynchronous,
    must_wait,
    record_of_statement,
)
from ormscope.owners import current
from ormscope.places import calling_places

if TYPE_CHECKING:
    from ormscope.pool import PoolScope

logger = logging.getLogger("ormscope")

_Method = Callable[..., Any]


class Attached:
    """The scopes that watch one engine, shared by its dialect and by each pool that it ever has."""

    __slots__ = ("scopes",)

    def __init__(self) -> None:
        self.scopes: tuple[PoolScope, ...] = ()  # replaced, never changed: others may be iterating


class _Hook:
    """What a pool or dialect has in place of one of its methods, and the method that somebody else had put there."""

    __slots__ = ("attached", "name", "own", "owner")

    def __init__(self, owner: Any, name: str, attached: Attached) -> None:
        self.owner = weakref.ref(owner)  # else owner and hook would keep each other
        self.name = name
        self.own: _Method | None = owner.__dict__.get(name)
        self.attached = attached
        method = _MAKERS[name](self, self.original())
        method.hook = self  # type: ignore[attr-defined]
        owner.__dict__[name] = method

    def original(self) -> _Method:
        """The method as it was, to be called with its owner."""
        owner = self.owner()
        if self.own is None:
            method: _Method = getattr(type(owner), self.name)
            return method
        own = self.own
        return lambda _owner, *arguments, **options: own(*arguments, **options)

    def give_back(self) -> None:
        """Put the method where it was."""
        owner = self.owner()
        if owner is not None:
            if self.own is None:
                del owner.__dict__[self.name]
            else:
                owner.__dict__[self.name] = self.own

    def tell(self, what: str, *about: Any) -> None:
        """Call a method of each scope's ledger; a scope whose method raises steps aside."""
        for scope in self.attached.scopes:
            try:
                getattr(scope.ledger, what)(*about)
            except Exception as error:
                step_aside(scope, error)

    def step_aside(self, error: Exception) -> None:
        """Let every scope step aside, because of what is common to all."""
        for scope in self.attached.scopes:
            step_aside(scope, error)


def _hook_of(owner: Any, name: str) -> _Hook | None:
    hook = getattr(owner.__dict__.get(name), "hook", None)
    return hook if isinstance(hook, _Hook) else None


def attach(scope: PoolScope, engine: Engine) -> None:
    """Let a scope hear of all that happens to an engine's pools and statements."""
    hook = _hook_of(engine.pool, TAKE)
    attached = Attached() if hook is None else hook.attached
    if hook is None:
        _watch_pool(engine.pool, attached)
    for name in STATEMENT_HOOKS:
        known = _hook_of(engine.dialect, name)
        if known is None:
            _Hook(engine.dialect, name, attached)
        else:
            known.attached = attached
    attached.scopes += (scope,)


def detach(scope: PoolScope, engine: Engine) -> None:
    """Let a scope hear of nothing any more; after the last one, engine and pool are as they were."""
    hook = _hook_of(engine.pool, TAKE)
    if hook is None:
        return
    attached = hook.attached
    attached.scopes = tuple(other for other in attached.scopes if other is not scope)
    if not attached.scopes:
        for owner, names in ((engine.pool, POOL_HOOKS), (engine.dialect, STATEMENT_HOOKS)):
            for name in names:
                hook = _hook_of(owner, name)
                if hook is not None:
                    hook.give_back()


def step_aside(scope: PoolScope, error: BaseException) -> None:
    """Take a scope that has failed off its engine, and say so once; nothing of it reaches the application."""
    try:
        if scope.failure is None:
            scope.failure = f"{type(error).__qualname__}: {error}"
            logger.error(
                "PoolScope %r failed and has stepped aside; the engine goes on without it",
                scope.name,
                exc_info=error,
            )
            scope.close()
    except Exception:
        logger.exception("a PoolScope could not step aside")


def _watch_pool(pool: Pool, attached: Attached) -> None:
    for name in POOL_HOOKS:
        _Hook(pool, name, attached)


# The methods. Each is called for every request, so the loops stand in them.


def _do_get(hook: _Hook, original: _Method) -> _Method:
    owner: Callable[[], Any] = hook.owner
    attached = hook.attached
    pool = hook.owner()
    sleeps = pool is not None and not is_asynchronous(pool)

    def do_get() -> Any:
        pool = owner()
        who = None
        try:
            who, frames, since = current(), calling_places(), perf_counter()
            waits = must_wait(pool)
            # A thread may lose a connection that it has seen to another one, and then wait after all.
            if waits or sleeps:
                for scope in attached.scopes:
                    try:
                        scope.ledger.queued(pool, who, frames, since, waits)
                    except Exception as error:
                        step_aside(scope, error)
        except Exception as error:
            hook.step_aside(error)
        try:
            record = original(pool)
        except BaseException as error:
            hook.tell("acquire_failed", pool, error)
            who = None  # who keeps the error keeps this frame, and would keep the task
            raise
        if who is not None:
            for scope in attached.scopes:
                try:
                    scope.ledger.acquired(pool, who, frames, record)
                except Exception as error:
                    step_aside(scope, error)
        return record

    return do_get


def _open(hook: _Hook, original: _Method) -> _Method:
    """`_create_connection`, and `_invoke_creator`, by which also an existing place is connected anew."""
    owner: Callable[[], Any] = hook.owner
    is_the_attempt = hook.name == CONNECT_ANEW

    def create_connection(*arguments: Any) -> Any:
        pool = owner()
        hook.tell("connecting", pool)
        try:
            opened = original(pool, *arguments)
        except BaseException as error:
            hook.tell("connect_failed", error, is_the_attempt)
            raise
        if is_the_attempt:
            hook.tell("connected", *arguments)
        return opened

    return create_connection


def _do_return_conn(hook: _Hook, original: _Method) -> _Method:
    owner: Callable[[], Any] = hook.owner
    attached = hook.attached

    def do_return_conn(record: Any) -> None:
        pool = owner()
        # Before: a moment later it may be somebody else's.
        for scope in attached.scopes:
            try:
                scope.ledger.released(record)
                if scope.proof is not None:
                    scope.released(pool)
            except Exception as error:
                step_aside(scope, error)
        try:
            original(pool, record)
        finally:
            for scope in attached.scopes:
                if scope.ledger.samples is not None:
                    try:
                        scope.ledger.available(pool)
                    except Exception as error:
                        step_aside(scope, error)

    return do_return_conn


def _close_connection(hook: _Hook, original: _Method) -> _Method:
    owner: Callable[[], Any] = hook.owner

    def close_connection(*arguments: Any, **options: Any) -> None:
        hook.tell("closed")
        original(owner(), *arguments, **options)

    return close_connection


def _recreate(hook: _Hook, original: _Method) -> _Method:
    owner: Callable[[], Any] = hook.owner

    def recreate() -> Any:
        pool = original(owner())
        try:
            _watch_pool(pool, hook.attached)
        except Exception as error:
            hook.step_aside(error)
        hook.tell("recreated", pool)
        return pool

    return recreate


def _execute(hook: _Hook, original: _Method) -> _Method:
    owner: Callable[[], Any] = hook.owner

    def do_execute(cursor: Any, statement: str, parameters: Any, context: Any = None) -> Any:
        scopes = hook.attached.scopes
        record = None
        try:
            record = None if context is None else record_of_statement(context)
        except Exception as error:
            hook.step_aside(error)
        if record is None:
            return original(owner(), cursor, statement, parameters, context)
        for scope in scopes:
            try:
                scope.ledger.statement_begins(record, statement, context)
            except Exception as error:
                step_aside(scope, error)
        try:
            return original(owner(), cursor, statement, parameters, context)
        finally:
            for scope in scopes:
                try:
                    scope.ledger.statement_ends(record)
                except Exception as error:
                    step_aside(scope, error)

    return do_execute


def _execute_no_parameters(hook: _Hook, original: _Method) -> _Method:
    def without(owner: Any, cursor: Any, statement: str, _parameters: Any, context: Any) -> Any:
        return original(owner, cursor, statement, context)

    watched = _execute(hook, without)

    def do_execute_no_params(cursor: Any, statement: str, context: Any = None) -> Any:
        return watched(cursor, statement, None, context)

    return do_execute_no_params


_MAKERS: dict[str, Callable[[_Hook, _Method], _Method]] = {
    "recreate": _recreate,
    TAKE: _do_get,
    GIVE_BACK: _do_return_conn,
    OPEN: _open,
    CONNECT_ANEW: _open,
    CLOSE: _close_connection,
    "do_execute": _execute,
    "do_executemany": _execute,
    "do_execute_no_params": _execute_no_parameters,
}
