"""What a function returned beside what was asked for, in words."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from workshop.checks.catalogue import Finding

_MOST_LETTERS = 60  # of one value

_short = reprlib.Repr()
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = 2
_short.maxstring = _short.maxother = _short.maxlong = _MOST_LETTERS


def is_same(returned: Any, expected: Any) -> bool:
    """Whether two values are equal, and of the same types: 7.5 is not Decimal("7.5")."""
    if not isinstance(returned, type(expected)):
        return False
    if isinstance(expected, Mapping):
        return returned.keys() == expected.keys() and all(
            is_same(returned[key], value) for key, value in expected.items()
        )
    if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        return len(returned) == len(expected) and all(map(is_same, returned, expected))
    return bool(returned == expected)


def another_answer(call: str, returned: Any, expected: Any) -> Finding:
    """That a call, such as "shelf(Session, 870000)", returned something else than was asked for."""
    return Finding("not-what-was-asked", f"{call} returned {_difference(returned, expected)}")


def _difference(returned: Any, expected: Any) -> str:
    if returned is None:
        return f"None, as a function does without a `return`. The task wants {_told(expected)}."
    if inspect.isawaitable(returned):
        return (
            f"a {type(returned).__name__}: an `await` is missing. The task wants {_told(expected)}."
        )
    if not isinstance(returned, type(expected)):
        return f"{_told(returned)}. The task wants {_told(expected)}."
    if isinstance(expected, Mapping):
        return _difference_of_mappings(returned, expected)
    if isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        for number, (found, wanted) in enumerate(zip(returned, expected, strict=False)):
            if not is_same(found, wanted):
                return f"{_told(found)} at [{number}]. The task wants {_told(wanted)}."
        return f"{len(returned)} values, {_short.repr(returned)}. The task wants {len(expected)}."
    return f"{_told(returned)}. The task wants {_told(expected)}."


def _difference_of_mappings(returned: Mapping[Any, Any], expected: Mapping[Any, Any]) -> str:
    missing = [key for key in expected if key not in returned]
    extra = [key for key in returned if key not in expected]
    if missing and extra:
        return f"the key {_told(extra[0])}. The task wants {_told(missing[0])}."
    if missing:
        return f"{len(returned)} of {len(expected)} keys: {_told(missing[0])} is missing."
    if extra:
        return f"a key that was not asked for: {_told(extra[0])}."
    key = next(key for key in expected if not is_same(returned[key], expected[key]))
    return f"{_told(returned[key])} for {_short.repr(key)}. The task wants {_told(expected[key])}."


def _told(value: Any) -> str:
    """A value with its type, cut where it is long; whatever its own repr does."""
    text = " ".join(_short.repr(value).split())
    shown = text if len(text) <= 2 * _MOST_LETTERS else f"{text[: 2 * _MOST_LETTERS]}…"
    return f"{shown} ({type(value).__name__})"
