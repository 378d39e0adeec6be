"""Who holds or asks for a connection: a task, or a thread where no event loop runs."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterable
from typing import Any

from ormscope.internals import current_task, running_loop

TaskOrThread = asyncio.Task[Any] | threading.Thread


class Owner:
    """A task or thread, known by name, without keeping it alive.

    A strong reference would pin the task's frames, and so the session that it forgot to close:
    the instrument would cause the leak that it is there to find.
    """

    __slots__ = ("key", "name", "reference")

    def __init__(self, subject: TaskOrThread) -> None:
        self.reference = weakref.ref(subject)
        self.key = id(subject)  # another subject may have it once this one is gone
        # As `name_of` has it: this is done for each checkout.
        self.name = subject.get_name() if isinstance(subject, asyncio.Task) else subject.name

    @property
    def subject(self) -> TaskOrThread | None:
        """The task or thread itself; None once it is gone."""
        return self.reference()

    @property
    def living(self) -> TaskOrThread | None:
        """The task or thread, while it can still run, and so give a connection back; else None.

        For who asks from another thread, a second look may find that it has gone.
        """
        subject = self.subject
        if isinstance(subject, asyncio.Task):
            return None if subject.done() else subject
        return subject if subject is not None and subject.is_alive() else None


def living(owners: Iterable[Owner]) -> set[TaskOrThread]:
    """Those who can still run."""
    return {subject for owner in owners if (subject := owner.living) is not None}


def name_of(subject: TaskOrThread) -> str:
    """The name of a task or thread."""
    return subject.get_name() if isinstance(subject, asyncio.Task) else subject.name


def current() -> TaskOrThread:
    """The task that runs now in this thread, or the thread."""
    loop = running_loop()
    task = None if loop is None else current_task(loop)
    return threading.current_thread() if task is None else task
