"""The live view of `ormscope console`: a Textual application. The only module that needs the extra `console`."""

from __future__ import annotations

import asyncio
import time
from typing import Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from ormscope.console_client import Connection, ConsoleError, NoAnswerError

_INTERVAL_SECONDS = 0.25
_LATE_SECONDS = 0.1  # a loop that is behind for so long is said to be late
_BAR = 20  # characters

# Okabe and Ito's palette, which colour-blind people can tell apart, as in `ormscope.lab`'s pictures.
_CHECKED_OUT = "#0072B2"
_WAITING = "#D55E00"
_COLOURS = {
    "healthy": "#009E73",
    "saturated": "#56B4E9",
    "deadlock": "#D55E00",
    "deadlock until a timer": "#D55E00",
    "leaked": "#CC79A7",
    "loop blocked": "#E69F00",
    "unfair": "#F0E442",
    "held across a foreign await": "#F0E442",
    "connects failing": "#CC79A7",
}
_OTHER = "#BBBBBB"


class Report(ModalScreen[None]):
    """The full report on one pool, over the view."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,r,q", "dismiss", "Back")]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """The text, as long as it may be."""
        with VerticalScroll():
            yield Static(Text(self._text), id="report")
        yield Footer()


class ConsoleApp(App[None]):
    """Shows one process's pools about four times a second, until the user quits.

    Where the process does not answer, or is gone, the view says so and keeps what it showed last.
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "ormscope console"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "report", "Full report"),
        Binding("n", "switch(1)", "Next pool"),
        Binding("p", "switch(-1)", "Previous pool"),
        Binding("tab", "app.focus_next", "Other list"),
        Binding("q", "quit", "Quit"),
    ]
    CSS = """
    Screen { layout: vertical; }
    #process { height: auto; padding: 0 1; background: $panel; }
    #trouble { height: auto; padding: 0 1; background: #D55E00; color: black; text-style: bold; display: none; }
    #pools { height: auto; max-height: 30%; padding: 0 1; margin: 1 0 0 0; }
    #says { height: auto; padding: 0 1; margin: 1 0 0 0; }
    .list { border: round $panel-lighten-2; padding: 0 1; height: 1fr; }
    #holding { height: auto; max-height: 45%; }
    .list { border-title-color: $text; border-title-style: bold; }
    .list:focus { border: round $accent; }
    Report { align: center middle; }
    Report VerticalScroll { width: 95%; height: 90%; border: round $accent; padding: 0 1; background: $surface; }
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._asking = asyncio.Lock()
        self._key = ""
        self._state: dict[str, Any] | None = None
        self._seen_at = time.monotonic()

    def compose(self) -> ComposeResult:
        """The process and its loop, the pools, what the verdict on one says, who holds, and who waits."""
        yield Static(Text("Connecting …"), id="process")
        yield Static(id="trouble")
        with VerticalScroll(id="pools", can_focus=False):
            yield Static(id="pool-rows")
        yield Static(id="says")
        with VerticalScroll(id="holding", classes="list"):
            yield Static(id="holding-rows")
        with VerticalScroll(id="waiting", classes="list"):
            yield Static(id="waiting-rows")
        yield Footer()

    def on_mount(self) -> None:
        """Begin to ask."""
        self.query_one("#holding").border_title = "Who holds"
        self.query_one("#waiting").border_title = "Who waits"
        self.run_worker(self._poll(), name="poll")

    async def _poll(self) -> None:
        while True:
            await self._refresh()
            await asyncio.sleep(_INTERVAL_SECONDS)

    async def _refresh(self) -> None:
        state = await self._ask(f"state {self._key}".strip())
        if state is None:
            return
        self._state = state
        if not self._key and state["detail"] is not None:
            self._key = state["detail"]["key"]
        self._show(state)

    async def _ask(self, request: str) -> dict[str, Any] | None:
        """The answer; None where there is none, and then the view says why."""
        async with self._asking:  # two keys at once
            try:
                answer = await asyncio.to_thread(self._connection.ask, request)
            except NoAnswerError:
                self._say(
                    "The process does not answer: it is stopped, or lets no thread of its own run."
                )
                return None
            except ConsoleError as error:
                self._say(
                    f"The process has gone, or closed its console: {error}."
                    if self._state is not None
                    else f"No console there: {error}."
                )
                return None
        self._seen_at = time.monotonic()
        if (
            not self.is_running
        ):  # while that was asked, the view was closed: there is nothing left to show it
            return None
        self.query_one("#trouble").display = False
        return answer

    def _say(self, trouble: str) -> None:
        if not self.is_running:
            return
        shown = self.query_one("#trouble", Static)
        if self._state is not None:
            trouble += f" What follows was {time.monotonic() - self._seen_at:.0f} s ago."
        shown.update(Text(trouble))
        shown.display = True

    # What is shown.

    def _show(self, state: dict[str, Any]) -> None:
        self.query_one("#process", Static).update(_process(state))
        self.query_one("#pool-rows", Static).update(_pools(state, self._key))
        detail = state["detail"] or {"says": [], "holding": [], "waiting": []}
        self.query_one("#says", Static).update(Text("\n".join(detail["says"])))
        self.query_one("#holding-rows", Static).update(_holding(detail))
        self.query_one("#waiting-rows", Static).update(_waiting(detail))

    # What the keys do.

    async def action_switch(self, step: int) -> None:
        """Show another pool's holders and waiters."""
        keys = [pool["key"] for pool in self._state["pools"]] if self._state is not None else []
        if keys:
            at = keys.index(self._key) if self._key in keys else -step
            self._key = keys[(at + step) % len(keys)]
            await self._refresh()

    async def action_report(self) -> None:
        """Show the full report on the pool."""
        answer = await self._ask(f"report {self._key}")
        if answer is not None:
            await self.push_screen(Report(answer["report"]))


