"""Runs the service's workers for as long as its own input is open: the keeper of a drill.

Its first line of input is {"file": ..., "workers": [{"port": ..., "environment": {...}}, ...]}, and its answer one
line: {"pids": [...], "logs": [...]}, or {"mistake": what a worker has written}. When the input ends, however that
comes, the workers end and the folder with their logs is removed. Each worker lives as long as a pipe that this
process alone holds, so that none outlives it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from workshop.drill.worker import main; main()"
_START_SECONDS = 60.0
_END_SECONDS = 5.0
_SHOWN_LINES = 12  # of the log of a worker that did not start


def main() -> None:
    """Start, answer, and wait for the end of the input."""
    request = json.loads(sys.stdin.readline())
    with tempfile.TemporaryDirectory(prefix="workshop-drill-") as folder:
        workers: list[subprocess.Popen[bytes]] = []
        logs = [Path(folder, f"worker-{n}.log") for n, _ in enumerate(request["workers"], 1)]
        try:
            for log, worker in zip(logs, request["workers"], strict=True):
                workers.append(_start(request["file"], worker, log))
            print(json.dumps(_await_ready(workers, request["workers"], logs)), flush=True)
            sys.stdin.read()
        finally:
            _end(workers)


def _start(file: str, worker: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps({**worker, "file": file}).encode() + b"\n")
    process.stdin.flush()
    return process


def _await_ready(
    workers: list[subprocess.Popen[bytes]], requests: list[dict[str, Any]], logs: list[Path]
) -> dict[str, Any]:
    deadline = time.monotonic() + _START_SECONDS
    for worker, request, log in zip(workers, requests, logs, strict=True):
        while not _answers(request["port"]):
            if worker.poll() is not None or time.monotonic() > deadline:
                lines = log.read_text("utf-8", errors="replace").splitlines()
                return {"mistake": "\n".join(lines[-_SHOWN_LINES:]) or "it wrote nothing"}
            time.sleep(0.05)
    return {"pids": [worker.pid for worker in workers], "logs": list(map(str, logs))}


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
    for worker in workers:
        try:
            worker.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    main()
