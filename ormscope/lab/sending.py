"""What `observe` sends to the process of a run, and what it says where something cannot be sent."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import linecache
import os
import pickle
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import CodeType, FunctionType
from typing import Any, ClassVar

import cloudpickle
from sqlalchemy import Executable
from sqlalchemy.ext import serializer
from sqlalchemy.orm import DeclarativeBase

from ormscope.orm_internals import show_as
from ormscope.places import is_cell

# Imported before a run where the caller has imported them; the asynchronous ones always are.
_SYNCHRONOUS_DRIVERS = ("psycopg", "psycopg2", "pymysql", "MySQLdb")


class UnsendableError(ValueError):
    """A workload that cannot be sent to a process of its own; the message says why.

    `culprit` is what of it cannot, such as "the global ENGINE (AsyncEngine)", where that is known.
    """

    def __init__(self, message: str, culprit: str = "") -> None:
        super().__init__(message)
        self.culprit = culprit
        # A mistake of the caller: none of the frames that lead here would tell more.
        show_as(self, [message])


def name_of(workload: Any) -> str:
    """The name of a workload, also of one whose first arguments are bound."""
    while isinstance(workload, partial):
        workload = workload.func
    return getattr(workload, "__name__", type(workload).__name__)


def payload(
    workload: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> bytes:
    """A workload with its arguments and its surroundings, pickled; raises UnsendableError where that cannot be."""
    _refuse_what_is_no_workload(workload)
    cells = {
        name: entry[2]
        for name, entry in linecache.cache.items()
        if is_cell(name) and len(entry) == 4
    }
    try:
        code = _pickled((workload, arguments, options))
    except Exception as error:
        culprit = next(_unsendable_parts(workload, arguments, options), "")
        reason = f", for {culprit} cannot" if culprit else ""
        raise UnsendableError(
            f"{name_of(workload)} cannot be sent to its own process{reason} ({error}): "
            "create the engine, the sessions and all that is open inside it, and hand it plain values.",
            culprit,
        ) from None
    drivers = [name for name in _SYNCHRONOUS_DRIVERS if name in sys.modules]
    setting = {
        "path": sys.path,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "cells": cells,
        "drivers": drivers,
    }
    return pickle.dumps((setting, code))


def _executor_anew(executor: ThreadPoolExecutor) -> tuple[Any, ...]:
    return ThreadPoolExecutor, (executor._max_workers, executor._thread_name_prefix)


def _cache_anew(cached: Any) -> str | tuple[Any, ...]:
    if cached.__module__ != "__main__" and "<locals>" not in cached.__qualname__:
        return str(cached.__reduce__())  # by its name
    return _cached, (cached.__wrapped__, cached.cache_parameters())


def _cached(function: Callable[..., Any], parameters: dict[str, Any]) -> Any:
    return functools.lru_cache(**parameters)(function)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Pickles besides what another process can make anew.

    That is the ORM's statements, which know their mappers (SQLAlchemy has a serializer for those), thread pools, and
    what functools has cached a function with.
    """

    dispatch_table: ClassVar[Any] = ChainMap(
        {
            ThreadPoolExecutor: _executor_anew,
            type(functools.cache(len)): _cache_anew,
        },
        cloudpickle.Pickler.dispatch_table,
    )

    def reducer_override(self, obj: Any) -> Any:
        entity = _entity_of(obj) if isinstance(obj, Executable) else None
        if entity is None:
            return super().reducer_override(obj)
        return _statement, (serializer.dumps(obj), entity)  # type: ignore[no-untyped-call]


def _pickled(value: Any) -> bytes:
    with io.BytesIO() as file:
        _Pickler(file).dump(value)
        return file.getvalue()


def _entity_of(statement: Executable) -> type[DeclarativeBase] | None:
    """The first mapped class of a statement; None where it has none that can be imported in another process."""
    described = getattr(statement, "column_descriptions", None) or [
        getattr(statement, "entity_description", {})
    ]
    entities = (column.get("entity") for column in described)
    entity = next((entity for entity in entities if isinstance(entity, type)), None)
    return None if entity is None or entity.__module__ == "__main__" else entity


def _statement(serialized: bytes, entity: type[DeclarativeBase]) -> Any:
    return serializer.loads(serialized, entity.metadata)  # type: ignore[no-untyped-call]


def _refuse_what_is_no_workload(workload: Any) -> None:
    name = name_of(workload)
    if inspect.iscoroutine(workload):
        workload.close()  # else Python would warn that nobody awaited it
    if inspect.iscoroutine(workload) or inspect.isasyncgen(workload):
        raise UnsendableError(
            f"pass the function, not its result: observe({name}), not observe({name}()); "
            f"arguments follow it, as in observe({name}, 3)."
        )
    if not callable(workload):
        raise UnsendableError(
            f"observe wants a function to run, not {type(workload).__name__}; pass it without ()."
        )
    if inspect.isasyncgenfunction(workload) or inspect.isgeneratorfunction(workload):
        raise UnsendableError(
            f"{name} has a `yield`, so calling it runs nothing; observe wants a function that runs to its end: "
            "one that loops over it, say."
        )


def _unsendable_parts(
    workload: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[str]:
    """What keeps a workload from being sent, with its class: arguments, globals, variables of enclosing functions."""
    parts = {f"argument {number}": value for number, value in enumerate(arguments, 1)}
    parts |= {f"argument {name}": value for name, value in options.items()}
    unseen, seen = [*parts.items(), ("the workload", workload)], set()
    while unseen:
        label, value = unseen.pop()
        if id(value) in seen or _is_sendable(value):
            continue
        seen.add(id(value))
        if isinstance(value, partial):
            unseen += [(f"an argument of {name_of(value)}", it) for it in value.args]
            unseen.append((label, value.func))
        elif isinstance(value, FunctionType):
            unseen += _used_by(value)
        else:
            yield f"{label} ({type(value).__name__})"


def _is_sendable(value: Any) -> bool:
    try:
        _pickled(value)
    except Exception:  # whatever its class raises: it is the reason that is looked for
        return False
    return True


def _used_by(function: FunctionType) -> list[tuple[str, Any]]:
    """The globals that a function names, and the variables of enclosing functions that it uses."""
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    known = function.__globals__
    used = [(f"the global {name}", known[name]) for name in sorted(names) if name in known]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # nothing is in it yet
            used.append((f"the variable {name}", cell.cell_contents))
    return used


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
