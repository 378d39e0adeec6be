"""What a kernel of the lessons does beside what IPython does: some errors are told as a learner should read them."""

from __future__ import annotations

import ast
import re
import traceback
from types import TracebackType
from typing import Any

from ormscope.lab.forks import preload


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
    import ormscope.lab.live_picture  # noqa: F401

    preload("workshop.shop")
    shell.set_custom_exc((Exception, BaseExceptionGroup), show)


def syntax_error_of(function: str) -> str:
    """The syntax error of the last cell that defines this function; empty where there is none, or no kernel.

    Such a cell was never taken in, so the kernel still has the version before it.
    """
    from IPython.core.getipython import (
        get_ipython,
    )  # not where a check's load runs: it takes long, and 20 MiB

    shell = get_ipython()
    if shell is None or shell.history_manager is None:
        return ""
    definition = re.compile(rf"^(?:async +)?def +{function}\b", re.MULTILINE)
    for cell in reversed(shell.history_manager.input_hist_raw):
        if definition.search(cell):
            try:
                ast.parse(shell.transform_cell(cell))
            except SyntaxError as error:
                return f"line {error.lineno}: {error.msg}"
            return ""
    return ""


def _is_of_cell(trace: TracebackType) -> bool:
    """Whether an error was raised by a cell itself, not by a function that it called."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_name.startswith("<")


def _holds_group(error: BaseException | None) -> bool:
    return error is not None and (
        isinstance(error, BaseExceptionGroup) or _holds_group(error.__context__)
    )
