"""The post-mortem: what was noted while it went on, and a document with the figures put in."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from workshop.drill.incidents import Incident
from workshop.drill.judge import LIMIT, Judgement
from workshop.drill.run import Run


@dataclass
class Notes:
    """What happened when, on the clock of the drill; `now` is in seconds."""

    began: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)
    before: Run | None = None
    after: Judgement | None = None
    clues: int = 0

    @property
    def now(self) -> float:
        """Seconds since the phone rang."""
        return time.monotonic() - self.began

    def add(self, what: str) -> None:
        """Write a line."""
        self.lines.append((self.now, what))


def post_mortem(incident: Incident, notes: Notes, edits: list[str]) -> str:
    """The document, in Markdown: what is known is put in, and what only people know is asked for."""
    timeline = "\n".join(f"| ≈ {at / 60:.1f} min | {what} |" for at, what in notes.lines)
    rows = [("before", notes.before), ("after", notes.after.run if notes.after else None)]
    figures = "\n".join(_row(name, run) for name, run in rows if run is not None)
    is_mended = notes.after is not None and notes.after.is_mended
    cause = incident.cause if is_mended else "*(The judge tells it when the service is mended.)*"
    real = ", ".join(f"<{link}>" for link in incident.real) if is_mended else "*(The same.)*"
    clues = f"{notes.clues} of {len(incident.clues)} clues"
    return f"""# Post-mortem

**What customers saw.** {" ".join(incident.scenario.split())}

**State.** {"Mended" if is_mended else "Going on"}, after ≈ {notes.now / 60:.1f} minutes and {clues}.

| when | what |
|---|---|
{timeline}

| load | served | 99 of 100 within | connections | verdicts seen | memory grew by |
|---|---|---|---|---|---|
{figures}

**What was believed first, and which number spoke against it.** *(Two sentences of yours.)*

**The cause.** {cause}

**What was changed.** {", ".join(f"`{name}`" for name in edits) or "nothing"}. *(Why this and nothing less?)*

**What will tell us next time.** *(An alert, a test in CI, a line on a dashboard: the earliest of them.)*

**The same elsewhere.** {real}
"""


def _row(name: str, run: Run) -> str:
    causes = ", ".join(sorted(cause for cause in run.causes if cause != "healthy")) or "healthy"
    late = "" if run.p99 <= LIMIT else f" (more than {LIMIT})"
    return (
        f"| {name} | ≈ {run.served} of ≈ {len(run.answers)} | ≈ {run.p99:.2f} s{late} | ≈ {run.connections}"
        f" | {causes} | ≈ {max(0.0, run.grown):.0f} MiB |"
    )
