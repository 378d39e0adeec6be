"""Lesson 01 and exercise 01 as a learner meets them: in a real JupyterLab, in Chromium.

The environment variable SCREENSHOTS names a folder for pictures of it, to be looked at by a person.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from leftovers import assert_nothing_is_left, await_that
from playwright.sync_api import Browser, Locator, Page, expect

ROOT = Path(__file__).parents[1]
LESSON = "01_pool_starvation.ipynb"
EXERCISE = "01b_exercise.ipynb"
TOKEN = "browser-test"
PROJECTOR = {"width": 1280, "height": 720}
HALF_A_WINDOW = {"width": 900, "height": 900}
# What the text alternative of each picture of the lesson says.
PICTURES = [
    "200 orders, 20 connections. pool: up to 20 of 20 checked out, 20 at the end",
    "Wait-for graph: 20 tasks each hold one connection of pool and wait for one more",
    "the same, pool_timeout=3. pool: up to 20 of 20",
    "the same, pool_timeout=None. pool: up to 20 of 20",
    "19 orders at once. .*requests: 19 of 19 completed",
    "20 orders at once. .*requests: 0 of 20 completed",
    "19 threads. .*requests: 19 of 19 completed",
    "20 threads. .*requests: 0 of 20 completed",
]
PATIENCE = 60_000  # milliseconds for what has to come, on a busy machine
WHOLE_LESSON = 240_000  # milliseconds
# Milliseconds from a click on ■ to the end of the cell: some hundreds when idle; else it would run on for a minute.
STOPPED_WITHIN = 10_000
# Every cell is drawn, also those that are scrolled out of sight.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},
    "docmanager-extension/plugin": {"autosave": False},
}
# Notes each new picture in the output of a cell, and when its prompt stops being [*].
WATCH_CELL = """
cell => {
    const seen = {pictures: [], ended: null};
    const prompt = cell.querySelector('.jp-InputPrompt');
    let running = false;
    const look = () => {
        for (const image of cell.querySelectorAll('.jp-OutputArea-output img'))
            if (seen.pictures.at(-1) !== image.src && running) seen.pictures.push(image.src);
        const busy = prompt.textContent.includes('*');
        if (running && !busy && seen.ended === null) seen.ended = performance.now();
        running = running || busy;
    };
    new MutationObserver(look).observe(cell, {
        subtree: true, childList: true, attributes: true, characterData: true
    });
    window.seen = seen;
}
"""
# The words of an element's text that do not stand on one line; a line of code may have one that is longer than that.
WORDS_THAT_BREAK = """
element => {
    const found = [];
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    while (walker.nextNode())
        for (const word of walker.currentNode.data.matchAll(/(?<!\\S)\\S{1,40}(?!\\S)/g)) {
            const range = document.createRange();
            range.setStart(walker.currentNode, word.index);
            range.setEnd(walker.currentNode, word.index + word[0].length);
            if (range.getClientRects().length > 1) found.push(word[0]);
        }
    return found;
}
"""
NOTE_CLICK = """
button => button.addEventListener(
    'click', () => { window.clicked = performance.now(); }, {capture: true}
)
"""


class JupyterLab:
    """JupyterLab as lab.py opens it, in a checkout of its own, on the learner's copy of one notebook."""

    def __init__(self, sandbox: Path, notebook: str) -> None:
        self.temporary = sandbox / "tmp"
        self.checkout = sandbox / "checkout"
        for folder in ("workshop", "ormscope", "data", "notebooks", "exercises", "solutions"):
            shutil.copytree(ROOT / folder, self.checkout / folder)
        self.lesson = self.checkout / "my_notebooks" / notebook
        for name, setting in SETTINGS.items():
            path = sandbox / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(setting), "utf-8")
        runtime = sandbox / "runtime"
        self.log = sandbox / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "workshop.jupyter", "--no-browser"),
                    *("--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={TOKEN}"),
                ],
                cwd=self.checkout,
                env={name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
                | {
                    "PYTHONPATH": str(self.checkout),
                    "TMPDIR": str(self.temporary),
                    "JUPYTER_CONFIG_DIR": str(sandbox / "configuration"),
                    "JUPYTER_RUNTIME_DIR": str(runtime),
                    "JUPYTERLAB_SETTINGS_DIR": str(sandbox / "settings"),
                    "JUPYTERLAB_WORKSPACES_DIR": str(sandbox / "workspaces"),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._information = runtime / f"jpserver-{self.process.pid}.json"
        assert await_that(self.is_listening, PATIENCE / 1000), self.log.read_text("utf-8")

    def is_listening(self) -> bool:
        """Whether it answers. It says where before it does, and not in one stroke."""
        assert self.process.poll() is None, self.log.read_text("utf-8")
        try:
            self.port = json.loads(self._information.read_text("utf-8"))["port"]
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()
        except (OSError, json.JSONDecodeError):
            return False
        return True

    @property
    def url(self) -> str:
        """The address of the lesson."""
        path = self.lesson.relative_to(self.checkout).as_posix()
        return f"http://127.0.0.1:{self.port}/lab/tree/{path}?token={TOKEN}"

    def stop(self) -> None:
        """End it as a closed terminal or `kill` does; it ends its kernels."""
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture
def jupyterlab(sandbox: Path, request: pytest.FixtureRequest) -> Iterator[JupyterLab]:
    running = JupyterLab(sandbox, getattr(request, "param", LESSON))
    yield running
    running.stop()
    assert_nothing_is_left(running.temporary)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=PROJECTOR)
    context.set_default_timeout(PATIENCE)
    yield context.new_page()
    context.close()


def open_lesson(page: Page, jupyterlab: JupyterLab) -> None:
    """Open the lesson and wait until its kernel is ready."""
    page.goto(jupyterlab.url)
    # The notebook's own indicator is idle before there is a kernel, and "Run All" would then ask for one.
    expect(page.get_by_text("Python 3 (ipykernel) | Idle")).to_be_visible(timeout=PATIENCE)
    cells = nbformat.read(jupyterlab.lesson, as_version=4).cells
    expect(page.locator(".jp-Notebook-cell")).to_have_count(len(cells), timeout=PATIENCE)


def choose(page: Page, *path: str) -> None:
    """Choose a command from the menu bar, by the labels on the way to it."""
    menu, *others = path
    page.get_by_role("menuitem", name=menu, exact=True).click()
    for label in others:
        pattern = re.compile(rf"^{re.escape(label)}($|[^\w].*$)")
        page.locator(".lm-Menu-item:visible", has=page.get_by_text(pattern)).first.click()


def cell_with(page: Page, jupyterlab: JupyterLab, text: str) -> Locator:
    """The first code cell whose source contains the text."""
    cells = nbformat.read(jupyterlab.lesson, as_version=4).cells
    number = next(
        number
        for number, cell in enumerate(cells)
        if cell.cell_type == "code" and text in cell.source
    )
    return page.locator(".jp-Notebook-cell").nth(number)


def seen(page: Page) -> dict[str, Any]:
    """What WATCH_CELL has noted."""
    noted: dict[str, Any] = page.evaluate("window.seen")
    return noted


def screenshots(tmp_path: Path) -> Path:
    """The folder for pictures of the screen."""
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take_screenshots(page: Page, theme: str, folder: Path) -> None:
    """Each output that has a picture in it, as it stands on the screen."""
    outputs = page.locator(".jp-OutputArea-output img")
    for number in range(outputs.count()):
        outputs.nth(number).scroll_into_view_if_needed()
        page.screenshot(path=folder / f"lesson_01_{theme}_{number + 1:02}.png")


def test_lesson_runs_from_first_to_last_cell(
    page: Page, jupyterlab: JupyterLab, tmp_path: Path
) -> None:
    """Run All: the picture moves while its cell runs, all cells end well, the verdict is there."""
    stored = nbformat.read(jupyterlab.lesson, as_version=4)
    open_lesson(page, jupyterlab)
    expect(page.locator(".jp-OutputArea-output")).to_have_count(0)

    starved = cell_with(page, jupyterlab, "starved = observe(")
    starved.evaluate(WATCH_CELL)
    choose(page, "Run", "Run All Cells")
    page.wait_for_function("window.seen.ended !== null", timeout=WHOLE_LESSON)
    assert len(set(seen(page)["pictures"])) >= 3

    prompts = page.locator(".jp-CodeCell .jp-InputPrompt")
    count = len([cell for cell in stored.cells if cell.cell_type == "code"])
    expected = [f"[{number}]:" for number in range(1, count + 1)]
    expect(prompts).to_have_text(expected, timeout=WHOLE_LESSON)
    errors = page.locator(
        '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"],'
        '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
    )
    expect(errors).to_have_count(0)
    verdict = cell_with(page, jupyterlab, "print(starved.verdict())")
    expect(verdict.locator(".jp-OutputArea-output")).to_contain_text("DEADLOCK in pool")

    pictures = page.locator(".jp-OutputArea-output img")
    expect(pictures).to_have_count(len(PICTURES))
    for picture, about in zip(pictures.all(), PICTURES, strict=True):
        expect(picture).to_have_attribute("alt", re.compile(about, re.DOTALL))

    folder = screenshots(tmp_path)
    for theme in ("Light", "Dark"):
        choose(page, "Settings", "Theme", f"JupyterLab {theme}")
        expect(page.locator("body")).to_have_attribute(
            "data-jp-theme-light", str(theme == "Light").lower()
        )
        take_screenshots(page, theme.lower(), folder)

    page.set_viewport_size(HALF_A_WINDOW)
    output = verdict.locator(".jp-OutputArea-output pre")
    output.scroll_into_view_if_needed()
    page.screenshot(path=folder / "lesson_01_verdict_in_half_a_window.png")
    assert output.evaluate("pre => pre.scrollWidth <= pre.clientWidth"), "it is cut off"
    assert output.evaluate(WORDS_THAT_BREAK) == []


def test_nothing_is_told_before_it_is_run(
    page: Page, jupyterlab: JupyterLab, tmp_path: Path
) -> None:
    """No output; line numbers, for messages name lines; links from copy to copy, each in a tab of its own name."""
    open_lesson(page, jupyterlab)
    expect(page.locator(".jp-OutputArea-output")).to_have_count(0)
    prediction = cell_with(page, jupyterlab, "my_prediction = None")
    expect(prediction.locator(".cm-lineNumbers")).to_be_visible()
    prediction.scroll_into_view_if_needed()
    page.screenshot(path=screenshots(tmp_path) / "lesson_01_prediction.png")

    link = page.get_by_role("link", name="Exercise 01")
    link.click()
    tabs = page.locator("#jp-main-dock-panel .lm-TabBar-tabLabel")
    expect(tabs).to_have_text([LESSON, EXERCISE])
    expect(page.locator(".jp-OutputArea-output:visible")).to_have_count(0)
    page.screenshot(path=screenshots(tmp_path) / "exercise_01_opened.png")


def test_stop_button_ends_a_starved_cell(
    page: Page, jupyterlab: JupyterLab, record_property: Callable[[str, object], None]
) -> None:
    """■ ends it and keeps what was seen; the next cell works."""
    source = jupyterlab.lesson.read_text("utf-8")
    starved = "starved = observe(rush_hour, fuse=3,"
    assert source.count(starved) == 1
    # So that it is certainly the button that ends the run.
    jupyterlab.lesson.write_text(source.replace(starved, starved.replace("3", "60")), "utf-8")
    open_lesson(page, jupyterlab)

    cell = cell_with(page, jupyterlab, "starved = observe(")
    cell.locator(".jp-InputArea-editor").click()
    choose(page, "Run", "Run All Above Selected Cell")
    above = cell_with(page, jupyterlab, "my_prediction = None").locator(".jp-InputPrompt")
    expect(above).to_have_text(re.compile(r"^\[\d+\]:$"), timeout=PATIENCE)

    cell.evaluate(WATCH_CELL)
    button = page.locator('.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]')
    button.evaluate(NOTE_CLICK)
    cell.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Shift+Enter")
    # The deadlock is proved, and drawn, within the first pictures.
    page.wait_for_function("window.seen.pictures.length >= 6")
    button.click()
    page.wait_for_function("window.seen.ended !== null")
    took = page.evaluate("window.seen.ended - window.clicked")
    record_property("milliseconds from the click to the end of the cell", took)
    assert took < STOPPED_WITHIN
    interrupted = "You interrupted this run; what it saw until then is in the recording."
    expect(cell.locator(".jp-OutputArea-output").last).to_contain_text(interrupted)

    following = cell_with(page, jupyterlab, "print(starved.summary())")
    following.locator(".jp-InputArea-editor").click()
    page.keyboard.press("Shift+Enter")
    output = following.locator(".jp-OutputArea-output")
    expect(output).to_contain_text("20 of 20 checked out, 20 at the end", timeout=PATIENCE)
    expect(output).to_contain_text("requests: 0 of 200 completed")
    expect(output).to_contain_text(interrupted)


NESTED = """async def place_order(Session, number, sku):
    price = await price_of(Session, sku)
    async with Session() as session:
        order = Order(household_id=number)
        session.add(order)
        await session.flush()
        await price_of(Session, sku)
        session.add(OrderLine(order=order, sku=sku, unit_price=price))
        await session.commit()
"""
RIGHT = NESTED.replace("        await price_of(Session, sku)\n", "")


@pytest.mark.parametrize("jupyterlab", [EXERCISE], indirect=True, ids=["exercise"])
def test_exercise_from_the_first_run_to_the_proof(
    page: Page, jupyterlab: JupyterLab, tmp_path: Path
) -> None:
    """Unsolved, then a wrong answer and its misconception, then a right one and its proof; nothing else is needed."""
    open_lesson(page, jupyterlab)
    choose(page, "Run", "Run All Cells")
    check = cell_with(page, jupyterlab, "check.reuse_the_session(")
    output = check.locator(".jp-OutputArea-output")
    expect(output).to_contain_text(
        "NOT ATTEMPTED: place_order is still as it was given", timeout=PATIENCE
    )
    expected = page.locator(".jp-MarkdownOutput img").first
    expect(expected).to_have_attribute("alt", re.compile(r"^as given\. .* yours\. "))
    assert expected.evaluate("image => image.naturalWidth") > 800

    folder = screenshots(tmp_path)
    function = cell_with(page, jupyterlab, "async def place_order(")
    for name, answer, first, then in (
        (
            "wrong",
            NESTED,
            "WRONG: This holds only if a second connection is harmless",
            "price_of, line 3",
        ),
        ("right", RIGHT, "RIGHT: 60 of 60 orders placed with 10 connections", "0 timeouts"),
    ):
        helper = "async def price_of(Session, sku):\n    async with Session() as session:\n        "
        helper += "return await session.scalar(select(Product.unit_price).where(Product.sku == sku))\n\n\n"
        function.locator(".cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(helper + answer)
        page.keyboard.press("Shift+Enter")
        page.keyboard.press("Shift+Enter")  # the check is the next cell
        expect(output.first).to_contain_text(first, timeout=PATIENCE)
        expect(output.first).to_contain_text(then)
        check.scroll_into_view_if_needed()
        page.screenshot(path=folder / f"exercise_01_{name}.png")
    picture = output.locator("img")
    expect(picture).to_have_count(1, timeout=PATIENCE)
    picture.scroll_into_view_if_needed()
    page.screenshot(path=folder / "exercise_01_proof.png")
