"""PostgreSQL's own time limits, which may end a wait in the server: what can be known of those of a connection.

A connection begins with what its server, database, role and driver give it: a new one like it can be asked. Later a
statement may set another one, which only the connection itself could tell; so the statements are looked at as they
are sent. That such a setting ends with its transaction is not followed, nor one that sets a limit back to nothing: a
limit that may have ended is told as one that may still count, and nothing is called endless that is not. What a
program sends past SQLAlchemy, over a cursor of the driver, cannot be seen; that a listener to checkouts may do so can.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Iterable
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from sqlalchemy.pool import Pool

_WORKS, _IN_TRANSACTION, _IDLE = "active", "idle in transaction", "idle"

# The states of a connection in which each limit runs.
LIMITS: dict[str, tuple[str, ...]] = {
    "lock_timeout": (_WORKS,),
    "statement_timeout": (_WORKS,),
    "transaction_timeout": (_WORKS, _IN_TRANSACTION),
    "idle_in_transaction_session_timeout": (_IN_TRANSACTION,),
    "idle_session_timeout": (_IDLE,),
}
# asyncpg has one of its own, which not every event loop tells of.
_STATES = {**LIMITS, "command_timeout": (_WORKS,)}
# What a new connection has.
SETTINGS = "select pg_backend_pid(), " + ", ".join(
    f"current_setting('{name}', true)" for name in LIMITS
)
UNSEEN = "a limit that a statement set before the PoolScope was made, if one did"  # nobody can know
UNSEEN_AT_CHECKOUT = "a limit that a listener to checkout sets, if one does"
NEVER = (
    "never, as far as can be seen: pool_timeout is None, connections begin without a time limit, "
    "and no statement names one"
)

_NAMES = "|".join(LIMITS)
_NAMED = re.compile(rf"\b(?:{_NAMES})\b")
_SET = re.compile(
    rf"\bset\s+(?P<scope>session\s+|local\s+)?(?P<name>{_NAMES})\s*(?:=|\bto\b)\s*(?P<value>'[^']*'|[^\s;]+)"
)
_NO_LIMIT = re.compile(r"0+\s*[a-z]*|default")


class Setting(NamedTuple):
    """A time limit that a statement may have set; `value` is empty where the statement does not show it plainly."""

    name: str
    value: str
    is_local: bool  # to the transaction

    @property
    def words(self) -> str:
        """The limit, and that it may be over."""
        value = f"{self.value}, " if self.value else ""
        return f"{self.name} ({value}if it still is as a statement has set it)"


def settings_in(statement: str, parameters: Iterable[Any]) -> list[Setting]:
    """The limits that a statement may set; called for every statement, of which nearly none does."""
    lowered = statement.lower()
    found = []
    if "set_config" in lowered:  # the name may be one of the parameters
        names = {str(value).lower() for value in parameters} & set(LIMITS)
        found = [Setting(name, "", False) for name in sorted(names)]
    if "timeout" not in lowered or lowered.lstrip().startswith(("show ", "reset ")):
        return found
    plain = list(_SET.finditer(lowered))
    for match in plain:
        value = match["value"].strip("'").strip()
        if not _NO_LIMIT.fullmatch(value):
            is_local = (match["scope"] or "").startswith("local")
            found.append(Setting(match["name"], value, is_local))
    others = set(_NAMED.findall(lowered)) - {match["name"] for match in plain}
    return [*found, *(Setting(name, "", False) for name in sorted(others))]


def may_be_set_at_checkout(pool: Pool) -> bool:
    """Whether somebody listens to checkouts who uses what he is given, and so may have set a limit."""
    return any(map(_uses_its_arguments, pool.dispatch.checkout))


def _uses_its_arguments(listener: object) -> bool:
    # One that only counts, as instruments do, is sure not to talk to the server.
    is_method = isinstance(listener, MethodType)
    function = listener.__func__ if isinstance(listener, MethodType) else listener
    if not isinstance(function, FunctionType) or function.__code__.co_freevars:
        return True
    code = function.__code__
    starred = sum(bool(code.co_flags & flag) for flag in (CO_VARARGS, CO_VARKEYWORDS))
    count = code.co_argcount + code.co_kwonlyargcount + starred
    ways = {*code.co_varnames[is_method:count], "locals", "vars", "eval", "exec"}
    used = (instruction.argval for instruction in dis.get_instructions(code))
    return any(ways & set(names if isinstance(names, tuple) else (names,)) for names in used)


def running(
    state: str, begun_with: dict[str, str], settings: Iterable[Setting] | None, is_waited_for: bool
) -> list[str]:
    """The limits that run for a connection in a `state`, in words; `settings` are None where nobody saw them all.

    Where nobody waits for it, that an idle one is ended by the server lets nobody go on.
    """
    state = state.removesuffix(" (aborted)")

    def runs(name: str) -> bool:
        # A state that may not be seen is any.
        states = _STATES[name] if state else (_WORKS, _IN_TRANSACTION, _IDLE)
        return (not state or state in states) and (is_waited_for or _WORKS in states)

    found = [
        f"{name} ({value})" for name, value in begun_with.items() if value != "0" and runs(name)
    ]
    if settings is None:
        return [*found, UNSEEN]
    return [*found, *(setting.words for setting in settings if runs(setting.name))]
