"""What a learner hands in: whether it can be an answer, whether it is a try, and how the function was given."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

from workshop import exercises
from workshop.kernel import syntax_error_of


def unfit(exercise: str, function: str, answer: Any) -> str:
    """Why `answer` cannot be what was asked for; empty where it can."""
    given = exercises.given_functions(exercise)[function]
    wanted = f"{function}({ast.unparse(given.args)})"
    if error := syntax_error_of(function):
        return (
            f"the last version of {function} has a syntax error ({error}), "
            "so Python still knows the one before it. Mend it, run its cell, and check again."
        )
    if inspect.iscoroutine(answer):
        answer.close()
        return f"you called {function}; the check wants the function itself, without ()."
    within = function_of(answer)
    if within is None:
        return f"{function} is no function but {type(answer).__name__}; wanted is {wanted}."
    if isinstance(given, ast.AsyncFunctionDef) and not inspect.iscoroutinefunction(within):
        return f"{function} is no coroutine function; begin it with `async def`, and do not `yield` in it."
    if isinstance(given, ast.FunctionDef) and inspect.iscoroutinefunction(within):
        return f"{function} is asked for as an ordinary function; begin it with `def`."
    try:
        inspect.signature(answer).bind(*given.args.args)
    except TypeError:
        found = f"{function}{inspect.signature(answer)}"
        return f"{found} takes other arguments than were asked for; wanted is {wanted}."
    return ""


def function_of(answer: Any) -> FunctionType | None:
    """The function that is handed in, or that a decorator such as functools.cache has put into something else."""
    while isinstance(answer, functools.partial):
        answer = answer.func
    if not isinstance(answer, FunctionType):
        answer = getattr(answer, "__wrapped__", None)
    return answer if isinstance(answer, FunctionType) else None


def replace_names(answer: Any, old: object, new: object) -> None:
    """Give the notebook's names for `old` to `new`, for the code of an answer: `from time import monotonic` is one."""
    function = function_of(answer)
    names = {} if function is None else function.__globals__
    names |= {name: new for name, value in names.items() if value is old}


def is_attempted(exercise: str, answer: Any) -> bool:
    """Whether the function, or a function of the notebook that it calls, differs from what was given."""
    if not isinstance(answer, FunctionType):
        return True
    given = exercises.given_functions(exercise)
    for reached in _reachable(answer):
        try:
            (node,) = ast.parse(textwrap.dedent(inspect.getsource(reached.__code__))).body
        except (OSError, SyntaxError, ValueError):
            return True  # nobody knows how it is written, so it is judged
        known = given.get(reached.__name__)
        if known is None or ast.dump(node) != ast.dump(known):
            return True
    return False


def as_given(exercise: str, function: str, answer: Any) -> Any:
    """The function as it was given, among the learner's other names."""
    within = function_of(answer)
    namespace = {} if within is None else dict(within.__globals__)
    for name, node in exercises.given_functions(exercise).items():
        filename, source = f"<ipython-input-given-{name}>", ast.unparse(node)
        linecache.cache[filename] = (
            len(source),
            None,
            source.splitlines(keepends=True),
            filename,
        )
        # As a cell is: without the annotations that this module puts off.
        exec(compile(source, filename, "exec", dont_inherit=True), namespace)
    return namespace[function]


def _reachable(function: FunctionType) -> Iterator[FunctionType]:
    """A function, and those beside it that it names, directly or through others."""
    unseen, seen = [function], {function}
    while unseen:
        reached = unseen.pop()
        yield reached
        for name in reached.__code__.co_names:
            called = function_of(reached.__globals__.get(name))
            if (
                called is not None
                and called.__globals__ is function.__globals__
                and called not in seen
            ):
                seen.add(called)
                unseen.append(called)
