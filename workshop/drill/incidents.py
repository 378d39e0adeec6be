"""The incidents: what is known when the phone rings, what the service looks like then, and the clues."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from pathlib import Path

from workshop.drill.editing import replaced
from workshop.mistake import Mistake

_HERE = Path(__file__).resolve().parent
DRAWN = ("sign_in", "live_feed", "nightly_export")
"""Those that a seed chooses from."""
HARD = {"hard": "order_lock"}
"""The one for the fast, by a name that gives nothing away."""
SETTINGS = "POOL_SIZE=5\nPOOL_TIMEOUT=2.0\n"
"""What the operator has set, for each of the two workers; the rest is as in db.py."""


@dataclass(frozen=True)
class Incident:
    """One incident.

    `scenario` are three sentences; `clues` go from the general to the particular; `cause` is what it was, told
    afterwards, and `real` names reports of it from real services.
    """

    name: str
    scenario: str
    clues: list[str]
    cause: str
    real: list[str]

    def service(self) -> str:
        """The service's file as it was when the incident began."""
        return replaced(mended(), (_HERE / "faults" / f"{self.name}.py").read_text("utf-8"))


def mended() -> str:
    """The service's file as it should be: one way to mend each incident."""
    return (_HERE / "service.py").read_text("utf-8")


def incident(name: str) -> Incident:
    """The incident with this name; raises Mistake where there is none."""
    known = tomllib.loads((_HERE / "incidents.toml").read_text("utf-8"))
    if name not in known:
        raise Mistake(f"There is no incident {name!r}; there are {', '.join(known)}.")
    return Incident(name, **known[name])


def drawn(seed: int | str) -> Incident:
    """The incident of a seed: of three, in no order that anybody could guess; or the one that it names."""
    seed = HARD.get(str(seed), seed)
    if seed in (*DRAWN, *HARD.values()):
        return incident(str(seed))
    number = int.from_bytes(hashlib.sha256(str(seed).encode()).digest())
    return incident(DRAWN[number % len(DRAWN)])
