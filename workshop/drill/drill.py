"""The drill: a database, the service with an incident in it, the learner's file, the load, and what is noted of it."""

from __future__ import annotations

import difflib
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from ormscope.lab.picture import Picture
from workshop.database import start_server
from workshop.drill.alerts import Alerts
from workshop.drill.customers import register
from workshop.drill.dashboard import draw
from workshop.drill.documents import Document
from workshop.drill.editing import changed
from workshop.drill.incidents import SETTINGS, drawn, mended
from workshop.drill.judge import Judgement, judge
from workshop.drill.load import MOST_CLIENTS, MOST_SECONDS
from workshop.drill.postmortem import Notes, post_mortem
from workshop.drill.run import Run
from workshop.drill.running import NAMES, PROGRAM, Service, request
from workshop.drill.supervisor import ROOT
from workshop.exercises import MY_NOTEBOOKS
from workshop.keeper import Keeper, free_port
from workshop.mistake import Mistake

CLIENTS = 36
SECONDS = 5.0
FILE, SETTINGS_FILE = "service.py", "service.env"
# Keeps a folder for as long as its standard input is open, which ends with the parent in any case.
_TEMPORARY = """
import sys, tempfile
with tempfile.TemporaryDirectory(prefix="workshop-drill-") as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


class Drill:
    """An incident, going on, until `close()` or the end of this process.

    `seed` chooses the incident; the name of one chooses that. `folder` is where the learner's file is, and stays as
    it was left: `my_notebooks/drill` for a notebook in `my_notebooks`, else a temporary one.
    """

    def __init__(self, seed: int | str, folder: Path | None = None) -> None:
        self.incident = drawn(seed)
        self._temporary: Keeper | None = None
        self._alerts: Alerts | None = None
        self._service: Service | None = None
        if folder is None and Path.cwd() == MY_NOTEBOOKS:
            folder = MY_NOTEBOOKS / "drill" / str(seed)
        if folder is None:
            self._temporary = Keeper(_TEMPORARY, stdout=subprocess.PIPE)
            assert self._temporary.process.stdout is not None
            folder = Path(self._temporary.process.stdout.readline().decode().strip())
        self.file, self.settings_file = folder / FILE, folder / SETTINGS_FILE
        self.notes = Notes()
        folder.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self.put_back()
        self._ports = [(free_port(), free_port()) for _ in NAMES]
        self._server = start_server()
        try:
            register(self._server.url)
            self.reload()
            self._alerts = Alerts([metrics for _, metrics in self._ports])
        except BaseException:
            self.close()
            raise

    @property
    def service(self) -> Service:
        """The service as it runs now. Raises Mistake where it does not run."""
        if self._service is None:
            raise Mistake("The service does not run. Mend the file, then reload().")
        return self._service

    @property
    def settings(self) -> dict[str, str]:
        """What the operator has set, from the file beside the service's."""
        lines = self.settings_file.read_text("utf-8").splitlines()
        pairs = [line.partition("=") for line in lines if "=" in line and line[:1] != "#"]
        return {name.strip(): value.strip() for name, _, value in pairs}

    @property
    def edits(self) -> list[str]:
        """What differs from the files as they were given: functions, classes and settings, by name."""
        given = dict(line.split("=") for line in SETTINGS.splitlines())
        settings = {n for n, _ in given.items() ^ self.settings.items()}
        return [*changed(self.incident.service(), self.file.read_text("utf-8")), *sorted(settings)]

    def put_back(self) -> None:
        """Write both files as they were given."""
        self.file.write_text(self.incident.service(), encoding="utf-8")
        self.settings_file.write_text(SETTINGS, encoding="utf-8")

    def reload(self) -> None:
        """Stop both workers, and start them with the files as they are now. Raises Mistake where they do not start."""
        if self._service is not None:
            self._service.stop()
            self._service = None
        self._service = Service(self.file, self.settings, self._server.url, self._ports)

    def load(self, seconds: float = SECONDS, clients: int = CLIENTS) -> Run:
        """The sale: so many customers for so long, twelve screens and an export, and what was seen meanwhile.

        Raises Mistake where it is more than this machine should bear: 400 clients, two minutes.
        """
        if clients > MOST_CLIENTS or seconds > MOST_SECONDS:
            raise Mistake(f"At most {MOST_CLIENTS} clients, for at most {MOST_SECONDS:.0f} s.")
        wanted = {
            "url": self._server.url,
            "workers": [asdict(worker) for worker in self.service.workers],
            "clients": clients,
            "seconds": seconds,
        }
        began = time.monotonic()
        with _keeper("load") as keeper:
            run = Run.of(request(keeper, wanted))
        if self._alerts is not None:
            run.alerts = self._alerts.fired(run, began, time.monotonic())
        if self.notes.before is None and not self.edits:
            self.notes.before = run
        self.notes.add(f"load: ≈ {run.served} of ≈ {len(run.answers)} served")
        return run

    def judge(self, seconds: float = SECONDS, clients: int = CLIENTS) -> Judgement:
        """Reload, load, and judge how the service behaved."""
        self.reload()
        run = self.load(seconds, clients)
        self.notes.after = judgement = judge(run, self.edits, self.settings)
        told = "mended" if judgement.is_mended else judgement.misconception or "not yet"
        self.notes.add(f"judged: {'unknown, too busy' if judgement.is_unsure else told}")
        return judgement

    def clue(self) -> str:
        """The next clue; each one that was taken stands in the post-mortem."""
        clues = self.incident.clues
        if self.notes.clues == len(clues):
            return "There are no more clues."
        self.notes.clues += 1
        self.notes.add(f"clue {self.notes.clues} of {len(clues)}")
        return f"Clue {self.notes.clues} of {len(clues)}: {clues[self.notes.clues - 1]}"

    def note(self, what: str) -> None:
        """Put a line of yours into the post-mortem's timeline."""
        self.notes.add(what)

    def post_mortem(self) -> Document:
        """The post-mortem as it stands, which is also written beside the service's file."""
        text = post_mortem(self.incident, self.notes, self.edits)
        self.file.with_name("post_mortem.md").write_text(text, encoding="utf-8")
        return Document("post-mortem", text)

    def edit(self, old: str, new: str) -> None:
        """What an editor does: put `new` in the place of `old`, in the service's file or its settings.

        Raises Mistake where `old` does not stand in exactly one place.
        """
        for path in (self.file, self.settings_file):
            text = path.read_text("utf-8")
            if text.count(old) == 1:
                path.write_text(text.replace(old, new), encoding="utf-8")
                self.notes.add(f"edit: {', '.join(self.edits) or 'all is as it was given'}")
                return
        raise Mistake("What was to be replaced does not stand in exactly one place of the files.")

    def solve(self) -> str:
        """Mend the file in your place, unless you have changed it; the difference."""
        before, after = self.file.read_text("utf-8"), mended()
        if changed(before, self.incident.service()):
            return "You have changed the file yourself: yours stays."
        self.file.write_text(after, encoding="utf-8")
        self.notes.add("the solution was put in")
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), n=2, lineterm="")
        return "\n".join(list(lines)[2:])

    def dashboard(self, **runs: Run) -> Picture:
        """Loads by their names, side by side on the same axes."""
        return draw(**runs)

    def close(self) -> None:
        """End the service and its database; the learner's file stays where it is theirs."""
        if self._service is not None:
            self._service.stop()
            self._service = None
        if self._alerts is not None:
            self._alerts.close()
            self._alerts = None
        self._server.stop()
        if self._temporary is not None:
            self._temporary.stop()

    def __enter__(self) -> Drill:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@contextmanager
def _keeper(program: str) -> Iterator[Keeper]:
    """One of our programs in a process of its own, which ends with the block."""
    keeper = Keeper(PROGRAM.format(program), str(ROOT), stdout=subprocess.PIPE)
    try:
        yield keeper
    finally:
        keeper.stop()
