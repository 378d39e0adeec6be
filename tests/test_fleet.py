"""Several workers of a service, a real Prometheus that is told of all, and the dashboard that shows them."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from leftovers import await_that
from prometheus_client import CollectorRegistry
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import QueuePool
from test_metrics import program

from ormscope import LoopScope, PoolScope, verdict
from ormscope.console_view import _COLOURS, _OTHER
from ormscope.metrics import ALERTS, DASHBOARD, PoolCollector
from workshop.database import Server
from workshop.keeper import free_port
from workshop.prometheus import Prometheus

ROOT = Path(__file__).parents[1]
README = (ROOT / "ormscope" / "README.md").read_text(encoding="utf-8")
BOARD: dict[str, Any] = json.loads(DASHBOARD.read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = BOARD["panels"]
QUERIES = [
    (panel["title"], target["refId"], target["expr"])
    for panel in PANELS
    for target in panel["targets"]
]
VARIABLES = [variable for variable in BOARD["templating"]["list"] if variable["type"] == "query"]
STATES = ("starved", "busy", "blocked")
EVERY = {("starved", "orders"), ("blocked", "orders")} | {
    ("busy", pool) for pool in ("orders", "mail", "reports")
}


@dataclass
class Fleet:
    """The workers by their state, with the port of each, and the Prometheus that scrapes them."""

    workers: dict[str, subprocess.Popen[str]]
    ports: dict[str, int]
    prometheus: Prometheus

    def say(self, state: str) -> dict[str, Any]:
        """What the scopes of a worker see now."""
        worker = self.workers[state]
        assert worker.stdin is not None and worker.stdout is not None
        print("say", file=worker.stdin, flush=True)
        said: dict[str, Any] = json.loads(worker.stdout.readline())
        return said

    def state_of(self, instance: str) -> str:
        """The worker behind a label `instance`."""
        (state,) = [state for state, port in self.ports.items() if instance == f"127.0.0.1:{port}"]
        return state

    def found(self, expression: str) -> dict[tuple[str, str], float]:
        """The values of an expression by worker and pool, without NaN; there is one series for each."""
        answer = self.prometheus.query(expression)
        values = {
            (self.state_of(series["metric"]["instance"]), series["metric"].get("pool", "")): float(
                series["value"][1]
            )
            for series in answer
        }
        assert len(values) == len(answer), "two lines with the same legend"
        return {at: value for at, value in values.items() if not math.isnan(value)}


@pytest.fixture(scope="module")
def fleet(server: Server) -> Iterator[Fleet]:
    """Three workers, each on the first port that was free, scraped twice a second."""
    program("prometheus")
    first = free_port()
    script = str(Path(__file__).with_name("fleet_worker.py"))
    workers = {
        state: subprocess.Popen(
            [sys.executable, script, server.url, state, str(first), "20"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for state in STATES
    }
    prometheus = None
    try:
        ports = {
            state: int(worker.stdout.readline())
            for state, worker in workers.items()
            if worker.stdout
        }
        rules = ALERTS.read_text(encoding="utf-8")
        prometheus = Prometheus(list(ports.values()), rules, scrape_seconds=0.5)
        for worker in workers.values():
            assert worker.stdin is not None
            print("go", file=worker.stdin, flush=True)
        made = Fleet(workers, ports, prometheus)
        # The counters count from the first scrape on.
        lasts = filled(made, "rate(sqlalchemy_pool_deadlocks_total[$__rate_interval])")
        assert await_that(lambda: made.found(lasts).get(("starved", "orders")), 60)
        assert await_that(lambda: made.found("event_loop_lag_seconds")["blocked", ""] > 3, 60)
        yield made
    finally:
        if prometheus is not None:
            prometheus.close()
        for worker in workers.values():
            worker.communicate()


def all_of(fleet: Fleet) -> dict[str, str]:
    """The template variables, each queried as Grafana does and filled into the next: all values."""
    values: dict[str, str] = {}
    for variable in VARIABLES:
        ((series, label),) = re.findall(r"^label_values\((.+), (\w+)\)$", variable["query"])
        found = fleet.prometheus.values(label, with_values(series, values))
        assert found and label == variable["name"]
        values[label] = one_of(*found)
    return values


def one_of(*values: str) -> str:
    """As Grafana writes chosen values into a PromQL string."""
    return "(" + "|".join(re.escape(value).replace("\\", "\\\\") for value in values) + ")"


def with_values(expression: str, values: dict[str, str]) -> str:
    text = expression.replace("$__rate_interval", "30s")
    for name, value in values.items():
        text = re.sub(rf"\${name}\b", lambda _, value=value: value, text)
    assert "$" not in text, "a variable that nobody has declared"
    return text


def filled(fleet: Fleet, expression: str, **chosen: str) -> str:
    """A query of the dashboard with everything chosen, or what is said."""
    return with_values(expression, all_of(fleet) | chosen)


def query(title: str, letter: str = "A") -> str:
    (found,) = [expr for name, ref, expr in QUERIES if name.startswith(title) and ref == letter]
    return found


# Several workers in one pod, as the README says


def test_each_worker_is_scraped_and_told_from_the_others(fleet: Fleet) -> None:
    assert len(set(fleet.ports.values())) == 3
    assert set(fleet.found("up")) == {(state, "") for state in STATES}
    assert set(fleet.found("sqlalchemy_pool_waiting")) == EVERY
    assert fleet.found("sqlalchemy_pool_waiting")["starved", "orders"] == 5
    assert fleet.say("starved") == {"orders": {"waiting": 5, "cause": "deadlock"}}


def test_a_worker_whose_loop_is_blocked_is_scraped_all_the_while(fleet: Fleet) -> None:
    """Its lag grows from scrape to scrape; that of the others does not."""
    before = fleet.found("event_loop_lag_seconds")
    time.sleep(2)
    after = fleet.found("event_loop_lag_seconds")
    assert after["blocked", ""] - before["blocked", ""] > 0.9
    assert after["starved", ""] < before["blocked", ""] > after["busy", ""]
    # Not 1: where all of the machine stands still for half a second, a scrape is given up.
    assert fleet.found("avg_over_time(up[1m])")["blocked", ""] > 0.8
    cause = 'sqlalchemy_pool_verdict{cause="loop blocked"}'
    assert fleet.found(cause)["blocked", "orders"] == 1


def queued() -> Engine:
    """An engine that has every metric; it is not connected."""
    return create_engine("sqlite://", poolclass=QueuePool, pool_size=1)


def test_how_many_series_a_pool_costs() -> None:
    """The README says it, so that nobody makes a pool's name of a customer's."""
    pools = [PoolScope(queued(), name) for name in "ab"]
    counts = [
        sum(len(family.samples) for family in PoolCollector(*some).collect())
        for some in (pools[:1], pools)
    ]
    assert f"about {counts[1] - counts[0]} series" in README


# The dashboard


def test_every_variable_has_its_values(fleet: Fleet) -> None:
    values = all_of(fleet)
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["datasource", *values]
    assert values["job"] == "(shop)"
    assert values["pool"] == "(mail|orders|reports)"
    assert values["instance"].count("127") == 3


@pytest.mark.parametrize("title, letter, expression", QUERIES)
def test_every_query_is_answered(fleet: Fleet, title: str, letter: str, expression: str) -> None:
    """And by the chosen worker alone, where one is chosen."""
    found = fleet.found(filled(fleet, expression))
    assert found
    if (
        "histogram_quantile" in expression
    ):  # nothing ends in a deadlock, nor where the loop is blocked
        assert {("busy", "orders"), ("busy", "mail")} & set(found)
    else:
        assert {state for state, _ in found} == set(STATES)
    alone = filled(fleet, expression, instance=one_of(f"127.0.0.1:{fleet.ports['busy']}"))
    assert {state for state, _ in fleet.found(alone)} == {"busy"}


def test_the_panels_show_what_the_scopes_see(fleet: Fleet) -> None:
    def shown(title: str, letter: str = "A") -> dict[tuple[str, str], float]:
        return fleet.found(filled(fleet, query(title, letter)))

    starved, mail, reports = ("starved", "orders"), ("busy", "mail"), ("busy", "reports")
    seen = {
        (state, pool): about
        for state in ("starved", "blocked")
        for pool, about in fleet.say(state).items()
    }
    waiting, share = shown("Waiting"), shown("Connections checked out")
    assert {at: waiting[at] for at in seen} == {at: about["waiting"] for at, about in seen.items()}
    assert (waiting[starved], waiting[mail]) == (5, pytest.approx(1, abs=1))
    assert (share[starved], share[mail], share["blocked", "orders"]) == (1, 1, 0.5)
    assert shown("Connections: out")[starved] == 2 == shown("Connections: out", "C")[starved]
    assert shown("Connections: out", "B")[starved] == 0
    assert shown("Oldest wait")[starved] > 1 and shown("Oldest hold")[starved] > 1
    half, most = (shown("Holds that ended", letter)["busy", "orders"] for letter in "AC")
    assert 0.05 <= half <= most < 10
    # Each waits for two others, and holds for 0.06 s.
    assert 0.05 <= shown("Waits that ended")["busy", "orders"] < 10
    assert 0.1 <= shown("Waits that ended")[mail] < 10
    assert shown("Event loop lag")["blocked", ""] > 3
    timeouts, deadlocks, failed = (shown("Timeouts", letter) for letter in "ABC")
    assert {at for at, rate in timeouts.items() if rate} == {mail}
    assert {at for at, rate in deadlocks.items() if rate} == {starved}
    assert {at for at, rate in failed.items() if rate} == {reports}
    checkouts = shown("Checkouts")
    assert checkouts["busy", "orders"] > checkouts[starved] > 0
    assert shown("Connections opened")[reports] == 0


def test_the_verdict_has_its_words(fleet: Fleet) -> None:
    """Its numbers are what a state timeline can draw; the panel's mapping gives each its cause and colour."""
    (panel,) = [panel for panel in PANELS if panel["type"] == "state-timeline"]
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    words = {float(number): about["text"] for number, about in mapping["options"].items()}
    assert list(words.values()) == list(get_args(verdict.Cause))
    for about in mapping["options"].values():
        assert about["color"] == _COLOURS.get(about["text"], _OTHER), "as in the console"
    found = fleet.found(filled(fleet, query("Verdict")))
    shown = {at: words[number] for at, number in found.items()}
    assert shown["starved", "orders"] == fleet.say("starved")["orders"]["cause"] == "deadlock"
    assert shown["blocked", "orders"] == fleet.say("blocked")["orders"]["cause"] == "loop blocked"
    assert shown["busy", "reports"] == "connects failing"
    assert set(shown) == EVERY


