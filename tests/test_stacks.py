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


def test_variables_are_read_in_one_place() -> None:
    """Before Python 3.13 whoever reads `f_locals` writes into what the program's own `locals()` has returned."""
    reading = {
        path.name
        for path in Path(ormscope.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "f_locals"
    }
    assert reading == {"stacks.py"}
