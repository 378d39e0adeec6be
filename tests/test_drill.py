"""The incident drill: what breaks the service, what mends it under the same load, and the name of each wrong turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from answers import drill as turns
from answers.drill import Turn

from workshop.checks.catalogue import misconceptions
from workshop.drill import Drill, incidents
from workshop.drill.editing import replaced
from workshop.drill.judge import CONNECTIONS, LIMIT

INCIDENTS = (*incidents.DRAWN, "order_lock")


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
    assert broken.run.failed > 0.2 * len(broken.run.answers), broken
    assert broken.misconception == "restarts-it"
    assert broken.run.connections <= CONNECTIONS
    assert name in drill.solve().replace("-", "_") or drill.edits
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
