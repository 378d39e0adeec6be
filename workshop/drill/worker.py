"""One worker of the service, in a process of its own.

Its first line of input is {"file": ..., "port": ..., "environment": {...}}; when its input ends, it ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn

_GRACE_SECONDS = 1  # for answers that are still open at the end


def load(path: Path) -> Any:
    """The service's file as a module. Raises what the file raises."""
    specification = importlib.util.spec_from_file_location("service", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["service"] = module
    specification.loader.exec_module(module)
    return module


def main() -> None:
    """Serve until the supervisor goes."""
    request = json.loads(sys.stdin.readline())
    os.environ.update(request["environment"])
    application = load(Path(request["file"])).app
    server = uvicorn.Server(
        uvicorn.Config(
            application,
            host="127.0.0.1",
            port=request["port"],
            log_level="warning",
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )
    )

    def end_with_the_input() -> None:
        sys.stdin.read()
        server.should_exit = True
        # A loop that is blocked, or a lifespan that does not end, keeps nobody here.
        threading.Timer(2.0 * _GRACE_SECONDS, os._exit, (0,)).start()

    threading.Thread(target=end_with_the_input, daemon=True).start()
    server.run()
    os._exit(0)  # the timer, and threads that an answer has left, are not waited for


if __name__ == "__main__":
    main()