def _process(state: dict[str, Any]) -> Text:
    loop = state["loop"]
    text = Text.assemble(
        ("ormscope", "bold"), f"  process {state['pid']}: {state['program']}", no_wrap=True
    )
    text.append("\nevent loop ")
    if loop is None:
        return text.append("not watched: PoolScope(engine, loop=LoopScope())", "dim")
    late = loop["lag"] >= _LATE_SECONDS
    text.append(
        f" {_seconds(loop['lag'])} late " if late else "on time",
        f"bold black on {_COLOURS['loop blocked']}" if late else _COLOURS["healthy"],
    )
    return text.append(f"  (at most {_seconds(loop['longest_lag'])} late within 60 s)")


def _pools(state: dict[str, Any], key: str) -> RenderableType:
    table = _table(" ", "pool", "checked out", "waiting", "verdict")
    for pool in state["pools"]:
        out, capacity = pool["checked_out"], pool["capacity"]
        bar = Text()
        if capacity:
            filled = min(_BAR, round(_BAR * out / capacity))
            bar.append("█" * filled, _CHECKED_OUT).append("░" * (_BAR - filled), "dim")
            bar.append(" ")
        bar.append(f"{out} / {'no limit' if capacity is None else capacity}")
        if pool["connecting"]:
            bar.append(f", {pool['connecting']} being opened")
        colour = _COLOURS.get(pool["cause"], _OTHER)
        table.add_row(
            "▶" if pool["key"] == key else "",
            Text(pool["name"], "bold" if pool["key"] == key else ""),
            bar,
            Text(str(pool["waiting"]), f"bold {_WAITING}" if pool["waiting"] else ""),
            Text.assemble((f" {pool['cause']} ", f"bold black on {colour}")),
        )
    if not state["pools"]:
        return Text("No PoolScope watches a pool in this process.")
    return _with_more(table, state["more_pools"], "pools are not shown")


def _holding(detail: dict[str, Any]) -> RenderableType:
    if not detail["holding"]:
        return Text("nobody", "dim")
    table = _table("task", "for", "took it at", "last SQL", "waits for")
    for holder in detail["holding"]:
        sql = holder["sql"]
        table.add_row(
            Text(holder["owner"]),
            Text(_seconds(holder["age"])),
            Text(holder["line"]),
            Text("none yet", "dim") if sql is None else Text(sql),
            Text(holder["waits"]),
        )
    return _with_more(table, detail["more_holding"], "connections are held by others")


def _waiting(detail: dict[str, Any]) -> RenderableType:
    if not detail["waiting"]:
        return Text("nobody", "dim")
    table = _table("task", "for", "asks for one at")
    for waiter in detail["waiting"]:
        table.add_row(Text(waiter["owner"]), Text(_seconds(waiter["age"])), Text(waiter["line"]))
    for group in detail["grouped"]:
        table.add_row(
            Text(f"{group['count']} more", "bold"),
            Text(f"≤ {_seconds(group['age'])}"),
            Text(group["line"]),
        )
    return _with_more(table, detail["more_waiting"], "wait at other lines")


def _table(*columns: str) -> Table:
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim")
    # The first columns tell who, and are never cut short.
    ratios = {"took it at": 3, "last SQL": 3, "waits for": 5, "asks for one at": 1, "verdict": 1}
    for column in columns:
        table.add_column(
            column,
            ratio=ratios.get(column),
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if column in ("for", "waiting") else "left",
        )
    return table


def _with_more(table: Table, count: int, what: str) -> RenderableType:
    return table if not count else Group(table, Text(f"{count} more {what}", "dim"))


def _seconds(seconds: float) -> str:
    """A duration as people read it."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
