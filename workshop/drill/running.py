"""The service, running: two workers in processes of their own, on ports of 127.0.0.1."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workshop.drill.supervisor import ROOT
from workshop.keeper import Keeper
from workshop.mistake import Mistake

NAMES = ("worker 1", "worker 2")
WORKERS = len(NAMES)
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from workshop.drill.{} import main; main()"
)


@dataclass(frozen=True)
class Worker:
    """One worker: its process, the port where it serves, and the one where a thread of it serves its metrics."""

    name: str
    pid: int
    port: int
    metrics: int
    log: str


class Service:
    """The workers of a service's file, until `stop()` or the end of this process.

    `settings` are the operator's, such as {"POOL_SIZE": "5"}; `ports` has for each worker the one where it serves, and
    the one of its metrics. Raises Mistake, with the end of its log, where a worker
    does not start.
    """

    def __init__(
        self, file: Path, settings: dict[str, str], url: str, ports: Sequence[tuple[int, int]]
    ) -> None:
        requests = [
            {
                "port": port,
                "environment": {
                    **settings,
                    "DATABASE_URL": url,
                    "WAREHOUSE_URL": url.replace("+asyncpg", ""),
                    "METRICS_PORT": str(metrics),
                    "WORKER": name,
                },
            }
            for name, (port, metrics) in zip(NAMES, ports, strict=True)
        ]
        self._keeper = Keeper(PROGRAM.format("supervisor"), str(ROOT), stdout=subprocess.PIPE)
        try:
            answer = request(self._keeper, {"file": str(file), "workers": requests})
            if "mistake" in answer:
                raise Mistake(f"The service does not start:\n{answer['mistake']}")
        except BaseException:
            self._keeper.stop()
            raise
        self.workers = [
            Worker(name, pid, port, metrics, log)
            for name, pid, (port, metrics), log in zip(
                NAMES, answer["pids"], ports, answer["logs"], strict=True
            )
        ]

    def stop(self) -> None:
        """End the workers, and wait until they and their logs are gone."""
        self._keeper.stop()

    def log(self) -> list[str]:
        """What the workers have written so far."""
        return [
            line
            for worker in self.workers
            for line in Path(worker.log).read_text("utf-8", errors="replace").splitlines()
        ]


def request(keeper: Keeper, line: dict[str, Any]) -> dict[str, Any]:
    """Send a keeper one line, and wait for the line that it answers. Raises RuntimeError where it fails."""
    stdin, stdout = keeper.process.stdin, keeper.process.stdout
    assert stdin is not None and stdout is not None
    stdin.write(json.dumps(line).encode("ascii") + b"\n")
    stdin.flush()
    answered = stdout.readline()
    if not answered:
        raise RuntimeError("the process that was asked ended without an answer")
    answer: dict[str, Any] = json.loads(answered)
    if "failure" in answer:
        raise RuntimeError(answer["failure"])
    return answer
