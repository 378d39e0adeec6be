"""observe: run a workload in a fresh process with all instruments attached, draw it live, return the recording."""

from __future__ import annotations

import contextlib
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, BinaryIO

import cloudpickle

from ormscope.lab.forks import CAN_FORK, Process, forked, spawned
from ormscope.lab.memory import MemorySample, MemoryScope
from ormscope.lab.recording import Recording
from ormscope.lab.run import Curve, ObjectsSample, PoolCurve
from ormscope.lab.sending import UnsendableError as UnsendableError
from ormscope.lab.sending import name_of, payload
from ormscope.lab.storm import Request
from ormscope.ledger import Sample
from ormscope.orm_internals import show_as

_FAREWELL_SECONDS = 5.0  # a look for leaks may take a while on a busy machine
_INTERRUPTED_FAREWELL_SECONDS = 0.3
_START_SECONDS = 60.0

# By the class of an exception that no load can cause. An EOFError, of `input()`, says itself what to do.
_ADVICE = {
    "NameError": "If a cell defines it, run that cell first, and then this one again; else mend the name.",
    "EOFError": "",
}

_Message = tuple[str, Any]


class WorkloadError(Exception):
    """An exception of the workload that could not be carried over: its class and message as text."""


class InstrumentError(Exception):
    """The instruments of a run have failed, so its recording is not whole; the message is their traceback."""


class WorkloadTraceback(Exception):
    """A traceback from the observed process, as text; the cause of the exception that `observe` raises."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def observe(
    workload: Callable[..., Any],
    *arguments: Any,
    fuse: float = 30.0,
    memory_limit: float | None = None,
    title: str | None = None,
    curves: Sequence[Curve] = ("connections", "requests"),
    live: bool = True,
    on_print: Callable[[str], object] | None = None,
    **options: Any,
) -> Recording:
    """Run `workload(*arguments, **options)` in a fresh process under observation and return what was seen.

    `workload` is an ordinary `async def` (or `def`); it creates its own engine, since a connection cannot travel
    between processes. `fuse` is in seconds: a run that lasts longer is ended, and the recording says so.
    `memory_limit` is in MiB: a run that takes more than that, beyond what its process had when it began, is
    killed, as a container is. An interrupt (the stop button, Ctrl-C) ends the run too. In all these cases what
    was seen so far is returned.

    In a notebook the picture is drawn while the run goes on, and `curves` chooses what it shows, from above.
    With `live=False` nothing is drawn or said, and what the run prints is only recorded, unless `on_print` is
    there: it is called with each line as it comes.

    Raises what the workload raises, with the workload's traceback; UnsendableError when it cannot be sent;
    InstrumentError where the instruments have failed, for their recording would not be the truth.
    """
    if on_print is None:
        on_print = partial(print, end="") if live else lambda line: None
    sent = payload(workload, arguments, options)
    recording = Recording(
        title=title or name_of(workload),
        fuse=fuse,
        memory_limit=memory_limit,
        curves=tuple(curves),
    )
    with (
        _interrupts_noted() as interrupts,
        _picture(recording, live) as draw,
        _started(sent) as process,
    ):
        messages = _messages(process)
        memory = MemoryScope(process.pid)
        try:
            failure = _follow(process, messages, memory, recording, on_print, draw, interrupts)
        finally:
            memory.close()
    if live:
        for line in filter(None, (recording.ending, *_mistakes(recording))):
            print(line)
    if failure is not None:
        raise failure
    return recording


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """The interrupts so far. None is raised: it could fall into an import or a drawing and leave that half done."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _started(sent: bytes) -> Iterator[Process]:
    process = forked() if CAN_FORK else spawned()
    try:
        process.stdin.write(sent)
        process.stdin.flush()
        yield process
    finally:
        process.kill()
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def _messages(process: Process) -> queue.SimpleQueue[_Message]:
    """What the process reports and prints, in one queue; each of the two streams ends with its own message.

    Who reads a stream closes it: what the run has started may outlive it, with the other end in its hands, and until
    then to close it would mean to wait.
    """
    messages: queue.SimpleQueue[_Message] = queue.SimpleQueue()

    def read_reports(stream: BinaryIO) -> None:
        # The end, or a message cut short by the end of the process.
        with stream, contextlib.suppress(EOFError, pickle.UnpicklingError):
            while True:
                messages.put(pickle.load(stream))
        messages.put(("reports ended", None))

    def read_prints(stream: BinaryIO) -> None:
        with stream:
            for line in stream:
                messages.put(("printed", line.decode(errors="replace")))
        messages.put(("prints ended", None))

    for read, stream in ((read_reports, process.stdout), (read_prints, process.stderr)):
        threading.Thread(
            target=read, args=(stream,), name=f"observe {read.__name__}", daemon=True
        ).start()
    return messages


