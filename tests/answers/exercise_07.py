"""Answers to the tasks of exercise 07, right and wrong, as people give them."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise
from statistics import fmean

from sqlalchemy import event, text
from sqlalchemy.pool import QueuePool

from answers import Answers
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


# The alert


def has_risen(scrapes, counter):
    return any(after[counter] > before[counter] for before, after in pairwise(scrapes))


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
    if rise or any(map(is_deadlocked, scrapes)):
        return "deadlock"
    return "wait" if all_wait(scrapes, bearable) else None


def in_a_loop(scrapes, bearable):
    before, late = scrapes[0], 0
    for scrape in scrapes:
        if scrape["verdict"] == "deadlock" or scrape["deadlocks_total"] > before["deadlocks_total"]:
            return True
        late += scrape["oldest_wait_seconds"] > bearable and scrape["waiting"] > 0
        before = scrape
    return late == len(scrapes)


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


ANSWERS = {
    "measure_the_queue": Answers(
        right=[
            from_the_scope,
            from_the_pool_of_now,
            from_events_and_a_verdict,
            from_the_collector,
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
        ],
    ),
    "wake_somebody": Answers(
        right=[two_rules, as_increase_does, in_a_loop],
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
            (only_what_the_gauges_see, "between-two-scrapes"),
        ],
    ),
}