def test_every_metric_is_on_the_dashboard() -> None:
    class Loop(LoopScope):
        def __init__(self) -> None:
            """Without a loop; it has never been late."""

        def longest_lag_within(self, seconds: float) -> float:
            return 0.0

    registry = CollectorRegistry()
    registry.register(PoolCollector(PoolScope(queued()), loop=Loop()))
    exported = {sample.name for family in registry.collect() for sample in family.samples}
    used = {
        name
        for *_, expression in QUERIES
        for name in re.findall(r"\b(?:sqlalchemy_pool|event_loop)_\w+", expression)
    }
    # A histogram's average is what its quantiles are there to replace.
    averages = {
        f"sqlalchemy_pool_{histogram}_seconds_{part}"
        for histogram in ("wait", "hold")
        for part in ("count", "sum")
    }
    assert exported - used == averages
    assert used - exported == set()


def test_every_panel_says_what_to_do_and_has_a_place() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in PANELS:
        place = panel["gridPos"]
        mine = {
            (place["x"] + column, place["y"] + row)
            for column in range(place["w"])
            for row in range(place["h"])
        }
        assert not mine & cells, f"{panel['title']} lies on another"
        cells |= mine
        assert max(column for column, _ in mine) < 24
        assert len(panel["description"]) > 80
        for target in panel["targets"]:
            assert "{{instance}}" in target["legendFormat"], "several workers"
            assert (
                target["datasource"]
                == panel["datasource"]
                == {
                    "type": "prometheus",
                    "uid": "${datasource}",
                }
            )
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