def _follow(
    process: Process,
    messages: queue.SimpleQueue[_Message],
    memory: MemoryScope,
    recording: Recording,
    on_print: Callable[[str], object],
    draw: Callable[[], None],
    interrupts: list[int],
) -> BaseException | None:
    """Take in messages until the run ends; return the exception that the workload raised, if any."""
    open_streams = {"reports ended", "prints ended"}
    failure: BaseException | None = None
    deadline = time.monotonic() + _START_SECONDS
    started, stopping = None, False  # the start is on the clock that both processes share
    while open_streams:
        try:
            kind, content = messages.get(timeout=0.02)
        except queue.Empty:
            kind, content = "nothing", None
        if interrupts and not stopping:
            recording.ended, stopping = "interrupted", True
            if started is None:
                break  # it has nothing to say yet
            deadline = _ask_to_stop(process) + _INTERRUPTED_FAREWELL_SECONDS
        if started is not None:
            _take_in_memory(recording, memory, started)
            if (
                recording.memory_limit is not None
                and recording.extra_memory > recording.memory_limit
            ):
                recording.ended = "memory limit"
                recording.seconds = recording.memory[-1].time
                break  # the process gets no chance to say goodbye, as in a container
        if not stopping:
            draw()
        if kind in open_streams:
            open_streams.remove(kind)
        elif kind == "started":
            started, first = content
            recording.memory.append(MemorySample(0.0, first))
            deadline = time.monotonic() + recording.fuse
        elif kind == "seen":
            _take_in(recording, content)
        elif kind == "failed":
            failure = InstrumentError(content)
        elif kind == "printed":
            recording.printed += content
            on_print(content)
        elif kind in ("returned", "raised", "stopped"):
            recording.seconds, end = content
            if kind == "returned":
                recording.ended, recording.result = "returned", cloudpickle.loads(end)
            elif kind == "raised":
                recording.ended = "raised"
                failure = failure or _carried_over(*end)
            deadline = time.monotonic() + _FAREWELL_SECONDS
            stopping = True
        if time.monotonic() > deadline:
            if stopping:
                break
            recording.ended, stopping = "fuse", True
            deadline = _ask_to_stop(process) + _FAREWELL_SECONDS
    if recording.ended == "running":
        recording.ended = "died"
    return failure


def _ask_to_stop(process: Process) -> float:
    """Ask the run for its last words; return the time, on the monotonic clock."""
    with contextlib.suppress(OSError):
        process.stdin.write(b"stop\n")
        process.stdin.flush()
    return time.monotonic()


def _take_in(recording: Recording, seen: dict[str, Any]) -> None:
    for number, pool in enumerate(seen["pools"]):
        if number == len(recording.pools):
            recording.pools.append(PoolCurve(pool["name"], pool["capacity"]))
        curve = recording.pools[number]
        curve.samples += map(Sample._make, pool["samples"])
        curve.deadlocks += pool["deadlocks"]
        if pool["trouble"] is not None:
            curve.troubles.append(pool["trouble"])
        curve.last = pool["last"] or curve.last
        curve.timeouts = pool["timeouts"]
        curve.served_after_wait = pool["served_after_wait"]
        curve.longest_wait = pool["longest_wait"]
        curve.mean_hold = pool["mean_hold"]
        curve.most_held_by_one = pool["most_held_by_one"]
    recording.requests += map(Request._make, seen["requests"])
    recording.announced = seen["announced"]
    recording.loop_lag += seen["loop_lag"]
    at, alive = seen["objects"]
    if not recording.objects or recording.objects[-1].alive != alive:
        recording.objects.append(ObjectsSample(at, alive))
    for time_seen, _ in seen["loop_lag"]:
        recording.seconds = time_seen


def _take_in_memory(recording: Recording, memory: MemoryScope, started: float) -> None:
    """Move what was sampled since the start, and since the last time, to the recording."""
    taken = memory.samples[:]
    del memory.samples[: len(taken)]
    for sample in taken:
        if sample.time > started:
            recording.memory.append(MemorySample(sample.time - started, sample.mebibytes))


def _mistakes(recording: Recording) -> Iterator[str]:
    """What is to be said of requests that failed by a slip, and not by the load; their class alone would not tell."""
    for outcome, advice in _ADVICE.items():
        errors = [request.error for request in recording.requests if request.outcome == outcome]
        if errors:
            last = errors[0].splitlines()[-1]
            yield f"{len(errors)} of {recording.announced} requests failed: {last}. {advice}".rstrip()


def _carried_over(
    pickled: bytes | None, name: str, message: str, lines: list[str]
) -> BaseException:
    error: BaseException = (
        WorkloadError(f"{name}: {message}") if pickled is None else pickle.loads(pickled)
    )
    if isinstance(error, UnsendableError):
        lines = [message]
    if any(line.lstrip(" |").startswith("NameError: ") for line in lines):
        lines = [*lines, _ADVICE["NameError"]]
    error.__cause__ = WorkloadTraceback("\n".join(lines))
    # IPython shows what this returns instead of the frames of this module.
    show_as(error, lines)
    return error


@contextlib.contextmanager
def _picture(recording: Recording, live: bool) -> Iterator[Callable[[], None]]:
    """A function that brings the picture up to date, at most as often as leaves the run undisturbed."""
    if not (live and _in_notebook()):
        yield lambda: None
        return
    from ormscope.lab.live_picture import LivePicture

    picture = LivePicture(recording)
    yield picture.draw_if_due
    picture.draw_final()


def _in_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython.core.getipython import get_ipython

    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")
