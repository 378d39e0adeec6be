"""Whether the service is mended: by how it behaves under the load, never by how it is written.

What has been edited is only looked at to tell which idea stands behind a service that still fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from workshop.checks.catalogue import Finding
from workshop.drill.incidents import SETTINGS
from workshop.drill.run import OK, Run
from workshop.drill.running import WORKERS

LIMIT = 3.0  # seconds, for 99 of 100 customers
GROWTH = 30.0  # MiB, for each worker
STALL = 2.5  # seconds; the warehouse takes five
AGAIN = 1.5  # waits in vain for each request that failed; a screen comes back by itself, a customer does not
SEEN = 0.5  # of the orders, on each screen
# Shares of the processors' time: other programs had so much of it, and no more than that was left.
BUSY, LEFT = 0.25, 0.1
GIVEN = dict(line.split("=") for line in SETTINGS.splitlines())
CONNECTIONS = WORKERS * int(GIVEN["POOL_SIZE"])
_CLOSES = {"open_session", "get_session"}


@dataclass(frozen=True)
class Judgement:
    """What the judge says of a service: whether it is mended, from what was seen of it, and else what is wrong."""

    run: Run
    edits: list[str]
    findings: list[Finding]
    seen: list[str]

    @property
    def is_mended(self) -> bool:
        """Whether nothing is left to say."""
        return not self.findings and not self.seen

    @property
    def is_unsure(self) -> bool:
        """Whether it may have failed because other programs needed the machine: no idea stands behind it."""
        is_busy = self.run.others > BUSY and self.run.idle < LEFT
        return is_busy and not self.findings and bool(self.seen)

    @property
    def misconception(self) -> str | None:
        """The idea behind what is wrong, where it is known: a name of the catalogue."""
        return self.findings[0].misconception if self.findings else None

    def __str__(self) -> str:
        if self.is_mended:
            return f"MENDED: {figures(self.run)}"
        told = [*map(str, self.findings[:1]), *([] if self.findings else self.seen[:1])]
        if self.is_unsure:
            told.append(
                f"But other programs had ≈ {self.run.others:.0%} of the processors, and ≈ {self.run.idle:.0%} were"
                " free: let them end, and judge again."
            )
        heading = "UNKNOWN, for this machine is too busy:" if self.is_unsure else "NOT YET:"
        return "\n".join([heading, *told, f"Seen: {figures(self.run)}"])


def figures(run: Run) -> str:
    """What was measured, in a line."""
    return (
        f"≈ {run.served} of ≈ {len(run.answers)} served; 99 of 100 customers within ≈ {run.p99:.2f} s; at most"
        f" ≈ {run.connections} connections; memory grew by ≈ {max(0.0, run.grown):.0f} MiB"
    )


def judge(run: Run, edits: Sequence[str], settings: Mapping[str, str]) -> Judgement:
    """Judge a service that has stood, or not stood, a load; `edits` are what differs from the files as given."""
    findings = list(_findings(run, set(edits), settings))
    return Judgement(run, list(edits), findings, list(_what_is_wrong(run)))


def _findings(run: Run, edits: set[str], settings: Mapping[str, str]) -> Iterator[Finding]:
    yield from _of_the_door(run)
    yield from _of_the_connections(run, settings)
    if run.failed:
        yield from _of_failures(run, edits, settings)
        return
    if timeouts := run.timeouts:
        told = (
            f"Everybody was served, and yet ≈ {timeouts:.0f} waits for a connection ended in vain."
        )
        yield Finding("covers-it-with-retries", told)
    yield from _of_the_work(run)
    if run.grown > GROWTH:
        yield _growth(run, "Nobody is stopped any more")


def _growth(run: Run, told: str) -> Finding:
    told += f", and a worker grew by ≈ {run.grown:.0f} MiB (at most {GROWTH:.0f})."
    return Finding("ends-the-stops-only", told)


def _of_the_door(run: Run) -> Iterator[Finding]:
    if strangers := run.found["strangers"]:
        told = f"Somebody without a good token was let in, by {strangers} of {WORKERS} workers."
        yield Finding("skips-the-sign-in", told)
    elif revoked := run.found["revoked"]:
        yield Finding(
            "remembers-the-token",
            f"A token was good, was revoked, and was still let in a moment later, by {revoked} of {WORKERS} workers.",
        )
    if run.found["distinct"] < run.found["receipts"]:
        twice = run.found["receipts"] - run.found["distinct"]
        told = (
            f"Of ≈ {run.found['receipts']} receipts, ≈ {twice} have a number that another one has."
        )
        yield Finding("the-lock-is-in-the-way", told)


def _of_the_connections(run: Run, settings: Mapping[str, str]) -> Iterator[Finding]:
    if run.connections <= CONNECTIONS:
        return
    told = f"The server had ≈ {run.connections} connections of the shop; it may have {CONNECTIONS}."
    if settings.get("POOL_SIZE") != GIVEN["POOL_SIZE"]:
        yield Finding("takes-a-larger-share", told)
    else:
        yield Finding("a-pool-beside-the-pool", told)


def _of_failures(run: Run, edits: set[str], settings: Mapping[str, str]) -> Iterator[Finding]:
    told = f"≈ {run.failed} of ≈ {len(run.answers)} requests failed."
    if not edits:
        yield Finding("restarts-it", f"Both files are as they were given. {told}")
    elif timeout := _shortened(edits, settings):
        yield Finding("fails-sooner", f"{timeout} is shorter than it was. {told}")
    elif run.timeouts > AGAIN * run.failed:
        told += f" But ≈ {run.timeouts:.0f} waits for a connection ended in vain."
        yield Finding("covers-it-with-retries", told)
    elif edits <= {"Deadline", "DEADLINE", "POOL_TIMEOUT"}:
        told += f" 99 of 100 customers waited for up to ≈ {run.p99:.1f} s."
        yield Finding("waits-longer", told)
    elif edits <= _CLOSES:
        left = run.found["left_out"]
        yield Finding(
            "blames-cancellation", f"{told} When all had gone, {left} connections were still out."
        )
    elif "export" in edits and run.most("lag") > STALL and run.grown <= GROWTH:
        yield Finding(
            "ends-the-growth-only",
            f"No worker grows any more, but its loop stood still for ≈ {run.most('lag'):.1f} s, and {told}",
        )
    elif "export" in edits and run.grown > GROWTH and run.most("lag") <= STALL:
        yield _growth(run, f"{told} But no loop stands still any more")


def _shortened(edits: set[str], settings: Mapping[str, str]) -> str:
    """The name of a time limit that is shorter than it was; empty where there is none."""
    given = float(GIVEN["POOL_TIMEOUT"])
    if float(settings.get("POOL_TIMEOUT", given)) < given:
        return "POOL_TIMEOUT"
    others = {"LOCK_TIMEOUT", "STATEMENT_TIMEOUT", "IDLE_IN_TRANSACTION_SESSION_TIMEOUT"}
    return min(others & edits, default="")


def _of_the_work(run: Run) -> Iterator[Finding]:
    """That the screens and the export still do what they are there for."""
    orders, screens = run.found["orders"], run.found["screens"]
    dark = sum(seen < SEEN * orders for seen in screens)
    if dark:
        told = f"{dark} of {len(screens)} screens have not shown half of the ≈ {orders} orders."
        yield Finding("turns-the-screens-off", told)
    wanted = run.found["wanted"]
    short = [done for done in run.found.get("exported", []) if _differs(done, wanted)]
    if short:
        told = f"An export had {short[0].get('lines')} lines, of {wanted['lines']}."
        yield Finding("exports-less", told)


def _differs(done: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    return (done.get("lines"), str(done.get("total"))) != (wanted["lines"], str(wanted["total"]))


def _what_is_wrong(run: Run) -> Iterator[str]:
    """What no idea is known for."""
    if run.failed:
        failures = {status: count for status, count in run.statuses.items() if status != OK}
        told = ", ".join(
            f"≈ {count} × {status or 'no answer'}" for status, count in sorted(failures.items())
        )
        yield f"Some requests failed: {told}."
    if run.p99 > LIMIT:
        yield f"One of 100 customers waited for more than ≈ {run.p99:.2f} s (at most {LIMIT})."
    if run.found["left_out"]:
        yield f"When all had gone, {run.found['left_out']} connections were still checked out."
