"""The drill outside of a notebook: `python3 lab.py service [SEED]`.

The service runs until you say quit, press Ctrl-C, or close the terminal. Your file is below my_notebooks/drill.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable

from workshop.drill import Drill
from workshop.drill.drill import CLIENTS, SECONDS
from workshop.drill.judge import figures
from workshop.exercises import MY_NOTEBOOKS, ROOT
from workshop.mistake import Mistake

COMMANDS = """load         send the customers, and say what they got
report       what the workers wrote on a signal in the last load
log          the last lines of the workers' log
judge        reload your file, send the customers, and judge
reload       reload your file
clue         the next clue; it will stand in the post-mortem
note ...     write a line into the post-mortem
post-mortem  the post-mortem as it stands
quit"""
_LINES = 20  # of the log


class Desk:
    """Where commands are typed."""

    def __init__(self, drill: Drill, clients: int, seconds: float) -> None:
        self._drill, self._clients, self._seconds = drill, clients, seconds
        self._report = "There is no report yet: load first."

    def greet(self) -> None:
        """What is known, and where everything is."""
        print(self._drill.incident.scenario)
        print(
            f"Your file: {self._drill.file.relative_to(ROOT)}, and {self._drill.settings_file.name}"
        )
        for worker in self._drill.service.workers:
            print(
                f"{worker.name}: http://127.0.0.1:{worker.port}, its metrics: http://127.0.0.1:{worker.metrics}/metrics,"
                f" live: python -m ormscope console {worker.pid}"
            )
        print(f"Sign in with: Authorization: Bearer token-7\n\n{COMMANDS}")

    def obey(self, line: str) -> str:
        """Carry out one command, and say what came of it."""
        command, _, rest = line.strip().partition(" ")
        if command == "load":
            run = self._drill.load(self._seconds, self._clients)
            self._report = str(run.report) if run.reports else self._report
            return f"{figures(run)}\nalerts: {', '.join(run.alerts) or 'none'}"
        if command == "judge":
            return str(self._drill.judge(self._seconds, self._clients))
        if command == "note":
            self._drill.note(rest)
            return "noted"
        if command == "reload":
            self._drill.reload()
            return "reloaded"
        answers: dict[str, Callable[[], object]] = {
            "report": lambda: self._report,
            "log": lambda: "\n".join(self._drill.service.log()[-_LINES:]),
            "clue": self._drill.clue,
            "post-mortem": lambda: str(self._drill.post_mortem()),
        }
        return str(answers.get(command, lambda: COMMANDS)())


def measure(seed: str, clients: int, seconds: float) -> bool:
    """The incident, the solution, the same load; whether the first fails and the second does not."""
    with Drill(seed) as drill:
        before = drill.load(seconds, clients)
        print(f"before: {figures(before)}", flush=True)
        print(drill.solve())
        after = drill.judge(seconds, clients)
        print(f"after: {figures(after.run)}\n{after}")
        return before.failed > 0 and after.is_mended


def main() -> int:
    """Carry out one command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="lab.py service", description=__doc__)
    parser.add_argument("seed", nargs="?", default="1", help="which incident; 1 unless given")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each load")
    parser.add_argument(
        "--measure", action="store_true", help="load it, mend it in your place, load it again"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        if arguments.measure:
            return 0 if measure(arguments.seed, arguments.clients, arguments.seconds) else 1
        with Drill(arguments.seed, MY_NOTEBOOKS / "drill" / arguments.seed) as drill:
            desk = Desk(drill, arguments.clients, arguments.seconds)
            desk.greet()
            while (line := input("> ")) != "quit":
                try:
                    print(desk.obey(line))
                except Mistake as mistake:  # of the file that is being mended
                    print(mistake)
    except Mistake as mistake:
        print(mistake, file=sys.stderr)
        return 1
    except EOFError:
        return 0
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
