"""Definitions of one file put in the place of those of the same name in another."""

from __future__ import annotations

import ast
from collections.abc import Iterator


def replaced(text: str, definitions: str) -> str:
    """`text` with each class, function and assignment of `definitions` in place of its namesake.

    What has no namesake comes before the first function that replaces one. The rest of `definitions`, its imports
    and its docstring, is left out: `text` has what they need. Raises SyntaxError where one of the two is no Python.
    """
    lines = text.splitlines(keepends=True)
    new = {name: "\n".join(code) for name, _, code in _definitions(definitions)}
    places = {name: (first, first + len(code) - 1) for name, first, code in _definitions(text)}
    unknown = "".join(f"{code}\n\n\n" for name, code in new.items() if name not in places)
    for name, (first, last) in sorted(places.items(), key=lambda place: place[1], reverse=True):
        if name in new:
            lines[first - 1 : last] = [new[name] + "\n"]
    if unknown:
        first = min(places[name][0] for name in new if name in places)
        lines.insert(first - 1, unknown)
    return "".join(lines)


def changed(text: str, other: str) -> list[str]:
    """The names of the classes, functions and assignments that differ, comments and layout aside; sorted."""
    one, two = (
        {name: ast.dump(ast.parse("\n".join(code))) for name, _, code in _definitions(source)}
        for source in (text, other)
    )
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def _definitions(text: str) -> Iterator[tuple[str, int, list[str]]]:
    """The name, the first line's number and the lines of each class, function and assignment at the top level."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = node.name
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            first = node.lineno
        else:
            continue
        yield name, first, lines[first - 1 : node.end_lineno]
