"""What the server and a pool know together, in words: who is blocked, by whom, at which lines, and what ends it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ormscope.places import NOWHERE, Place
from ormscope.server_limits import NEVER

_LONG_SECONDS = 1.0  # a shorter statement, or pause in a transaction, is not worth a headline
_MOST_LINES = 10
_NAMED_BY_PYTHON = re.compile(r"(Task|Thread|MainThread|asyncio|ThreadPoolExecutor)[-_\d]*( .*)?")

Cause = Literal[
    "deadlock", "deadlock until a timer", "lock left behind", "blocked", "idle in transaction", "slow", "quiet",
    "unknown",
]  # fmt: skip


@dataclass(frozen=True)
class Session:
    """A connection to the server, as the server and the scope see it; `owner` is empty where no watched pool has it.

    `seconds` is how long it has been in its `state`, `lock` what it waits for, `blockers` the process ids of those who
    have that lock, and as what. `taken` is where the connection was taken, `place` where its user is now, `asks` where
    that one waits for a connection of the pool `asked`. `left` are the advisory locks that it has though it lies in
    the pool; `stuck` says that a proved deadlock goes through it.
    """

    pid: int
    state: str
    event: str
    seconds: float
    statement: str
    program: str
    lock: str
    blockers: dict[int, str]
    owner: str = ""
    taken: Place = NOWHERE
    place: Place = NOWHERE
    asks: Place | None = None
    asked: str = ""
    left: tuple[str, ...] = ()
    stuck: bool = False

    @property
    def who(self) -> str:
        """Whose it is, and the line where that one took it."""
        if self.left:
            return f"a connection that lies in the pool, last taken by {self.owner} at {self.taken}"
        if self.owner:
            return f"{self.owner} at {self.taken}"
        if not self.pid:
            return "a prepared transaction (pg_prepared_xacts)"
        return f"pid {self.pid}, outside of this program ({self.program or 'unknown'})"

    @property
    def does(self) -> str:
        """What it does now."""
        if self.asks is not None:
            return f"waits for a connection of {self.asked} at {self.asks.short}"
        if self.lock:
            return f"waits itself for {self.lock}"
        if not self.state:
            return "what it does may not be seen"
        return f"{self.state} for {self.seconds:.1f} s ({self.statement})"


@dataclass(frozen=True, kw_only=True)
class ServerReport:
    """What the server and a pool know together at one moment; `str()` is the report.

    `sessions` are the connections that are checked out, those that block them, and those that have locks left behind.
    `ends` are the time limits that end a deadlock, or may, `above` those after which its task may be
    cancelled, `timeout` is the
    pool's, in seconds. `problem` is why nothing is known.
    The report of a deadlock has no times, so that it reads the same in every run.
    """

    pool: str
    cause: Cause
    state: str = ""
    sessions: tuple[Session, ...] = ()
    ends: tuple[str, ...] = ()
    above: tuple[str, ...] = ()
    timeout: float | None = None
    problem: str = ""

    def __str__(self) -> str:
        if self.problem:
            return f"UNKNOWN what the server does for {self.pool}: {self.problem}"
        return "\n".join(_deadlock_report(self) if "deadlock" in self.cause else _report(self))


def cause_of(sessions: tuple[Session, ...], has_limits: bool) -> Cause:
    ours = [session for session in sessions if session.owner and not session.left]
    long = {session.state for session in ours if session.seconds >= _LONG_SECONDS}
    left = {session.pid for session in sessions if session.left}
    blockers = {pid for session in ours for pid in session.blockers}
    if any(session.stuck for session in sessions):
        return "deadlock until a timer" if has_limits else "deadlock"
    if left and (left & blockers or not blockers):
        return "lock left behind"
    if blockers:
        return "blocked"
    if any(state.startswith("idle in transaction") for state in long):
        return "idle in transaction"
    return "slow" if "active" in long else "quiet"


def _lines(title: str, texts: Iterable[str]) -> list[str]:
    """One line for each text, the most frequent first, with how often it is there where that is more than once."""
    counts = sorted(Counter(texts).items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count} × {text}" if count > 1 else text for text, count in counts[:_MOST_LINES]]
    texts += [f"and {len(counts) - _MOST_LINES} more"] * (len(counts) > _MOST_LINES)
    return [f"  {'' if number else title:<9} {text}" for number, text in enumerate(texts)]


def _deadlock_report(report: ServerReport) -> list[str]:
    stuck = [session for session in report.sessions if session.stuck]
    blocked = [session for session in stuck if session.blockers]
    asking = [session for session in stuck if session.asks is not None]
    blockers = {pid for session in blocked for pid in session.blockers}
    has_it = [session for session in asking if session.pid in blockers]
    others = [session for session in asking if session.pid not in blockers]
    patience = [f"pool_timeout ({report.timeout:g} s)"] if report.timeout else []
    limits = [*report.ends, *patience, *report.above]
    return [
        f"{report.cause.upper()} through the server in {report.pool}: {report.state}",
        "Who has the lock waits for a connection; who could give one back waits in the server for the lock.",
        *_lines("lock", {session.lock for session in blocked}),
        *_lines("has it", (f"{_name(it)}at {it.taken}" for it in has_it)),
        *_lines("held too", (f"{_name(it)}at {it.taken}" for it in others)),
        *_lines("they ask", (f"{it.asked} at {it.asks}" for it in asking)),
        *_lines("blocked", (f"{_name(it)}at {it.place} ({it.statement})" for it in blocked)),
        *_lines("ends", [f"when {' or '.join(limits)} ends it" if limits else NEVER]),
        *_lines("fix", {_fix(session) for session in has_it}),
    ]


def _name(session: Session) -> str:
    """How the program named who has a connection; Python numbers the others as they come."""
    return "" if _NAMED_BY_PYTHON.fullmatch(session.owner) else f"{session.owner} "


def _report(report: ServerReport) -> list[str]:
    ours = [it for it in report.sessions if it.owner and not it.left]
    blocked = [it for it in ours if it.lock]
    idle = [it for it in ours if it.state.startswith("idle in transaction") and it.asks is None]
    active = [it for it in ours if it.state == "active" and not it.lock]
    left = [it for it in report.sessions if it.left]
    modes = {pid: mode for it in report.sessions for pid, mode in it.blockers.items()}
    blocking = [it for it in report.sessions if it.pid in modes]
    culprits = {
        "blocked": [it for it in blocking if not it.lock],
        "lock left behind": left,
        "idle in transaction": sorted(idle, key=lambda it: -it.seconds),
        "slow": sorted(active, key=lambda it: -it.seconds),
    }.get(report.cause, [])
    began = [f"{_now(it)} in a transaction begun at {it.taken} ({it.statement})" for it in idle]
    return [
        f"{report.cause.upper()} in the server, {report.pool}: {report.state}",
        *_lines("blocked", (f"{_now(it)} for {it.lock} ({it.statement})" for it in blocked)),
        *_lines("by", (f"{it.who}{_as(modes[it.pid])}; {it.does}" for it in blocking)),
        *_lines("left", (f"{', '.join(it.left)}, by {it.who}" for it in left)),
        *_lines("idle", began),
        *_lines("works", (f"{_now(it)} {it.event} ({it.statement})" for it in active)),
        *_lines("fix", [_fix(it) for it in culprits[:1]]),
    ]


def _now(session: Session) -> str:
    since = (
        f", {session.seconds:.1f} s" if session.state else ""
    )  # hidden from a role without rights
    return f"{session.owner} at {session.place}{since}"


def _as(mode: str) -> str:
    return f", with {mode}" if mode else ""


def _fix(session: Session) -> str:
    """What is to be done about a session that others wait for."""
    taken, asks = session.taken, session.asks
    if session.left:
        return f"pg_advisory_unlock in a finally in {taken.function}, or pg_advisory_xact_lock, which ends by itself"
    if asks is not None and asks.function == taken.function:
        return f"{taken.function}: use the connection it holds (line {taken.line}) also at line {asks.line}"
    if asks is not None:
        return f"hand the session that {taken.function} holds on to {asks.function}, or finish with it first"
    if not session.owner:
        return f"end it (select pg_terminate_backend({session.pid})), and let its like begin with set lock_timeout"
    if session.state == "active":
        return f"make the statement in {session.place.short} shorter: look at its plan with EXPLAIN (ANALYZE)"
    return f"end the transaction before {session.place.short}: commit, or leave the session's block"
