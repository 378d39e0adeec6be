"""Some of the random systems of tests/random_systems.py: every proof is true, and none is missed."""

from __future__ import annotations

from random_systems import numbers_of, run_all

SYSTEMS = 240


def test_what_is_proved_is_what_happens() -> None:
    figures = run_all(numbers_of(1, SYSTEMS))
    assert not any(figures.failing.values()), str(figures)
    counts = figures.counts
    assert counts["systems"] == SYSTEMS
    # Else it could pass without having looked at anything.
    assert counts["stuck, of promised kinds"] > SYSTEMS / 5, str(figures)
    assert counts["proved"] > SYSTEMS / 5, str(figures)
    assert counts["until a timer"] > 0, str(figures)  # they are rare: 3 to 5 in four runs
    assert counts["systems"] - counts["stuck"] > SYSTEMS / 5, str(figures)
    assert counts["missed among others only"] <= SYSTEMS / 50, str(figures)
    assert counts["times that a loop was late"] < SYSTEMS / 5, str(figures)