# An enum's members are strings and numbers in the JSON.
TYPES = """
import type { Dashboard, Panel, VariableModel } from "RAW/dashboard/x/types.gen";
import type * as timeseries from "RAW/composable/timeseries/panelcfg/x/types.gen";
import type * as timeline from "RAW/composable/statetimeline/panelcfg/x/types.gen";
type Plain<T> = T extends string ? `${T}`
    : T extends number ? (`${T}` extends `${infer N extends number}` ? N : T)
    : T extends (infer U)[] ? Plain<U>[]
    : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
""".replace("RAW", "./node_modules/@grafana/schema/dist/types/raw")


@pytest.fixture(scope="module")
def grafanas_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the types that Grafana publishes; there is no Grafana here that could load a dashboard."""
    folder = tmp_path_factory.mktemp("types")
    run_npm("install", "--ignore-scripts", "typescript@5.9", "@grafana/schema@13.2.3", cwd=folder)
    return folder


@pytest.mark.skipif(shutil.which("npm") is None, reason="Grafana's types come with npm")
@pytest.mark.parametrize("wrong", [None, ('"mergeValues"', '"mergeAll"'), ('"h": 8', '"h": "8"')])
def test_it_has_the_types_of_grafanas_schema(
    wrong: tuple[str, str] | None, grafanas_types: Path
) -> None:
    wanted = [("Dashboard", BOARD)]
    wanted += [("VariableModel", variable) for variable in BOARD["templating"]["list"]]
    for panel in PANELS:
        kind = {"timeseries": "timeseries", "state-timeline": "timeline"}[panel["type"]]
        wanted += [
            ("Panel", panel),
            (f"{kind}.Options", panel["options"]),
            (f"{kind}.FieldConfig", panel["fieldConfig"]["defaults"]["custom"]),
        ]
    lines = [
        f"export const part{number}: Plain<{kind}> = {json.dumps(value)};"
        for number, (kind, value) in enumerate(wanted)
    ]
    text = TYPES + "\n".join(lines)
    if wrong:
        assert wrong[0] in text
        text = text.replace(*wrong)
    (grafanas_types / "board.ts").write_text(text)
    options = "--noEmit --strict --skipLibCheck --module esnext --moduleResolution bundler"
    checked = subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", *options.split(), "board.ts"],
        cwd=grafanas_types,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode == 0) == (wrong is None), checked.stdout


def run_npm(*arguments: str, cwd: Path) -> None:
    """Run npm; skip where its registry is out of reach, but never in CI."""
    done = subprocess.run(["npm", *arguments], cwd=cwd, capture_output=True, text=True)
    if (
        re.search("ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ETIMEDOUT", done.stderr)
        and os.environ.get("CI") != "true"
    ):
        pytest.skip("npm's registry is out of reach")
    assert done.returncode == 0, done.stderr
