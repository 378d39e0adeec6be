"""Makes ormscope/console.svg anew: `PYTHONPATH=. python tests/console_picture.py`, from the project's root."""

from __future__ import annotations

import asyncio
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ormscope.console_client import Connection
from ormscope.console_view import ConsoleApp

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "ormscope" / "console.svg"
SIZE = (132, 36)


@contextmanager
def service(
    kind: str, url: str, script: Path | None = None
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """One of the services of console_services.py, run as `script`, and its console's address."""
    original = Path(__file__).with_name("console_services.py")
    script = shutil.copy(original, script) if script is not None else original
    process = subprocess.Popen(
        [sys.executable, str(script), kind, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process, Path(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def lines_of(svg: str) -> list[str]:
    """The lines of text in a picture of a terminal, as people read them."""
    rows: dict[float, list[tuple[float, str]]] = defaultdict(list)
    for x, y, text in re.findall(
        r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)<', svg
    ):
        rows[float(y)].append((float(x), html.unescape(text).replace("\xa0", " ")))
    return ["".join(text for _, text in sorted(parts)) for _, parts in sorted(rows.items())]


def drawn(app: ConsoleApp) -> str:
    """What the application shows, as a picture without addresses: it names fonts, and loads none."""
    svg = app.export_screenshot(title="ormscope console")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg)
    svg = svg.replace("Fira Code, monospace", "DejaVu Sans Mono, Menlo, Consolas, monospace")
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


async def shows(app: ConsoleApp, *wanted: str) -> str:
    """Wait until all that is wanted can be read in the view; the text of it."""
    text = ""
    for _ in range(300):
        await asyncio.sleep(0.1)
        text = "\n".join(lines_of(app.export_screenshot()))
        if all(expected in text for expected in wanted):
            return text
    raise AssertionError(f"{wanted} is not in\n{text}")


class _Neutral(Connection):
    """Tells a process id that is nobody's, so that the picture shows nothing of the machine it was made on."""

    def ask(self, request: str) -> dict[str, Any]:
        """The answer, with another process in it."""
        return super().ask(request) | {"pid": 4711, "program": "shop.py"}


async def _picture(address: Path) -> str:
    app = ConsoleApp(_Neutral(address))
    async with app.run_test(size=SIZE):
        await shows(app, "deadlock", "GET /price/11", "on time")
        await asyncio.sleep(5)  # so that the ages are those of a service that stands still
        return drawn(app)


def main() -> None:
    """Draw the starved service."""
    from workshop.database import start_server

    server = start_server()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            service("starved", server.url, Path(folder, "shop.py")) as (_, address),
        ):
            svg = asyncio.run(_picture(address))
    finally:
        server.stop()
    PICTURE.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
