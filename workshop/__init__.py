"""What the lessons stand on: the database, the shop, the doctor, and this extension for their kernels."""

from __future__ import annotations

import re
import traceback
from types import TracebackType
from typing import Any

unread: dict[str, str] = {}
"""Functions whose last version in this kernel has a syntax error, so was never taken in: the error, by name."""


def load_ipython_extension(shell: Any) -> None:
    """Let a kernel report some errors as they should be; `%load_ext workshop` calls this.

    IPython prints an ExceptionGroup on standard error and sends no error message, so a cell that failed with
    one looks as if it had passed: to nbval, to nbclient and to "Run All". A name that a cell uses and the kernel
    does not know is told in one line, for it mostly means that the kernel was restarted.
    """

    def show(
        self: Any,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType,
        tb_offset: int | None = None,
    ) -> None:
        if _holds_group(error) and not hasattr(error, "_render_traceback_"):
            lines = "".join(traceback.format_exception(kind, error, trace)).splitlines()
            error._render_traceback_ = lambda: lines  # type: ignore[attr-defined]
        if isinstance(error, NameError) and _is_of_cell(trace):
            line = (
                f"{error}. Run the cells above first (menu Run, Run All Above Selected Cell): a kernel that was "
                "restarted knows none of them. If you have renamed it, give it its old name."
            )
            error._render_traceback_ = lambda: [line]  # type: ignore[attr-defined]
        if hasattr(error, "_render_traceback_"):
            self._showtraceback(kind, error, error._render_traceback_())
        else:
            self.showtraceback((kind, error, trace), tb_offset=tb_offset)

    # Here rather than within the first run: an import cannot be cut short, and would delay ■ by a second.
    import ormscope.lab.picture  # noqa: F401

    shell.set_custom_exc((Exception, BaseExceptionGroup), show)
    shell.events.register("post_run_cell", _note_syntax_error)


def _note_syntax_error(result: Any) -> None:
    error = result.error_before_exec
    for name in re.findall(r"^(?:async +)?def +(\w+)", result.info.raw_cell, re.MULTILINE):
        if isinstance(error, SyntaxError):
            unread[name] = f"line {error.lineno}: {error.msg}"
        else:
            unread.pop(name, None)


def _is_of_cell(trace: TracebackType) -> bool:
    """Whether an error was raised by a cell itself, not by a function that it called."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_name.startswith("<")


def _holds_group(error: BaseException | None) -> bool:
    return error is not None and (
        isinstance(error, BaseExceptionGroup) or _holds_group(error.__context__)
    )
