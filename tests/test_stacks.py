"""Stacks are read while their owners run, in other threads: what is read must not be what Python has half put down."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ormscope

# An exception that is thrown into a step makes Python put down what the step awaited, which may run code, and let
# another thread in. On Python 3.11 to ask the step then what it awaits reads outside of its stack, and crashes.
_PROGRAM = """
from ormscope import stacks

class Awaited:
    def __init__(self):
        self.asks = lambda: print("unasked")

    def __iter__(self):
        return self

    def __next__(self):
        return None

    def __del__(self):
        self.asks()

class Pause:
    def __init__(self, awaited):
        self.awaited = awaited

    def __await__(self):
        return vars(self).pop("awaited")

async def coroutine(awaited):
    await Pause(awaited.pop())

async def asynchronous_generator(awaited):
    await Pause(awaited.pop())
    yield

def generator(awaited):
    yield from awaited.pop()

awaited = Awaited()
step = {step}([awaited])
driven = step.asend(None) if hasattr(step, "asend") else step
driven.send(None)
print(stacks.awaited_step(step) is awaited)
awaited.asks = lambda: print(stacks.awaited_step(step))
del awaited
try:
    driven.throw(KeyError("thrown"))
except KeyError as error:
    print(error)
"""


@pytest.mark.parametrize("step", ["coroutine", "asynchronous_generator", "generator"])
def test_a_step_that_runs_awaits_nobody(step: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM.replace("{step}", step)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (0, "True\nNone\n'thrown'\n"), ended


# Until Python 3.12 a frame that is asked for is made at that moment, and the collector may run within that step.
_COLLECTED = """
import gc
import sys
import threading
from ormscope import stacks

def deep(calls):
    if calls:
        return deep(calls - 1)
    ready.set()
    go.wait()

def generator():
    deep(5)
    yield

def work():
    global step
    step = generator()
    next(step)
    step = None

def end_the_thread(phase, _):
    if phase == "start" and not go.is_set():
        go.set()
        thread.join()
        global other
        other = [bytearray(500) for _ in range(1000)]

found = set()
for objects in range(1, 60):
    ready, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    gc.callbacks.append(end_the_thread)
    gc.set_threshold(objects)
    frames = {read}
    gc.set_threshold(700)
    gc.callbacks.clear()
    go.set()
    thread.join()
    found |= {{frame.f_code.co_name for frame in frames}}
print(gc.isenabled(), *sorted(found & {{"deep", "generator"}}))
"""


@pytest.mark.parametrize(
    ("read", "found"),
    [
        ("stacks.thread_frames(thread.ident)", "deep generator"),
        ("stacks.frames_of_threads().get(thread.ident, ())", "deep generator"),
        ("stacks.calling_frames()", "deep generator"),
        ("filter(None, [stacks.frame_of(step)])", "generator"),
    ],
)
def test_no_collection_ends_a_stack_that_is_being_read(read: str, found: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _COLLECTED.format(read=read)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"True {found}\n", "")


def test_frames_are_asked_for_in_one_place() -> None:
    asking = {
        path.name
        for path in Path(ormscope.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and node.attr in ("cr_frame", "gi_frame", "ag_frame", "_current_frames")
    }
    assert asking <= {"stacks.py"}


def test_variables_are_read_in_one_place() -> None:
    """Before Python 3.13 whoever reads `f_locals` writes into what the program's own `locals()` has returned."""
    reading = {
        path.name
        for path in Path(ormscope.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "f_locals"
    }
    assert reading == {"stacks.py"}
