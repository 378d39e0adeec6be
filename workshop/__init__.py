"""What the lessons stand on: the database, the shop, the doctor, and this extension for their kernels."""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import Any


def load_ipython_extension(shell: Any) -> None:
    """Let a kernel report an ExceptionGroup as the error that it is; `%load_ext workshop` calls this.

    IPython prints an ExceptionGroup on standard error and sends no error message, so a cell that failed with
    one looks as if it had passed: to nbval, to nbclient and to "Run All".
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
        if hasattr(error, "_render_traceback_"):
            self._showtraceback(kind, error, error._render_traceback_())
        else:
            self.showtraceback((kind, error, trace), tb_offset=tb_offset)

    # Here rather than within the first run: an import cannot be cut short, and would delay ■ by a second.
    import ormscope.picture  # noqa: F401

    shell.set_custom_exc((Exception, BaseExceptionGroup), show)


def _holds_group(error: BaseException | None) -> bool:
    return error is not None and (
        isinstance(error, BaseExceptionGroup) or _holds_group(error.__context__)
    )
