"""report_on_signal: the reports of all scopes, written when the process gets a signal.

A handler of `signal.signal` runs in the main thread, between two steps of Python: not while a call in C keeps that
thread. `signal.set_wakeup_fd` belongs to the event loop, and to wait with `sigwait` all threads, and so all child
processes, would have to block the signal. What is left is `faulthandler`: its handler is C, runs at once in
whichever thread the signal meets, and writes a few lines to a descriptor. Here that is a pipe, and what comes out of it
wakes a thread of our own; the lines themselves nobody reads.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

from ormscope import proof
from ormscope.hooks import logger
from ormscope.places import place, running_places

# Seconds in which the handler has written its lines; further signals count as the same.
_PAUSE = 0.02
_MOST_BYTES = 65536  # a pipe's

_lock = threading.Lock()
_watched: dict[int, SignalReport] = {}  # faulthandler has room for one file for each signal
# What Python knew as the handler of each signal that faulthandler has taken.
_before: dict[int, Any] = {}


def report_on_signal(signum: int | None = None, file: TextIO | None = None) -> SignalReport:
    """Write the reports of all PoolScopes of this process to `file` whenever it gets the signal.

    `signum` is SIGUSR1 where nothing else is said, `file` what `sys.stderr` is at that time. A thread of its own does
    it, so also while the event loop is blocked; a call in C that keeps Python's lock (the GIL) is waited for. May be
    called from any thread, before or after a loop starts, and again: for one signal the last call counts. A handler
    that Python had for the signal is called as before; one that is set later takes the signal away from here, so choose
    one that your server leaves alone. After a fork the child writes its own reports.

    `close()` of what is returned puts things back as they were.

    Raises RuntimeError where the system has no such signal (Windows), Python keeps it for itself (SIGSEGV), or a
    handler that was set since an earlier call can only be asked for in the main thread; ValueError or OSError where
    `signum` is not the number of a signal that can be caught.
    """
    if signum is None:
        signum = getattr(signal, "SIGUSR1", None)
    if signum is None or not hasattr(faulthandler, "register"):
        raise RuntimeError(
            "there is no SIGUSR1 on this system; serve scope.report() from an endpoint instead"
        )
    report = SignalReport(signum, file)
    with _lock:
        report._start()
        earlier, _watched[signum] = _watched.get(signum), report
        if earlier is not None:
            earlier._end()
    _follow_forks()
    return report


class SignalReport:
    """Writes the reports of all PoolScopes whenever the process gets the signal, until `close()`."""

    def __init__(self, signum: int, file: TextIO | None) -> None:
        self.signum = signum
        self.file = file
        self._pipe: tuple[int, int] | None = None
        self._ended = False

    def close(self) -> None:
        """Write no more; the signal does again what it did before."""
        with _lock:
            if _watched.get(self.signum) is self:
                del _watched[self.signum]
                _unregister(self.signum)
                self._end()

    def __enter__(self) -> SignalReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        if sys.platform == "win32":
            raise NotImplementedError  # whose faulthandler knows no signals
        reader, writer = os.pipe()
        try:
            # A full pipe says the same once more; a handler must not wait for it.
            os.set_blocking(writer, False)
            _register(self.signum, writer)
        except BaseException:
            os.close(reader)
            os.close(writer)
            raise
        self._pipe = reader, writer
        threading.Thread(
            target=self._write_whenever, args=self._pipe, name="ormscope signal", daemon=True
        ).start()

    def _end(self) -> None:
        """The handler writes to another pipe, or none; the thread closes this one when none can be at it any more."""
        self._ended = True
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):  # full: the thread is awake
                os.write(self._pipe[1], b".")

    def _start_in_child(self) -> None:
        """After a fork: the thread is the parent's, and so would be what is written to its pipe."""
        parents, self._pipe = self._pipe, None
        self._start()
        for descriptor in parents or ():
            os.close(descriptor)

    def _write_whenever(self, reader: int, writer: int) -> None:
        if sys.platform == "win32":
            raise NotImplementedError  # whose faulthandler knows no signals
        try:
            while True:
                os.read(reader, _MOST_BYTES)
                time.sleep(_PAUSE)
                if self._ended:
                    return
                os.set_blocking(reader, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.read(reader, _MOST_BYTES)
                os.set_blocking(reader, True)
                self._write()
        finally:
            os.close(reader)
            os.close(writer)

    def _write(self) -> None:
        try:
            file = sys.stderr if self.file is None else self.file
            file.write(_reports())
            file.flush()
        except Exception:
            logger.exception("the reports for a signal could not be written")


def _register(signum: int, writer: int) -> None:
    if sys.platform == "win32":
        raise NotImplementedError  # whose faulthandler knows no signals
    handler = signal.getsignal(signum)
    if signum in _before and handler is not _before[signum]:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"a handler was set for signal {signum} since;"
                " call report_on_signal() in the main thread to share the signal with it"
            )
        _unregister(signum)
    # Who had the signal before is called as well, but not the system's default: it ends the process.
    faulthandler.register(signum, file=writer, all_threads=False, chain=callable(handler))
    _before[signum] = handler


def _unregister(signum: int) -> None:
    """faulthandler brings back the handler that it found, also where Python has set another one since."""
    if sys.platform == "win32":
        raise NotImplementedError  # whose faulthandler knows no signals
    handler = signal.getsignal(signum)
    if handler is _before[signum]:
        faulthandler.unregister(signum)
    elif threading.current_thread() is threading.main_thread():
        faulthandler.unregister(signum)
        signal.signal(signum, handler)
    else:
        return  # ours is not called any more, and only the main thread may set a handler
    del _before[signum]


def _reports() -> str:
    """The reports of all scopes, and where the main thread stands."""
    scopes = sorted(proof.scopes(), key=lambda scope: scope.name)
    now = time.strftime("%Y-%m-%d %H:%M:%S%z")
    found = running_places(threading.main_thread().ident or 0)
    stands = f"main thread at {place(found[0])}" if found else "main thread in no code of the user"
    head = f"ORMSCOPE, process {os.getpid()}, {now}; {stands}"
    none = "" if scopes else "\nNo PoolScope watches a pool in this process."
    return "\n\n".join([head + none, *(scope.report() for scope in scopes)]) + "\n\n"


@functools.cache
def _follow_forks() -> None:
    """Called once: what is registered here stays for ever."""
    if sys.platform == "win32":
        raise NotImplementedError  # whose faulthandler knows no signals
    os.register_at_fork(
        before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork
    )


def _after_fork() -> None:
    try:
        for report in _watched.values():
            report._start_in_child()
    except Exception:
        logger.exception("a forked process will write no reports on a signal")
    finally:
        _lock.release()
