"""Ctrl-C and SIGTERM: what is under way is saved first, within the grace time; a second signal ends at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Protocol

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
LATE = 0.75
"""Share of the grace time after which what still works is interrupted; the rest is for tidying up."""


class Stopped(BaseException):
    """The process was asked to end. No Exception: nothing but the command itself answers it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Stoppable(Protocol):
    def stop(self) -> bool:
        """Ask for an end that saves first. False: there is nothing to save. Only sets flags: a signal handler calls
        it."""
        ...


class Grace:
    """What a signal asked for, and the end of patience: `over` says that the process ends by itself."""

    def __init__(self, seconds: float, leave: Callable[[int], object] = os._exit) -> None:
        self.seconds = seconds
        self.asked: int | None = None
        """The number of the signal; None: none came."""
        self._leave = leave
        self._backstop: threading.Timer | None = None

    def begin(self, number: int) -> None:
        """From now on the grace time runs. A thread of its own ends the process, because the main one may hang in
        compiled code, where no exception reaches it; that is as safe as being killed."""
        self.asked = number
        signal.setitimer(signal.ITIMER_REAL, LATE * self.seconds)
        self._backstop = threading.Timer(self.seconds, self._end)
        self._backstop.daemon = True
        self._backstop.start()

    def _end(self) -> None:
        print("the grace time is over; everything committed is kept, go on with selfplay resume", file=sys.stderr)
        sys.stderr.flush()
        self._leave(EXIT_CODES[self.asked or signal.SIGTERM])

    def over(self) -> None:
        if self._backstop is not None:
            self._backstop.cancel()


@contextmanager
def graceful(work: Stoppable, grace: Grace) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM ask `work` to stop. `Stopped` is raised where it has nothing to save, at a second
    signal, and when the grace time is nearly over; otherwise `work` ends by itself. Who entered calls `grace.over`
    once all is tidied up."""

    def asked(number: int, _frame: FrameType | None) -> None:
        if grace.asked is not None:
            raise Stopped(number)
        grace.begin(number)
        if not work.stop():
            raise Stopped(number)

    def late(_number: int, _frame: FrameType | None) -> None:
        raise Stopped(grace.asked or signal.SIGTERM)

    before = {number: signal.signal(number, asked) for number in EXIT_CODES}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, late)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in before.items():
            signal.signal(number, handler)
