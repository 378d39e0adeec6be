"""Answers to the tasks of exercise 08, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from statistics import fmean

import numpy as np
from sqlalchemy import event, text
from sqlalchemy.pool import QueuePool

from answers import Answers
from ormscope import PoolScope
from ormscope.metrics import PoolCollector

# The metrics


def numbers(checked_out, waiting, oldest_wait):
    return {"checked_out": checked_out, "waiting": waiting, "oldest_wait": oldest_wait}


def age_of(entries):
    return time.perf_counter() - entries[0].since if entries else 0


def from_the_scope(engine, scope):
    def measure():
        return numbers(scope.checked_out, len(scope.waiters), age_of(scope.waiters))

    return measure


def from_the_pool_of_now(engine, scope):
    def measure():
        pool = engine.pool
        out = pool.checkedout() if isinstance(pool, QueuePool) else len(scope.holders)
        now = time.perf_counter()
        ages = [now - waiter.since for waiter in scope.waiters]
        return numbers(out, len(ages), max(ages, default=0.0))

    return measure


def from_events_and_a_verdict(engine, scope):
    out = set()
    event.listen(engine.sync_engine, "checkout", lambda _, record, proxy: out.add(record))
    event.listen(engine.sync_engine, "checkin", lambda _, record: out.discard(record))

    def measure():
        waiting = scope.verdict().waiting
        return numbers(len(out), len(waiting), max((waiter.age for waiter in waiting), default=0))

    return measure


def from_the_collector(engine, scope):
    collector = PoolCollector(scope)

    def measure():
        found = {metric.name: metric.samples for metric in collector.collect()}
        return {
            name: found[f"sqlalchemy_pool_{series}"][0].value
            for name, series in [
                ("checked_out", "checked_out"),
                ("waiting", "waiting"),
                ("oldest_wait", "oldest_wait_seconds"),
            ]
        }

    return measure


def overflow_waits(engine, scope):
    return lambda: numbers(
        engine.pool.checkedout(), max(0, engine.pool.overflow()), age_of(scope.waiters)
    )


def longest_so_far(engine, scope):
    return lambda: numbers(scope.checked_out, len(scope.waiters), scope.longest_wait)


def raw_time(engine, scope):
    def measure():
        waiters = scope.waiters
        return numbers(scope.checked_out, len(waiters), waiters[0].since if waiters else 0)

    return measure


def age_of_the_holder(engine, scope):
    return lambda: numbers(scope.checked_out, len(scope.waiters), age_of(scope.holders))


def mean_of_those_who_wait(engine, scope):
    def measure():
        now = time.perf_counter()
        ages = [now - waiter.since for waiter in scope.waiters]
        return numbers(scope.checked_out, len(ages), fmean(ages) if ages else 0)

    return measure


def is_it_alive(engine, scope):
    loop = asyncio.get_running_loop()

    async def ask():
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    def measure():
        asyncio.run_coroutine_threadsafe(ask(), loop).result(5)
        return from_the_scope(engine, scope)()

    return measure


def handed_to_the_loop(engine, scope):
    loop, measure = asyncio.get_running_loop(), from_the_scope(engine, scope)

    async def ask():
        return measure()

    return lambda: asyncio.run_coroutine_threadsafe(ask(), loop).result()


def pool_of_the_beginning(engine, scope):
    checked_out = getattr(engine.pool, "checkedout", lambda: len(scope.holders))
    return lambda: numbers(checked_out(), len(scope.waiters), age_of(scope.waiters))


def counter_of_the_pool(engine, scope):
    return lambda: numbers(engine.pool.checkedout(), len(scope.waiters), age_of(scope.waiters))


class Numbers:
    def __init__(self, scope):
        self.scope = scope

    def __call__(self):
        waiters = self.scope.waiters
        now = time.perf_counter()
        oldest = now - min((waiter.since for waiter in waiters), default=now)
        return numbers(len(self.scope.holders), len(waiters), oldest) | {"capacity": 3}


def from_an_object(engine, scope):
    return Numbers(scope)


def now_is_when_it_began(engine, scope):
    began = time.perf_counter()

    def measure():
        waiters = scope.waiters
        return numbers(scope.checked_out, len(waiters), began - waiters[0].since if waiters else 0)

    return measure


def in_milliseconds(engine, scope):
    return lambda: numbers(scope.checked_out, len(scope.waiters), 1_000 * age_of(scope.waiters))


def on_the_clock_of_the_loop(engine, scope):
    def measure():
        waiters = scope.waiters
        oldest = time.monotonic() - waiters[0].since if waiters else 0
        return numbers(scope.checked_out, len(waiters), oldest)

    return measure


def whole_seconds(engine, scope):
    return lambda: numbers(scope.checked_out, len(scope.waiters), int(age_of(scope.waiters)))


def nothing_when_nobody_waits(engine, scope):
    return lambda: numbers(
        scope.checked_out, len(scope.waiters), age_of(scope.waiters) if scope.waiters else None
    )


def numbers_instead_of_a_function(engine, scope):
    return from_the_scope(engine, scope)()


def who_waits_instead_of_how_many(engine, scope):
    return lambda: numbers(scope.checked_out, scope.waiters, age_of(scope.waiters))


def holders_and_waiters_together(engine, scope):
    return lambda: numbers(
        len(scope.holders) + len(scope.waiters), len(scope.waiters), age_of(scope.waiters)
    )


def a_scope_for_each_scrape(engine, scope):
    def measure():
        own = PoolScope(engine)
        found = from_the_scope(engine, own)()
        own.close()
        return found

    return measure


def closes_the_scope(engine, scope):
    def measure():
        found = from_the_scope(engine, scope)()
        scope.close()
        return found

    return measure


def by_the_time_of_the_loop(engine, scope):
    loop = asyncio.get_running_loop()

    def measure():
        waiters = scope.waiters
        oldest = loop.time() - waiters[0].since if waiters else 0
        return numbers(scope.checked_out, len(waiters), oldest)

    return measure


def disposes_of_the_engine(engine, scope):
    def measure():
        found = from_the_scope(engine, scope)()
        engine.sync_engine.dispose(close=False)
        return found

    return measure


def asks_the_server(engine, scope):
    def measure():
        asyncio.run(scope.ask_server())
        return from_the_scope(engine, scope)()

    return measure


def what_it_was_at_first(engine, scope):
    found = from_the_scope(engine, scope)()
    return lambda: found


# The alert


def has_risen(scrapes, counter):
    """Also from 0, where it has begun anew."""
    return any(
        after[counter] > (before[counter] if after[counter] >= before[counter] else 0)
        for before, after in pairwise(scrapes)
    )


def is_deadlocked(scrape):
    return scrape["verdict"] == "deadlock"


def all_wait(scrapes, bearable):
    return min(scrape["oldest_wait_seconds"] for scrape in scrapes) > bearable


def two_rules(scrapes, bearable):
    proved = has_risen(scrapes, "deadlocks_total") or is_deadlocked(scrapes[-1])
    return proved or all_wait(scrapes, bearable)


def as_increase_does(scrapes, bearable):
    counts = [scrape["deadlocks_total"] for scrape in scrapes]
    rise = sum(after - before if after >= before else after for before, after in pairwise(counts))
    return bool(rise) or is_deadlocked(scrapes[-1]) or all_wait(scrapes, bearable)


def in_a_loop(scrapes, bearable):
    before, late = scrapes[0], 0
    for scrape in scrapes:
        if scrape["checkouts_total"] < before["checkouts_total"]:
            before = {"deadlocks_total": 0}
        if scrape["deadlocks_total"] > before["deadlocks_total"]:
            return True
        late += scrape["oldest_wait_seconds"] > bearable and scrape["waiting"] > 0
        before = scrape
    return late == len(scrapes) or before["verdict"] == "deadlock"


def with_numpy(scrapes, bearable):
    waits = np.array([scrape["oldest_wait_seconds"] for scrape in scrapes])
    counts = np.array([scrape["deadlocks_total"] for scrape in scrapes])
    rises = np.diff(counts)
    rises = np.where(rises < 0, counts[1:], rises)
    return np.any([is_deadlocked(scrapes[-1]), rises.any(), (waits > bearable).all()])


def always(scrapes, bearable):
    return True


def when_full(scrapes, bearable):
    return all(scrape["checked_out"] == scrape["capacity"] for scrape in scrapes)


def when_many_wait(scrapes, bearable):
    return is_deadlocked(scrapes[-1]) or scrapes[-1]["waiting"] > 6


def when_nothing_moves(scrapes, bearable):
    still = scrapes[0]["checkouts_total"] == scrapes[-1]["checkouts_total"]
    return (still and all(scrape["waiting"] for scrape in scrapes)) or all_wait(scrapes, bearable)


def when_somebody_times_out(scrapes, bearable):
    return has_risen(scrapes, "timeouts_total") or all_wait(scrapes, bearable)


def when_the_last_waits(scrapes, bearable):
    return two_rules(scrapes, bearable) or scrapes[-1]["oldest_wait_seconds"] > bearable


def when_there_was_a_deadlock(scrapes, bearable):
    return scrapes[-1]["deadlocks_total"] > 0 or all_wait(scrapes, bearable)


def when_the_counter_differs(scrapes, bearable):
    return (
        scrapes[0]["deadlocks_total"] != scrapes[-1]["deadlocks_total"]
        or is_deadlocked(scrapes[-1])
        or all_wait(scrapes, bearable)
    )


def only_deadlocks(scrapes, bearable):
    return has_risen(scrapes, "deadlocks_total") or is_deadlocked(scrapes[-1])


def mean_of_the_served(scrapes, bearable):
    def mean(before, after):
        count = after["wait_seconds_count"] - before["wait_seconds_count"]
        return (after["wait_seconds_sum"] - before["wait_seconds_sum"]) / count if count else 0

    return all(mean(*pair) > bearable for pair in pairwise(scrapes))


def only_what_customers_feel(scrapes, bearable):
    return all_wait(scrapes, bearable)


def only_what_the_gauges_see(scrapes, bearable):
    return any(map(is_deadlocked, scrapes)) or all_wait(scrapes, bearable)


def only_the_last_gauge(scrapes, bearable):
    return is_deadlocked(scrapes[-1]) or all_wait(scrapes, bearable)


def between_each_two(scrapes, bearable):
    return any(
        after["deadlocks_total"] > before["deadlocks_total"] for before, after in pairwise(scrapes)
    )


def without_a_restart_at_once(scrapes, bearable):
    proved = between_each_two(scrapes, bearable) or is_deadlocked(scrapes[-1])
    return proved or all_wait(scrapes, bearable)


def last_less_first(scrapes, bearable):
    first, last = scrapes[0]["deadlocks_total"], scrapes[-1]["deadlocks_total"]
    new = last - first if last >= first else last
    return new > 0 or is_deadlocked(scrapes[-1]) or all_wait(scrapes, bearable)


def any_deadlock_seen(scrapes, bearable):
    return two_rules(scrapes, bearable) or any(map(is_deadlocked, scrapes))


def only_the_last_step(scrapes, bearable):
    proved = has_risen(scrapes[-2:], "deadlocks_total") or is_deadlocked(scrapes[-1])
    return proved or all_wait(scrapes, bearable)


def only_the_first_step(scrapes, bearable):
    for before, after in pairwise(scrapes):
        if after["deadlocks_total"] > before["deadlocks_total"]:
            return True
        return is_deadlocked(scrapes[-1]) or all_wait(scrapes, bearable)
    return None


def first_and_last(scrapes, bearable):
    return two_rules(scrapes, bearable) or all_wait([scrapes[0], scrapes[-1]], bearable)


def as_long_as_they_bear(scrapes, bearable):
    waits = [scrape["oldest_wait_seconds"] for scrape in scrapes]
    return two_rules(scrapes, bearable) or min(waits) >= bearable


def five_seconds(scrapes, bearable):
    return two_rules(scrapes, 5)


def held_for_too_long(scrapes, bearable):
    held = min(scrape["oldest_hold_seconds"] for scrape in scrapes)
    return two_rules(scrapes, bearable) or held > bearable


def only_where_nothing_moves(scrapes, bearable):
    still = scrapes[0]["checkouts_total"] == scrapes[-1]["checkouts_total"]
    return only_deadlocks(scrapes, bearable) or (still and all_wait(scrapes, bearable))


def timeouts_as_well(scrapes, bearable):
    return two_rules(scrapes, bearable) or has_risen(scrapes, "timeouts_total")


known = {"deadlocks": 0}


def since_the_last_call(scrapes, bearable):
    new = scrapes[-1]["deadlocks_total"] > known["deadlocks"]
    known["deadlocks"] = scrapes[-1]["deadlocks_total"]
    return new or two_rules(scrapes, bearable)


def true_or_nothing(scrapes, bearable):
    if two_rules(scrapes, bearable):
        return True
    return None


def why(scrapes, bearable):
    return "deadlock" if two_rules(scrapes, bearable) else ""


ANSWERS = {
    "measure_the_queue": Answers(
        right=[
            from_the_scope,
            from_the_pool_of_now,
            from_events_and_a_verdict,
            from_the_collector,
            from_an_object,
        ],
        wrong=[
            (overflow_waits, "connections-are-no-queue"),
            (longest_so_far, "history-is-not-now"),
            (raw_time, "another-clock"),
            (age_of_the_holder, "hold-is-not-wait"),
            (mean_of_those_who_wait, "not-the-oldest"),
            (is_it_alive, "needs-a-connection"),
            (handed_to_the_loop, "asks-the-loop"),
            (pool_of_the_beginning, "keeps-the-first-pool"),
            (counter_of_the_pool, "every-pool-counts"),
            (asks_the_server, "needs-a-connection"),
            (now_is_when_it_began, "not-what-was-asked"),
            (on_the_clock_of_the_loop, "another-clock"),
            (by_the_time_of_the_loop, "another-clock"),
            (in_milliseconds, "not-what-was-asked"),
            (whole_seconds, "not-what-was-asked"),
            (nothing_when_nobody_waits, "not-what-was-asked"),
            (numbers_instead_of_a_function, "not-what-was-asked"),
            (who_waits_instead_of_how_many, "not-what-was-asked"),
            (holders_and_waiters_together, "not-what-was-asked"),
            (a_scope_for_each_scrape, "not-what-was-asked"),
            (closes_the_scope, "not-what-was-asked"),
            (disposes_of_the_engine, "not-what-was-asked"),
            (what_it_was_at_first, "not-what-was-asked"),
        ],
    ),
    "wake_somebody": Answers(
        right=[two_rules, as_increase_does, in_a_loop, with_numpy],
        wrong=[
            (always, "always-the-same"),
            (when_full, "full-is-no-fault"),
            (when_many_wait, "queue-is-no-outage"),
            (when_nothing_moves, "still-is-not-stuck"),
            (when_somebody_times_out, "timeout-is-no-deadlock"),
            (when_the_last_waits, "one-scrape-is-no-outage"),
            (when_there_was_a_deadlock, "counter-is-no-gauge"),
            (when_the_counter_differs, "counter-starts-anew"),
            (only_deadlocks, "only-the-cause"),
            (mean_of_the_served, "history-is-not-now"),
            (only_what_customers_feel, "deadlock-needs-no-slack"),
            (only_what_the_gauges_see, "over-is-over"),
            (only_the_last_gauge, "between-two-scrapes"),
            (without_a_restart_at_once, "counter-starts-anew"),
            (last_less_first, "counter-starts-anew"),
            (any_deadlock_seen, "over-is-over"),
            (only_the_last_step, "one-step-for-all"),
            (only_the_first_step, "one-step-for-all"),
            (first_and_last, "one-scrape-is-no-outage"),
            (as_long_as_they_bear, "not-what-was-asked"),
            (five_seconds, "another-limit"),
            (held_for_too_long, "hold-is-not-wait"),
            (only_where_nothing_moves, "moving-is-not-fast"),
            (timeouts_as_well, "one-scrape-is-no-outage"),
            (since_the_last_call, "not-what-was-asked"),
            (true_or_nothing, "not-what-was-asked"),
            (why, "not-what-was-asked"),
        ],
    ),
}
