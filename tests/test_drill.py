"""The incident drill: what breaks the service, what mends it under the same load, and the name of each wrong turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from answers import drill as turns
from answers.drill import Turn
from leftovers import assert_nothing_is_left, await_that, processes_of

from workshop.checks.catalogue import misconceptions
from workshop.drill import Drill, incidents
from workshop.drill.dashboard import draw
from workshop.drill.editing import changed, replaced
from workshop.drill.judge import BUSY, CONNECTIONS, LIMIT, judge
from workshop.drill.run import Answer, Look, Run
from workshop.mistake import Mistake

ROOT = Path(__file__).parents[1]
INCIDENTS = (*incidents.DRAWN, *incidents.HARD.values())


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """One for all tests: its incident is changed by each of them."""
    with Drill("sign_in", tmp_path_factory.mktemp("drill")) as running:
        yield running


def begin(drill: Drill, incident: str) -> None:
    drill.incident = incidents.incident(incident)
    drill.put_back()


def take(drill: Drill, turn: Turn) -> None:
    begin(drill, turn.incident)
    drill.file.write_text(replaced(drill.incident.service(), turn.definitions))
    settings = drill.settings | dict(turn.settings)
    drill.settings_file.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))


@pytest.mark.parametrize("name", INCIDENTS)
def test_each_incident_breaks_the_service_and_its_solution_mends_it(
    drill: Drill, name: str
) -> None:
    """The same load on the same machine, one after the other."""
    begin(drill, name)
    broken = drill.judge()
    # An export stops a worker for five seconds; most have been served by then, and some 10 of 60 are not.
    assert broken.run.failed > 0.1 * len(broken.run.answers), broken
    assert broken.misconception == "restarts-it"
    assert broken.run.connections <= CONNECTIONS
    assert drill.solve().startswith("@@ ")
    mended = drill.judge()
    assert mended.is_mended, mended
    assert (mended.run.failed, mended.run.found["left_out"]) == (0, 0)
    assert mended.run.p99 <= LIMIT


@pytest.mark.parametrize("turn", turns.MENDED.values(), ids=turns.MENDED)
def test_other_ways_to_mend_it(drill: Drill, turn: Turn) -> None:
    take(drill, turn)
    judgement = drill.judge()
    assert judgement.is_mended, judgement


@pytest.mark.parametrize("turn", turns.WRONG.values(), ids=turns.WRONG)
def test_each_wrong_turn_has_its_name(drill: Drill, turn: Turn) -> None:
    take(drill, turn)
    judgement = drill.judge()
    assert judgement.misconception == turn.draws, judgement
    assert misconceptions()[turn.draws or ""].says in str(judgement)


def test_there_are_at_least_twelve_wrong_ideas() -> None:
    assert len(turns.DRAWN) >= 12


# What needs no service


def test_a_seed_always_draws_the_same_incident_and_thirty_draw_each() -> None:
    drawn = [incidents.drawn(seed).name for seed in range(1, 31)]
    assert drawn == [incidents.drawn(str(seed)).name for seed in range(1, 31)]
    assert {name: drawn.count(name) > 5 for name in drawn} == dict.fromkeys(incidents.DRAWN, True)
    assert incidents.drawn("order_lock").name == incidents.drawn("hard").name == "order_lock"
    with pytest.raises(Mistake, match=r"no incident 'nothing'"):
        incidents.incident("nothing")


@pytest.mark.parametrize("name", INCIDENTS)
def test_an_incident_differs_from_the_mended_service_in_its_fault_only(name: str) -> None:
    incident = incidents.incident(name)
    faults = {
        "sign_in": ["Accounts"],
        "live_feed": ["feed"],
        "nightly_export": ["booked", "export"],
        "order_lock": ["audit", "place_order"],
    }
    assert changed(incident.service(), incidents.mended()) == faults[name]
    compile(incident.service(), name, "exec")


@pytest.mark.parametrize("name", INCIDENTS)
def test_an_incident_is_told_in_three_sentences_and_four_clues(name: str) -> None:
    """None of them gives the cause away: no clue but the last one names what has to be changed."""
    incident = incidents.incident(name)
    assert len(incident.scenario.strip().splitlines()) == 3
    assert len(incident.clues) == 4
    named = {part for part in changed(incident.service(), incidents.mended()) if len(part) > 6}
    assert not any(f"`{part}`" in text for part in named for text in incident.clues[:3])


def test_definitions_take_the_place_of_their_namesakes() -> None:
    text = "import a\n\nX = 1\n\n\n@first\ndef f():\n    return 1\n\n\nclass C:\n    pass\n"
    new = "import b\n\nX = 2\n\n\nY: int = 3\n\n\n@second\ndef f():\n    return 2\n"
    mixed = replaced(text, new)
    assert "@second\ndef f():\n    return 2" in mixed and "@first" not in mixed
    assert "import b" not in mixed and "X = 2" in mixed and "X = 1" not in mixed
    assert changed(text, mixed) == ["X", "Y", "f"]
    assert changed(text, text.replace("return 1", "return 1  # at once")) == []


def run_of(**found: Any) -> Run:
    """A load in which nothing has gone wrong, but for what is given."""
    everything = {
        "strangers": 0,
        "revoked": 0,
        "receipts": 50,
        "distinct": 50,
        "orders": 50,
        "screens": [50] * 12,
        "wanted": {"lines": 2, "total": "3.00"},
        "exported": [{"lines": 2, "total": "3.00"}],
        "left_out": 0,
    }
    run = Run(60, 5.0, answers=[Answer("GET /orders", 0.0, 0.1, 200)] * 100)
    run.found = everything | found
    return run


def look_of(memory: float) -> Look:
    """A worker at rest, with so many MiB."""
    return Look(1.0, "worker 1", "healthy", 0, 0, 0, 0, 0, 0, 0, memory, 0, 0, 0, 0)


def test_what_nobody_knows_a_name_for_is_told_as_it_was_seen() -> None:
    given = {"POOL_SIZE": "5", "POOL_TIMEOUT": "2.0"}
    assert judge(run_of(), ["Accounts"], given).is_mended
    failing = run_of()
    failing.answers.append(Answer("GET /orders", 0.0, 0.1, 500))
    judgement = judge(failing, ["Accounts"], given)
    assert (judgement.is_mended, judgement.misconception) == (False, None)
    assert "Some requests failed: ≈ 1 × 500." in str(judgement)
    leaking = judge(run_of(left_out=2), ["Accounts"], given)
    assert (leaking.is_mended, leaking.misconception) == (False, None)
    assert "2 connections were still checked out" in str(leaking)
    late = run_of()
    late.answers += [Answer("GET /orders", 0.0, LIMIT + 1, 200)] * 5
    assert not judge(late, ["Accounts"], given).is_mended


def test_what_fails_while_others_have_the_machine_is_unknown() -> None:
    """Only where no idea stands behind it: what was let in, or kept, was so whatever the machine did."""
    given = {"POOL_SIZE": "5", "POOL_TIMEOUT": "2.0"}
    run = run_of()
    run.others, run.idle = 0.6, 0.02
    assert judge(run, ["Accounts"], given).is_mended
    run.answers.append(Answer("GET /orders", 0.0, 0.1, 500))
    unsure = judge(run, ["Accounts"], given)
    assert (unsure.is_mended, unsure.is_unsure, unsure.misconception) == (False, True, None)
    assert "UNKNOWN" in str(unsure) and "≈ 60% of the processors, and ≈ 2% were free" in str(unsure)
    run.found["strangers"] = 1
    sure = judge(run, ["Accounts"], given)
    assert (sure.is_unsure, sure.misconception) == (False, "skips-the-sign-in")
    run.found["strangers"], run.idle = 0, 0.4
    assert not judge(run, ["Accounts"], given).is_unsure


def test_growth_has_its_name_also_where_some_requests_fail() -> None:
    run = run_of()
    run.answers.append(Answer("GET /orders", 0.0, 0.1, 500))
    run.looks = [look_of(memory=memory) for memory in (100.0, 190.0)]
    judgement = judge(run, ["export"], {"POOL_SIZE": "5", "POOL_TIMEOUT": "2.0"})
    assert judgement.misconception == "ends-the-stops-only"
    assert "≈ 1 of ≈ 101 requests failed. But no loop stands still any more" in str(judgement)


def test_what_others_take_of_the_processors_is_measured(drill: Drill) -> None:
    """With a program on each processor that never rests, beside a service that does."""
    begin(drill, "sign_in")
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(psutil.cpu_count() or 1)
    ]
    try:
        run = drill.load(seconds=3)
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert run.others > BUSY, run.others
    assert run.idle < 0.5, run.idle
    assert run.others + run.idle < 1.0, "the load, the service and its database had something, too"


@pytest.mark.parametrize("status", [200, 503])
def test_no_bar_of_the_dashboard_reaches_the_words(status: int) -> None:
    """Whichever of the loads brought the most answers in a second, and however many alerts have fired."""
    run = Run(60, 5.0, answers=[Answer("GET /orders", 3.0, 0.5, status)] * 30)
    alarmed = Run(
        60, 5.0, answers=run.answers, alerts=["ConnectionPoolDeadlock", "ConnectionPoolWait"]
    )
    figure = draw(before=alarmed, after=run).figure
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        words = axes.texts[0].get_window_extent()
        assert max(bar.get_window_extent().y1 for bar in axes.patches) < words.y0


def test_without_a_signal_the_report_says_where_else_to_look() -> None:
    assert "ormscope console PID" in str(run_of().report)


def test_the_export_and_the_waits_without_an_end_are_no_customers() -> None:
    run = run_of()
    run.answers.append(Answer("POST /export", 0.0, 60.0, 200))
    assert run.p99 == 0.1


# What is left


START = """
import sys, threading
from workshop.drill import Drill
drill = Drill("sign_in")
print("ready", flush=True)
{}
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "the end"])
def test_nothing_is_left(end: str, sandbox: Path) -> None:
    """However the process of a drill ends, in the middle of a load too: no process, no folder."""
    temporary = sandbox / "tmp"
    temporary.chmod(0o755)
    rest = "drill.load(seconds=60)" if end != "the end" else "drill.close()"
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(rest)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children(recursive=True)
        if end != "the end":
            assert await_that(lambda: len(load_processes(process.pid)) == 1, 30)
            children += load_processes(process.pid)
            process.send_signal(getattr(signal, end))
        process.wait(60)
    await_that(lambda: not processes_of(temporary), 30)
    assert_nothing_is_left(temporary, children)


def load_processes(pid: int) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(pid).children()
        if any("drill.load" in part for part in child.cmdline())
    ]
