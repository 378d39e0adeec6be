"""ormscope/README.md: its code runs from top to bottom on the real server, and prints what it says.

Its service, shop.py, is run by test_uvicorn.py."""

from __future__ import annotations

import ast
import asyncio
import inspect
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from helpers import PATIENCE, run, until
from sqlalchemy import create_engine

import ormscope
import ormscope.metrics
import ormscope.otel
from ormscope import PoolScope
from workshop.database import Server
from workshop.keeper import free_port
from workshop.service import serving

ROOT = Path(__file__).parents[1]
README = (ROOT / "ormscope" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|text)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
# Times, and which two of the forty were first.
CHANGING = r"\d+\.\d\d s|order \d+"


class Page:
    """The page's code, run in one namespace, and what each block has printed."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "shop"}
        self.printed: list[str] = []

    async def runs(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        for number, (kind, source) in enumerate(BLOCKS):
            if kind == "text":
                self.printed.append("")
                continue
            path = folder / str(number) / "shop.py"
            path.parent.mkdir()
            path.write_text(source)
            code = compile(source, path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            outcome = eval(code, self.names)
            if inspect.iscoroutine(outcome):
                await outcome
            written = capture.readouterr()
            self.printed.append(written.out + written.err)


def test_the_code_on_the_page(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DATABASE_URL", server.url)
    page = Page()

    async def main() -> None:
        async with asyncio.timeout(2 * PATIENCE):
            await page.runs(tmp_path, capsys)
            await the_workers_have_a_port_each(page.names)
            await asyncio.to_thread(the_thread_answers, page.names)
        page.names["scope"].close()
        page.names["loop_scope"].close()
        page.names["instruments"].close()

    asyncio.run(main())
    what_it_prints_is_on_the_page(page.printed)
    assert any("ORMSCOPE, process " in text and "POOL orders: " in text for text in page.printed)


async def the_workers_have_a_port_each(names: dict[str, Any]) -> None:
    first, servers = free_port(), []
    try:
        ports = []
        for _ in range(2):
            port, running = names["serve_metrics"](first, workers=20)
            ports.append(port)
            servers.append(running)
        assert len(set(ports)) == 2
        for port in ports:
            found = await asyncio.to_thread(read, port)
            assert 'sqlalchemy_pool_waiting{pool="orders"} 0.0' in found
        with pytest.raises(RuntimeError, match="are taken"):
            names["serve_metrics"](ports[0], workers=1)
    finally:
        for running in servers:
            await asyncio.to_thread(running.shutdown)
            running.server_close()


def the_thread_answers(names: dict[str, Any]) -> None:
    reports = names["reports"]
    assert read(reports.server_port).startswith("POOL orders: ")
    reports.shutdown()
    reports.server_close()


def read(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        found: bytes = answer.read()
    return found.decode()


def test_a_route_for_the_report_must_not_need_a_thread(server: Server) -> None:
    """Synchronous routes that wait for a connection keep all threads that FastAPI has for `def`."""
    engine = create_engine(
        server.url.replace("+asyncpg", "+psycopg"), pool_size=1, max_overflow=0, pool_timeout=60
    )
    scope, app, go_on = PoolScope(engine, "shop"), FastAPI(), threading.Event()

    @app.get("/orders")
    def place_order() -> None:
        with engine.connect():
            go_on.wait(PATIENCE)

    @app.get("/report", response_class=PlainTextResponse)
    async def report() -> str:
        return scope.report()

    @app.get("/report-by-a-thread", response_class=PlainTextResponse)
    def report_by_a_thread() -> str:
        return scope.report()

    async def main() -> None:
        async with serving(app) as client:
            orders = [asyncio.create_task(client.get("/orders")) for _ in range(40)]
            try:
                await until(lambda: len(scope.waiters) == 39)
                answer = await client.get("/report")
                assert answer.text.startswith("POOL shop: 1 of 1 checked out, 39 waiting")
                with pytest.raises(httpx.ReadTimeout):
                    await client.get("/report-by-a-thread", timeout=1)
            finally:
                go_on.set()
            await asyncio.gather(*orders)
            assert (await client.get("/report-by-a-thread")).status_code == 200

    run(main())
    engine.dispose()


def what_it_prints_is_on_the_page(printed: list[str]) -> None:
    compared = 0
    for number, (kind, shown) in enumerate(BLOCKS):
        if kind == "text":
            assert re.sub(CHANGING, "…", printed[number - 1]) == re.sub(CHANGING, "…", shown)
            compared += 1
    assert compared == 2


def public() -> Iterator[str]:
    yield from ormscope.__all__
    yield from ("PoolCollector", "PoolInstruments", "ormscope.lab", "ask_server")
    yield from ormscope.otel.INSTRUMENTS


@pytest.mark.parametrize("name", list(public()))
def test_what_is_public_is_on_the_page(name: str) -> None:
    if name in ("Verdict", "SignalReport"):
        return  # what verdict() and report_on_signal() give
    assert name in README


def test_each_metric_of_prometheus_is_on_the_page() -> None:
    text = README[README.index("## PoolCollector") : README.index("### Several workers")]
    for name in ormscope.metrics._GAUGES:
        assert f"_{name}`" in text, name
    for name in ormscope.metrics._COUNTERS:
        assert f"_{name}_total`" in text, name


def test_links_within_the_page() -> None:
    titles = re.findall(r"^##+ (.+)$", README, re.MULTILINE)
    anchors = {title.lower().replace(" ", "-") for title in titles}
    links = re.findall(r"\]\(#(.+?)\)", README)
    assert len(links) >= 8
    assert set(links) <= anchors


def test_the_page_names_no_place_of_a_machine() -> None:
    assert not re.search(r"/(home|root|tmp|Users)/", README)


MULTIPROCESS = """
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from sqlalchemy.ext.asyncio import create_async_engine
from ormscope import PoolScope
from ormscope.metrics import PoolCollector

REGISTRY.register(PoolCollector(PoolScope(create_async_engine("sqlite+aiosqlite://"))))
Counter("orders", "Orders.").inc()
assert b"sqlalchemy_pool_waiting" in generate_latest(REGISTRY)
registry = CollectorRegistry()
MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_the_multiprocess_mode_takes_no_custom_collector(tmp_path: Path) -> None:
    """Where this fails, prometheus-client has learned it, and the page has less to say."""
    done = subprocess.run(
        [sys.executable, "-c", MULTIPROCESS],
        cwd=ROOT,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert "orders_total 1.0" in done.stdout
    assert "sqlalchemy_pool" not in done.stdout
