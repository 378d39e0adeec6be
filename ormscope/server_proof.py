"""Deadlocks that go through a lock in the server: what is stuck there, whether it is for good, and what may end it.

Between the tasks and threads of the wait-for graph there are more edges then: from whoever has a statement waiting
for a lock in the server, to those who can use the connections that have this lock. Nothing is proved through a lock
that anybody else has, or by one look: what has not moved until a second one, in the server and here, is.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import Engine

from ormscope import proof
from ormscope.backends import Backends, edges_of
from ormscope.ledger import Holder
from ormscope.owners import TaskOrThread
from ormscope.server_limits import UNSEEN_AT_CHECKOUT, may_be_set_at_checkout, running
from ormscope.waitgraph import Stuck, find_stuck_parts

if TYPE_CHECKING:
    from ormscope.pool import PoolScope


@dataclass
class Deadlock:
    """Pools that are stuck, through which sessions of the server, and who waits there for a lock."""

    stuck: Stuck
    pids: set[int]
    blockers: set[int]
    in_server: set[TaskOrThread]

    def limits(self, seen: Backends, begun_with: dict[Engine, dict[str, str]]) -> tuple[str, ...]:
        """The server's time limits that may end it; `begun_with` are those of a new connection, by the engine."""
        found: list[str] = []
        for pid in sorted(self.pids):
            holder, session = seen.holders[pid], seen.sessions.get(pid)
            settings = seen.scopes[pid].ledger.settings(holder)
            found += running(
                "" if session is None else session.state,
                begun_with[seen.scopes[pid].engine],
                None if settings is None else settings.values(),
                is_waited_for=pid in self.blockers,
            )
            if may_be_set_at_checkout(holder.pool):
                found.append(UNSEEN_AT_CHECKOUT)
        return tuple(dict.fromkeys(found))


def deadlocks_in(seen: Backends) -> list[Deadlock]:
    """What looks stuck, each part by itself, and only where the server has a part in it."""
    edges = edges_of(seen)
    found = []
    for stuck in find_stuck_parts(proof.waits_of(proof.scopes(), dict(edges.values()))):
        waiting = {pid for pid, (who, _) in edges.items() if who in stuck.members}
        if waiting:
            blockers = {blocker for pid in waiting for blocker in seen.sessions[pid].blockers}
            held = {pid for pid, holder in seen.holders.items() if holder.pool in stuck.pools}
            in_server = {edges[pid][0] for pid in waiting}
            found.append(Deadlock(stuck, waiting | blockers | held, blockers, in_server))
    return found


@dataclass
class Suspicion:
    """What looks stuck, held once against everybody who can use one of the connections."""

    seen: Backends
    deadlocks: list[Deadlock]
    exact: bool
    returned: dict[int, int]
    holders: list[Holder]

    @property
    def other_loop(self) -> asyncio.AbstractEventLoop | None:
        """The loop, of another thread, on which the second look has to be: there nothing moves meanwhile."""
        loops = {task.get_loop() for task in _tasks_of(self.deadlocks)}
        here = all(proof.is_of_this_thread(it.stuck) for it in self.deadlocks)
        return None if here or len(loops) != 1 else loops.pop()

    def proved(self, again: Backends) -> list[Deadlock]:
        """Those of them that a second look finds as they were, so that nothing has moved in between."""
        now = {frozenset(deadlock.stuck.pools): deadlock for deadlock in self._look_here(again)}
        proved = []
        for before in self.deadlocks:
            after = now.get(frozenset(before.stuck.pools))
            if (
                after is not None
                and after.stuck.signature == before.stuck.signature
                and after.pids == before.pids
                and all(again.marks.get(pid) == self.seen.marks.get(pid) for pid in after.pids)
                and self.is_unmoved(after.stuck)
            ):
                proved.append(after)
        return proved

    def is_unmoved(self, stuck: Stuck) -> bool:
        """Whether nothing has come back to its pools, and nothing is about to."""
        return self._nothing_returned_to(stuck) and self._is_quiet(stuck)

    def _look_here(self, again: Backends) -> list[Deadlock]:
        found = deadlocks_in(again)
        if not found or self.exact or not all(proof.is_of_this_thread(it.stuck) for it in found):
            return found
        # What moved while the first answer was looked for, from another thread, may have been missed. Now nothing can.
        proof.look_for_users(self.holders, _tasks_of(found))
        return deadlocks_in(again)

    def _nothing_returned_to(self, stuck: Stuck) -> bool:
        now = proof.returned_to(proof.scopes(), stuck.pools)
        return all(self.returned.get(key) == count for key, count in now.items())

    def _is_quiet(self, stuck: Stuck) -> bool:
        """Whether nothing is about to wake one of them, and nothing can have been missed in another thread."""
        is_woken = proof.is_being_woken(stuck)
        if proof.is_of_this_thread(stuck):
            return not is_woken
        return self.exact and is_woken is False


def suspect(seen: Backends) -> Suspicion | None:
    """What looks stuck once it is known who can use the connections; takes too long for an event loop."""
    first = deadlocks_in(seen)
    if not first:
        return None
    watched = proof.scopes()
    pools = {pool for deadlock in first for pool in deadlock.stuck.pools}
    returned = proof.returned_to(watched, pools)
    holders = [holder for scope in watched for holder in scope.holders if holder.pool in pools]
    pids = {pid for deadlock in first for pid in deadlock.pids}
    holders += [it for pid, it in seen.holders.items() if pid in pids and it not in holders]
    exact = proof.look_for_users(holders, _tasks_of(first))
    found = deadlocks_in(seen)
    return Suspicion(seen, found, exact, returned, holders) if found else None


def might_be_stuck(scope: PoolScope, seen: Backends) -> bool:
    """Whether one more look may find what this one did not: somebody may just have been woken, only to wait on."""
    ours = seen.holders.keys()
    return bool(scope.waiters) and any(
        session.blockers and session.blockers.keys() <= ours
        for pid, session in seen.sessions.items()
        if pid in ours and seen.holders[pid].pool is scope.pool
    )


def _tasks_of(deadlocks: list[Deadlock]) -> set[asyncio.Task[object]]:
    members = {member for deadlock in deadlocks for member in deadlock.stuck.members}
    return {member for member in members if isinstance(member, asyncio.Task)}
